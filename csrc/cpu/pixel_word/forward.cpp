// pixel_word on the CPU, forward: one pass over the pixels; the formulas are in common/pixel_word.h. A panel of pixels
// is read once, its logits M = V L^T are computed in the caches, and all terms are accumulated from them: the KL over
// words, the running KL over pixels of each word, and G = A^T A, K = D^T A, E = D^T D.
//
// The logits are saved for the backward: with few words they are small compared with the features, and recomputing them
// would read both networks' pixels again and cost half of the products.
#include "common/pixel_word.h"

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/pixel_word/plan.h"
#include "cpu/pixel_word/samples.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

using pixel_word::Forward;
using pixel_word::Workspace;

// Write -inf for words that the network lacks.
template <class T>
FASTKD_INLINE void absent_logits(const std::int32_t* word, std::int64_t words, std::int64_t width, std::int64_t stride,
                                 T* out) {
    for (std::int64_t k = 0; k < words; ++k) {
        for (std::int64_t p = 0; word[k] < 0 && p < width; p += lanes<T>) {
            store(out + k * stride + p, broadcast(softmax_kl::minus_infinity<T>()));
        }
    }
}

// Compute one network's logits of a panel from its features; for the cosine also write the pixels' norms.
template <class T>
void logits_of(const Plan<T>& plan, const Side& side, const Pixels<T>& pixels, const std::int32_t* word,
               std::int64_t words, const T* packed, std::int64_t padded, T* scratch, T* norms, T* out, Prefetch fetch,
               bool pairs) {
    const std::int64_t stride = plan.panel_pixels;
#if defined(FASTKD_BF16_PRODUCTS)
    if constexpr (sizeof(T) == sizeof(float)) {
        if (pairs) {
            auto* right = reinterpret_cast<PairWord*>(scratch);
            const auto* left = reinterpret_cast<const PairWord*>(packed);
            pack_panel(side.pixels, pixels, side.width, right, stride);
            multiply_pairs({left, padded / 2, 1}, PackedPairs{right, stride}, out, stride, words,
                           round_up(pixels.width, pair_strip), (side.width + 1) / 2, Store::set, fetch);
            absent_logits(word, words, pixels.width, stride, out);
            return;
        }
    }
#endif
    (void)pairs;
    // Wide maps are read in place: a copy doubles the memory traffic and does not fit the L1.
    const bool copy_map = plan.problem.cosine || side.width <= 128;
    const Panel<T> panel = load_panel(side.pixels, pixels, side.width, padded, copy_map, scratch);
    if (panel.by_pixel) {
        multiply_transposed(packed, padded, panel.data, panel.stride, out, stride, words, pixels.width, padded, false,
                            false, fetch);
    } else {
        multiply<T>({packed, padded, 1}, panel.data, panel.stride, out, stride, words, pixels.width, side.width,
                    Walk::down, Store::set, fetch);
    }
    if (plan.problem.cosine) {
        pixel_norms(panel, side.width, padded, pixels.width, norms);
    }
    for (std::int64_t k = 0; plan.problem.cosine && k < words; ++k) {
        T* row = out + k * stride;
        for (std::int64_t p = 0; p < pixels.width; p += lanes<T>) {
            store(row + p, load(row + p) * inverse_norms<T>(norms + p));
        }
    }
    absent_logits(word, words, pixels.width, stride, out);
}

// Save both networks' logits of a panel for the backward, with 0 for words that a network lacks.
template <class T>
void save_logits(const Plan<T>& plan, const Pixels<T>& pixels, const Scratch<T>& scratch, void* kept) {
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
    const auto clear = [&](const Side& side, std::int64_t first) __attribute__((always_inline)) {
        for (std::int64_t w = 0; w < side.word_count; ++w) {
            if (!has_word(side, pixels.sample, w)) {
                __builtin_memset(static_cast<void*>(out + (first + w) * problem.pixels), 0, pixels.count * sizeof(T));
            }
        }
    };
    clear(problem.student, 0);
    clear(problem.teacher, problem.student.word_count);
}

// A chunk's partial sums.
struct ForwardSums {
    double* row_kl;          // sum of the KL over words
    double* grams;           // [3][words][words]: G, K, E
    KLState<double>* states; // [words]
};

