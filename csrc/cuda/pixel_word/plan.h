// pixel_word's thread blocks and workspace on a GPU. They depend only on the batch and sizes, so that results do not
// depend on the device.
#pragma once

#include "common/arena.h"
#include "common/pixel_word.h"

namespace fastkd::cuda::pixel_word {

using namespace ::fastkd::pixel_word;

constexpr int most_words = 128;               // limit of a thread block's registers and smem
constexpr std::int64_t most_length = 1 << 28; // of pixels and widths: offsets within 8 rows have 32 bits
constexpr int tile_words = 8, tile_pixels = 16;
constexpr int block_warps = 8;
constexpr int block_threads = 32 * block_warps;

// Division of a sample's pixels into runs, one per thread block.
struct Runs {
    int steps_per_block;
    int blocks_per_sample;
};

// Return runs that need about `wanted` thread blocks for the batch, at most `most` per sample.
inline Runs divide_pixels(std::int64_t pixels, int step, std::int64_t batch, std::int64_t wanted, std::int64_t most) {
    const std::int64_t steps = ceil_div(pixels, step);
    std::int64_t blocks = wanted / batch;
    blocks = blocks < 1 ? 1 : (blocks < most ? blocks : most);
    const std::int64_t each = ceil_div(steps, blocks);
    return {static_cast<int>(each), static_cast<int>(ceil_div(steps, each))};
}

// The partial sums of a run of pixels: the sum of the KLs over words, the members of ColumnSums for each word, and the
// words x words sums of products: in fp32 the 16 x 16 tiles on and below the diagonal of [A D]^T [A D], as two
// fragments each; in fp64 G, K and E.
template <class T>
struct Partial {
    T* data;
    int words; // the larger of the two word counts

    static constexpr FASTKD_HD int matrix_tiles(int words) {
        const int rows = ceil_div(words, tile_words); // of 16 columns of [A D]
        return rows * (rows + 1) / 2;
    }
    static constexpr FASTKD_HD std::int64_t size(int words) {
        return 4 + 5 * round_up(words, 4) +
               (sizeof(T) == 4 ? 256 * matrix_tiles(words) : round_up(3 * words * words, 4));
    }
    FASTKD_HD T* column(int member) const { return data + 4 + member * round_up(words, 4); }
    FASTKD_HD T* matrices() const { return data + 4 + 5 * round_up(words, 4); }

