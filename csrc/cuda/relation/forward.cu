// relation on a GPU, forward. Formulas: common/relation.h. Matrices are stored only on request, for the backward.
//
// Three kernels: the rows' scales; tiles of the student's and teacher's matrices, one pair of row blocks I <= J per
// thread block, reduced immediately to a few sums for its rows and, E being symmetric, its columns; and the merge of
// those sums in a fixed order (merge.cu). No atomics: every run gives the same bits.
#include "cuda/kernels.h"
#include "cuda/relation/launch.cuh"

namespace fastkd::cuda::relation {
namespace {

struct ScalesArgs {
    Side sides[2];
    std::int64_t rows, all_rows;
    double* scales; // (2, all_rows)
};

// Compute the scales of cosine rows. blockDim is (32, 8): one block per 32 rows of one side. A warp reads a row, or for
// MN-major rows each thread reads a row and each warp an eighth of the columns.
template <class S>
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS(rows_of_group* groups) scales_kernel(ScalesArgs args) {
    FASTKD_SHARED float partial[groups][rows_of_group];
    const std::int64_t blocks = ceil_div(args.all_rows, rows_of_group);
    const int which = static_cast<int>(block_x() / blocks);
    const Side& side = args.sides[which];
    const std::int64_t first = block_x() % blocks * rows_of_group;
    const auto row_at = [&](std::int64_t row) { return rows_at<S>(side, row / args.rows, row % args.rows); };
    const auto write = [&](std::int64_t row, float square) {
        args.scales[which * args.all_rows + row] = square <= 1e-24f ? no_direction : 1.0f / std::sqrt(square);
    };
    if (side.rows.mn_major) {
        const std::int64_t row = first + thread_x();
        float square = 0.0f;
        if (row < args.all_rows) {
            const S* x = row_at(row);
            for (std::int64_t k = thread_y(); k < side.width; k += groups) {
                const float value = widen(x[k * side.rows.k_stride]);
                square += value * value;
            }
        }
        partial[thread_y()][thread_x()] = square;
        block_barrier();
        if (thread_y() == 0 && row < args.all_rows) {
            square = 0.0f;
            for (int group = 0; group < groups; ++group) {
                square += partial[group][thread_x()];
            }
            write(row, square);
        }
        return;
    }
    for (std::int64_t row = first + thread_y(); row < first + rows_of_group && row < args.all_rows; row += groups) {
        const S* x = row_at(row);
        // Elements up to the first multiple of 16 bytes, packs of 16 bytes, remaining elements.
        constexpr std::int64_t size = Pack<S>::size;
        const auto beyond = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(x) % 16 / sizeof(S));
        std::int64_t head = side.rows.k_stride == 1 ? (size - beyond) % size : side.width;
        head = head < side.width ? head : side.width;
        const std::int64_t packs = (side.width - head) / size;
        float square = 0.0f;
        const auto elements = [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t k = begin + thread_x(); k < end; k += warp_size) {
                const float value = widen(x[k * side.rows.k_stride]);
                square += value * value;
            }
        };
        elements(0, head);
        for (std::int64_t p = thread_x(); p < packs; p += warp_size) {
            const Pack<S> pack = load_pack(x + head + p * size);
#pragma unroll
            for (int e = 0; e < size; ++e) {
                const float value = widen(pack.at[e]);
                square += value * value;
            }
        }
        elements(head + packs * size, side.width);
        square = sum_over(square, 1, warp_size);
        if (thread_x() == 0) {
            write(row, square);
        }
    }
}

struct TilesArgs {
    Side student, teacher;
    LaunchRange range;
    Method method;
    bool cosine, negate;
    float inv_temperature;
    const double* scales; // (2, all_rows)
    float* sums;
    float* stored; // or null: do not store the matrices
};

template <class B>
constexpr int staged_pitch = B::block_n + 1; // adjacent elements of a row, and of a column, are in different banks

template <class B>
FASTKD_HD constexpr int tiles_shared_bytes(Method method) {
    constexpr int size = sizeof(float), staged = 2 * B::block_m * staged_pitch<B> * size;
    const bool more = method == Method::kl_maxima && staged > B::pipeline_bytes;
    return (more ? staged : B::pipeline_bytes) + 4 * B::block_m * size;
}

