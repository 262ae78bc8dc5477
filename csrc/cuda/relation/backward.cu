// relation on a GPU, backward: H, the derivative of the losses with respect to the similarities, tile by tile; then its
// product with the rows (product.cu). Every sum is computed by one thread in a fixed order.
//
// Each row's coefficients come from its statistics and its gradient g (divided by the number of samples if the loss
// averages over them):
//
//     kl            H = f_S (A_i + A_j) - f_T (B_i + B_j),   A = g sigma/(tau z_S), B = g sigma/(tau z_T), f as in the
//                   forward; with maxima f differs between i and j
//     mse           H = (E^S - E^T) (A_i + A_j),                     A = 2g/rows
//     row_cosine    H = E^S (A_i + A_j) - E^T (B_i + B_j),           A = 2gc/n^2,  B = 2g/(n m)
//
// kl and row_cosine are computed from differences as well. With D = A - B, for kl g sigma/tau (z_T - z_S)/(z_S z_T):
//
//     f_S A - f_T B = (f_S - f_T) A + f_T D = (f_S - f_T) B + f_S D
//
// The form that multiplies f_S - f_T by the smaller coefficient has no term larger than the two subtracted, also where
// one network's similarities, and with them A and B, are orders of magnitude smaller than the other's. So H stays
// accurate as the student approaches the teacher, and is exactly 0 where they are equal. The stored matrix is
// M_ij = s_i H_ij s_j, so the product takes the rows unscaled. Where M is rounded, q is summed from the rounded
// numbers, so that rounding errors along a row cancel against q. A cosine's diagonal is 1 for every x and is skipped.
#include "cuda/kernels.h"
#include "cuda/relation/launch.cuh"
#include "cuda/relation/product.cuh"

namespace fastkd::cuda::relation {
namespace {

struct DerivativeArgs {
    Side student, teacher;
    LaunchRange range;
    Method method;
    bool cosine, negate;
    float inv_temperature;
    const double* statistics;
    const double* scales;
    const float* grad_loss;
    std::int64_t grad_batch_stride, grad_row_stride;
    const float* stored; // or null: recompute the matrices
    void* h;
    float* sums; // parts of q, one plane
};

// A, B and D of a row; `index` is its position in a plane of the statistics, `row` its position in the batch.
struct Coefficients {
    float a = 0.0f, b = 0.0f, d = 0.0f;

