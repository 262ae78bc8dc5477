// Tiles of relation matrices, for relation's forward and backward: their order, the products of student and teacher,
// and sums over a tile's rows and columns.
#pragma once

#include "cuda/relation/gemm.cuh"
#include "cuda/relation/plan.h"

namespace fastkd::cuda::relation {

// The shape of one thread block's product: BLOCK_M x BLOCK_N of the result, BLOCK_K per stage of the smem pipeline.
template <class S, int block_m_, int block_n_, int warp_m, int warp_n, int block_k_, int stages_,
          int min_blocks_per_sm_>
struct Blocking {
    using Storage = S;
    static constexpr int block_m = block_m_, block_n = block_n_, block_k = block_k_, stages = stages_;
    static constexpr int min_blocks_per_sm = min_blocks_per_sm_; // for __launch_bounds__: bounds the registers
    static constexpr int warps_m = block_m / warp_m, warps_n = block_n / warp_n;
    static constexpr int threads = warp_size * warps_m * warps_n;
    static constexpr int fragments_m = warp_m / 16, fragments_n = warp_n / 8; // per warp
    using AccumulatorFragments = Accumulator<S, fragments_m, fragments_n>;
    using SmemA = SmemTile<S, block_m, block_k>;
    using SmemB = SmemTile<S, block_n, block_k>;
    static constexpr int pipeline_bytes = stages * (SmemA::bytes + SmemB::bytes);

    static FASTKD_DEVICE int warp() { return thread_x() / warp_size; }
    static FASTKD_DEVICE int warp_row() { return warp() / warps_n * warp_m; }
    static FASTKD_DEVICE int warp_col() { return warp() % warps_n * warp_n; }
    // Row and column of a fragment's element: e = 0, 1 in one row, e = 2, 3 eight rows below.
    static FASTKD_DEVICE int row_of(int i, int e) {
        return warp_row() + 16 * i + e / 2 * 8 + thread_x() % warp_size / 4;
    }
    static FASTKD_DEVICE int col_of(int j, int e) { return warp_col() + 8 * j + thread_x() % 4 * 2 + e % 2; }
};

template <class S, int tile_size>
struct TileBlocking;
template <class S>
struct TileBlocking<S, 128> : Blocking<S, 128, 128, 64, 32, 32, 4, 1> {};
template <class S>
struct TileBlocking<S, 64> : Blocking<S, 64, 64, 32, 32, 32, 3, 3> {};
template <>
struct TileBlocking<float, 64> : Blocking<float, 64, 64, 32, 32, 16, 3, 2> {};

// The student's or the teacher's rows.
struct Side {
    Operand rows; // mn is the row within a sample, k the column
    std::int64_t width;
    std::int64_t batch_stride;
    float factor; // of the similarities; unused for cosines
};

// The problems and row blocks of one launch (see plan.h).
struct LaunchRange {
    std::int64_t rows, all_rows; // of a sample, of the batch
    std::int64_t samples, row_blocks, blocks;
    std::int64_t first_problem, problems, first, last;
    std::int64_t tiles; // of a problem

    // Return the index of tile (I, J >= I) among the band's stored tiles.
    FASTKD_DEVICE std::int64_t stored(std::int64_t i, std::int64_t j) const {
        return (i - first) * blocks - (i * (i - 1) - first * (first - 1)) / 2 + (j - i);
    }
    // Return the index of a tile's partial sums. Its row sums are slot J of row block I, its column sums slot I of
    // block J. Blocks of the band have slots [first, blocks), later ones [first, last).
    FASTKD_DEVICE std::int64_t slot(std::int64_t block, std::int64_t other) const {
        const std::int64_t band = last - first;
        return block < last ? (block - first) * blocks + other
                            : band * blocks + (block - last) * band + (other - first);
    }
    FASTKD_HD std::int64_t slots() const { return (last - first) * (2 * blocks - last); }
};

// The tile of a thread block. A launch has fewer than 2^31 blocks, so 32 bits suffice.
struct Tile {
    int problem_in_launch, problem;
    int i, j; // row blocks
    int sample_i, sample_j;
    int row_i, row_j;   // first row of each block, within its sample
    int rows_i, rows_j; // number of rows of each block

