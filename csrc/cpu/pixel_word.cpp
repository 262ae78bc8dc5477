// pixel_word on the CPU. The formulas are those of common/pixel_word.h; here is how they walk over the pixels.
//
// Forward: one pass. A panel of pixels is read once, its logits are computed in the caches, and all terms' sums are
// taken from there. The logits are kept for the backward: words are few, so they are small beside the features, and
// computing them again would cost reading both networks' pixels and half of the products.
// Backward: one pass over the kept logits and the student's pixels.
#include "common/pixel_word.h"

#include "cpu/kernels.h"
#include "cpu/pixel_word_plan.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

using pixel_word::Backward;
using pixel_word::Forward;

// Calls f with each of a thread's units, threads having consecutive ones: their pixels lie one after the other.
template <class T, class F>
FASTKD_INLINE void each_unit(const Plan<T>& plan, std::int64_t thread, F f) {
    const std::int64_t end = (thread + 1) * plan.units() / plan.threads;
    for (std::int64_t unit = thread * plan.units() / plan.threads; unit < end; ++unit) {
        f(unit);
    }
}

// Calls f with each panel of a unit.
template <class T, class F>
FASTKD_INLINE void each_panel(const Plan<T>& plan, std::int64_t unit, T* valid, F f) {
    const std::int64_t begin = unit % plan.chunks * plan.chunk_pixels;
    const std::int64_t end = least(begin + plan.chunk_pixels, plan.problem.pixels);
    for (std::int64_t p = begin; p < end; p += plan.panel_pixels) {
        f(plan.pixels_at(unit / plan.chunks, p, end, valid));
    }
}

template <class T>
FASTKD_INLINE ScaledExp<T> exp_of(const Network& network) {
    return ScaledExp<T>{static_cast<T>(network.scale)};
}

// ---- forward -------------------------------------------------------------------------------------------------------

// One network's logits of a panel, from its features. `norms` receives those of the pixels, for the cosine.
template <class T>
void logits_of(const Plan<T>& plan, const Network& network, const Pixels<T>& pixels, const std::int32_t* word,
               std::int64_t words, const T* packed, std::int64_t padded, T* scratch, T* norms, T* out, Prefetch fetch) {
    const std::int64_t stride = plan.panel_pixels;
    const Panel<T> panel = load_panel(network.pixels, pixels, network.width, padded, true, scratch);
    if (panel.by_pixel) {
        multiply_transposed(packed, padded, panel.data, panel.stride, out, stride, words, pixels.width, padded, false,
                            false, fetch);
    } else {
        multiply<T>({packed, padded, 1}, panel.data, panel.stride, out, stride, words, pixels.width, network.width,
                    Walk::down, Store::set, fetch);
    }
    if (plan.problem.cosine) {
        pixel_norms(panel, network.width, padded, pixels.width, norms);
    }
    for (std::int64_t k = 0; k < words; ++k) {
        T* row = out + k * stride;
        for (std::int64_t p = 0; p < pixels.width; p += lanes<T>) {
            if (word[k] < 0) {
                store(row + p, broadcast(softmax_kl::minus_infinity<T>()));
            } else if (plan.problem.cosine) {
                store(row + p, load(row + p) * inverse_norms<T>(norms + p));
            }
        }
    }
}

template <class T>
void keep_logits(const Plan<T>& plan, const Pixels<T>& pixels, const Scratch<T>& scratch, void* kept) {
    const Problem& problem = plan.problem;
    const Sample& sample = plan.samples[pixels.sample];
    const std::int64_t rows = problem.student.word_count + problem.teacher.word_count;
    T* out = static_cast<T*>(kept) + pixels.sample * rows * problem.pixels + pixels.begin;
    for (std::int64_t k = 0; k < sample.words; ++k) {
        if (sample.student_word[k] >= 0) {
            store_row(scratch.student + k * plan.panel_pixels, pixels.count,
                      out + sample.student_word[k] * problem.pixels);
        }
        if (sample.teacher_word[k] >= 0) {
            store_row(scratch.teacher + k * plan.panel_pixels, pixels.count,
                      out + (problem.student.word_count + sample.teacher_word[k]) * problem.pixels);
        }
    }
    const auto clear = [&](const Network& network, std::int64_t first) __attribute__((always_inline)) {
        for (std::int64_t w = 0; w < network.word_count; ++w) {
            if (!has_word(network, pixels.sample, w)) {
                __builtin_memset(static_cast<void*>(out + (first + w) * problem.pixels), 0, pixels.count * sizeof(T));
            }
        }
    };
    clear(problem.student, 0);
    clear(problem.teacher, problem.student.word_count);
}

