// Tiles of relation matrices, for relation's forward and backward: their numbering, both networks' products, and sums
// over a tile's rows and columns.
#pragma once

#include "cuda/relation/gemm.cuh"
#include "cuda/relation/plan.h"

namespace fastkd::cuda::relation {

// How a block of threads shares out a product of `rows` x `cols`, `depth` columns of the operands at a time, of which
// `stages` - 1 are being copied.
template <class S, int rows_, int cols_, int warp_rows, int warp_cols, int depth_, int stages_, int resident_>
struct Blocking {
    using Storage = S;
    static constexpr int rows = rows_, cols = cols_, depth = depth_, stages = stages_;
    static constexpr int resident = resident_; // blocks to a multiprocessor, at least: leaves them registers
    static constexpr int warps_across = cols / warp_cols, warps_down = rows / warp_rows;
    static constexpr int threads = warp_size * warps_down * warps_across;
    static constexpr int down = warp_rows / 16, across = warp_cols / 8; // fragments of a warp
    using Accumulated = Accumulator<S, down, across>;
    using A = SharedOperand<S, rows, depth>;
    using B = SharedOperand<S, cols, depth>;
    static constexpr int pipeline_bytes = stages * (A::bytes + B::bytes);

    static FASTKD_DEVICE int warp() { return thread_x() / warp_size; }
    static FASTKD_DEVICE int warp_row() { return warp() / warps_across * warp_rows; }
    static FASTKD_DEVICE int warp_col() { return warp() % warps_across * warp_cols; }
    // Of a fragment's element: e[0], e[1] in one row, e[2], e[3] eight rows below.
    static FASTKD_DEVICE int row_of(int i, int e) {
        return warp_row() + 16 * i + e / 2 * 8 + thread_x() % warp_size / 4;
    }
    static FASTKD_DEVICE int col_of(int j, int e) { return warp_col() + 8 * j + thread_x() % 4 * 2 + e % 2; }
};

template <class S, int side>
struct TileBlocking;
template <class S>
struct TileBlocking<S, 128> : Blocking<S, 128, 128, 64, 32, 32, 4, 1> {};
template <class S>
struct TileBlocking<S, 64> : Blocking<S, 64, 64, 32, 32, 32, 3, 3> {};
template <>
struct TileBlocking<float, 64> : Blocking<float, 64, 64, 32, 32, 16, 3, 2> {};

// A network's rows.
struct Network {
    Operand rows; // the index is the row within a sample
    std::int64_t width;
    std::int64_t batch_stride;
    float factor; // of the similarities, but for cosines
};

// One launch's part of the work, see relation_plan.h.
struct Cut {
    std::int64_t rows, all_rows; // of a sample, of the batch
    std::int64_t samples, row_blocks, blocks;
    std::int64_t first_problem, problems, first, last;
    std::int64_t tiles; // of a problem

    // Tiles I, J >= I of the band lie in this order, where they are stored.
    FASTKD_DEVICE std::int64_t stored(std::int64_t i, std::int64_t j) const {
        return (i - first) * blocks - (i * (i - 1) - first * (first - 1)) / 2 + (j - i);
    }
    // Sums of a tile for its rows are slot J of block I, for its columns slot I of block J. Blocks of the band have
    // slots [first, blocks), those behind it [first, last).
    FASTKD_DEVICE std::int64_t slot(std::int64_t block, std::int64_t other) const {
        const std::int64_t band = last - first;
        return block < last ? (block - first) * blocks + other
                            : band * blocks + (block - last) * band + (other - first);
    }
    FASTKD_HD std::int64_t slots() const { return (last - first) * (2 * blocks - last); }
};

// Which tile a block of threads has. 32 bits hold all of it: a launch has no more blocks.
struct Tile {
    int here, problem; // in this launch, of all
    int i, j;          // row blocks
    int sample_i, sample_j;
    int row_i, row_j;   // the first of each block, within its sample
    int rows_i, rows_j; // how many there are

