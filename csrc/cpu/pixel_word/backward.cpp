// pixel_word on the CPU, backward: one pass over the saved logits and the student's pixels; the formulas are in
// common/pixel_word.h. Per panel: A and D from the logits, dM, then dV = dM L and the chunk's part of dL = dM^T V.
#include "common/pixel_word.h"

#include "cpu/kernels.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/pixel_word/plan.h"
#include "cpu/pixel_word/samples.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

using pixel_word::Backward;

// Compute the coefficients of one sample's gradient with respect to its logits.
template <class T>
Coefficients<T> coefficients_of(const Backward& args, const Plan<T>& plan, std::int64_t b, T* mix) {
    const Sample& sample = plan.samples[b];
    const T* grad = static_cast<const T*>(args.grad_loss) + b * args.grad_loss_strides[0];
    const double scale = static_cast<double>(static_cast<T>(plan.problem.student.scale));
    const auto of = [&](int term) __attribute__((always_inline)) {
        return (plan.problem.terms >> term & 1) != 0 ? scale * grad[term * args.grad_loss_strides[1]] : 0.0;
    };
    const double pixels = static_cast<double>(sample.pixels);
    Coefficients<T> by{nullptr, plan.has(pixel_word::pixel_pixel), static_cast<T>(of(0) / pixels),
                       static_cast<T>(of(1) / static_cast<double>(sample.words))};
    if (plan.has(pixel_word::second_order)) {
        const double pp = 4 * of(2) / (pixels * pixels), ww = 4 * of(3) / (pixels * pixels);
        const std::int64_t words = sample.words, size = plan.words * plan.words;
        const T* g = static_cast<const T*>(args.kept.grams) + b * 3 * size;
        const T* k = g + size;
        const T* e = k + size;
        for (std::int64_t i = 0; i < words; ++i) {
            for (std::int64_t j = 0; j < words; ++j) {
                const std::int64_t ij = i * plan.words + j, ji = j * plan.words + i;
                mix[i * words + j] = static_cast<T>(pixel_word::slope_x<double>(k[ij], k[ji], e[ij], pp, ww));
                mix[(words + i) * words + j] = static_cast<T>(pixel_word::slope_z<double>(g[ij], k[ij], pp));
            }
        }
        by.mix = mix;
    }
    return by;
}

// Load both networks' logits: the saved ones, or the inputs.
template <class T>
Logits<T> backward_logits(const Backward& args, const Plan<T>& plan, const Pixels<T>& pixels,
                          const Scratch<T>& scratch) {
    const Problem& problem = plan.problem;
    const Sample& sample = plan.samples[pixels.sample];
    Array student = problem.student.pixels, teacher = problem.teacher.pixels;
    if (plan.from_features()) {
        const std::int64_t rows = problem.student.word_count + problem.teacher.word_count;
        student = {args.kept.logits, problem.dtype, rows * problem.pixels, 1, problem.pixels};
        teacher = student;
        teacher.data = static_cast<const T*>(args.kept.logits) + problem.student.word_count * problem.pixels;
    }
    load_logits(student, pixels, sample.student_word, sample.words, scratch.student, plan.panel_pixels);
    load_logits(teacher, pixels, sample.teacher_word, sample.words, scratch.teacher, plan.panel_pixels);
    return {scratch.student,           scratch.teacher, sample.words, plan.panel_pixels, exp_of<T>(problem.student),
            exp_of<T>(problem.teacher)};
}

// Return the memory of the next panel's saved logits.
template <class T>
FASTKD_INLINE Prefetch next_logits(const Backward& args, const Plan<T>& plan, const Pixels<T>& pixels) {
    const Problem& problem = plan.problem;
    const std::int64_t begin = pixels.begin + plan.panel_pixels;
    if (!plan.from_features() || begin >= problem.pixels) {
        return {};
    }
    const std::int64_t rows = problem.student.word_count + problem.teacher.word_count, size = sizeof(T);
    Prefetch fetch;
    fetch.row = static_cast<const char*>(args.kept.logits) + (pixels.sample * rows * problem.pixels + begin) * size;
    fetch.rows = rows;
    fetch.stride = problem.pixels * size;
    fetch.bytes = smaller(plan.panel_pixels, problem.pixels - begin) * size;
    return fetch;
}

