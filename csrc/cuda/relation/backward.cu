// relation on a GPU, backward: H, the losses' derivative by the similarities, tile by tile, then its product with the
// rows (relation_product.cuh). Every sum has one owner and a fixed order.
//
// With each row's coefficients from its statistics and its gradient g (over the samples, where they are averaged),
//
//     kl            H = f_S (A_i + A_j) - f_T (B_i + B_j),   A = g sigma/(tau z_S), B = g sigma/(tau z_T), f as in the
//                   forward; with maxima f differs between i and j
//     mse           H = (E^S - E^T) (A_i + A_j),                     A = 2g/rows
//     row_cosine    H = (E^S - E^T) (A_i + A_j) + E^T (D_i + D_j),   A = 2gc/n^2,  D = A - 2g/(n m)
//
// kl too is computed from differences, with D = A - B = g sigma/tau (z_T - z_S)/(z_S z_T):
//
//     f_S A - f_T B = (f_S - f_T) A + f_T D = (f_S - f_T) B + f_S D
//
// of which the one that multiplies f_S - f_T by the smaller coefficient has no term larger than the two subtracted.
// So H keeps its digits as the student nears the teacher, and is exactly 0 where it is the teacher. What is stored is
// M_ij = s_i H_ij s_j: the product then takes rows as they are. Where M is rounded, q is summed from the rounded
// numbers, so that what rounding leaves along a row goes out with q. A cosine's diagonal is 1 whatever x: it is left
// out, instead of being subtracted again.
#include "cuda/kernels.h"
#include "cuda/relation/launch.cuh"
#include "cuda/relation/product.cuh"

namespace fastkd::cuda::relation {
namespace {

struct DerivativeArgs {
    Network student, teacher;
    Cut cut;
    Method method;
    bool cosine, negate;
    float inv_temperature;
    const double* statistics;
    const double* scales;
    const float* grad_loss;
    std::int64_t grad_batch_stride, grad_row_stride;
    const float* stored; // or null
    void* h;
    float* sums; // parts of q, one plane
};

// A, B and D of a row, `index` being its place in a plane of the statistics, `row` that in the batch.
struct Coefficients {
    float a = 0.0f, b = 0.0f, d = 0.0f;