    FASTKD_DEVICE Coefficients(const DerivativeArgs& args, std::int64_t index, std::int64_t row) {
        const std::int64_t rows = args.range.rows, samples = args.range.samples;
        float g = args.grad_loss[row / rows * args.grad_batch_stride + row % rows * args.grad_row_stride] /
                  static_cast<float>(samples);
        const auto statistic = [&](int number) {
            return static_cast<float>(args.statistics[number * samples * args.range.all_rows + index]);
        };
        switch (args.method) {
        case Method::mse:
            a = 2.0f * g / static_cast<float>(rows);
            break;
        case Method::row_cosine: {
            const float sums[5] = {statistic(0), statistic(1), statistic(2), statistic(3), statistic(4)};
            const RowCosine row_cosine(sums);
            const float outer =
                sums[0] <= 1e-24f ? 0.0f : 2.0f * g / row_cosine.n / row_cosine.n; // the gradient of a zero row is 0
            a = outer * row_cosine.c;
            b = outer * (row_cosine.n / row_cosine.m);
            d = outer * row_cosine.slope;
            break;
        }
        default: {
            const float z_s = statistic(args.method == Method::kl ? 0 : 2),
                        z_t = statistic(args.method == Method::kl ? 1 : 3);
            g = (args.negate ? -g : g) * args.inv_temperature;
            a = g / z_s;
            b = g / z_t;
            d = g * (z_t - z_s) / z_s / z_t;
        }
        }
    }
};

// Numbers per row that H needs; in smem for the tile's rows and columns.
enum RowNumber { scale_s, scale_t, norm, number_a, number_d, number_b, max_s, max_t, row_numbers };

template <class B>
struct DerivativeShared {
    using H = typename StoredH<typename B::Storage>::Type;
    static constexpr int planes = StoredH<typename B::Storage>::planes;
    static constexpr int pitch = B::block_n + 16 / static_cast<int>(sizeof(H));
    static constexpr int staged_bytes = planes * B::block_m * pitch * static_cast<int>(sizeof(H));
    static constexpr int sums_bytes = reduction_floats<B, 1> * 4;
    static_assert(staged_bytes + sums_bytes <= B::pipeline_bytes,
                  "staged M and the partial sums reuse the pipeline's smem");
    static constexpr int bytes = B::pipeline_bytes + 2 * row_numbers * B::block_m * 4;
};

// Return f_S A - f_T B, given D = A - B.
FASTKD_DEVICE float difference(float f_s, float f_t, float a, float b, float d) {
    const bool by_a = std::fabs(a) <= std::fabs(b);
    return (f_s - f_t) * (by_a ? a : b) + (by_a ? f_t : f_s) * d;
}

// Compute one tile of M, and its contributions to q of its rows and, off the diagonal, its columns.
template <class B>
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS_OF(B::threads, B::min_blocks_per_sm) derivative_kernel(DerivativeArgs args) {
    using Shared = DerivativeShared<B>;
    using H = typename Shared::H;
    FASTKD_DYNAMIC_SHARED(shared);
    constexpr int tile_size = B::block_m, planes = Shared::planes;
    const LaunchRange& range = args.range;
    const Tile tile = Tile::of<tile_size>(range, block_x());
    float* const numbers_i = reinterpret_cast<float*>(shared + B::pipeline_bytes); // [row_numbers][tile_size]
    float* const numbers_j = numbers_i + row_numbers * tile_size;
    for (int at = thread_x(); at < 2 * tile_size; at += B::threads) {
        const int within = at % tile_size;
        const bool of_j = at >= tile_size, inside = within < (of_j ? tile.rows_j : tile.rows_i);
        float* const numbers = (of_j ? numbers_j : numbers_i) + within;
        for (int number = 0; number < row_numbers; ++number) {
            numbers[number * tile_size] = 0.0f;
        }
        if (!inside) {
            continue;
        }
        const std::int64_t row =
            (of_j ? tile.sample_j : tile.sample_i) * range.rows + (of_j ? tile.row_j : tile.row_i) + within;
        // Row i's statistics with respect to the sample of j, and vice versa.
        const std::int64_t other = (of_j ? tile.sample_i : tile.sample_j) - tile.problem * range.samples;
        const std::int64_t index = other * range.all_rows + row;
        const Coefficients coefficients(args, index, row);
        numbers[number_a * tile_size] = coefficients.a;
        numbers[number_b * tile_size] = coefficients.b;
        numbers[number_d * tile_size] = coefficients.d;
        if (args.cosine) {
            const double scale = args.scales[row];
            numbers[scale_s * tile_size] = static_cast<float>(scale);
            numbers[scale_t * tile_size] = static_cast<float>(args.scales[range.all_rows + row]);
            numbers[norm * tile_size] = 1.0f / static_cast<float>(scale);
        }
        if (args.method == Method::kl_maxima) {
            numbers[max_s * tile_size] = static_cast<float>(args.statistics[index]);
            numbers[max_t * tile_size] = static_cast<float>(args.statistics[range.samples * range.all_rows + index]);
        }
    }
    typename B::AccumulatorFragments e_s, e_t;
    if (args.stored != nullptr) {
        float* const stored = const_cast<float*>(args.stored); // only read
        const auto load = [](typename B::AccumulatorFragments& to) {
            return [&to](const float* at, int i, int j) {
                const Pack<float> pack = load_pack(at);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    to.c[i][j][e] = pack.at[e];
                }
            };
        };
        visit_stored<B>(stored, range, tile, 0, load(e_s));
        visit_stored<B>(stored, range, tile, 1, load(e_t));
        block_barrier();
    } else {
        multiply_rows<B>(args.student, args.teacher, tile, shared, e_s, e_t);
        scale_products<B>(e_s, tile, args.cosine, numbers_i + scale_s * tile_size, numbers_j + scale_s * tile_size,
                          args.student.factor, 0.0f);
        scale_products<B>(e_t, tile, args.cosine, numbers_i + scale_t * tile_size, numbers_j + scale_t * tile_size,
                          args.teacher.factor, 0.0f);
    }