struct ForwardSums {
    double* row_kl;
    double* grams;           // [3][words][words]: G, K, E
    KLState<double>* states; // [words]
};

template <class T>
FASTKD_INLINE ForwardSums sums_of(const Plan<T>& plan, std::int64_t unit) {
    auto* begin = plan.template partial<double>(unit);
    const std::int64_t grams = plan.has(pixel_word::second_order) ? 3 * plan.words * plan.words : 0;
    return {begin, begin + 1, reinterpret_cast<KLState<double>*>(begin + 1 + grams)};
}

template <class T>
void forward_panel(const Forward& args, const Plan<T>& plan, const Pixels<T>& pixels, const Scratch<T>& scratch,
                   ForwardSums sums) {
    const Problem& problem = plan.problem;
    const Sample& sample = plan.samples[pixels.sample];
    const std::int64_t stride = plan.panel_pixels, words = sample.words;
    if (plan.from_features()) {
        logits_of(plan, problem.teacher, pixels, sample.teacher_word, words,
                  plan.words_teacher + pixels.sample * plan.words * plan.width_teacher, plan.width_teacher,
                  scratch.panel, scratch.norms, scratch.teacher,
                  prefetch_of(problem.student.pixels, pixels, problem.student.width));
        logits_of(plan, problem.student, pixels, sample.student_word, words,
                  plan.words_student + pixels.sample * plan.words * plan.width_student, plan.width_student,
                  scratch.panel, scratch.norms, scratch.student, plan.next(problem.teacher, pixels));
        if (args.kept.logits != nullptr) {
            keep_logits(plan, pixels, scratch, args.kept.logits);
        }
        if (args.kept.norms != nullptr) {
            store_row(scratch.norms, pixels.count,
                      static_cast<T*>(args.kept.norms) + pixels.sample * problem.pixels + pixels.begin);
        }
    } else {
        load_logits(problem.teacher.pixels, pixels, sample.teacher_word, words, scratch.teacher, stride);
        load_logits(problem.student.pixels, pixels, sample.student_word, words, scratch.student, stride);
    }
    const Logits<T> logits{scratch.student,           scratch.teacher, words, stride, exp_of<T>(problem.student),
                           exp_of<T>(problem.teacher)};
    const bool second = plan.has(pixel_word::second_order);
    T* a = second ? scratch.a : nullptr;
    T* d = scratch.a + words * stride;
    if (plan.has(pixel_word::pixel_to_word)) {
        *sums.row_kl += attend<T, true>(logits, pixels, a, d);
    } else if (second) {
        attend<T, false>(logits, pixels, a, d);
    }
    if (second) {
        for (std::int64_t k = 0; pixels.valid != nullptr && k < 2 * words; ++k) {
            keep_valid(a + k * stride, pixels.valid, pixels.width);
        }
        const std::int64_t size = plan.words * plan.words;
        const auto gram = [&](const T* left, const T* right, double* to, bool symmetric)
                              __attribute__((always_inline)) {
                                  multiply_transposed(left, stride, right, stride, to, plan.words, words, words,
                                                      pixels.width, true, symmetric);
                              };
        gram(a, a, sums.grams, true);
        gram(d, a, sums.grams + size, false);
        gram(d, d, sums.grams + 2 * size, true);
    }
    if (plan.has(pixel_word::word_to_pixel)) {
        accumulate_columns(logits, pixels, sums.states, scratch.maxima);
    }
}