// Write d/dM to scratch.out; 0 for invalid pixels.
template <class T>
void gradient_of_logits(const Backward& args, const Plan<T>& plan, const Pixels<T>& pixels, const Coefficients<T>& by,
                        const Logits<T>& logits, const Scratch<T>& scratch) {
    T* d = scratch.a + logits.words * logits.stride;
    const bool over_words = plan.has(pixel_word::over_words);
    if (over_words) {
        attend<T, false>(logits, pixels, scratch.a, d, next_logits(args, plan, pixels));
        gradient_over_words(by, scratch.a, d, logits.words, logits.stride, pixels.width, scratch.out);
    }
    if (plan.has(pixel_word::word_to_pixel)) {
        const double* lse = static_cast<const double*>(args.kept.columns) + 2 * pixels.sample * plan.words;
        gradient_over_pixels(logits, by.word_to_pixel, lse, lse + plan.words, pixels.width, over_words, scratch.out);
    }
    for (std::int64_t k = 0; pixels.valid != nullptr && k < logits.words; ++k) {
        keep_valid(scratch.out + k * logits.stride, pixels.valid, pixels.width);
    }
}

// For the cosine, write scratch.scaled = dM/|V| and own = -<dM, M>/|V|^2, the coefficient of V in each pixel's
// gradient.
template <class T>
void scale_by_norms(const Backward& args, const Plan<T>& plan, const Pixels<T>& pixels, const Logits<T>& logits,
                    const Scratch<T>& scratch, T* own) {
    const Sample& sample = plan.samples[pixels.sample];
    const T* kept = static_cast<const T*>(args.kept.norms) + pixels.sample * plan.problem.pixels + pixels.begin;
    load_row(kept, pixels.count, scratch.norms, pixels.width);
    for (std::int64_t p = 0; p < pixels.width; p += lanes<T>) {
        const Vec<T> inverse = inverse_norms<T>(scratch.norms + p);
        Vec<T> along{};
        for (std::int64_t k = 0; k < logits.words; ++k) {
            const Vec<T> g = load(scratch.out + k * logits.stride + p);
            if (sample.student_word[k] >= 0) {
                along += g * load(logits.student + k * logits.stride + p);
            }
            store(scratch.scaled + k * logits.stride + p, g * inverse);
        }
        store(own + p, -along * inverse * inverse);
    }
}

// Write dV = dM L to memory.
template <class T>
void gradient_of_pixels(const Backward& args, const Plan<T>& plan, const Pixels<T>& pixels, const Panel<T>& panel,
                        T* d_m, T* own, std::int64_t words, const Scratch<T>& scratch, Prefetch fetch) {
    const std::int64_t columns = plan.problem.student.width, padded = plan.width_student;
    const T* packed = plan.words_student + pixels.sample * plan.words * padded;
    const PanelOut<T> out = start_panel(args.grad_pixels, pixels, columns, padded, plan.streams(), scratch.gradient);
    const bool cosine = plan.problem.cosine;
    const Store mode = cosine ? Store::add : (out.stream && out.in_memory ? Store::stream : Store::set);
    if (cosine) { // pixels of zero norm get a zero gradient
        for (std::int64_t k = -1; k < words; ++k) {
            keep_valid(k < 0 ? own : d_m + k * plan.panel_pixels, scratch.norms, pixels.width);
        }
        for (std::int64_t i = 0; i < (out.by_pixel ? pixels.width : columns); ++i) {
            for (std::int64_t j = 0; j < (out.by_pixel ? padded : pixels.width); j += lanes<T>) {
                const Vec<T> by = out.by_pixel ? broadcast(own[i]) : load(own + j);
                store(out.data + i * out.stride + j, by * load(panel.data + i * panel.stride + j));
            }
        }
    }
    if (out.by_pixel) {
        multiply<T>({d_m, 1, plan.panel_pixels}, packed, padded, out.data, out.stride, pixels.width, padded, words,
                    Walk::across, mode, fetch);
    } else {
        multiply<T>({packed, 1, padded}, d_m, plan.panel_pixels, out.data, out.stride, columns, pixels.width, words,
                    Walk::across, mode, fetch);
    }
    finish_panel(out, args.grad_pixels, pixels, columns);
}