    FASTKD_DEVICE Coefficients(const DerivativeArgs& args, std::int64_t index, std::int64_t row) {
        const std::int64_t rows = args.cut.rows, samples = args.cut.samples;
        float g = args.grad_loss[row / rows * args.grad_batch_stride + row % rows * args.grad_row_stride] /
                  static_cast<float>(samples);
        const auto of = [&](int number) {
            return static_cast<float>(args.statistics[number * samples * args.cut.all_rows + index]);
        };
        switch (args.method) {
        case Method::mse:
            a = 2.0f * g / static_cast<float>(rows);
            break;
        case Method::row_cosine: {
            const float sums[5] = {of(0), of(1), of(2), of(3), of(4)};
            const RowCosine row_cosine(sums);
            const float outer = sums[0] <= 1e-24f ? 0.0f : 2.0f * g / row_cosine.n / row_cosine.n; // no gradient there
            a = outer * row_cosine.c;
            d = outer * row_cosine.slope;
            break;
        }
        default: {
            const float z_s = of(args.method == Method::kl ? 0 : 2), z_t = of(args.method == Method::kl ? 1 : 3);
            g = (args.negate ? -g : g) * args.inv_temperature;
            a = g / z_s;
            b = g / z_t;
            d = g * (z_t - z_s) / z_s / z_t;
        }
        }
    }
};

// Numbers of a row that H needs, for the tile's rows and columns, in shared memory.
enum RowNumber { scale_s, scale_t, norm, number_a, number_d, number_b, max_s, max_t, row_numbers };

template <class B>
struct DerivativeShared {
    using H = typename StoredH<typename B::Storage>::Type;
    static constexpr int planes = StoredH<typename B::Storage>::planes;
    static constexpr int pitch = B::cols + 16 / static_cast<int>(sizeof(H));
    static constexpr int staged_bytes = planes * B::rows * pitch * static_cast<int>(sizeof(H));
    static constexpr int sums_bytes = reduction_floats<B, 1> * 4;
    static_assert(staged_bytes + sums_bytes <= B::pipeline_bytes, "what follows the products fits where they were");
    static constexpr int bytes = B::pipeline_bytes + 2 * row_numbers * B::rows * 4;
};

// f_S A - f_T B, D being A - B.
FASTKD_DEVICE float difference(float f_s, float f_t, float a, float b, float d) {
    const bool by_a = std::fabs(a) <= std::fabs(b);
    return (f_s - f_t) * (by_a ? a : b) + (by_a ? f_t : f_s) * d;
}

// One tile of M, and its parts of q for its rows and, off the diagonal, for its columns.
template <class B>
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS_OF(B::threads, B::resident) derivative_kernel(DerivativeArgs args) {
    using Shared = DerivativeShared<B>;
    using H = typename Shared::H;
    FASTKD_DYNAMIC_SHARED(shared);
    constexpr int side = B::rows, planes = Shared::planes;
    const Cut& cut = args.cut;
    const Tile tile = Tile::of<side>(cut, block_x());
    float* const numbers_i = reinterpret_cast<float*>(shared + B::pipeline_bytes); // [row_numbers][side]
    float* const numbers_j = numbers_i + row_numbers * side;
    for (int at = thread_x(); at < 2 * side; at += B::threads) {
        const int within = at % side;
        const bool of_j = at >= side, here = within < (of_j ? tile.rows_j : tile.rows_i);
        float* const numbers = (of_j ? numbers_j : numbers_i) + within;
        for (int number = 0; number < row_numbers; ++number) {
            numbers[number * side] = 0.0f;
        }
        if (!here) {
            continue;
        }
        const std::int64_t row =
            (of_j ? tile.sample_j : tile.sample_i) * cut.rows + (of_j ? tile.row_j : tile.row_i) + within;
        // Row i's statistics against the sample of j, and the other way round.
        const std::int64_t other = (of_j ? tile.sample_i : tile.sample_j) - tile.problem * cut.samples;
        const std::int64_t index = other * cut.all_rows + row;
        const Coefficients coefficients(args, index, row);
        numbers[number_a * side] = coefficients.a;
        numbers[number_b * side] = coefficients.b;
        numbers[number_d * side] = coefficients.d;
        if (args.cosine) {
            const double scale = args.scales[row];
            numbers[scale_s * side] = static_cast<float>(scale);
            numbers[scale_t * side] = static_cast<float>(args.scales[cut.all_rows + row]);
            numbers[norm * side] = 1.0f / static_cast<float>(scale);
        }
        if (args.method == Method::kl_maxima) {
            numbers[max_s * side] = static_cast<float>(args.statistics[index]);
            numbers[max_t * side] = static_cast<float>(args.statistics[cut.samples * cut.all_rows + index]);
        }
    }
    typename B::Accumulated e_s, e_t;
    if (args.stored != nullptr) {
        float* const stored = const_cast<float*>(args.stored); // read only
        const auto load = [](typename B::Accumulated& to) {
            return [&to](const float* at, int i, int j) {
                const Pack<float> pack = load_pack(at);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    to.c[i][j][e] = pack.at[e];
                }
            };
        };
        visit_stored<B>(stored, cut, tile, 0, load(e_s));
        visit_stored<B>(stored, cut, tile, 1, load(e_t));
        block_barrier();
    } else {
        multiply_rows<B>(args.student, args.teacher, tile, shared, e_s, e_t);
        scale_products<B>(e_s, tile, args.cosine, numbers_i + scale_s * side, numbers_j + scale_s * side,
                          args.student.factor, 0.0f);
        scale_products<B>(e_t, tile, args.cosine, numbers_i + scale_t * side, numbers_j + scale_t * side,
                          args.teacher.factor, 0.0f);
    }

