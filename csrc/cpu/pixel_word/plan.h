// The plan of a pixel_word problem: its division into groups of samples, chunks and panels, its workspace, and the
// preparation of each sample.
//
// A sample's pixels are divided into chunks of several panels. The division depends on the problem alone, and the
// partial sums of the chunks are added in order, so results do not depend on the number of threads. A group has as
// many samples as the workspace holds.
#pragma once

#include "common/arena.h"
#include "common/pixel_word.h"
#include "common/softmax_kl.h"
#include "cpu/pages.h"
#include "cpu/pixel_word/attention.h"
#include "cpu/pixel_word/panel_bf16.h"

namespace fastkd::cpu::FASTKD_ISA {

using pixel_word::Problem;
using pixel_word::Side;

constexpr std::int64_t column_padding = 16; // lanes of the widest vectors: sizes are equal for all instruction sets
// Limit of the chunks' sums, not counting each sample's first chunk.
constexpr std::int64_t partial_bytes = 12 * 1024 * 1024;

// A sample's valid pixels and words. Words that at least one network has are numbered densely; the others are skipped.
struct Sample {
    std::int64_t pixels;
    std::int64_t words;         // in the dense numbering
    std::int32_t* student_word; // [words]: the student's word, or -1 if it has none
    std::int32_t* teacher_word;
    std::int32_t* student_slot; // [student's words]: its dense number, or -1
};

// Scratch memory of a thread.
template <class T>
struct Scratch {
    T* panel;
    T* gradient;
    T* student; // [words][panel_pixels], as are teacher, out and scaled
    T* teacher;
    T* a; // [2 words][panel_pixels]: A, then D
    T* out;
    T* scaled;
    T* mix;   // [2 words][words]
    T* valid; // [panel_pixels]
    T* norms; // [2][panel_pixels]
    Maxima<T>* maxima;
};

template <class T>
struct Plan {
    Problem problem;                                   // the current group of samples
    std::int64_t group = 0;                            // samples per group
    std::int64_t words = 0;                            // the larger count
    bool pairs_student = false, pairs_teacher = false; // whether bfloat16 is multiplied without widening
    std::int64_t width_student = 0, width_teacher = 0; // padded
    std::int64_t panel_pixels = 0, chunk_pixels = 0, chunks = 0;
    std::int64_t threads = 0;
    std::int64_t partial_size = 0; // bytes of a chunk's sums

    Sample* samples = nullptr;
    T* words_student = nullptr; // [B][words][padded width]; unit vectors for the cosine
    T* words_teacher = nullptr;
    T* word_norms = nullptr; // [B][words] of the student, 0 if at most norm_floor
    char* partials = nullptr;
    char* scratch = nullptr;
    std::int64_t scratch_size = 0; // per thread
    std::int64_t workspace = 0;
    std::int64_t minimum = 0; // the smallest possible workspace_limit

    FASTKD_INLINE std::int64_t units() const { return problem.batch * chunks; }
    FASTKD_INLINE bool from_features() const { return problem.student.width > 0; }
    FASTKD_INLINE bool has(int terms) const { return (problem.terms & terms) != 0; }
    template <class P>
    FASTKD_INLINE P* partial(std::int64_t unit) const {
        return reinterpret_cast<P*>(partials + unit * partial_size);
    }

    // Return whether the pixels' gradient is too large for the caches.
    FASTKD_INLINE bool streams() const {
        return problem.batch * problem.pixels * problem.student.width * static_cast<std::int64_t>(sizeof(T)) >=
               stream_bytes;
    }
    // Return the memory of the next panel.
    FASTKD_INLINE Prefetch next(const Side& side, const Pixels<T>& pixels) const {
        const std::int64_t begin = pixels.begin + panel_pixels;
        if (begin >= problem.pixels) {
            return {};
        }
        const std::int64_t count = smaller(panel_pixels, problem.pixels - begin);
        return prefetch_of<T>(side.pixels, {pixels.sample, begin, count, 0, nullptr}, side.width);
    }