#if defined(FASTKD_BF16_PRODUCTS)
// Compute both gradients from bfloat16 without widening, with dM split into a sum of two bfloat16.
void gradients_of_pairs(const Backward& args, const Plan<float>& plan, const Pixels<float>& pixels, std::int64_t words,
                        const Scratch<float>& scratch, float* grad_words) {
    const Side& student = plan.problem.student;
    const std::int64_t stride = plan.panel_pixels, padded = plan.width_student, columns = student.width;
    const std::int64_t strips = round_up(pixels.width, pair_strip);
    auto* high = reinterpret_cast<BFloat16*>(scratch.student); // the logits are no longer needed
    auto* low = high + words * stride;
    auto* pairs = reinterpret_cast<PairWord*>(scratch.teacher);
    split_rows(scratch.out, words, pixels.width, stride, high, low, pairs);
    if (args.grad_words != nullptr) {
        const PanelBF16 panel =
            load_panel_bf16(student.pixels, pixels, columns, reinterpret_cast<BFloat16*>(scratch.panel));
        for (int i = 0; i < 2; ++i) {
            const BFloat16* part = i == 0 ? high : low;
            const Prefetch fetch = i == 0 ? plan.next(student, pixels) : Prefetch{};
            if (panel.by_pixel) {
                multiply_pairs({reinterpret_cast<const PairWord*>(part), stride / 2, 1},
                               PairsOfRows{panel.data, panel.stride}, grad_words, padded, words, padded,
                               pixels.width / 2, Store::add, fetch);
            } else {
                add_transposed_pairs(part, stride, panel.data, panel.stride, grad_words, padded, words, columns, strips,
                                     fetch);
            }
        }
    }
    if (args.grad_pixels.data == nullptr) {
        return;
    }
    const auto* packed = reinterpret_cast<const PairWord*>(plan.words_student + pixels.sample * plan.words * padded);
    const PanelBF16Out out = start_panel_bf16(args.grad_pixels, pixels, columns, plan.streams(),
                                              reinterpret_cast<BFloat16*>(scratch.gradient));
    if (by_pixel(args.grad_pixels)) {
        multiply_pairs({pairs, 1, stride}, PackedPairs{packed, padded}, out.data, out.stride, pixels.count, padded,
                       words, out.mode);
    } else {
        multiply_pairs({packed, 1, padded}, PackedPairs{pairs, stride}, out.data, out.stride, columns, strips, words,
                       out.mode);
    }
    finish_panel_bf16(out, args.grad_pixels, pixels, columns);
}
#endif

// Write the gradient of one panel's pixels, and add its part of the words' gradient to grad_words.
template <class T>
void backward_panel(const Backward& args, const Plan<T>& plan, const Pixels<T>& pixels, const Coefficients<T>& by,
                    const Scratch<T>& scratch, T* grad_words) {
    const Problem& problem = plan.problem;
    const Sample& sample = plan.samples[pixels.sample];
    const std::int64_t words = sample.words, stride = plan.panel_pixels;
    const Logits<T> logits = backward_logits(args, plan, pixels, scratch);
    gradient_of_logits(args, plan, pixels, by, logits, scratch);
    if (!plan.from_features()) {
        store_logits(args.grad_pixels, pixels, sample.student_slot, problem.student.word_count, scratch.out, stride);
        return;
    }
#if defined(FASTKD_BF16_PRODUCTS)
    if constexpr (sizeof(T) == sizeof(float)) {
        if (plan.pairs_student) {
            gradients_of_pairs(args, plan, pixels, words, scratch, grad_words);
            return;
        }
    }
#endif
    T* d_m = scratch.out;
    T* own = scratch.norms + stride;
    if (problem.cosine) {
        scale_by_norms(args, plan, pixels, logits, scratch, own);
        d_m = scratch.scaled;
    }
    Panel<T> panel{};
    if (args.grad_words != nullptr || problem.cosine) {
        panel = load_panel(problem.student.pixels, pixels, problem.student.width, plan.width_student, problem.cosine,
                           scratch.panel);
    }
    const Prefetch fetch = panel.data == nullptr ? Prefetch{} : plan.next(problem.student, pixels);
    const bool for_pixels = args.grad_pixels.data != nullptr;
    if (args.grad_words != nullptr) {
        if (panel.by_pixel) {
            multiply<T>({d_m, stride, 1}, panel.data, panel.stride, grad_words, plan.width_student, words,
                        plan.width_student, pixels.width, Walk::down, Store::add, for_pixels ? Prefetch{} : fetch);
        } else {
            multiply_transposed(d_m, stride, panel.data, panel.stride, grad_words, plan.width_student, words,
                                problem.student.width, pixels.width, true, false, for_pixels ? Prefetch{} : fetch);
        }
    }
    if (for_pixels) {
        gradient_of_pixels(args, plan, pixels, panel, d_m, own, words, scratch, fetch);
    }
}