    const float sign = args.negate ? -1.0f : 1.0f, kappa = args.inv_temperature * 1.4426950408889634f;
    const bool cosine = args.cosine, diagonal = tile.diagonal();
    const float factor = args.student.factor;
    // M in place of E^S, as it is stored but for the sum of two.
    const auto terms_of = [&](auto h_of) {
        return [&, h_of](int i, int j, int e, float (&term)[1]) {
            const int row = B::row_of(i, e), col = B::col_of(j, e);
            const float s = e_s.c[i][j][e], t = e_t.c[i][j][e];
            const float* const of_i = numbers_i + row;
            const float* const of_j = numbers_j + col;
            const bool used = row < tile.rows_i && col < tile.rows_j && !(cosine && diagonal && row == col);
            const float h = h_of(s, t, of_i, of_j);
            const float m = cosine ? h * of_i[scale_s * side] * of_j[scale_s * side] : h * factor;
            e_s.c[i][j][e] = used ? m : 0.0f;
            float stored = m;
            if constexpr (planes == 1 && sizeof(H) == 2) {
                stored = widen(narrow<BFloat16>(m));
            }
            term[0] = used && cosine ? stored * (of_i[norm * side] * of_j[norm * side]) * s : 0.0f;
        };
    };
    const auto both = [](int number, const float* of_i, const float* of_j) {
        return of_i[number * side] + of_j[number * side];
    };
    const auto store = [&](int, int index, bool for_rows, float sum) {
        if (for_rows || !diagonal) {
            const std::int64_t slot = for_rows ? cut.slot(tile.i, tile.j) : cut.slot(tile.j, tile.i);
            args.sums[(tile.here * cut.slots() + slot) * side + index] = sum;
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
    case Method::kl_maxima: {
        const auto one_sided = [&](float s, float t, const float* of) {
            const float f_s = std::exp2((sign * s - of[max_s * side]) * kappa);
            const float f_t = std::exp2((sign * t - of[max_t * side]) * kappa);
            return difference(f_s, f_t, of[number_a * side], of[number_b * side], of[number_d * side]);
        };
        sum_tile<B, 1>(reductions, terms_of([&](float s, float t, const float* of_i, const float* of_j) {
                           return one_sided(s, t, of_i) + one_sided(s, t, of_j);
                       }),
                       store);
        break;
    }
    default: // mse, whose D is 0, and row_cosine
        sum_tile<B, 1>(reductions, terms_of([&](float s, float t, const float* of_i, const float* of_j) {
                           const float h = (s - t) * both(number_a, of_i, of_j);
                           return args.method == Method::mse ? h : h + t * both(number_d, of_i, of_j);
                       }),
                       store);
    }

    // Through shared memory, so that whole lines are written.
    H* const staged = reinterpret_cast<H*>(shared);
#pragma unroll
    for (int i = 0; i < B::down; ++i) {
#pragma unroll
        for (int j = 0; j < B::across; ++j) {
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
                        at[side * Shared::pitch] = narrow<BFloat16>(left - widen(left_high));
                        at[side * Shared::pitch + 1] = narrow<BFloat16>(right - widen(right_high));
                    }
                }
            }
        }
    }
    block_barrier();
    constexpr int size = Pack<H>::size, packs = side / size;
    H* const to =
        static_cast<H*>(args.h) + (tile.here * cut.tiles + cut.stored(tile.i, tile.j)) * (planes * side * side);
#pragma unroll 4
    for (int at = thread_x(); at < planes * side * packs; at += B::threads) {
        const int line = at / packs, piece = at % packs * size;
        Pack<H> pack;
        const H* const from = staged + line * Shared::pitch + piece;
#pragma unroll
        for (int e = 0; e < size; ++e) {
            pack.at[e] = from[e];
        }
        store_pack(to + line * side + piece, pack);
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
    const Network student = network_of(args.student, options), teacher = network_of(args.teacher, options);
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
    const Operand out_rows = network_of(out, options).rows;
    const int pack = 16 / static_cast<int>(element_size(options.dtype));
    const Gradient gradient{
        args.grad_student,
        args.out_batch_stride,
        args.out_row_stride,
        args.out_col_stride,
        out_rows.k_major,
        out_rows.unit == pack && student.rows.unit == pack && out_rows.k_major == student.rows.k_major};
    return with_tile(options.dtype, plan.tile, [&](auto element, auto side_type) {
        using S = decltype(element);
        constexpr int side = decltype(side_type)::value;
        using B = TileBlocking<S, side>;
        using Product = ProductBlocking<S, side>;
        return for_each_launch(options, plan, [&](const Cut& cut) {
            void* const h = workspace + plan.h;
            const DerivativeArgs derivative{student,
                                            teacher,
                                            cut,
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
                launch(derivative_kernel<B>, {cut.problems * cut.tiles, B::threads, 1, DerivativeShared<B>::bytes},
                       stream, derivative);
            if (launched == cudaSuccess && cosine) {
                launched = launch_merge(
                    {cut, Method::mse, side, inv_temperature, false, floats_at(plan.sums), nullptr, nullptr, row_sums},
                    stream);
            }
            if (launched != cudaSuccess) {
                return launched;
            }
            const bool direct = plan.whole() && plan.splits == 1;
            const ProductArgs product{student,
                                      cut,
                                      h,
                                      row_sums,
                                      scales,
                                      gradient,
                                      direct ? nullptr : floats_at(plan.partials),
                                      plan.whole() ? nullptr : floats_at(plan.totals),
                                      plan.width_blocks,
                                      plan.splits,
                                      cosine};
            const std::int64_t band = cut.last - cut.first;
            const std::int64_t items = band * plan.splits + (cut.blocks - cut.last);
            launched =
                launch(product_kernel<S, side>,
                       {cut.problems * items * plan.width_blocks, Product::threads, 1, product_shared_bytes<S, side>()},
                       stream, product);
            if (launched != cudaSuccess || direct) {
                return launched;
            }
            const std::int64_t strips = cut.problems * band * plan.width_blocks * (side / finish_rows);
            return launch(finish_kernel<S, side>, {strips, finish_threads}, stream, product);
        });
    });
}

} // namespace fastkd::cuda