// Sum kl with maxima: one KLState per row and column, each computed by one thread from smem.
template <class B, class Store>
FASTKD_DEVICE void sum_tile_with_maxima(float* shared, const typename B::AccumulatorFragments& e_s,
                                        const typename B::AccumulatorFragments& e_t, float sign, float inv_temperature,
                                        const Store& store) {
    constexpr int pitch = staged_pitch<B>, batch = 8;
    B::AccumulatorFragments::visit([&](int i, int j, int e) {
        float* const at = shared + B::row_of(i, e) * pitch + B::col_of(j, e);
        at[0] = sign * e_s.c[i][j][e];
        at[B::block_m * pitch] = sign * e_t.c[i][j][e];
    });
    block_barrier();
    for (int at = thread_x(); at < B::block_m + B::block_n; at += B::threads) {
        const bool for_rows = at < B::block_m;
        const int index = for_rows ? at : at - B::block_m, step = for_rows ? 1 : pitch;
        const float* const line = shared + (for_rows ? index * pitch : index);
        auto state = softmax_kl::KLState<float>::empty();
#pragma unroll 1
        for (int first = 0; first < (for_rows ? B::block_n : B::block_m); first += batch) {
            float x_s[batch], x_t[batch];
#pragma unroll
            for (int k = 0; k < batch; ++k) {
                x_s[k] = line[(first + k) * step];
                x_t[k] = line[(first + k) * step + B::block_m * pitch];
            }
            state.add_logits(x_s, x_t, inv_temperature);
        }
        store(0, index, for_rows, state.max_s);
        store(1, index, for_rows, state.max_t);
        store(2, index, for_rows, state.z_s);
        store(3, index, for_rows, state.z_t);
        store(4, index, for_rows, state.a);
    }
}

// Sum one tile over its rows and, off the diagonal, over its columns.
template <class B>
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS_OF(B::threads, B::min_blocks_per_sm) tiles_kernel(TilesArgs args) {
    FASTKD_DYNAMIC_SHARED(shared);
    constexpr int tile_size = B::block_m;
    const LaunchRange& range = args.range;
    const Tile tile = Tile::of<tile_size>(range, block_x());
    // [student, teacher][rows i, rows j][tile_size]
    float* const scales = reinterpret_cast<float*>(shared + tiles_shared_bytes<B>(args.method)) - 4 * tile_size;
    if (args.cosine) {
        for (int at = thread_x(); at < 4 * tile_size; at += B::threads) {
            const int within = at % tile_size, of_j = at / tile_size % 2;
            const std::int64_t row =
                (of_j ? tile.sample_j : tile.sample_i) * range.rows + (of_j ? tile.row_j : tile.row_i) + within;
            const bool inside = within < (of_j ? tile.rows_j : tile.rows_i);
            scales[at] = inside ? static_cast<float>(args.scales[at / (2 * tile_size) * range.all_rows + row]) : 0.0f;
        }
    }
    typename B::AccumulatorFragments e_s, e_t;
    multiply_rows<B>(args.student, args.teacher, tile, shared, e_s, e_t);

    // Elements outside get weight 0 in a softmax and add 0 to sums of squares.
    const bool softmax = args.method == Method::kl || args.method == Method::kl_maxima;
    const float outside = !softmax ? 0.0f : softmax_kl::minus_infinity<float>() * (args.negate ? -1.0f : 1.0f);
    scale_products<B>(e_s, tile, args.cosine, scales, scales + tile_size, args.student.factor, outside);
    scale_products<B>(e_t, tile, args.cosine, scales + 2 * tile_size, scales + 3 * tile_size, args.teacher.factor,
                      outside);
    if (args.stored != nullptr) {
        visit_stored<B>(args.stored, range, tile, 0, [&](float* at, int i, int j) {
            store_pack(at, Pack<float>{{e_s.c[i][j][0], e_s.c[i][j][1], e_s.c[i][j][2], e_s.c[i][j][3]}});
        });
        visit_stored<B>(args.stored, range, tile, 1, [&](float* at, int i, int j) {
            store_pack(at, Pack<float>{{e_t.c[i][j][0], e_t.c[i][j][1], e_t.c[i][j][2], e_t.c[i][j][3]}});
        });
    }

    const auto store = [&](int plane, int index, bool for_rows, float sum) {
        if (for_rows || !tile.diagonal()) {
            const std::int64_t slot = for_rows ? range.slot(tile.i, tile.j) : range.slot(tile.j, tile.i);
            args.sums[((tile.problem_in_launch * range.slots() + slot) * planes_of(args.method) + plane) * tile_size +
                      index] = sum;
        }
    };
    float* const reductions = reinterpret_cast<float*>(shared);
    const float sign = args.negate ? -1.0f : 1.0f;
    switch (args.method) {
    case Method::kl: {
        const float kappa = args.inv_temperature * 1.4426950408889634f;
        sum_tile<B, 3>(
            reductions,
            [&](int i, int j, int e, float (&term)[3]) {
                const float v_s = sign * e_s.c[i][j][e], v_t = sign * e_t.c[i][j][e];
                const float f_t = std::exp2((v_t - 1.0f) * kappa);
                term[0] = std::exp2((v_s - 1.0f) * kappa);
                term[1] = f_t;
                term[2] = f_t == 0.0f ? 0.0f : f_t * (v_t - v_s);
            },
            store);
        break;
    }
    case Method::kl_maxima:
        if constexpr (tile_size == 64) { // the plan's only tile size for this method
            sum_tile_with_maxima<B>(reductions, e_s, e_t, sign, args.inv_temperature, store);
        }
        break;
    case Method::mse:
        sum_tile<B, 1>(
            reductions,
            [&](int i, int j, int e, float (&term)[1]) {
                const float d = e_s.c[i][j][e] - e_t.c[i][j][e];
                term[0] = d * d;
            },
            store);
        break;
    case Method::row_cosine: // in two passes, to fit the registers
        sum_tile<B, 3>(
            reductions,
            [&](int i, int j, int e, float (&term)[3]) {
                const float s = e_s.c[i][j][e], t = e_t.c[i][j][e], d = s - t;
                term[0] = s * s;
                term[1] = t * t;
                term[2] = d * d;
            },
            store);
        sum_tile<B, 2>(
            reductions + reduction_floats<B, 3>,
            [&](int i, int j, int e, float (&term)[2]) {
                const float s = e_s.c[i][j][e], t = e_t.c[i][j][e], d = s - t;
                term[0] = d * (s + t);
                term[1] = s * t;
            },
            [&](int plane, int index, bool for_rows, float sum) { store(3 + plane, index, for_rows, sum); });
        break;
    }
}

