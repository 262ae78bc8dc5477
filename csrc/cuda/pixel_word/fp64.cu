// pixel_word on a GPU in fp64: the same steps as fp32, without tensor cores, for any strides. One warp per pixel, with
// words distributed over its lanes. Not optimised further: fp64 is slow on most GPUs.
#include "cuda/pixel_word/tile.cuh"

namespace fastkd::cuda::pixel_word {
namespace {

using pixel_word::Backward;
using pixel_word::ColumnSums;
using pixel_word::Forward;

constexpr int lane_words = most_words / warp_size;
constexpr double least_norm = pixel_word::norm_floor;

// A strided array of doubles.
struct Strided {
    const double* data;
    std::int64_t batch, pixel, column;
    FASTKD_DEVICE double at(std::int64_t sample, std::int64_t n, std::int64_t k) const {
        return data[sample * batch + n * pixel + k * column];
    }
};

struct SideArgs {
    Strided pixels;
    const double* words;
    const std::uint8_t* mask;
    double* norms; // or null
    int count, width, first_row;
};

// Compute M of one pixel per warp, one word per lane.
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS(block_threads)
    logits_fp64_kernel(SideArgs side, const std::uint8_t* pixel_mask, double* logits, int rows, std::int64_t pixels,
                       std::int64_t blocks, bool cosine) {
    const Lane at;
    const std::int64_t sample = block_x() / blocks, n = block_x() % blocks * block_warps + at.warp;
    if (n >= pixels) {
        return;
    }
    const bool pixel_ok = valid(pixel_mask, sample, n, pixels);
    for (int word = at.lane; word < side.count; word += warp_size) {
        double dot = 0, square_v = 0, square_l = 0;
        if (pixel_ok && valid(side.mask, sample, word, side.count)) {
            const double* l = side.words + (sample * side.count + word) * side.width;
            for (int d = 0; d < side.width; ++d) {
                const double v = side.pixels.at(sample, n, d);
                dot += v * l[d];
                square_v += v * v;
                square_l += l[d] * l[d];
            }
        }
        if (cosine) {
            const double norm_v = std::sqrt(square_v), norm_l = std::sqrt(square_l);
            dot /= (norm_v < least_norm ? least_norm : norm_v) * (norm_l < least_norm ? least_norm : norm_l);
        }
        logits[(sample * rows + side.first_row + word) * pixels + n] = dot;
    }
    if (side.norms != nullptr && at.lane == 0) {
        double square = 0;
        for (int d = 0; pixel_ok && d < side.width; ++d) {
            square += side.pixels.at(sample, n, d) * side.pixels.at(sample, n, d);
        }
        side.norms[sample * pixels + n] = std::sqrt(square);
    }
}

// Logits and masks of student and teacher.
struct Pair64 {
    Strided student, teacher;
    const std::uint8_t *student_mask, *teacher_mask, *pixel_mask;
    int student_count, teacher_count, words, terms;
    std::int64_t pixels;
    double student_scale, teacher_scale;
    Runs runs;
};

// The softmax over one pixel's words: a lane's M, e^u and u (0 where masked) of words lane, lane + 32, ...
struct Row {
    double m[lane_words], e[lane_words], u[lane_words];
    double inverse, sum;
};

FASTKD_DEVICE Row row_of(const Strided& logits, const std::uint8_t* mask, int count, double scale, std::int64_t sample,
                         std::int64_t n, bool pixel_ok, int lane) {
    Row row{};
    double top = softmax_kl::minus_infinity<double>();
    for (int k = 0; k < lane_words; ++k) {
        const int word = lane + k * warp_size;
        if (pixel_ok && valid(mask, sample, word, count)) {
            row.m[k] = logits.at(sample, n, word);
            top = row.m[k] > top ? row.m[k] : top;
        }
    }
    top = max_over(top, 1, warp_size);
    for (int k = 0; k < lane_words; ++k) {
        if (pixel_ok && valid(mask, sample, lane + k * warp_size, count)) {
            row.u[k] = rounded_product(row.m[k] - top, scale);
            row.e[k] = std::exp(row.u[k]);
            row.sum += row.e[k];
        }
    }
    row.sum = sum_over(row.sum, 1, warp_size);
    row.inverse = pixel_ok ? 1 / row.sum : 0;
    return row;
}

FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS(block_threads) terms_fp64_kernel(Pair64 args, double* partials) {
    FASTKD_DYNAMIC_SHARED(shared);
    FASTKD_SHARED double scratch[block_warps];
    double* const a = reinterpret_cast<double*>(shared); // A [pixel][words], then D, M_S, M_T
    const int size = fp64_step * args.words;
    const Lane at;
    const std::int64_t sample = block_x() / args.runs.blocks_per_sample,
                       run_of_sample = block_x() % args.runs.blocks_per_sample;
    const Partial<double> partial{partials + block_x() * Partial<double>::size(args.words), args.words};
    double row_kl = 0;
    ColumnSums<double> column = ColumnSums<double>::empty(); // of word thread_x()
    const int square = args.words * args.words;
    for (int s = 0; s < args.runs.steps_per_block; ++s) {
        const std::int64_t begin = (run_of_sample * args.runs.steps_per_block + s) * fp64_step, n = begin + at.warp;
        if (begin >= args.pixels) {
            break;
        }
        const bool pixel_ok = valid(args.pixel_mask, sample, n, args.pixels);
        const Row x = row_of(args.student, args.student_mask, args.student_count, args.student_scale, sample, n,
                             pixel_ok, at.lane);
        const Row y = row_of(args.teacher, args.teacher_mask, args.teacher_count, args.teacher_scale, sample, n,
                             pixel_ok, at.lane);
        double kl = 0;
        for (int k = 0; k < lane_words; ++k) {
            const int word = at.lane + k * warp_size;
            kl += y.e[k] == 0 ? 0.0 : y.e[k] * (y.u[k] - x.u[k]);
            if (word < args.words) {
                double* const to = a + at.warp * args.words + word;
                to[0] = rounded_product(x.e[k], x.inverse);
                to[size] = to[0] - rounded_product(y.e[k], y.inverse);
                to[2 * size] = x.m[k];
                to[3 * size] = y.m[k];
            }
        }
        if (pixel_ok) {
            row_kl += kl * y.inverse + (at.lane == 0 ? std::log(x.sum / y.sum) : 0.0);
        }
        block_barrier();
        if ((args.terms & pixel_word::word_to_pixel) != 0 && thread_x() < args.words) {
            for (int p = 0; p < fp64_step; ++p) {
                if (!valid(args.pixel_mask, sample, begin + p, args.pixels)) {
                    continue;
                }
                const double m_s = a[2 * size + p * args.words + thread_x()];
                const double m_t = a[3 * size + p * args.words + thread_x()];
                column.raise(m_s, m_t, args.student_scale, args.teacher_scale);
                const double u_s = rounded_product(m_s - softmax_kl::shift_of(column.max_s), args.student_scale);
                const double u_t = rounded_product(m_t - softmax_kl::shift_of(column.max_t), args.teacher_scale);
                const double e_t = std::exp(u_t);
                column.z_s += std::exp(u_s);
                column.z_t += e_t;
                column.a += e_t == 0 ? 0.0 : e_t * (u_t - u_s);
            }
        }
        for (int i = thread_x(); (args.terms & pixel_word::second_order) != 0 && i < 3 * square; i += block_threads) {
            const double* const left = a + (i < square ? 0 : size) + i % square / args.words;
            const double* const right = a + (i < 2 * square ? 0 : size) + i % args.words;
            double sum = s == 0 ? 0 : partial.matrices()[i];
            for (int p = 0; p < size; p += args.words) {
                sum += left[p] * right[p];
            }
            partial.matrices()[i] = sum;
        }
        block_barrier();
    }
    row_kl = block_sum(row_kl, scratch, block_warps);
    if (thread_x() == 0) {
        partial.data[0] = row_kl;
    }
    if (thread_x() < args.words) {
        const double members[5] = {column.max_s, column.max_t, column.z_s, column.z_t, column.a};
        for (int k = 0; k < 5; ++k) {
            partial.column(k)[thread_x()] = members[k];
        }
    }
}

struct Gradient {
    Pair64 pair;
    const Coefficients<double>* coefficients;
    const double* slopes;
    const double* columns;
    double* out;
    std::int64_t out_batch, out_pixel, out_word;
    double* projections; // <dM, M> (B, N); or null without the cosine
};

FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS(block_threads) gradient_fp64_kernel(Gradient args) {
    FASTKD_DYNAMIC_SHARED(shared);
    const Pair64& pair = args.pair;
    const Lane at;
    double* const a = reinterpret_cast<double*>(shared) + at.warp * 2 * pair.words; // A and D of the warp's pixel
    const std::int64_t sample = block_x() / pair.runs.blocks_per_sample,
                       run_of_sample = block_x() % pair.runs.blocks_per_sample;
    const Coefficients<double> by = args.coefficients[sample];
    const int square = pair.words * pair.words;
    const double* const x_slopes = args.slopes + sample * 2 * square;
    const double* const columns = args.columns + sample * 4 * pair.words;
    for (int s = 0; s < pair.runs.steps_per_block; ++s) {
        const std::int64_t n = (run_of_sample * pair.runs.steps_per_block + s) * fp64_step + at.warp;
        if (n >= pair.pixels) {
            break;
        }
        const bool pixel_ok = valid(pair.pixel_mask, sample, n, pair.pixels);
        const Row x = row_of(pair.student, pair.student_mask, pair.student_count, pair.student_scale, sample, n,
                             pixel_ok, at.lane);
        const Row y = row_of(pair.teacher, pair.teacher_mask, pair.teacher_count, pair.teacher_scale, sample, n,
                             pixel_ok, at.lane);
#pragma unroll
        for (int k = 0; k < lane_words; ++k) {
            const int word = at.lane + k * warp_size;
            if (word < pair.words) {
                a[word] = rounded_product(x.e[k], x.inverse);
                a[pair.words + word] = a[word] - rounded_product(y.e[k], y.inverse);
            }
        }
        warp_barrier();
        double da[lane_words] = {}, inner = 0, projection = 0;
#pragma unroll
        for (int k = 0; k < lane_words; ++k) {
            const int word = at.lane + k * warp_size;
            if ((pair.terms & pixel_word::second_order) == 0 || word >= pair.words) {
                break;
            }
            for (int i = 0; i < pair.words; ++i) {
                da[k] += a[i] * x_slopes[i * pair.words + word];
                da[k] += a[pair.words + i] * x_slopes[square + i * pair.words + word];
            }
            inner += valid(pair.student_mask, sample, word, pair.student_count) ? da[k] * a[word] : 0.0;
        }
        inner = sum_over(inner, 1, warp_size);
#pragma unroll
        for (int k = 0; k < lane_words; ++k) {
            const int word = at.lane + k * warp_size;
            if (word >= pair.student_count) {
                break;
            }
            double dm = 0;
            if (pixel_ok && valid(pair.student_mask, sample, word, pair.student_count)) {
                if ((pair.terms & pixel_word::second_order) != 0) {
                    dm = a[word] * (da[k] - inner);
                }
                if ((pair.terms & pixel_word::pixel_to_word) != 0) {
                    dm += by.row_kl * a[pair.words + word];
                }
                if ((pair.terms & pixel_word::word_to_pixel) != 0) {
                    const double* const column = columns + word;
                    const double e_s = std::exp(rounded_product(x.m[k] - column[0], pair.student_scale));
                    const double e_t = std::exp(rounded_product(y.m[k] - column[2 * pair.words], pair.teacher_scale));
                    const double q_s = rounded_product(e_s, column[pair.words]);
                    dm += by.column_kl * (q_s - rounded_product(e_t, column[3 * pair.words]));
                }
            }
            args.out[sample * args.out_batch + n * args.out_pixel + word * args.out_word] = dm;
            projection += dm * x.m[k];
        }
        projection = sum_over(projection, 1, warp_size);
        if (args.projections != nullptr && at.lane == 0) {
            args.projections[sample * pair.pixels + n] = projection;
        }
        warp_barrier(); // before A and D are overwritten
    }
}

struct Features {
    Strided pixels; // V
    Strided grad_pixels;
    const double* words; // L
    const std::uint8_t *word_mask, *pixel_mask;
    const double* grad_logits;         // dM (B, T, N)
    const double *norms, *projections; // (B, N); or null without the cosine
    double* sums;
    std::int64_t pixel_count;
    int count, width, step;
    Runs runs;
};

// Compute dV of a thread block's pixels, and their part of dM^T V.
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS(block_threads) features_fp64_kernel(Features args) {
    FASTKD_SHARED double inverse[most_words]; // 1/|L|, 0 for masked words
    const Lane at;
    const std::int64_t sample = block_x() / args.runs.blocks_per_sample,
                       run_of_sample = block_x() % args.runs.blocks_per_sample;
    for (int word = at.warp; word < args.count; word += block_warps) {
        double square = 0;
        for (int d = at.lane; args.norms != nullptr && d < args.width; d += warp_size) {
            const double l = args.words[(sample * args.count + word) * args.width + d];
            square += l * l;
        }
        const double norm = args.norms != nullptr ? std::sqrt(sum_over(square, 1, warp_size)) : 1.0;
        const bool ok = valid(args.word_mask, sample, word, args.count);
        if (at.lane == 0) {
            inverse[word] = ok ? 1 / (norm < least_norm ? least_norm : norm) : 0.0;
        }
    }
    block_barrier();
    const double* const grad_logits = args.grad_logits + sample * args.count * args.pixel_count;
    const std::int64_t first = run_of_sample * args.runs.steps_per_block * args.step,
                       beyond = first + args.runs.steps_per_block * args.step;
    const std::int64_t end = beyond < args.pixel_count ? beyond : args.pixel_count;
    for (std::int64_t i = thread_x(); args.grad_pixels.data != nullptr && i < (end - first) * args.width;
         i += block_threads) {
        const std::int64_t n = first + i / args.width;
        const int d = static_cast<int>(i % args.width);
        double dv = 0;
        for (int word = 0; word < args.count; ++word) {
            if (inverse[word] != 0) {
                const double l = args.words[(sample * args.count + word) * args.width + d];
                dv += grad_logits[word * args.pixel_count + n] * inverse[word] * l;
            }
        }
        if (args.norms != nullptr) {
            const double norm = args.norms[sample * args.pixel_count + n];
            const double projection = args.projections[sample * args.pixel_count + n] / norm;
            dv = norm <= least_norm ? 0.0 : (dv - args.pixels.at(sample, n, d) * projection) / norm;
        }
        const Strided& out = args.grad_pixels;
        const_cast<double*>(out.data)[sample * out.batch + n * out.pixel + d * out.column] =
            valid(args.pixel_mask, sample, n, args.pixel_count) ? dv : 0.0;
    }
    for (int i = thread_x(); args.sums != nullptr && i < args.count * args.width; i += block_threads) {
        const int word = i / args.width, d = i % args.width;
        double sum = 0;
        for (std::int64_t n = first; n < end; ++n) {
            if (valid(args.pixel_mask, sample, n, args.pixel_count)) {
                const double norm = args.norms != nullptr ? args.norms[sample * args.pixel_count + n] : 1.0;
                sum += grad_logits[word * args.pixel_count + n] / (norm < least_norm ? least_norm : norm) *
                       args.pixels.at(sample, n, d);
            }
        }
        args.sums[block_x() * args.count * args.width + i] = sum;
    }
}

Strided strided(const pixel_word::Array& array) {
    return {static_cast<const double*>(array.data), array.batch, array.pixel, array.column};
}

Pair64 pair_of(const Problem& problem, const Plan& plan, const void* kept, Runs runs) {
    const Logits student = logits_of(problem, kept, true), teacher = logits_of(problem, kept, false);
    const auto of = [](const Logits& logits) {
        return Strided{static_cast<const double*>(logits.data), logits.batch, logits.pixel, logits.word};
    };
    return {of(student),           of(teacher),           student.mask, teacher.mask,  problem.pixel_mask,
            student.count,         teacher.count,         plan.words,   problem.terms, problem.pixels,
            problem.student.scale, problem.teacher.scale, runs};
}

} // namespace

cudaError_t compute_logits_fp64(const Problem& problem, void* logits, void* norms, cudaStream_t stream) {
    const int rows = static_cast<int>(problem.student.word_count + problem.teacher.word_count);
    const std::int64_t blocks = ceil_div(problem.pixels, block_warps);
    for (int i = 0; i < 2; ++i) {
        const Side& side = i == 0 ? problem.student : problem.teacher;
        const SideArgs args{strided(side.pixels),
                            static_cast<const double*>(side.words),
                            side.word_mask,
                            i == 0 ? static_cast<double*>(norms) : nullptr,
                            static_cast<int>(side.word_count),
                            static_cast<int>(side.width),
                            i == 0 ? 0 : static_cast<int>(problem.student.word_count)};
        const cudaError_t error =
            launch(logits_fp64_kernel, {problem.batch * blocks, block_threads}, stream, args, problem.pixel_mask,
                   static_cast<double*>(logits), rows, problem.pixels, blocks, problem.cosine);
        if (error != cudaSuccess) {
            return error;
        }
    }
    return cudaSuccess;
}

cudaError_t sum_terms_fp64(const Forward& args, const Plan& plan, cudaStream_t stream) {
    const Problem& problem = args.problem;
    const Grid grid{problem.batch * plan.terms.blocks_per_sample, block_threads, 1, 4 * fp64_step * plan.words * 8};
    return launch(terms_fp64_kernel, grid, stream, pair_of(problem, plan, args.kept.logits, plan.terms),
                  at_bytes<double>(args.workspace, plan.partials));
}

cudaError_t differentiate_logits_fp64(const Backward& args, const Plan& plan, cudaStream_t stream) {
    const Problem& problem = args.problem;
    const Strided out = strided(args.grad_pixels);
    Gradient gradient{pair_of(problem, plan, args.kept.logits, plan.gradient),
                      at_bytes<Coefficients<double>>(args.workspace, plan.coefficients),
                      at_bytes<double>(args.workspace, plan.slopes),
                      static_cast<const double*>(args.kept.columns),
                      const_cast<double*>(out.data),
                      out.batch,
                      out.pixel,
                      out.column,
                      problem.cosine ? at_bytes<double>(args.workspace, plan.projections) : nullptr};
    if (problem.student.width > 0) {
        gradient.out = at_bytes<double>(args.workspace, plan.grad_logits);
        gradient.out_batch = problem.student.word_count * problem.pixels;
        gradient.out_pixel = 1;
        gradient.out_word = problem.pixels;
    }
    const Grid grid{problem.batch * plan.gradient.blocks_per_sample, block_threads, 1,
                    block_warps * 2 * plan.words * 8};
    return launch(gradient_fp64_kernel, grid, stream, gradient);
}

cudaError_t differentiate_features_fp64(const Backward& args, const Plan& plan, cudaStream_t stream) {
    const Problem& problem = args.problem;
    const Side& student = problem.student;
    const Features features{strided(student.pixels),
                            strided(args.grad_pixels),
                            static_cast<const double*>(student.words),
                            student.word_mask,
                            problem.pixel_mask,
                            at_bytes<double>(args.workspace, plan.grad_logits),
                            problem.cosine ? static_cast<const double*>(args.kept.norms) : nullptr,
                            problem.cosine ? at_bytes<double>(args.workspace, plan.projections) : nullptr,
                            args.grad_words == nullptr ? nullptr : at_bytes<double>(args.workspace, plan.sums),
                            problem.pixels,
                            static_cast<int>(student.word_count),
                            static_cast<int>(student.width),
                            fp64_features_step,
                            plan.runs};
    return launch(features_fp64_kernel, {problem.batch * plan.runs.blocks_per_sample, block_threads}, stream, features);
}

} // namespace fastkd::cuda::pixel_word
