// pixel_word on a GPU: the launchers, and the kernels that process whole samples. Formulas: common/pixel_word.h.
//
// Forward: logits from features (logits.cu); partial sums of the losses per run of pixels (terms.cu); their sum over a
// sample's runs, in order (merge_kernel). Backward: coefficients per sample from its matrices (prepare_kernel); the
// gradient of the logits (gradient.cu), then of the features (features.cu) and words (words_kernel). fp64: fp64.cu.
// No atomics: every run gives the same bits.
#include "cuda/kernels.h"
#include "cuda/pixel_word/tile.cuh"

namespace fastkd::cuda::pixel_word {
namespace {

using pixel_word::Backward;
using pixel_word::ColumnSums;
using pixel_word::Forward;

constexpr int merge_threads = 512;
constexpr int merge_warps = merge_threads / warp_size;

struct Merge {
    const void* partials;
    void* loss;
    void* columns; // or null
    void* grams;
    const std::uint8_t* pixel_mask;
    const std::uint8_t* word_mask; // the student's
    std::int64_t pixels;
    int student_count, words, terms, runs;
    double student_scale, teacher_scale;
};

// Merge the sums of a warp's lanes.
template <class T>
FASTKD_DEVICE ColumnSums<T> over_lanes(ColumnSums<T> sum, T scale_s, T scale_t) {
    sum.raise(max_over(sum.max_s, 1, warp_size), max_over(sum.max_t, 1, warp_size), scale_s, scale_t);
    sum.z_s = sum_over(sum.z_s, 1, warp_size);
    sum.z_t = sum_over(sum.z_t, 1, warp_size);
    sum.a = sum_over(sum.a, 1, warp_size);
    return sum;
}

// Merge the partial sums of a sample's runs into its losses. One thread block per sample.
template <class T>
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS(merge_threads) merge_kernel(Merge args) {
    FASTKD_SHARED T scratch[merge_warps];
    FASTKD_SHARED int counts[merge_warps];
    const std::int64_t sample = block_x();
    const int warp = thread_x() / warp_size, lane = thread_x() % warp_size;
    const std::int64_t size = Partial<T>::size(args.words);
    T* const partials = const_cast<T*>(static_cast<const T*>(args.partials)) + sample * args.runs * size;
    T* const loss = static_cast<T*>(args.loss) + sample * pixel_word::term_count;
    const T n = static_cast<T>(count_valid(args.pixel_mask, sample, args.pixels, merge_threads, counts));
    const T t = static_cast<T>(count_valid(args.word_mask, sample, args.student_count, merge_threads, counts));

    T row_kl = 0;
    for (int p = thread_x(); (args.terms & pixel_word::pixel_to_word) != 0 && p < args.runs; p += merge_threads) {
        row_kl += partials[p * size];
    }
    row_kl = block_sum(row_kl, scratch, merge_warps);

    T column_kl = 0; // one warp per word
    for (int word = warp; (args.terms & pixel_word::word_to_pixel) != 0 && word < args.words; word += merge_warps) {
        const T scale_s = static_cast<T>(args.student_scale), scale_t = static_cast<T>(args.teacher_scale);
        ColumnSums<T> sum = ColumnSums<T>::empty();
        for (int p = lane; p < args.runs; p += warp_size) {
            const Partial<T> partial{partials + p * size, args.words};
            sum.merge({partial.column(0)[word], partial.column(1)[word], partial.column(2)[word],
                       partial.column(3)[word], partial.column(4)[word]},
                      scale_s, scale_t);
        }
        sum = over_lanes(sum, scale_s, scale_t);
        if (lane == 0 && valid(args.word_mask, sample, word, args.student_count)) {
            column_kl += sum.loss();
        }
        if (lane == 0 && args.columns != nullptr) {
            T* const column = static_cast<T*>(args.columns) + sample * 4 * args.words + word;
            column[0] = softmax_kl::shift_of(sum.max_s);
            column[args.words] = 1 / sum.z_s;
            column[2 * args.words] = softmax_kl::shift_of(sum.max_t);
            column[3 * args.words] = 1 / sum.z_t;
        }
    }
    column_kl = block_sum(column_kl, scratch, merge_warps);

    T pixel_pixel = 0, word_word = 0;
    if ((args.terms & pixel_word::second_order) != 0) {
        const int square = args.words * args.words;
        T* const grams = static_cast<T*>(args.grams) + sample * 3 * square;
        for (int index = thread_x(); index < 3 * square; index += merge_threads) {
            const int matrix = index / square, i = index % square / args.words, j = index % args.words;
            if (matrix != 1 && i < j) {
                continue; // symmetric
            }
            const Partial<T> partial{partials, args.words};
            const T* from = partial.matrices() + partial.entry(matrix, i, j);
            T sum = 0;
#pragma unroll 8
            for (int p = 0; p < args.runs; ++p) {
                sum += from[p * size];
            }
            grams[index] = sum;
            if (matrix != 1) {
                grams[matrix * square + j * args.words + i] = sum;
            }
        }
        block_barrier();
        for (int index = thread_x(); index < square; index += merge_threads) {
            const T g = grams[index], k = grams[square + index], e = grams[2 * square + index];
            const T k_t = grams[square + index % args.words * args.words + index / args.words];
            pixel_pixel += pixel_word::pixel_pixel_of(g, k, k_t, e);
            word_word += pixel_word::word_word_of(k, k_t, e);
        }
    }
    pixel_pixel = block_sum(pixel_pixel, scratch, merge_warps);
    word_word = block_sum(word_word, scratch, merge_warps);
    if (thread_x() == 0) {
        loss[0] = (args.terms & pixel_word::pixel_to_word) != 0 ? row_kl / n : T(0);
        loss[1] = (args.terms & pixel_word::word_to_pixel) != 0 ? column_kl / t : T(0);
        loss[2] = (args.terms & pixel_word::pixel_pixel) != 0 ? pixel_pixel / (n * n) : T(0);
        loss[3] = (args.terms & pixel_word::word_word) != 0 ? word_word / (n * n) : T(0);
    }
}

struct Prepare {
    const void* grad_loss;
    std::int64_t grad_batch, grad_term; // strides
    const void* grams;
    const std::uint8_t* pixel_mask;
    const std::uint8_t* word_mask; // the student's
    std::int64_t pixels;
    int student_count, words, tiles, terms;
    double scale; // the student's
    void* coefficients;
    void* slopes;
};

// Return scale X (`which` 0) or scale Z (1) at (row, column); 0 outside.
template <class T>
FASTKD_DEVICE T slope(const T* grams, int words, int which, int row, int column, T by_pp, T by_ww) {
    if (row >= words || column >= words) {
        return T(0);
    }
    const int square = words * words, at = row * words + column;
    return which == 0 ? pixel_word::slope_x(grams[square + at], grams[square + column * words + row],
                                            grams[2 * square + at], by_pp, by_ww)
                      : pixel_word::slope_z(grams[at], grams[square + at], by_pp);
}

// Return the maximum over a thread block, to all its threads.
template <class T>
FASTKD_DEVICE T block_max(T value, T* scratch) {
    value = max_over(value, 1, warp_size);
    block_barrier();
    if (thread_x() % warp_size == 0) {
        scratch[thread_x() / warp_size] = value;
    }
    block_barrier();
    for (int w = 0; w < merge_warps; ++w) {
        value = scratch[w] > value ? scratch[w] : value;
    }
    return value;
}

// Compute the backward's coefficients and slopes. One thread block per sample. In fp32 the slopes are divided by the
// largest one and stored as B fragments of split halves, [X, Z][16 rows][8 columns][lane] (high of rows 2t, high of
// rows 2t + 8, low of both); in fp64 they are stored as matrices.
template <class T>
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS(merge_threads) prepare_kernel(Prepare args) {
    FASTKD_SHARED T scratch[merge_warps];
    FASTKD_SHARED int counts[merge_warps];
    const std::int64_t sample = block_x();
    const T n = static_cast<T>(count_valid(args.pixel_mask, sample, args.pixels, merge_threads, counts));
    const T t = static_cast<T>(count_valid(args.word_mask, sample, args.student_count, merge_threads, counts));
    const T* const grad = static_cast<const T*>(args.grad_loss) + sample * args.grad_batch;
    const auto by = [&](int term) {
        return (args.terms >> term & 1) != 0 ? static_cast<T>(args.scale) * grad[term * args.grad_term] : T(0);
    };
    Coefficients<T> coefficients{by(0) / n, by(1) / t, T(1), T(1)};
    if ((args.terms & pixel_word::second_order) != 0) {
        const T by_pp = 4 * by(2) / (n * n), by_ww = 4 * by(3) / (n * n);
        const int square = args.words * args.words;
        const T* const grams = static_cast<const T*>(args.grams) + sample * 3 * square;
        for (int which = 0; which < 2; ++which) {
            if constexpr (sizeof(T) == sizeof(double)) {
                T* const to = static_cast<T*>(args.slopes) + (sample * 2 + which) * square;
                for (int i = thread_x(); i < square; i += merge_threads) {
                    to[i] = slope(grams, args.words, which, i / args.words, i % args.words, by_pp, by_ww);
                }
            } else {
                T largest = static_cast<T>(1e-30);
                for (int i = thread_x(); i < square; i += merge_threads) {
                    const T x = slope(grams, args.words, which, i / args.words, i % args.words, by_pp, by_ww);
                    largest = std::fabs(x) > largest ? std::fabs(x) : largest;
                }
                largest = block_max(largest, scratch);
                (which == 0 ? coefficients.unit_x : coefficients.unit_z) = largest * unit_of_halves;
                const int tiles = args.tiles, steps = (tiles + 1) / 2;
                std::uint32_t* const to =
                    static_cast<std::uint32_t*>(args.slopes) + (sample * 2 + which) * steps * tiles * warp_size * 4;
                for (int i = thread_x(); i < steps * tiles * warp_size; i += merge_threads) {
                    const int lane = i % warp_size, row = i / warp_size / tiles * 16 + lane % 4 * 2;
                    const int column = i / warp_size % tiles * 8 + lane / 4;
                    Pack<std::uint32_t> pack;
                    for (int k = 0; k < 2; ++k) {
                        const T first = slope(grams, args.words, which, row + 8 * k, column, by_pp, by_ww) / largest;
                        const T second =
                            slope(grams, args.words, which, row + 8 * k + 1, column, by_pp, by_ww) / largest;
                        split_halves(first, second, pack.at[k], pack.at[2 + k]);
                    }
                    store_pack(to + i * 4, pack);
                }
            }
        }
    }
    if (thread_x() == 0) {
        static_cast<Coefficients<T>*>(args.coefficients)[sample] = coefficients;
    }
}

struct Words {
    const void* sums;  // (B, runs, T, D): parts of dM^T V
    const void* words; // L (B, T, D)
    const std::uint8_t* word_mask;
    void* grad_words; // (B, T, D)
    int runs, count, width;
    bool cosine;
};

constexpr int words_threads = 128;

// Write dL, the sum d over runs, in the dtype of L. For the cosine, remove its component along L:
//
//     dL = (d - L <d, L>/|L|^2)/|L|
//
// One thread block per word.
template <class S>
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS(words_threads) words_kernel(Words args) {
    using T = Compute<S>;
    FASTKD_SHARED T scratch[words_threads / warp_size];
    const std::int64_t sample = block_x() / args.count, word = block_x() % args.count;
    const S* const l = static_cast<const S*>(args.words) + block_x() * args.width;
    S* const to = static_cast<S*>(args.grad_words) + block_x() * args.width;
    const std::int64_t run = static_cast<std::int64_t>(args.count) * args.width;
    const T* const from = static_cast<const T*>(args.sums) + sample * args.runs * run + word * args.width;
    const auto sum_of_runs = [&](int d) {
        T sum = 0;
#pragma unroll 8
        for (int r = 0; r < args.runs; ++r) {
            sum += from[r * run + d];
        }
        return sum;
    };
    bool ok = valid(args.word_mask, sample, word, args.count);
    T along = 0, inverse = 1;
    if (args.cosine) {
        T square = 0, inner = 0;
        for (int d = thread_x(); d < args.width; d += words_threads) {
            square += widen(l[d]) * widen(l[d]);
            inner += widen(l[d]) * sum_of_runs(d);
        }
        const T norm = std::sqrt(block_sum(square, scratch, words_threads / warp_size));
        ok = ok && !(norm <= static_cast<T>(pixel_word::norm_floor));
        inverse = 1 / norm;
        along = block_sum(inner, scratch, words_threads / warp_size) * inverse * inverse;
    }
    for (int d = thread_x(); d < args.width; d += words_threads) {
        const T sum = sum_of_runs(d);
        to[d] = narrow<S>(!ok ? T(0) : (args.cosine ? (sum - widen(l[d]) * along) * inverse : sum));
    }
}

} // namespace

cudaError_t merge_words(const Backward& args, const Plan& plan, cudaStream_t stream) {
    const Problem& problem = args.problem;
    const Side& student = problem.student;
    const Words words{at_bytes<void>(args.workspace, plan.sums),
                      student.words,
                      student.word_mask,
                      args.grad_words,
                      plan.runs.blocks_per_sample,
                      static_cast<int>(student.word_count),
                      static_cast<int>(student.width),
                      problem.cosine};
    const Grid grid{problem.batch * student.word_count, words_threads};
    switch (student.pixels.dtype) {
    case DType::Float32:
        return launch(words_kernel<float>, grid, stream, words);
    case DType::Float16:
        return launch(words_kernel<Half>, grid, stream, words);
    case DType::BFloat16:
        return launch(words_kernel<BFloat16>, grid, stream, words);
    case DType::Float64:
        return launch(words_kernel<double>, grid, stream, words);
    }
    return cudaErrorInvalidValue;
}

cudaError_t merge_terms(const Forward& args, const Plan& plan, cudaStream_t stream) {
    const Problem& problem = args.problem;
    const Merge merge{at_bytes<void>(args.workspace, plan.partials),
                      args.loss,
                      args.kept.columns,
                      args.kept.grams != nullptr ? args.kept.grams : at_bytes<void>(args.workspace, plan.grams),
                      problem.pixel_mask,
                      problem.student.word_mask,
                      problem.pixels,
                      static_cast<int>(problem.student.word_count),
                      plan.words,
                      problem.terms,
                      plan.terms.blocks_per_sample,
                      problem.student.scale,
                      problem.teacher.scale};
    const Grid grid{problem.batch, merge_threads};
    return plan.size == 8 ? launch(merge_kernel<double>, grid, stream, merge)
                          : launch(merge_kernel<float>, grid, stream, merge);
}

cudaError_t prepare_gradient(const Backward& args, const Plan& plan, cudaStream_t stream) {
    const Problem& problem = args.problem;
    const Prepare prepare{args.grad_loss,
                          args.grad_loss_strides[0],
                          args.grad_loss_strides[1],
                          args.kept.grams,
                          problem.pixel_mask,
                          problem.student.word_mask,
                          problem.pixels,
                          static_cast<int>(problem.student.word_count),
                          plan.words,
                          plan.tiles,
                          problem.terms,
                          problem.student.scale,
                          at_bytes<void>(args.workspace, plan.coefficients),
                          at_bytes<void>(args.workspace, plan.slopes)};
    const Grid grid{problem.batch, merge_threads};
    return plan.size == 8 ? launch(prepare_kernel<double>, grid, stream, prepare)
                          : launch(prepare_kernel<float>, grid, stream, prepare);
}

} // namespace fastkd::cuda::pixel_word