    const float sign = args.negate ? -1.0f : 1.0f, kappa = args.inv_temperature * 1.4426950408889634f;
    const bool cosine = args.cosine, diagonal = tile.diagonal();
    const float factor = args.student.factor;
    // Replace E^S by M.
    const auto terms_of = [&](auto h_of) {
        return [&, h_of](int i, int j, int e, float (&term)[1]) {
            const int row = B::row_of(i, e), col = B::col_of(j, e);
            const float s = e_s.c[i][j][e], t = e_t.c[i][j][e];
            const float* const of_i = numbers_i + row;
            const float* const of_j = numbers_j + col;
            const bool used = row < tile.rows_i && col < tile.rows_j && !(cosine && diagonal && row == col);
            const float h = h_of(s, t, of_i, of_j);
            const float m = cosine ? h * of_i[scale_s * tile_size] * of_j[scale_s * tile_size] : h * factor;
            e_s.c[i][j][e] = used ? m : 0.0f;
            float stored = m;
            if constexpr (planes == 1 && sizeof(H) == 2) {
                stored = widen(narrow<BFloat16>(m));
            }
            term[0] = used && cosine ? stored * (of_i[norm * tile_size] * of_j[norm * tile_size]) * s : 0.0f;
        };
    };
    const auto both = [](int number, const float* of_i, const float* of_j) {
        return of_i[number * tile_size] + of_j[number * tile_size];
    };
    const auto store = [&](int, int index, bool for_rows, float sum) {
        if (for_rows || !diagonal) {
            const std::int64_t slot = for_rows ? range.slot(tile.i, tile.j) : range.slot(tile.j, tile.i);
            args.sums[(tile.problem_in_launch * range.slots() + slot) * tile_size + index] = sum;
        }
    };
    float* const reductions = reinterpret_cast<float*>(shared + Shared::staged_bytes);
    switch (args.method) {
    case Method::kl:
        sum_tile<B, 1>(reductions, terms_of([&](float s, float t, const float* of_i, const float* of_j) {
                           const float f_s = std::exp2((sign * s - 1.0f) * kappa);
                           const float f_t = std::exp2((sign * t - 1.0f) * kappa);
                           return difference(f_s, f_t, both(number_a, of_i, of_j), both(number_b, of_i, of_j),
                                             both(number_d, of_i, of_j));
                       }),
                       store);
        break;
    case Method::kl_maxima:
        if constexpr (tile_size == 64) { // the plan's only tile for this method
            const auto one_sided = [&](float s, float t, const float* of) {
                const float f_s = std::exp2((sign * s - of[max_s * tile_size]) * kappa);
                const float f_t = std::exp2((sign * t - of[max_t * tile_size]) * kappa);
                return difference(f_s, f_t, of[number_a * tile_size], of[number_b * tile_size],
                                  of[number_d * tile_size]);
            };
            sum_tile<B, 1>(reductions, terms_of([&](float s, float t, const float* of_i, const float* of_j) {
                               return one_sided(s, t, of_i) + one_sided(s, t, of_j);
                           }),
                           store);
        }
        break;
    default: // mse and row_cosine
        sum_tile<B, 1>(reductions, terms_of([&](float s, float t, const float* of_i, const float* of_j) {
                           const float a = both(number_a, of_i, of_j);
                           return args.method == Method::mse
                                      ? (s - t) * a
                                      : difference(s, t, a, both(number_b, of_i, of_j), both(number_d, of_i, of_j));
                       }),
                       store);
    }

