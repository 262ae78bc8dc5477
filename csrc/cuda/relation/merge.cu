// relation on a GPU, last step of the forward: merges the sums of all tiles into each row's statistics and loss. The
// backward also uses it, to merge the parts of q.
#include "cuda/relation/rows.cuh"

namespace fastkd::cuda::relation {
namespace {

// Merge the sums of 32 rows; with `plain`, one plane over all samples, into row_sums. blockDim is (32, 8): one thread
// block per 32 rows, for row blocks from `first` on; each warp sums an eighth of the slots.
template <Method method, bool plain>
FASTKD_DEVICE void merge_rows(const MergeArgs& args) {
    constexpr int planes = plain ? 1 : planes_of(method);
    constexpr bool maxima = !plain && method == Method::kl_maxima;
    using State = softmax_kl::KLState<float>;
    FASTKD_SHARED float partial[groups][planes][rows_of_group];
    const LaunchRange& range = args.range;
    const std::int64_t parts = args.tile_size / rows_of_group, later = range.blocks - range.first;
    const std::int64_t part = block_x() % parts, block = range.first + block_x() / parts % later;
    const std::int64_t problem_in_launch = block_x() / parts / later, problem = range.first_problem + problem_in_launch;
    const int within = static_cast<int>(part) * rows_of_group + thread_x();
    const std::int64_t row = block % range.row_blocks * args.tile_size + within;
    const bool mine = row < range.rows && thread_y() == 0;
    const std::int64_t index = (problem * range.samples + block / range.row_blocks) * range.rows + row;
    const std::int64_t end = block < range.last ? range.blocks : range.last;
    float loss = 0.0f;
    for (std::int64_t other = 0; other < range.samples; ++other) {
        std::int64_t from = other * range.row_blocks, to = from + range.row_blocks;
        from = from > range.first ? from : range.first;
        to = to < end ? to : end;
        if (plain) { // sums over all samples
            from = range.first;
            to = end;
        }
        float total[planes] = {};
        State state = State::empty();
        for (std::int64_t slot = from + thread_y(); slot < to; slot += groups) {
            const float* at =
                args.sums + (problem_in_launch * range.slots() + range.slot(block, slot)) * (planes * args.tile_size) +
                within;
            if constexpr (maxima) {
                state.merge(
                    {at[0], at[args.tile_size], at[2 * args.tile_size], at[3 * args.tile_size], at[4 * args.tile_size]},
                    args.inv_temperature);
            } else {
#pragma unroll
                for (int plane = 0; plane < planes; ++plane) {
                    total[plane] += at[plane * args.tile_size];
                }
            }
        }
        const auto put = [&](int plane, float value) { partial[thread_y()][plane][thread_x()] = value; };
        if constexpr (maxima) {
            put(0, state.max_s), put(1, state.max_t), put(2, state.z_s), put(3, state.z_t), put(4, state.a);
        } else {
#pragma unroll
            for (int plane = 0; plane < planes; ++plane) {
                put(plane, total[plane]);
            }
        }
        block_barrier();
        if (mine) {
            const auto of_statistics = [&](int plane) -> double& {
                return args.statistics[(plane * range.samples + other) * range.all_rows + index];
            };
            if constexpr (plain) {
                float sum = range.first > 0 ? args.row_sums[index] : 0.0f;
                for (int group = 0; group < groups; ++group) {
                    sum += partial[group][0][thread_x()];
                }
                args.row_sums[index] = sum;
            } else {
                if constexpr (maxima) {
                    State sum = State::empty();
                    if (range.first > 0) {
                        sum = {static_cast<float>(of_statistics(0)), static_cast<float>(of_statistics(1)),
                               static_cast<float>(of_statistics(2)), static_cast<float>(of_statistics(3)),
                               static_cast<float>(of_statistics(4))};
                    }
                    for (int group = 0; group < groups; ++group) {
                        sum.merge({partial[group][0][thread_x()], partial[group][1][thread_x()],
                                   partial[group][2][thread_x()], partial[group][3][thread_x()],
                                   partial[group][4][thread_x()]},
                                  args.inv_temperature);
                    }
                    total[0] = sum.max_s, total[1] = sum.max_t, total[2] = sum.z_s, total[3] = sum.z_t;
                    total[4] = sum.a;
                    loss += sum.loss();
                } else {
#pragma unroll
                    for (int plane = 0; plane < planes; ++plane) {
                        total[plane] = range.first > 0 ? static_cast<float>(of_statistics(plane)) : 0.0f;
                        for (int group = 0; group < groups; ++group) {
                            total[plane] += partial[group][plane][thread_x()];
                        }
                    }
                    if constexpr (method == Method::kl) {
                        loss += total[2] / total[1] * args.inv_temperature + std::log(total[0] / total[1]);
                    } else if constexpr (method == Method::mse) {
                        loss += total[0] / static_cast<float>(range.rows);
                    } else {
                        loss += RowCosine(total).loss;
                    }
                }
#pragma unroll
                for (int plane = 0; plane < relation::statistic_planes; ++plane) {
                    of_statistics(plane) = plane < planes ? total[plane < planes ? plane : 0] : 0.0;
                }
            }
        }
        if (plain) {
            return;
        }
        block_barrier(); // before `partial` is overwritten
    }
    if (mine) {
        if (args.unit_scales) {
            double* scales = args.statistics + relation::statistic_planes * range.samples * range.all_rows + index;
            scales[0] = scales[range.all_rows] = 1.0;
        }
        if (block < range.last) {
            args.loss[index] = loss / static_cast<float>(range.samples);
        }
    }
}

FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS(rows_of_group* groups) merge_kernel(MergeArgs args) {
    if (args.statistics == nullptr) {
        merge_rows<Method::mse, true>(args);
        return;
    }
    switch (args.method) {
    case Method::kl:
        return merge_rows<Method::kl, false>(args);
    case Method::kl_maxima:
        return merge_rows<Method::kl_maxima, false>(args);
    case Method::mse:
        return merge_rows<Method::mse, false>(args);
    case Method::row_cosine:
        return merge_rows<Method::row_cosine, false>(args);
    }
}

} // namespace

cudaError_t launch_merge(const MergeArgs& args, cudaStream_t stream) {
    const std::int64_t rows = args.range.problems * (args.range.blocks - args.range.first) * args.tile_size;
    return launch(merge_kernel, {rows / rows_of_group, rows_of_group, groups}, stream, args);
}

} // namespace fastkd::cuda::relation