    // Return the pixels of the panel that starts at `begin`.
    FASTKD_INLINE Pixels<T> pixels_at(std::int64_t sample, std::int64_t begin, std::int64_t end, T* valid) const {
        Pixels<T> pixels{sample, begin, smaller(panel_pixels, end - begin), 0, nullptr};
        pixels.width = round_up(pixels.count, column_padding);
        const std::uint8_t* mask =
            problem.pixel_mask == nullptr ? nullptr : problem.pixel_mask + sample * problem.pixels + begin;
        bool all = pixels.width == pixels.count;
        for (std::int64_t p = 0; mask != nullptr && all && p < pixels.count; ++p) {
            all = mask[p] != 0;
        }
        if (!all) {
            for (std::int64_t p = 0; p < pixels.width; ++p) {
                valid[p] = static_cast<T>(p < pixels.count && (mask == nullptr || mask[p] != 0));
            }
            pixels.valid = valid;
        }
        return pixels;
    }
};

// Return whether a side's bfloat16 features are multiplied without widening; the cosine's unit vectors are not
// bfloat16.
template <class T>
FASTKD_INLINE bool multiplies_pairs(const Problem& problem, const Side& side) {
#if defined(FASTKD_BF16_PRODUCTS)
    return sizeof(T) == sizeof(float) && side.bf16_words && side.pixels.dtype == DType::BFloat16 && side.width > 0 &&
           !problem.cosine && bf16_products();
#else
    return (void)problem, (void)side, false;
#endif
}

// Allocate a thread's scratch memory in the arena.
template <class T>
Scratch<T> lay_out_scratch(const Plan<T>& plan, Arena<64>& arena, bool backward) {
    const std::int64_t width = plan.width_student > plan.width_teacher ? plan.width_student : plan.width_teacher;
    const std::int64_t rows = plan.words * plan.panel_pixels;
    Scratch<T> scratch{};
    scratch.panel = arena.take<T>(width * plan.panel_pixels);
    scratch.gradient = arena.take<T>(backward ? plan.width_student * plan.panel_pixels : 0);
    scratch.student = arena.take<T>(rows);
    scratch.teacher = arena.take<T>(rows);
    scratch.a = arena.take<T>(2 * rows);
    scratch.out = arena.take<T>(backward ? rows : 0);
    scratch.scaled = arena.take<T>(backward && plan.problem.cosine ? rows : 0);
    scratch.mix = arena.take<T>(backward ? 2 * plan.words * plan.words : 0);
    scratch.valid = arena.take<T>(plan.panel_pixels);
    scratch.norms = arena.take<T>(2 * plan.panel_pixels);
    scratch.maxima = arena.take<Maxima<T>>(backward ? 0 : plan.words);
    return scratch;
}

// Bytes of a chunk's sums in a forward: the KL over words, G, K, E, and one KLState per word.
FASTKD_INLINE std::int64_t forward_partial_size(const Problem& problem, std::int64_t words) {
    const std::int64_t states = (problem.terms & pixel_word::word_to_pixel) != 0 ? words : 0;
    const std::int64_t grams = (problem.terms & pixel_word::second_order) != 0 ? 3 * words * words : 0;
    return (1 + grams) * static_cast<std::int64_t>(sizeof(double)) +
           states * static_cast<std::int64_t>(sizeof(KLState<double>));
}

FASTKD_INLINE std::int64_t larger(std::int64_t a, std::int64_t b) {
    return a < b ? b : a;
}

// Plan a forward or backward. Without a workspace, only sizes are computed.
template <class T>
Plan<T> make_plan(const Problem& problem, bool backward, void* workspace, int threads) {
    Plan<T> plan{problem};
    const Side& student = problem.student;
    const Side& teacher = problem.teacher;
    plan.words = larger(student.word_count, teacher.word_count);
    plan.pairs_student = multiplies_pairs<T>(problem, student);
    plan.pairs_teacher = multiplies_pairs<T>(problem, teacher);
    plan.width_student = round_up(student.width, plan.pairs_student ? 2 * column_padding : column_padding);
    plan.width_teacher = round_up(teacher.width, plan.pairs_teacher ? 2 * column_padding : column_padding);
    const std::int64_t width = larger(plan.width_student, plan.width_teacher);
    // A panel fits the L2 cache. Panels of maps are longer, because a panel's length is also its row length.
    const std::int64_t row_bytes =
        width * (plan.pairs_student ? element_size(DType::BFloat16) : static_cast<std::int64_t>(sizeof(T)));
    plan.panel_pixels =
        by_pixel(problem.student.pixels) ? (row_bytes <= 1024 ? 128 : 64) : (row_bytes <= 2048 ? 256 : 128);
    const std::int64_t panels = ceil_div(problem.pixels, plan.panel_pixels);
    plan.partial_size = round_up(backward ? plan.words * plan.width_student * static_cast<std::int64_t>(sizeof(T))
                                          : forward_partial_size(problem, plan.words),
                                 64);
    Arena<64> one;
    lay_out_scratch(plan, one, backward);
    plan.scratch_size = one.bytes();
    const std::int64_t words_size = // packed words and their norms
        (plan.width_student + (backward ? 0 : plan.width_teacher) + 1) * static_cast<std::int64_t>(sizeof(T));
    const std::int64_t sample_size = static_cast<std::int64_t>(sizeof(Sample)) +
                                     plan.words * (3 * static_cast<std::int64_t>(sizeof(std::int32_t)) + words_size) +
                                     plan.partial_size;
    constexpr std::int64_t rounding = 6 * 64; // of the allocations below
    plan.minimum = sample_size + plan.scratch_size + rounding;
    const std::int64_t beyond = larger(0, problem.workspace_limit - plan.minimum);
    plan.group = smaller(problem.batch, 1 + beyond / 2 / sample_size);
    const std::int64_t left = beyond - (plan.group - 1) * sample_size;

    std::int64_t each = problem.batch * panels / 64; // panels per chunk
    each = each < 1 ? 1 : smaller(each, 8);
    const std::int64_t most = smaller(left / 2, partial_bytes) / (plan.group * (plan.partial_size + 1)) + 1; // chunks
    each = each * most < panels ? ceil_div(panels, most) : each;
    plan.chunks = ceil_div(panels, each);
    plan.chunk_pixels = each * plan.panel_pixels;
    plan.threads = smaller(smaller(threads, plan.group * plan.chunks),
                           1 + (left - plan.group * (plan.chunks - 1) * plan.partial_size) / plan.scratch_size);

    Arena<64> arena(workspace);
    plan.samples = arena.take<Sample>(plan.group);
    auto* lists = arena.take<std::int32_t>(plan.group * 3 * plan.words);
    for (std::int64_t b = 0; workspace != nullptr && b < plan.group; ++b) {
        std::int32_t* list = lists + b * 3 * plan.words;
        plan.samples[b] = {0, 0, list, list + plan.words, list + 2 * plan.words};
    }
    plan.words_student = arena.take<T>(plan.group * plan.words * plan.width_student);
    plan.words_teacher = arena.take<T>(backward ? 0 : plan.group * plan.words * plan.width_teacher);
    plan.word_norms = arena.take<T>(plan.group * plan.words);
    plan.partials = arena.take<char>(plan.group * plan.chunks * plan.partial_size);
    plan.scratch = arena.take<char>(plan.threads * plan.scratch_size);
    plan.workspace = arena.bytes();
    return plan;
}

// ---- iteration ----------------------------------------------------------------------------------------------------

// Call f with each unit (a sample's chunk) of a thread. A thread's units are consecutive in memory.
template <class T, class F>
FASTKD_INLINE void each_unit(const Plan<T>& plan, std::int64_t thread, F f) {
    const std::int64_t end = (thread + 1) * plan.units() / plan.threads;
    for (std::int64_t unit = thread * plan.units() / plan.threads; unit < end; ++unit) {
        f(unit);
    }
}

// Call f with each panel of a unit.
template <class T, class F>
FASTKD_INLINE void each_panel(const Plan<T>& plan, std::int64_t unit, T* valid, F f) {
    const std::int64_t begin = unit % plan.chunks * plan.chunk_pixels;
    const std::int64_t end = smaller(begin + plan.chunk_pixels, plan.problem.pixels);
    for (std::int64_t p = begin; p < end; p += plan.panel_pixels) {
        f(plan.pixels_at(unit / plan.chunks, p, end, valid));
    }
}

template <class T>
FASTKD_INLINE ScaledExp<T> exp_of(const Side& side) {
    return ScaledExp<T>{static_cast<T>(side.scale)};
}

// ---- per sample ----------------------------------------------------------------------------------------------------

// Return whether the side has a word and does not mask it.
FASTKD_INLINE bool has_word(const Side& side, std::int64_t sample, std::int64_t word) {
    return word < side.word_count &&
           (side.word_mask == nullptr || side.word_mask[sample * side.word_count + word] != 0);
}

// Pack the words in dense numbering, padded with zeros; words that the side lacks become zero rows. For the cosine,
// normalise them.
template <class T>
void pack_words(const Side& side, std::int64_t sample, const std::int32_t* word, std::int64_t count,
                std::int64_t padded, bool cosine, T* to, T* norms) {
    const T* from = static_cast<const T*>(side.words) + sample * side.word_count * side.width;
    for (std::int64_t k = 0; k < count; ++k) {
        T* row = to + k * padded;
        load_row(from + (word[k] < 0 ? 0 : word[k]) * side.width, word[k] < 0 ? 0 : side.width, row, padded);
        if (!cosine) {
            continue;
        }
        const Panel<T> panel{row, padded, true};
        T norm;
        pixel_norms(panel, side.width, padded, 1, &norm);
        const T divisor = norm == T(0) ? static_cast<T>(pixel_word::norm_floor) : norm;
        for (std::int64_t c = 0; c < padded; c += lanes<T>) {
            store(row + c, load(row + c) / divisor);
        }
        if (norms != nullptr) {
            norms[k] = norm;
        }
    }
}

#if defined(FASTKD_BF16_PRODUCTS)
// Like pack_words, in bfloat16: [word][column] for the logits, [word][column][2 copies] for the gradient of the pixels.
FASTKD_INLINE void pack_word_pairs(const Side& side, std::int64_t sample, const std::int32_t* word, std::int64_t count,
                                   std::int64_t padded, bool backward, void* to) {
    const auto* from = static_cast<const float*>(side.words) + sample * side.word_count * side.width;
    for (std::int64_t k = 0; k < count; ++k) {
        for (std::int64_t c = 0; c < padded; ++c) {
            const float x = word[k] >= 0 && c < side.width ? from[word[k] * side.width + c] : 0.0f;
            const std::uint32_t bits = bit_cast<std::uint32_t>(x) >> 16;
            if (backward) {
                static_cast<PairWord*>(to)[k * padded + c] = bits | bits << 16;
            } else {
                static_cast<std::uint16_t*>(to)[k * padded + c] = static_cast<std::uint16_t>(bits);
            }
        }
    }
}
#endif

template <class T>
void pack_words_of(const Plan<T>& plan, const Side& side, std::int64_t b, bool backward) {
    const Sample& sample = plan.samples[b];
    const bool student = &side == &plan.problem.student;
    const std::int32_t* word = student ? sample.student_word : sample.teacher_word;
    const std::int64_t padded = student ? plan.width_student : plan.width_teacher;
    T* to = (student ? plan.words_student : plan.words_teacher) + b * plan.words * padded;
#if defined(FASTKD_BF16_PRODUCTS)
    if (student ? plan.pairs_student : plan.pairs_teacher) {
        pack_word_pairs(side, b, word, sample.words, padded, backward, to);
        return;
    }
#endif
    (void)backward;
    pack_words(side, b, word, sample.words, padded, plan.problem.cosine, to,
               student ? plan.word_norms + b * plan.words : nullptr);
}

// Number the sample's words, count its valid pixels, and pack its words.
template <class T>
void prepare_sample(const Plan<T>& plan, std::int64_t b, bool backward) {
    const Problem& problem = plan.problem;
    Sample& sample = plan.samples[b];
    sample.pixels = problem.pixels;
    if (problem.pixel_mask != nullptr) {
        sample.pixels = 0;
        for (std::int64_t p = 0; p < problem.pixels; ++p) {
            sample.pixels += problem.pixel_mask[b * problem.pixels + p] != 0;
        }
    }
    sample.words = 0;
    for (std::int64_t w = 0; w < plan.words; ++w) {
        const bool student = has_word(problem.student, b, w), teacher = has_word(problem.teacher, b, w);
        sample.student_slot[w] = student ? static_cast<std::int32_t>(sample.words) : -1;
        if (student || teacher) {
            sample.student_word[sample.words] = student ? static_cast<std::int32_t>(w) : -1;
            sample.teacher_word[sample.words] = teacher ? static_cast<std::int32_t>(w) : -1;
            ++sample.words;
        }
    }
    if (plan.from_features()) {
        pack_words_of(plan, problem.student, b, backward);
        if (!backward) {
            pack_words_of(plan, problem.teacher, b, backward);
        }
    }
}

} // namespace fastkd::cpu::FASTKD_ISA