    // Stage M in smem, so that whole lines are written to gmem.
    H* const staged = reinterpret_cast<H*>(shared);
#pragma unroll
    for (int i = 0; i < B::fragments_m; ++i) {
#pragma unroll
        for (int j = 0; j < B::fragments_n; ++j) {
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const float left = e_s.c[i][j][e], right = e_s.c[i][j][e + 1];
                H* const at = staged + B::row_of(i, e) * Shared::pitch + B::col_of(j, e);
                if constexpr (sizeof(H) == 4) {
                    at[0] = left;
                    at[1] = right;
                } else {
                    const BFloat16 left_high = narrow<BFloat16>(left), right_high = narrow<BFloat16>(right);
                    at[0] = left_high;
                    at[1] = right_high;
                    if constexpr (planes == 2) {
                        at[tile_size * Shared::pitch] = narrow<BFloat16>(left - widen(left_high));
                        at[tile_size * Shared::pitch + 1] = narrow<BFloat16>(right - widen(right_high));
                    }
                }
            }
        }
    }
    block_barrier();
    constexpr int size = Pack<H>::size, packs = tile_size / size;
    H* const to = static_cast<H*>(args.h) + (tile.problem_in_launch * range.tiles + range.stored(tile.i, tile.j)) *
                                                (planes * tile_size * tile_size);
#pragma unroll 4
    for (int at = thread_x(); at < planes * tile_size * packs; at += B::threads) {
        const int line = at / packs, piece = at % packs * size;
        Pack<H> pack;
        const H* const from = staged + line * Shared::pitch + piece;
#pragma unroll
        for (int e = 0; e < size; ++e) {
            pack.at[e] = from[e];
        }
        store_pack(to + line * tile_size + piece, pack);
    }
}

} // namespace

} // namespace fastkd::cuda::relation

namespace fastkd::cuda {

cudaError_t relation_backward(const relation::Backward& args, const RelationPlan& plan, cudaStream_t stream) {
    using namespace relation;
    const relation::Options& options = args.options;
    const cudaError_t error = check_call(options, args.student, args.teacher, plan);
    if (error != cudaSuccess) {
        return error;
    }
    const Side student = side_of(args.student, options), teacher = side_of(args.teacher, options);
    const std::int64_t all_rows = options.batch * options.rows;
    const double* const scales = args.statistics + relation::statistic_planes * options.others() * all_rows;
    const bool cosine = options.similarity == relation::Similarity::cosine;
    const bool negate = options.negate && options.distance == relation::Distance::kl;
    const auto inv_temperature = static_cast<float>(1 / options.temperature);
    char* const workspace = static_cast<char*>(args.workspace);
    const auto floats_at = [&](std::int64_t offset) { return reinterpret_cast<float*>(workspace + offset); };
    float* const row_sums = floats_at(plan.row_sums);
    const relation::Rows out{args.grad_student, args.student.width, args.out_batch_stride, args.out_row_stride,
                             args.out_col_stride};
    const Operand out_rows = side_of(out, options).rows;
    const int pack = 16 / static_cast<int>(element_size(options.dtype));
    const Gradient gradient{args.grad_student,
                            args.out_batch_stride,
                            args.out_row_stride,
                            args.out_col_stride,
                            out_rows.mn_major,
                            out_rows.alignment == pack && student.rows.alignment == pack &&
                                out_rows.mn_major == student.rows.mn_major};
    return with_tile(options.dtype, plan.tile, [&](auto element, auto tile_size_type) {
        using S = decltype(element);
        constexpr int tile_size = decltype(tile_size_type)::value;
        using B = TileBlocking<S, tile_size>;
        return for_each_launch(options, plan, [&](const LaunchRange& range) {
            void* const h = workspace + plan.h;
            const DerivativeArgs derivative{student,
                                            teacher,
                                            range,
                                            plan.method,
                                            cosine,
                                            negate,
                                            inv_temperature,
                                            args.statistics,
                                            scales,
                                            static_cast<const float*>(args.grad_loss),
                                            args.grad_batch_stride,
                                            args.grad_row_stride,
                                            static_cast<const float*>(args.stored),
                                            h,
                                            floats_at(plan.sums)};
            cudaError_t launched =
                launch(derivative_kernel<B>, {range.problems * range.tiles, B::threads, 1, DerivativeShared<B>::bytes},
                       stream, derivative);
            if (launched == cudaSuccess && cosine) {
                launched = launch_merge({range, Method::mse, tile_size, inv_temperature, false, floats_at(plan.sums),
                                         nullptr, nullptr, row_sums},
                                        stream);
            }
            if (launched != cudaSuccess) {
                return launched;
            }
            const bool direct = plan.whole() && plan.splits == 1;
            const ProductArgs product{student,
                                      range,
                                      h,
                                      row_sums,
                                      scales,
                                      gradient,
                                      direct ? nullptr : floats_at(plan.partials),
                                      plan.whole() ? nullptr : floats_at(plan.totals),
                                      plan.width_blocks,
                                      plan.splits,
                                      cosine};
            return launch_product(product, options.dtype, tile_size, stream);
        });
    });
}

} // namespace fastkd::cuda