namespace fastkd::cuda {

using namespace pixel_word;

// Return from the calling function on an error, skipping later launches.
#define FASTKD_TRY(call)                                                                                               \
    if (const cudaError_t error = (call); error != cudaSuccess) {                                                      \
        return error;                                                                                                  \
    }

bool pixel_word_fits(const Problem& problem) {
    return fits(problem);
}

std::int64_t pixel_word_workspace(const Problem& problem, bool backward) {
    return (backward ? plan_backward(problem) : plan_forward(problem)).bytes;
}

cudaError_t pixel_word_forward(const pixel_word::Forward& args, cudaStream_t stream) {
    const Problem& problem = args.problem;
    if (!fits(problem) || (problem.student.width > 0 && args.kept.logits == nullptr)) {
        return cudaErrorInvalidValue;
    }
    const Plan plan = plan_forward(problem);
    const bool fp64 = problem.dtype == DType::Float64;
    if (problem.student.width > 0) {
        FASTKD_TRY(fp64 ? compute_logits_fp64(problem, args.kept.logits, args.kept.norms, stream)
                        : compute_logits(problem, plan, args.kept.logits, args.kept.norms, stream))
    }
    FASTKD_TRY(fp64 ? sum_terms_fp64(args, plan, stream) : sum_terms(args, plan, stream))
    return merge_terms(args, plan, stream);
}

cudaError_t pixel_word_backward(const pixel_word::Backward& args, cudaStream_t stream) {
    const Problem& problem = args.problem;
    if (!fits(problem)) {
        return cudaErrorInvalidValue;
    }
    const Plan plan = plan_backward(problem);
    const bool fp64 = problem.dtype == DType::Float64;
    FASTKD_TRY(prepare_gradient(args, plan, stream))
    FASTKD_TRY(fp64 ? differentiate_logits_fp64(args, plan, stream) : differentiate_logits(args, plan, stream))
    if (problem.student.width == 0) {
        return cudaSuccess;
    }
    FASTKD_TRY(fp64 ? differentiate_features_fp64(args, plan, stream) : differentiate_features(args, plan, stream))
    return args.grad_words == nullptr ? cudaSuccess : merge_words(args, plan, stream);
}

} // namespace fastkd::cuda