    // A row block and its counterpart from the band's other end have as many tiles as any other such pair.
    template <int side>
    static FASTKD_DEVICE Tile of(const Cut& cut, std::int64_t index) {
        const int tiles = static_cast<int>(cut.tiles), blocks = static_cast<int>(cut.blocks);
        const int first = static_cast<int>(cut.first), last = static_cast<int>(cut.last);
        const int samples = static_cast<int>(cut.samples), row_blocks = static_cast<int>(cut.row_blocks);
        Tile tile;
        tile.here = static_cast<int>(index) / tiles;
        tile.problem = static_cast<int>(cut.first_problem) + tile.here;
        const int number = static_cast<int>(index) % tiles, pair = 2 * blocks - (first + last - 1);
        const int up = number / pair, left = number % pair, mine = blocks - (first + up);
        tile.i = left < mine ? first + up : last - 1 - up;
        tile.j = tile.i + (left < mine ? left : left - mine);
        tile.sample_i = tile.problem * samples + tile.i / row_blocks;
        tile.sample_j = tile.problem * samples + tile.j / row_blocks;
        tile.row_i = tile.i % row_blocks * side;
        tile.row_j = tile.j % row_blocks * side;
        const int rows = static_cast<int>(cut.rows);
        tile.rows_i = rows - tile.row_i < side ? rows - tile.row_i : side;
        tile.rows_j = rows - tile.row_j < side ? rows - tile.row_j : side;
        return tile;
    }
    FASTKD_DEVICE bool diagonal() const { return i == j; }
};

template <class S>
FASTKD_DEVICE const S* rows_at(const Network& network, std::int64_t sample, std::int64_t row) {
    return static_cast<const S*>(network.rows.data) + sample * network.batch_stride + row * network.rows.index_stride;
}

// <x_i, x_j> of both networks, through the pipeline in shared memory, which is free again on return. The teacher's
// first chunks are copied during the student's last products.
template <class B>
FASTKD_DEVICE void multiply_rows(const Network& student, const Network& teacher, const Tile& tile,
                                 unsigned char* shared, typename B::Accumulated& of_student,
                                 typename B::Accumulated& of_teacher) {
    using S = typename B::Storage;
    using Shared = typename B::A;
    constexpr int stage_elements = 2 * Shared::elements;
    S* const pipeline = reinterpret_cast<S*>(shared);
    const int own = static_cast<int>((student.width + B::depth - 1) / B::depth);
    const int all = own + static_cast<int>((teacher.width + B::depth - 1) / B::depth);
    const auto copy = [&](int chunk) {
        if (chunk < all) {
            const Network& network = chunk < own ? student : teacher;
            const std::int64_t k = static_cast<std::int64_t>(chunk < own ? chunk : chunk - own) * B::depth;
            S* const to = pipeline + chunk % B::stages * stage_elements;
            const std::int64_t ahead = k * network.rows.k_stride;
            using Copy = OperandCopy<S, B::rows, B::depth, B::threads>;
            Copy::start(to, rows_at<S>(network, tile.sample_i, tile.row_i) + ahead, network.rows, tile.rows_i,
                        network.width - k);
            Copy::start(to + Shared::elements, rows_at<S>(network, tile.sample_j, tile.row_j) + ahead, network.rows,
                        tile.rows_j, network.width - k);
        }
        copy_async_commit(); // empty ones too: each chunk is a group
    };
    for (int chunk = 0; chunk < B::stages - 1; ++chunk) {
        copy(chunk);
    }
    typename B::Accumulated& sum = of_teacher;
#pragma unroll 1
    for (int network = 0; network < 2; ++network) {
        sum.clear();
        const bool k_major = network == 0 ? student.rows.k_major : teacher.rows.k_major;
        const int end = network == 0 ? own : all;
#pragma unroll 1
        for (int chunk = network == 0 ? 0 : own; chunk < end; ++chunk) {
            copy_async_wait<B::stages - 2>();
            block_barrier(); // this chunk is there for all, and the one before it no longer read
            copy(chunk + B::stages - 1);
            const S* const a = pipeline + chunk % B::stages * stage_elements;
            if (k_major) {
                sum.template add<true, true, B::depth, Shared::by_k, Shared::by_k>(a, a + Shared::elements,
                                                                                   B::warp_row(), B::warp_col());
            } else {
                sum.template add<false, false, B::depth, Shared::by_index, Shared::by_index>(
                    a, a + Shared::elements, B::warp_row(), B::warp_col());
            }
        }
        if (network == 0) {
            of_student = sum;
        }
    }
    copy_async_wait<0>();
    block_barrier();
}

// Similarities from dot products: each rounded like its twin in the other network, whatever follows. Outside of the
// tile's rows and columns they are `outside`. Scales come by side of the tile from shared memory.
template <class B>
FASTKD_DEVICE void scale_products(typename B::Accumulated& sum, const Tile& tile, bool cosine, const float* scales_i,
                                  const float* scales_j, float factor, float outside) {
    B::Accumulated::visit([&](int i, int j, int e) {
        const int row = B::row_of(i, e), col = B::col_of(j, e);
        const float by_row = cosine ? scales_i[row] : factor, by_col = cosine ? scales_j[col] : 1.0f;
        const float value = multiply_alone(multiply_alone(sum.c[i][j][e], by_row), by_col);
        sum.c[i][j][e] = row < tile.rows_i && col < tile.rows_j ? value : outside;
    });
}

// Tiles stored for the backward, in the order of fragments: both kernels' blocks have the same shape.
template <class B, class Visit>
FASTKD_DEVICE void visit_stored(float* stored, const Cut& cut, const Tile& tile, int network, const Visit& visit) {
    const std::int64_t i = tile.i, number = i * cut.blocks - i * (i - 1) / 2 + (tile.j - i);
    const std::int64_t of_problem = cut.blocks * (cut.blocks + 1) / 2;
    float* at = stored + ((tile.problem * of_problem + number) * 2 + network) * (B::rows * B::cols) + thread_x() * 4;
#pragma unroll
    for (int i = 0; i < B::down; ++i) {
#pragma unroll
        for (int j = 0; j < B::across; ++j) {
            visit(at + (i * B::across + j) * (B::threads * 4), i, j);
        }
    }
}

FASTKD_DEVICE float sum_over(float value, int from, int to) {
#pragma unroll
    for (int mask = 1; mask < warp_size; mask *= 2) {
        if (mask >= from && mask < to) {
            value += shuffle_xor(value, mask);
        }
    }
    return value;
}
constexpr int lanes_of_row = 1, lanes_of_col = 4; // the least bit in which lanes of one row (column) differ

template <class B, int planes>
constexpr int reduction_floats = planes * (B::warps_across * B::rows + B::warps_down * B::cols);

// Sums over the tile's rows and columns of the `planes` numbers that terms(i, j, e, out) gives for each element, as
// store(plane, index, for_rows, sum) wants them: each sum once, by one thread. Takes reduction_floats of shared
// memory that all are done with.
template <class B, int planes, class Terms, class Store>
FASTKD_DEVICE void sum_tile(float* shared, const Terms& terms, const Store& store) {
    float* const of_rows = shared;                                      // [warps_across][planes][rows]
    float* const of_cols = shared + B::warps_across * planes * B::rows; // [warps_down][planes][cols]
    const int lane = thread_x() % warp_size;
    float col[B::across][2][planes] = {};
#pragma unroll
    for (int i = 0; i < B::down; ++i) {
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
            warp_barrier(); // or what `terms` reads of the columns would be held in registers from row to row
            float row[planes] = {};
#pragma unroll
            for (int j = 0; j < B::across; ++j) {
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
                    of_rows[(B::warp() % B::warps_across * planes + plane) * B::rows + B::row_of(i, half)] = row[plane];
                }
            }
        }
    }
#pragma unroll
    for (int j = 0; j < B::across; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int plane = 0; plane < planes; ++plane) {
                const float sum = sum_over(col[j][e][plane], lanes_of_col, warp_size);
                if (lane < 4) {
                    of_cols[(B::warp() / B::warps_across * planes + plane) * B::cols + B::col_of(j, e)] = sum;
                }
            }
        }
    }
    block_barrier();
    for (int at = thread_x(); at < planes * B::rows; at += B::threads) {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < B::warps_across; ++warp) {
            sum += of_rows[warp * planes * B::rows + at];
        }
        store(at / B::rows, at % B::rows, true, sum);
    }
    for (int at = thread_x(); at < planes * B::cols; at += B::threads) {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < B::warps_down; ++warp) {
            sum += of_cols[warp * planes * B::cols + at];
        }
        store(at / B::cols, at % B::cols, false, sum);
    }
}

} // namespace fastkd::cuda::relation