    // Return the index of entry (i, j) of G, K or E (0, 1, 2); for G and E i >= j.
    FASTKD_HD std::int64_t entry(int matrix, int i, int j) const {
        if (sizeof(T) != 4) {
            return (static_cast<std::int64_t>(matrix) * words + i) * words + j;
        }
        const int padded = static_cast<int>(round_up(words, tile_words));
        const int row = matrix == 0 ? i : padded + i, col = matrix == 2 ? padded + j : j;
        const int tile = row / 16 * (row / 16 + 1) / 2 + col / 16;
        const int lane = row % 8 * 4 + col % 8 / 2;
        return ((tile * 2 + col % 16 / 8) * 32 + lane) * 4 + row % 16 / 8 * 2 + col % 2;
    }
};

// The backward's factors of one sample, computed once for all pixels.
template <class T>
struct Coefficients {
    T row_kl;    // scale g_pw / n
    T column_kl; // scale g_wp / t
    T unit_x;    // factor that converts products with the stored slopes (split halves) to scale X
    T unit_z;    // likewise for scale Z
};

inline int larger_count(const Problem& problem) {
    const std::int64_t student = problem.student.word_count, teacher = problem.teacher.word_count;
    return static_cast<int>(student > teacher ? student : teacher);
}

// Return the number of warps that share the words of a pixel, 32 each.
inline int split_of(int words) {
    return words <= 32 ? 1 : (words <= 64 ? 2 : 4);
}

// Return the features per warp in features.cu; accumulators grow with features times words.
constexpr FASTKD_HD int warp_features_of(int words, std::int64_t size) {
    return words <= 32 && size == 2 ? 32 : 16;
}

struct Plan {
    int words;
    int split;
    int tiles;                    // of 8 words: the kernel variant
    std::int64_t size;            // bytes of an element of the arithmetic
    std::int64_t bytes;           // of the workspace
    Runs logits, terms;           // forward
    std::int64_t partials, grams; // offsets in bytes; grams only if they are not saved
    Runs gradient, runs;          // backward
    std::int64_t coefficients, slopes, grad_logits, projections, sums;
    int feature_warps; // warps of a thread block that share pixels and split the features
    int warp_features; // features per warp
};

constexpr int fp64_step = 8, fp64_features_step = 64; // pixels

inline Plan plan_forward(const Problem& problem) {
    const int words = larger_count(problem);
    const bool fp64 = problem.dtype == DType::Float64;
    Plan plan{};
    plan.words = words;
    plan.split = split_of(words);
    plan.tiles = words <= 24 ? 3 : 4 * plan.split;
    plan.size = fp64 ? 8 : 4;
    plan.logits = divide_pixels(problem.pixels, block_warps * tile_pixels, 2 * problem.batch, 1056, problem.pixels);
    plan.terms = divide_pixels(problem.pixels, fp64 ? fp64_step : block_warps / plan.split * tile_pixels, problem.batch,
                               528, 128);
    const std::int64_t partial = fp64 ? Partial<double>::size(words) : Partial<float>::size(words);
    Arena<256> arena;
    plan.partials = arena.take_bytes(problem.batch * plan.terms.blocks_per_sample * partial * plan.size);
    plan.grams = arena.take_bytes(
        (problem.terms & pixel_word::second_order) != 0 ? problem.batch * 3 * words * words * plan.size : 0);
    plan.bytes = arena.bytes();
    return plan;
}

inline Plan plan_backward(const Problem& problem) {
    const int words = larger_count(problem);
    const bool fp64 = problem.dtype == DType::Float64, features = problem.student.width > 0;
    const std::int64_t count = problem.student.word_count, width = problem.student.width;
    Plan plan{};
    plan.words = words;
    plan.split = split_of(words);
    plan.tiles = words <= 24 ? 3 : 4 * plan.split;
    plan.size = fp64 ? 8 : 4;
    plan.gradient = divide_pixels(problem.pixels, fp64 ? fp64_step : block_warps / plan.split * tile_pixels,
                                  problem.batch, 1056, problem.pixels);
    plan.warp_features = warp_features_of(words, element_size(problem.student.pixels.dtype));
    const std::int64_t groups = ceil_div(width, plan.warp_features);
    plan.feature_warps = groups >= 3 ? 4 : (groups >= 2 ? 2 : 1);
    const std::int64_t chunks = ceil_div(groups, plan.feature_warps);
    const int step = fp64 ? fp64_features_step : block_warps / plan.feature_warps * tile_pixels;
    plan.runs = divide_pixels(problem.pixels, step, problem.batch * (features && !fp64 ? chunks : 1), 528, 64);
    const std::int64_t steps = (plan.tiles + 1) / 2; // of 16 words
    const bool second = (problem.terms & pixel_word::second_order) != 0;
    Arena<256> arena;
    plan.coefficients = arena.take_bytes(problem.batch * 4 * plan.size);
    plan.slopes =
        arena.take_bytes(!second ? 0 : problem.batch * 2 * (fp64 ? words * words * 8 : steps * plan.tiles * 32 * 16));
    plan.grad_logits = arena.take_bytes(features ? problem.batch * count * problem.pixels * plan.size : 0);
    plan.projections = arena.take_bytes(problem.cosine ? problem.batch * problem.pixels * plan.size : 0);
    plan.sums =
        arena.take_bytes(features ? problem.batch * plan.runs.blocks_per_sample * count * width * plan.size : 0);
    plan.bytes = arena.bytes();
    return plan;
}

// Return whether the kernels can index a problem. A launch has fewer than 2^31 thread blocks.
inline bool fits(const Problem& problem) {
    const Side& student = problem.student;
    const Side& teacher = problem.teacher;
    const std::int64_t width = student.width > teacher.width ? student.width : teacher.width;
    if (larger_count(problem) > most_words || problem.pixels > most_length || width > most_length ||
        problem.batch > most_length) {
        return false;
    }
    const std::int64_t most_blocks = 0x7fffffff;
    if (problem.dtype == DType::Float64 && problem.batch > most_blocks / ((problem.pixels + 7) / 8)) {
        return false;
    }
    const Plan plan = plan_backward(problem);
    return problem.batch * 2 * plan_forward(problem).logits.blocks_per_sample <= most_blocks &&
           problem.batch * plan.gradient.blocks_per_sample <= most_blocks &&
           problem.batch * plan.runs.blocks_per_sample * ((width + 15) / 16) <= most_blocks &&
           problem.batch * student.word_count <= most_blocks;
}

} // namespace fastkd::cuda::pixel_word