// The losses of a sample, and what is kept of it, from its chunks' sums.
template <class T>
void finish_forward(const Forward& args, const Plan<T>& plan, std::int64_t b) {
    const Sample& sample = plan.samples[b];
    const std::int64_t words = sample.words, size = plan.words * plan.words, batch = plan.problem.batch;
    const double pixels = static_cast<double>(sample.pixels);
    const ForwardSums sums = sums_of(plan, b * plan.chunks); // those of the first chunk become those of all
    T* loss = static_cast<T*>(args.loss) + b * pixel_word::term_count;
    for (int term = 0; term < pixel_word::term_count; ++term) {
        loss[term] = T(0);
    }
    double word_to_pixel = 0;
    for (std::int64_t c = 1; c < plan.chunks; ++c) {
        const ForwardSums more = sums_of(plan, b * plan.chunks + c);
        *sums.row_kl += *more.row_kl;
        for (std::int64_t i = 0; plan.has(pixel_word::second_order) && i < 3 * size; ++i) {
            sums.grams[i] += more.grams[i];
        }
        for (std::int64_t k = 0; plan.has(pixel_word::word_to_pixel) && k < words; ++k) {
            KLState<double>& state = sums.states[k];
            KLState<double>& other = more.states[k];
            state.raise(other.max_s, other.max_t, 1.0);
            other.raise(state.max_s, state.max_t, 1.0);
            state.add(other.z_s, other.z_t, other.a);
        }
    }
    if (plan.has(pixel_word::pixel_to_word)) {
        loss[0] = static_cast<T>(*sums.row_kl / pixels);
    }
    if (plan.has(pixel_word::word_to_pixel)) {
        for (std::int64_t k = 0; k < words; ++k) {
            word_to_pixel += sums.states[k].loss();
        }
        loss[1] = static_cast<T>(word_to_pixel / static_cast<double>(words));
    }
    double* columns = args.kept.columns;
    for (std::int64_t k = 0; columns != nullptr && k < plan.words; ++k) {
        const bool there = k < words;
        const KLState<double>& state = sums.states[there ? k : 0];
        columns[b * plan.words + k] = there ? softmax_kl::log_sum_exp(state.max_s, __builtin_log(state.z_s), 1.0) : 0;
        columns[(batch + b) * plan.words + k] =
            there ? softmax_kl::log_sum_exp(state.max_t, __builtin_log(state.z_t), 1.0) : 0;
    }
    if (!plan.has(pixel_word::second_order)) {
        return;
    }
    double pixel_pixel = 0, word_word = 0;
    T* kept = static_cast<T*>(args.kept.grams);
    kept += kept == nullptr ? 0 : b * 3 * size;
    for (std::int64_t i = 0; i < plan.words; ++i) {
        for (std::int64_t j = 0; j < plan.words; ++j) {
            const bool there = i < words && j < words;
            const std::int64_t ij = i * plan.words + j, ji = j * plan.words + i, lower = i > j ? ij : ji;
            const double g = there ? sums.grams[lower] : 0, e = there ? sums.grams[2 * size + lower] : 0;
            const double k = there ? sums.grams[size + ij] : 0, k_t = there ? sums.grams[size + ji] : 0;
            pixel_pixel += (g + (g - k - k_t + e)) * e + 2 * k * (k_t - e);
            word_word += (k + k_t - e) * (k + k_t - e);
            if (kept != nullptr) {
                kept[ij] = static_cast<T>(g);
                kept[size + ij] = static_cast<T>(k);
                kept[2 * size + ij] = static_cast<T>(e);
            }
        }
    }
    if (plan.has(pixel_word::pixel_pixel)) {
        loss[2] = static_cast<T>(pixel_pixel / (pixels * pixels));
    }
    if (plan.has(pixel_word::word_word)) {
        loss[3] = static_cast<T>(word_word / (pixels * pixels));
    }
}

template <class T>
void forward(const Forward& args, int threads) {
    const Plan<T> plan = make_plan<T>(args.problem, false, args.workspace, threads);
    const std::int64_t batch = args.problem.batch;
#pragma omp parallel num_threads(static_cast<int>(plan.threads))
    {
#pragma omp for schedule(static)
        for (std::int64_t b = 0; b < batch; ++b) {
            prepare_sample(plan, b, false);
        }
#pragma omp for schedule(static)
        for (std::int64_t thread = 0; thread < plan.threads; ++thread) {
            Arena arena(plan.scratch + thread * plan.scratch_size);
            const Scratch<T> scratch = lay_out_scratch(plan, arena, false);
            each_unit(plan, thread, [&](std::int64_t unit) {
                const ForwardSums sums = sums_of(plan, unit);
                *sums.row_kl = 0;
                for (std::int64_t k = 0; plan.has(pixel_word::word_to_pixel) && k < plan.words; ++k) {
                    sums.states[k] = KLState<double>::of_nothing();
                    scratch.maxima[k] = {softmax_kl::minus_infinity<T>(), softmax_kl::minus_infinity<T>()};
                }
                for (std::int64_t i = 0; plan.has(pixel_word::second_order) && i < 3 * plan.words * plan.words; ++i) {
                    sums.grams[i] = 0; // also what lies above the diagonal
                }
                each_panel(plan, unit, scratch.valid,
                           [&](const Pixels<T>& pixels) { forward_panel(args, plan, pixels, scratch, sums); });
            });
        }
#pragma omp for schedule(static)
        for (std::int64_t b = 0; b < batch; ++b) {
            finish_forward(args, plan, b);
        }
    }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// The coefficients of one sample's gradient with respect to its logits.
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
                const double w = static_cast<double>(k[ij]) + k[ji] - e[ij];
                mix[i * words + j] = static_cast<T>(ww * w + pp * k[ij]);
                mix[(words + i) * words + j] = static_cast<T>(pp * (static_cast<double>(g[ij]) - k[ij]));
            }
        }
        by.mix = mix;
    }
    return by;
}

