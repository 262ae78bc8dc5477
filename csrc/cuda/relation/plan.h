// How a relation is cut into tiles and launches on a GPU, and laid out in its workspace. Host code without CUDA.
//
// Rows are taken `tile` at a time; pairs of blocks I <= J of such rows are the tiles of a relation matrix. A *problem*
// is one pair of matrices: a sample's, or with `cross` that of all samples' rows together, each sample's blocks
// beginning anew. A launch takes as many whole problems as its workspace holds, or a *band* of one problem's row blocks
// [first, last): its tiles are those with I in the band, and what they give the blocks after the band is added to what
// earlier bands gave.
#pragma once

#include "common/relation.h"

// The kernels' own names, beside those that all backends of the family share.
namespace fastkd::cuda::relation {
using namespace fastkd::relation;
}

namespace fastkd::cuda {

enum class Method { kl, kl_maxima, mse, row_cosine };

// Numbers per row and tile.
FASTKD_HD constexpr int planes_of(Method method) {
    return method == Method::kl ? 3 : method == Method::mse ? 1 : 5;
}

// Cosines lie in [-1, 1]: from this temperature on e^{(E - 1)/tau} is at least e^-50, and 1 serves all rows as maximum.
constexpr double fixed_shift_temperature = 0.04;

Method method_of(const relation::Options& options);

// Below this many tiles of 128 x 128 those of 64 x 64 keep more multiprocessors busy: two for each of an H100's 132.
// Floats, and rows that keep their own maxima, take 64 x 64 always.
constexpr std::int64_t enough_tiles = 264;
constexpr std::int64_t enough_products = 132; // with fewer the sum over H's columns is shared out

struct RelationPlan {
    Method method;
    std::int64_t tile, problems, samples, row_blocks, blocks; // blocks of a problem, row_blocks of each sample
    std::int64_t together;                                    // problems of a launch; one if there are bands
    std::int64_t band;                                        // row blocks of a launch: `blocks` if it is whole

    std::int64_t width_blocks, splits; // of the product: columns of the gradient, parts of the sum over H's columns
    std::int64_t row_sums, h, sums, partials, totals; // bytes from the start of the workspace

    std::int64_t bytes;   // of the workspace
    std::int64_t minimum; // what `limit` would have to be, at least

    bool whole() const { return band == blocks; }
    // Of a problem, in a launch.
    std::int64_t tiles(std::int64_t first, std::int64_t last) const {
        return (last - first) * blocks - (last - first) * (first + last - 1) / 2;
    }
};

// Columns of the gradient to a block of threads.
FASTKD_HD constexpr int product_columns(std::int64_t element_size) {
    return element_size == 4 ? 64 : 128;
}

// `limit` bounds the workspace, but for the student's gradient in fp32 that bands of a backward add up.
RelationPlan plan_relation(const relation::Options& options, std::int64_t student_width, bool backward,
                           std::int64_t limit);

// Floats of both networks' stored tiles.
std::int64_t stored_elements(const relation::Options& options);

} // namespace fastkd::cuda