    // Return tile `index` of the launch. Row blocks first + n and last - 1 - n together have the same number of tiles
    // for every n.
    template <int tile_size>
    static FASTKD_DEVICE Tile of(const LaunchRange& range, std::int64_t index) {
        const int tiles = static_cast<int>(range.tiles), blocks = static_cast<int>(range.blocks);
        const int first = static_cast<int>(range.first), last = static_cast<int>(range.last);
        const int samples = static_cast<int>(range.samples), row_blocks = static_cast<int>(range.row_blocks);
        Tile tile;
        tile.problem_in_launch = static_cast<int>(index) / tiles;
        tile.problem = static_cast<int>(range.first_problem) + tile.problem_in_launch;
        const int number = static_cast<int>(index) % tiles, pair = 2 * blocks - (first + last - 1);
        const int up = number / pair, left = number % pair, row_tiles = blocks - (first + up);
        tile.i = left < row_tiles ? first + up : last - 1 - up;
        tile.j = tile.i + (left < row_tiles ? left : left - row_tiles);
        tile.sample_i = tile.problem * samples + tile.i / row_blocks;
        tile.sample_j = tile.problem * samples + tile.j / row_blocks;
        tile.row_i = tile.i % row_blocks * tile_size;
        tile.row_j = tile.j % row_blocks * tile_size;
        const int rows = static_cast<int>(range.rows);
        tile.rows_i = rows - tile.row_i < tile_size ? rows - tile.row_i : tile_size;
        tile.rows_j = rows - tile.row_j < tile_size ? rows - tile.row_j : tile_size;
        return tile;
    }
    FASTKD_DEVICE bool diagonal() const { return i == j; }
};

// Return the address of a sample's row.
template <class S>
FASTKD_DEVICE const S* rows_at(const Side& side, std::int64_t sample, std::int64_t row) {
    return static_cast<const S*>(side.rows.data) + sample * side.batch_stride + row * side.rows.mn_stride;
}

// Compute <x_i, x_j> of student and teacher through the smem pipeline, which is free again on return. The teacher's
// first k-tiles are copied during the student's last products.
template <class B>
FASTKD_DEVICE void multiply_rows(const Side& student, const Side& teacher, const Tile& tile, unsigned char* shared,
                                 typename B::AccumulatorFragments& of_student,
                                 typename B::AccumulatorFragments& of_teacher) {
    using S = typename B::Storage;
    using Smem = typename B::SmemA;
    constexpr int stage_elements = 2 * Smem::elements;
    S* const pipeline = reinterpret_cast<S*>(shared);
    const int student_tiles = static_cast<int>(ceil_div(student.width, B::block_k));
    const int all_tiles = student_tiles + static_cast<int>(ceil_div(teacher.width, B::block_k));
    const auto copy = [&](int k_tile) {
        if (k_tile < all_tiles) {
            const Side& side = k_tile < student_tiles ? student : teacher;
            const std::int64_t k =
                static_cast<std::int64_t>(k_tile < student_tiles ? k_tile : k_tile - student_tiles) * B::block_k;
            S* const to = pipeline + k_tile % B::stages * stage_elements;
            const std::int64_t ahead = k * side.rows.k_stride;
            using Copy = GmemToSmem<S, B::block_m, B::block_k, B::threads>;
            Copy::start(to, rows_at<S>(side, tile.sample_i, tile.row_i) + ahead, side.rows, tile.rows_i,
                        side.width - k);
            Copy::start(to + Smem::elements, rows_at<S>(side, tile.sample_j, tile.row_j) + ahead, side.rows,
                        tile.rows_j, side.width - k);
        }
        copy_async_commit(); // one group per k-tile, empty past the last
    };
    for (int k_tile = 0; k_tile < B::stages - 1; ++k_tile) {
        copy(k_tile);
    }
    typename B::AccumulatorFragments& sum = of_teacher;
    constexpr bool restart = true; // an error of a similarity is multiplied by 1 / temperature
#pragma unroll 1
    for (int which = 0; which < 2; ++which) {
        sum.clear();
        const bool mn_major = which == 0 ? student.rows.mn_major : teacher.rows.mn_major;
        const int end = which == 0 ? student_tiles : all_tiles;
#pragma unroll 1
        for (int k_tile = which == 0 ? 0 : student_tiles; k_tile < end; ++k_tile) {
            copy_async_wait<B::stages - 2>();
            block_barrier(); // this k-tile has arrived for all threads, and none reads the previous one
            copy(k_tile + B::stages - 1);
            const S* const a = pipeline + k_tile % B::stages * stage_elements;
            if (mn_major) {
                sum.template add<true, true, B::block_k, Smem::mn_major_pitch, Smem::mn_major_pitch, restart>(
                    a, a + Smem::elements, B::warp_row(), B::warp_col());
            } else {
                sum.template add<false, false, B::block_k, Smem::k_major_pitch, Smem::k_major_pitch, restart>(
                    a, a + Smem::elements, B::warp_row(), B::warp_col());
            }
        }
        if (which == 0) {
            of_student = sum;
        }
    }
    copy_async_wait<0>();
    block_barrier();
}

// Scale dot products to similarities. Products are never contracted into FMAs, so that equal student and teacher
// similarities stay equal. Elements outside the tile's rows and columns become `outside`. Scales of rows are in smem.
template <class B>
FASTKD_DEVICE void scale_products(typename B::AccumulatorFragments& sum, const Tile& tile, bool cosine,
                                  const float* scales_i, const float* scales_j, float factor, float outside) {
    B::AccumulatorFragments::visit([&](int i, int j, int e) {
        const int row = B::row_of(i, e), col = B::col_of(j, e);
        const float by_row = cosine ? scales_i[row] : factor, by_col = cosine ? scales_j[col] : 1.0f;
        const float value = multiply_without_fma(multiply_without_fma(sum.c[i][j][e], by_row), by_col);
        sum.c[i][j][e] = row < tile.rows_i && col < tile.rows_j ? value : outside;
    });
}

// Visit the tiles stored for the backward, in fragment order: both kernels use the same Blocking.
template <class B, class Visit>
FASTKD_DEVICE void visit_stored(float* stored, const LaunchRange& range, const Tile& tile, int which,
                                const Visit& visit) {
    const std::int64_t i = tile.i, number = i * range.blocks - i * (i - 1) / 2 + (tile.j - i);
    const std::int64_t of_problem = range.blocks * (range.blocks + 1) / 2;
    float* at =
        stored + ((tile.problem * of_problem + number) * 2 + which) * (B::block_m * B::block_n) + thread_x() * 4;
#pragma unroll
    for (int i = 0; i < B::fragments_m; ++i) {
#pragma unroll
        for (int j = 0; j < B::fragments_n; ++j) {
            visit(at + (i * B::fragments_n + j) * (B::threads * 4), i, j);
        }
    }
}

// Return the sum over the lanes whose index differs in the bits from `from` to below `to`.
FASTKD_DEVICE float sum_over(float value, int from, int to) {
#pragma unroll
    for (int mask = 1; mask < warp_size; mask *= 2) {
        if (mask >= from && mask < to) {
            value += shuffle_xor(value, mask);
        }
    }
    return value;
}
constexpr int lanes_of_row = 1, lanes_of_col = 4; // lowest bit in which lanes of one row (column) differ

template <class B, int planes>
constexpr int reduction_floats = planes * (B::warps_n * B::block_m + B::warps_m * B::block_n);

// Sum the `planes` numbers that terms(i, j, e, out) computes per element over the tile's rows and columns, and call
// store(plane, index, for_rows, sum) once per sum, on one thread. Needs reduction_floats of smem that no thread is
// using.
template <class B, int planes, class Terms, class Store>
FASTKD_DEVICE void sum_tile(float* shared, const Terms& terms, const Store& store) {
    float* const of_rows = shared;                                    // [warps_across][planes][rows]
    float* const of_cols = shared + B::warps_n * planes * B::block_m; // [warps_down][planes][cols]
    const int lane = thread_x() % warp_size;
    float col[B::fragments_n][2][planes] = {};
#pragma unroll
    for (int i = 0; i < B::fragments_m; ++i) {
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
            warp_barrier(); // keeps the compiler from holding the columns' operands in registers across rows
            float row[planes] = {};
#pragma unroll
            for (int j = 0; j < B::fragments_n; ++j) {
#pragma unroll
                for (int e = half; e < half + 2; ++e) {
                    float term[planes];
                    terms(i, j, e, term);
#pragma unroll
                    for (int plane = 0; plane < planes; ++plane) {
                        row[plane] += term[plane];
                        col[j][e - half][plane] += term[plane];
                    }
                }
            }
#pragma unroll
            for (int plane = 0; plane < planes; ++plane) {
                row[plane] = sum_over(row[plane], lanes_of_row, lanes_of_col);
                if (lane % 4 == 0) {
                    of_rows[(B::warp() % B::warps_n * planes + plane) * B::block_m + B::row_of(i, half)] = row[plane];
                }
            }
        }
    }
#pragma unroll
    for (int j = 0; j < B::fragments_n; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int plane = 0; plane < planes; ++plane) {
                const float sum = sum_over(col[j][e][plane], lanes_of_col, warp_size);
                if (lane < 4) {
                    of_cols[(B::warp() / B::warps_n * planes + plane) * B::block_n + B::col_of(j, e)] = sum;
                }
            }
        }
    }
    block_barrier();
    for (int at = thread_x(); at < planes * B::block_m; at += B::threads) {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < B::warps_n; ++warp) {
            sum += of_rows[warp * planes * B::block_m + at];
        }
        store(at / B::block_m, at % B::block_m, true, sum);
    }
    for (int at = thread_x(); at < planes * B::block_n; at += B::threads) {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < B::warps_m; ++warp) {
            sum += of_cols[warp * planes * B::block_n + at];
        }
        store(at / B::block_n, at % B::block_n, false, sum);
    }
}

} // namespace fastkd::cuda::relation