template <class S>
cudaError_t launch_scales(const relation::Forward& args, const ScalesArgs& scales, cudaStream_t stream) {
    const std::int64_t blocks = ceil_div(args.options.batch * args.options.rows, rows_of_group);
    return launch(scales_kernel<S>, {2 * blocks, rows_of_group, groups}, stream, scales);
}

} // namespace

} // namespace fastkd::cuda::relation

namespace fastkd::cuda {

cudaError_t relation_forward(const relation::Forward& args, const RelationPlan& plan, cudaStream_t stream) {
    using namespace relation;
    const relation::Options& options = args.options;
    cudaError_t error = check_call(options, args.student, args.teacher, plan);
    if (error != cudaSuccess) {
        return error;
    }
    const Side student = side_of(args.student, options), teacher = side_of(args.teacher, options);
    const std::int64_t all_rows = options.batch * options.rows;
    double* const scales = args.statistics + relation::statistic_planes * options.others() * all_rows;
    const bool cosine = options.similarity == relation::Similarity::cosine;
    const bool negate = options.negate && options.distance == relation::Distance::kl;
    const auto inv_temperature = static_cast<float>(1 / options.temperature);
    float* const sums = reinterpret_cast<float*>(static_cast<char*>(args.workspace) + plan.sums);
    return with_tile(options.dtype, plan.tile, [&](auto element, auto tile_size) {
        using S = decltype(element);
        using B = TileBlocking<S, decltype(tile_size)::value>;
        if (cosine) {
            error = launch_scales<S>(args, {{student, teacher}, options.rows, all_rows, scales}, stream);
            if (error != cudaSuccess) {
                return error;
            }
        }
        return for_each_launch(options, plan, [&](const LaunchRange& range) {
            const TilesArgs tiles{student, teacher,         range,  plan.method, cosine,
                                  negate,  inv_temperature, scales, sums,        static_cast<float*>(args.stored)};
            const Grid grid{range.problems * range.tiles, B::threads, 1, tiles_shared_bytes<B>(plan.method)};
            const cudaError_t launched = launch(tiles_kernel<B>, grid, stream, tiles);
            if (launched != cudaSuccess) {
                return launched;
            }
            return launch_merge({range, plan.method, decltype(tile_size)::value, inv_temperature, !cosine, sums,
                                 args.statistics, static_cast<float*>(args.loss), nullptr},
                                stream);
        });
    });
}

} // namespace fastkd::cuda