// Compute the words' gradient of a sample from its chunks' sums.
template <class T>
void finish_words(const Backward& args, const Plan<T>& plan, std::int64_t b) {
    const Sample& sample = plan.samples[b];
    const std::int64_t columns = plan.problem.student.width, padded = plan.width_student;
    const std::int64_t count = plan.problem.student.word_count;
    for (std::int64_t w = 0; w < count; ++w) {
        T* out = static_cast<T*>(args.grad_words) + (b * count + w) * columns;
        const std::int64_t k = sample.student_slot[w];
        if (k < 0) {
            __builtin_memset(static_cast<void*>(out), 0, columns * sizeof(T));
            continue;
        }
        const T* unit = plan.words_student + (b * plan.words + k) * padded;
        double along = 0;
        constexpr std::int64_t block = 256; // columns of one chunk to read before the next, which is far away
        for (std::int64_t first = 0; first < columns; first += block) {
            const std::int64_t size = smaller(block, columns - first);
            double sums[block] = {};
            for (std::int64_t c = 0; c < plan.chunks; ++c) {
                const T* part = plan.template partial<T>(b * plan.chunks + c) + k * padded + first;
                for (std::int64_t d = 0; d < size; ++d) {
                    sums[d] += static_cast<double>(part[d]);
                }
            }
            for (std::int64_t d = 0; d < size; ++d) {
                out[first + d] = static_cast<T>(sums[d]);
                along += plan.problem.cosine ? sums[d] * unit[first + d] : 0;
            }
        }
        if (plan.problem.cosine) {
            const double norm = static_cast<double>(plan.word_norms[b * plan.words + k]);
            for (std::int64_t d = 0; d < columns; ++d) {
                out[d] = norm == 0 ? T(0) : static_cast<T>((static_cast<double>(out[d]) - along * unit[d]) / norm);
            }
        }
    }
}

template <class T>
void backward_group(const Backward& args, const Plan<T>& plan) {
    const std::int64_t batch = args.problem.batch;
    const bool for_words = args.grad_words != nullptr;
    const auto workers = static_cast<int>(plan.threads);
    parallel_for(workers, batch, [&](std::int64_t b, int) { prepare_sample(plan, b, true); });
    parallel_for(workers, plan.threads, [&](std::int64_t thread, int) {
        Arena<64> arena(plan.scratch + thread * plan.scratch_size);
        const Scratch<T> scratch = lay_out_scratch(plan, arena, true);
        each_unit(plan, thread, [&](std::int64_t unit) {
            const Coefficients<T> by = coefficients_of(args, plan, unit / plan.chunks, scratch.mix);
            T* grad_words = plan.template partial<T>(unit);
            if (for_words) {
                __builtin_memset(static_cast<void*>(grad_words), 0, plan.partial_size);
            }
            each_panel(plan, unit, scratch.valid,
                       [&](const Pixels<T>& pixels) { backward_panel(args, plan, pixels, by, scratch, grad_words); });
        });
        stream_fence();
    });
    if (for_words) {
        parallel_for(workers, batch, [&](std::int64_t b, int) { finish_words(args, plan, b); });
    }
}

template <class T>
void backward(const Backward& args, int threads) {
    Plan<T> plan = make_plan<T>(args.problem, true, args.workspace, threads);
    const Array& out = args.grad_pixels;
    const std::int64_t sample = args.problem.pixels * args.problem.student.width;
    if (out.data != nullptr && out.batch == sample) {
        advise_huge_pages(const_cast<void*>(out.data), args.problem.batch * sample * element_size(out.dtype));
    }
    for (std::int64_t first = 0; first < args.problem.batch; first += plan.group) {
        const Backward part = part_of(args, first, smaller(plan.group, args.problem.batch - first));
        plan.problem = part.problem;
        backward_group(part, plan);
    }
}

} // namespace

void pixel_word_backward(const Backward& args, int threads) {
    args.problem.dtype == DType::Float64 ? backward<double>(args, threads) : backward<float>(args, threads);
}

} // namespace fastkd::cpu::FASTKD_ISA
