// Tiles, launches and workspace of a relation on a GPU. Host code without CUDA.
//
// `tile` rows are a row block; pairs of row blocks I <= J are the tiles of a relation matrix. A *problem* is one pair
// of matrices: of one sample, or with `cross` of all samples' rows, where row blocks do not span samples. A launch
// computes as many whole problems as the workspace holds, or a *band* of one problem's row blocks [first, last): the
// tiles with I in the band, whose contributions to later row blocks are added to those of earlier bands.
#pragma once

#include "common/relation.h"

// Make the names that all backends share visible to the kernels.
namespace fastkd::cuda::relation {
using namespace fastkd::relation;
}

namespace fastkd::cuda {

enum class Method { kl, kl_maxima, mse, row_cosine };

// Return the number of sums per row and tile.
FASTKD_HD constexpr int planes_of(Method method) {
    return method == Method::kl ? 3 : method == Method::mse ? 1 : 5;
}

// Cosines lie in [-1, 1]: at this temperature and above, e^{(E - 1)/tau} is at least e^-50, so 1 can replace every
// row's maximum.
constexpr double fixed_shift_temperature = 0.04;

Method method_of(const relation::Options& options);

// Tiles are 128 x 128 if there are at least this many, two per SM of an H100 (132); with fewer, 64 x 64 tiles occupy
// more SMs. Floats, and rows with their own maxima, always use 64 x 64.
constexpr std::int64_t enough_tiles = 264;
constexpr std::int64_t enough_products = 132; // with fewer thread blocks, the sum over H's columns is split

struct RelationPlan {
    Method method;
    std::int64_t tile, problems, samples, row_blocks, blocks; // blocks of a problem, row_blocks of each sample
    std::int64_t together;                                    // problems per launch; 1 with bands
    std::int64_t band;                                        // row blocks per launch; `blocks` if it is whole

    std::int64_t width_blocks, splits; // of the product: blocks of gradient columns, parts of the sum over H's columns
    std::int64_t row_sums, h, sums, partials, totals; // offsets in the workspace, in bytes

    std::int64_t bytes;   // of the workspace
    std::int64_t minimum; // the smallest sufficient `limit`

    bool whole() const { return band == blocks; }
    // Return the number of tiles of a problem in a launch of row blocks [first, last).
    std::int64_t tiles(std::int64_t first, std::int64_t last) const {
        return (last - first) * blocks - (last - first) * (first + last - 1) / 2;
    }
};

// Return the gradient's columns per thread block (BLOCK_N of the product).
FASTKD_HD constexpr int product_columns(std::int64_t element_size) {
    return element_size == 4 ? 64 : 128;
}

// `limit` bounds the workspace, except for the fp32 sums of the gradient (`totals`) that a backward with bands needs.
RelationPlan plan_relation(const relation::Options& options, std::int64_t student_width, bool backward,
                           std::int64_t limit);

// Return the number of floats in the stored tiles of student and teacher.
std::int64_t stored_elements(const relation::Options& options);

} // namespace fastkd::cuda