template <class T>
FASTKD_INLINE ForwardSums sums_of(const Plan<T>& plan, std::int64_t unit) {
    auto* begin = plan.template partial<double>(unit);
    const std::int64_t grams = plan.has(pixel_word::second_order) ? 3 * plan.words * plan.words : 0;
    return {begin, begin + 1, reinterpret_cast<KLState<double>*>(begin + 1 + grams)};
}

// Add one panel to the sums of its chunk.
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
                  prefetch_of(problem.student.pixels, pixels, problem.student.width), plan.pairs_teacher);
        logits_of(plan, problem.student, pixels, sample.student_word, words,
                  plan.words_student + pixels.sample * plan.words * plan.width_student, plan.width_student,
                  scratch.panel, scratch.norms, scratch.student, plan.next(problem.teacher, pixels),
                  plan.pairs_student);
        if (args.kept.logits != nullptr) {
            save_logits(plan, pixels, scratch, args.kept.logits);
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

// Compute a sample's losses and the arrays saved for the backward from its chunks' sums.
template <class T>
void finish_forward(const Forward& args, const Plan<T>& plan, std::int64_t b) {
    const Sample& sample = plan.samples[b];
    const std::int64_t words = sample.words, size = plan.words * plan.words;
    const double pixels = static_cast<double>(sample.pixels);
    const ForwardSums sums = sums_of(plan, b * plan.chunks); // the first chunk's sums become the totals
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
    auto* columns = static_cast<double*>(args.kept.columns);
    for (std::int64_t k = 0; columns != nullptr && k < plan.words; ++k) {
        const bool there = k < words;
        const KLState<double>& state = sums.states[there ? k : 0];
        columns[2 * b * plan.words + k] =
            there ? softmax_kl::log_sum_exp(state.max_s, __builtin_log(state.z_s), 1.0) : 0;
        columns[(2 * b + 1) * plan.words + k] =
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
            pixel_pixel += pixel_word::pixel_pixel_of(g, k, k_t, e);
            word_word += pixel_word::word_word_of(k, k_t, e);
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
void forward_group(const Forward& args, const Plan<T>& plan) {
    const std::int64_t batch = args.problem.batch;
    const auto workers = static_cast<int>(plan.threads);
    parallel_for(workers, batch, [&](std::int64_t b, int) { prepare_sample(plan, b, false); });
    parallel_for(workers, plan.threads, [&](std::int64_t thread, int) {
        Arena<64> arena(plan.scratch + thread * plan.scratch_size);
        const Scratch<T> scratch = lay_out_scratch(plan, arena, false);
        each_unit(plan, thread, [&](std::int64_t unit) {
            const ForwardSums sums = sums_of(plan, unit);
            *sums.row_kl = 0;
            for (std::int64_t k = 0; plan.has(pixel_word::word_to_pixel) && k < plan.words; ++k) {
                sums.states[k] = KLState<double>::empty();
                scratch.maxima[k] = {softmax_kl::minus_infinity<T>(), softmax_kl::minus_infinity<T>()};
            }
            for (std::int64_t i = 0; plan.has(pixel_word::second_order) && i < 3 * plan.words * plan.words; ++i) {
                sums.grams[i] = 0; // including the upper triangle
            }
            each_panel(plan, unit, scratch.valid,
                       [&](const Pixels<T>& pixels) { forward_panel(args, plan, pixels, scratch, sums); });
        });
    });
    parallel_for(workers, batch, [&](std::int64_t b, int) { finish_forward(args, plan, b); });
}

template <class T>
void forward(const Forward& args, int threads) {
    Plan<T> plan = make_plan<T>(args.problem, false, args.workspace, threads);
    for (std::int64_t first = 0; first < args.problem.batch; first += plan.group) {
        const Forward part = part_of(args, first, smaller(plan.group, args.problem.batch - first));
        plan.problem = part.problem;
        forward_group(part, plan);
    }
}

template <class T>
Workspace workspace_of(const Problem& problem, bool backward, int threads) {
    const Plan<T> plan = make_plan<T>(problem, backward, nullptr, threads);
    return {plan.workspace, plan.minimum};
}

} // namespace

Workspace pixel_word_workspace(const Problem& problem, bool backward, int threads) {
    return problem.dtype == DType::Float64 ? workspace_of<double>(problem, backward, threads)
                                           : workspace_of<float>(problem, backward, threads);
}

void pixel_word_forward(const Forward& args, int threads) {
    args.problem.dtype == DType::Float64 ? forward<double>(args, threads) : forward<float>(args, threads);
}

} // namespace fastkd::cpu::FASTKD_ISA