// Both networks' logits: those kept, or those given.
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

// d/dM, in scratch.out; 0 for invalid pixels.
template <class T>
void gradient_of_logits(const Backward& args, const Plan<T>& plan, const Pixels<T>& pixels, const Coefficients<T>& by,
                        const Logits<T>& logits, const Scratch<T>& scratch) {
    T* d = scratch.a + logits.words * logits.stride;
    const bool over_words = plan.has(pixel_word::over_words);
    if (over_words) {
        attend<T, false>(logits, pixels, scratch.a, d);
        gradient_over_words(by, scratch.a, d, logits.words, logits.stride, pixels.width, scratch.out);
    }
    if (plan.has(pixel_word::word_to_pixel)) {
        const double* lse = args.kept.columns + pixels.sample * plan.words;
        gradient_over_pixels(logits, by.word_to_pixel, lse, lse + plan.problem.batch * plan.words, pixels.width,
                             over_words, scratch.out);
    }
    for (std::int64_t k = 0; pixels.valid != nullptr && k < logits.words; ++k) {
        keep_valid(scratch.out + k * logits.stride, pixels.valid, pixels.width);
    }
}

// For the cosine: scratch.scaled = dM/|V|, and of each pixel -<dM, M>/|V|^2, the coefficient of V in its own gradient.
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

// dV = dM L, to memory.
template <class T>
void gradient_of_pixels(const Backward& args, const Plan<T>& plan, const Pixels<T>& pixels, const Panel<T>& panel,
                        T* d_m, T* own, std::int64_t words, const Scratch<T>& scratch, Prefetch fetch) {
    const std::int64_t columns = plan.problem.student.width, padded = plan.width_student;
    const T* packed = plan.words_student + pixels.sample * plan.words * padded;
    const PanelOut<T> out = start_panel(args.grad_pixels, pixels, columns, padded, plan.streams(), scratch.gradient);
    const bool cosine = plan.problem.cosine;
    const Store mode = cosine ? Store::add : (out.stream ? Store::stream : Store::set);
    if (cosine) { // no direction, no gradient
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

// The words' gradient of a sample from its chunks' sums.
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
        for (std::int64_t d = 0; d < columns; ++d) {
            double sum = 0;
            for (std::int64_t c = 0; c < plan.chunks; ++c) {
                sum += static_cast<double>(plan.template partial<T>(b * plan.chunks + c)[k * padded + d]);
            }
            out[d] = static_cast<T>(sum);
            along += sum * unit[d];
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
void backward(const Backward& args, int threads) {
    const Plan<T> plan = make_plan<T>(args.problem, true, args.workspace, threads);
    const std::int64_t batch = args.problem.batch;
    const bool for_words = args.grad_words != nullptr;
#pragma omp parallel num_threads(static_cast<int>(plan.threads))
    {
#pragma omp for schedule(static)
        for (std::int64_t b = 0; b < batch; ++b) {
            prepare_sample(plan, b, true);
        }
#pragma omp for schedule(static)
        for (std::int64_t thread = 0; thread < plan.threads; ++thread) {
            Arena arena(plan.scratch + thread * plan.scratch_size);
            const Scratch<T> scratch = lay_out_scratch(plan, arena, true);
            each_unit(plan, thread, [&](std::int64_t unit) {
                const Coefficients<T> by = coefficients_of(args, plan, unit / plan.chunks, scratch.mix);
                T* grad_words = plan.template partial<T>(unit);
                if (for_words) {
                    __builtin_memset(static_cast<void*>(grad_words), 0, plan.partial_size);
                }
                each_panel(plan, unit, scratch.valid, [&](const Pixels<T>& pixels) {
                    backward_panel(args, plan, pixels, by, scratch, grad_words);
                });
            });
            stream_fence();
        }
        if (for_words) {
#pragma omp for schedule(static)
            for (std::int64_t b = 0; b < batch; ++b) {
                finish_words(args, plan, b);
            }
        }
    }
}

} // namespace

std::int64_t pixel_word_workspace(const Problem& problem, bool backward, int threads) {
    return problem.dtype == DType::Float64 ? make_plan<double>(problem, backward, nullptr, threads).workspace
                                           : make_plan<float>(problem, backward, nullptr, threads).workspace;
}

void pixel_word_forward(const Forward& args, int threads) {
    args.problem.dtype == DType::Float64 ? forward<double>(args, threads) : forward<float>(args, threads);
}

void pixel_word_backward(const Backward& args, int threads) {
    args.problem.dtype == DType::Float64 ? backward<double>(args, threads) : backward<float>(args, threads);
}

} // namespace fastkd::cpu::FASTKD_ISA
