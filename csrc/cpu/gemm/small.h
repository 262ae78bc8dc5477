// Products of small row-major matrices in cache, accumulated in registers.
#pragma once

#include <utility>

#include "common/arena.h"
#include "cpu/simd.h"

namespace fastkd::cpu::FASTKD_ISA {

// As many accumulators as fit the register file together with the operands.
#if FASTKD_VECTOR_BYTES == 64
constexpr int broadcast_rows = 10, dot_rows = 4;
#else
constexpr int broadcast_rows = 6, dot_rows = 2;
#endif
constexpr int dot_cols = 4;

FASTKD_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) {
    return a < b ? a : b;
}

// A matrix with element (i, k) at data[i row + k col].
template <class T>
struct Matrix {
    const T* data;
    std::int64_t row;
    std::int64_t col;
};

// Memory to prefetch into the L2 cache during a product, a few lines per tile. A product reads each element several
// times, so the memory would otherwise be idle after the first read.
struct Prefetch {
    const char* row = nullptr;
    std::int64_t rows = 0;
    std::int64_t stride = 0; // bytes from one row to the next
    std::int64_t bytes = 0;
    std::int64_t at = 0;   // position in the row, in bytes
    std::int64_t each = 0; // lines per step

    // Divide the memory evenly among the calls of step().
    FASTKD_INLINE void spread(std::int64_t tiles) {
        each = (rows * ceil_div(bytes, 64) + tiles - 1) / (tiles > 0 ? tiles : 1);
    }
    // Prefetch the next lines.
    FASTKD_INLINE void step() {
        for (std::int64_t i = 0; i < each && rows > 0; ++i) {
            __builtin_prefetch(row + at, 0, 2);
            at += 64;
            if (at >= bytes) {
                at = 0;
                row += stride;
                --rows;
            }
        }
    }
};

enum class Store {
    set,
    add,
    stream // non-temporal, to aligned addresses: see store_stream
};

// ---- C = A B, vectorised along the rows of B and C -----------------------------------------------------------------

// Compute a tile of rows x vectors, accumulated in registers.
template <class T, int rows, int vectors>
void multiply_tile(Matrix<T> a, const T* b, std::int64_t b_row, T* c, std::int64_t c_row, std::int64_t depth,
                   Store mode) {
    Vec<T> sums[rows][vectors];
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 16
        for (int j = 0; j < vectors; ++j) {
            sums[i][j] = Vec<T>{};
        }
    }
    for (std::int64_t k = 0; k < depth; ++k) {
        Vec<T> right[vectors];
#pragma GCC unroll 16
        for (int j = 0; j < vectors; ++j) {
            right[j] = load(b + k * b_row + j * lanes<T>);
        }
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i) {
            const Vec<T> left = broadcast(a.data[i * a.row + k * a.col]);
#pragma GCC unroll 16
            for (int j = 0; j < vectors; ++j) {
                sums[i][j] += left * right[j];
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 16
        for (int j = 0; j < vectors; ++j) {
            T* to = c + i * c_row + j * lanes<T>;
            if (mode == Store::stream) {
                store_stream(to, sums[i][j]);
            } else {
                store(to, mode == Store::add ? load(to) + sums[i][j] : sums[i][j]);
            }
        }
    }
}

// Call multiply_tile with `rows` as a template argument.
template <class T, int vectors, int most = broadcast_rows>
FASTKD_INLINE void multiply_rows(std::int64_t rows, Matrix<T> a, const T* b, std::int64_t b_row, T* c,
                                 std::int64_t c_row, std::int64_t depth, Store mode) {
    if (rows == most) {
        multiply_tile<T, most, vectors>(a, b, b_row, c, c_row, depth, mode);
    } else if constexpr (most > 1) {
        multiply_rows<T, vectors, most - 1>(rows, a, b, b_row, c, c_row, depth, mode);
    }
}

enum class Walk {
    down,  // one strip of B after another, each for all rows of A: for a large B
    across // one strip of rows of A after another, each for all of B: for a large C
};

// C (rows x cols) = A (rows x depth) B (depth x cols); `cols` is a multiple of `lanes`.
template <class T>
void multiply(Matrix<T> a, const T* b, std::int64_t b_row, T* c, std::int64_t c_row, std::int64_t rows,
              std::int64_t cols, std::int64_t depth, Walk walk, Store mode, Prefetch fetch = {}) {
    constexpr std::int64_t most_depth = 128; // two-level sums are more accurate, and a strip of B stays in the L1
    constexpr std::int64_t strip = 2 * lanes<T>;
    const std::int64_t strips = ceil_div(rows, broadcast_rows);
    const std::int64_t each = strips > 0 ? ceil_div(rows, strips) : 0;
    fetch.spread(strips * ceil_div(cols, strip) * ceil_div(depth, most_depth));
    // A large C is prefetched two tiles ahead; otherwise every store would wait for memory.
    const auto prefetch_tile = [&](std::int64_t i, std::int64_t j) __attribute__((always_inline)) {
        i += j < cols ? 0 : each;
        j -= j < cols ? 0 : cols;
        for (std::int64_t r = i; r < smaller(i + each, rows); ++r) {
            __builtin_prefetch(c + r * c_row + j, 1);
            __builtin_prefetch(c + r * c_row + j + lanes<T>, 1);
        }
    };
    const auto tile = [&](std::int64_t i, std::int64_t j, std::int64_t k, std::int64_t steps,
                          Store how) __attribute__((always_inline)) {
        const Matrix<T> left{a.data + i * a.row + k * a.col, a.row, a.col};
        const std::int64_t count = smaller(each, rows - i);
        fetch.step();
        if (walk == Walk::across && mode == Store::set) {
            prefetch_tile(i, j + 2 * strip);
        }
        if (cols - j >= strip) {
            multiply_rows<T, 2>(count, left, b + k * b_row + j, b_row, c + i * c_row + j, c_row, steps, how);
        } else {
            multiply_rows<T, 1>(count, left, b + k * b_row + j, b_row, c + i * c_row + j, c_row, steps, how);
        }
    };
    for (std::int64_t k = 0; k < depth; k += most_depth) {
        const std::int64_t steps = smaller(most_depth, depth - k);
        const bool last = k + steps == depth;
        const Store how = k > 0 ? Store::add : (mode == Store::stream && !last ? Store::set : mode);
        if (walk == Walk::down) {
            for (std::int64_t j = 0; j < cols; j += strip) {
                for (std::int64_t i = 0; i < rows; i += each) {
                    tile(i, j, k, steps, how);
                }
            }
        } else {
            for (std::int64_t i = 0; i < rows; i += each) {
                for (std::int64_t j = 0; j < cols; j += strip) {
                    tile(i, j, k, steps, how);
                }
            }
        }
    }
}

// ---- C = A B^T, vectorised along the rows of A and B ---------------------------------------------------------------

// For each group of `width` lanes, select the lower (or upper) half of a's group, then that of b's.
template <class T, int width>
constexpr int half_index(int lane, bool upper) {
    const int begin = lane / width * width, at = lane % width;
    return (at < width / 2 ? begin + at : lanes<T> + begin + at - width / 2) + (upper ? width / 2 : 0);
}

template <class T, int width, bool upper, int... lane>
FASTKD_INLINE Vec<T> halves(Vec<T> a, Vec<T> b, std::integer_sequence<int, lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, half_index<T, width>(lane, upper)...);
#else
    return __builtin_shuffle(a, b, Bits<T>{half_index<T, width>(lane, upper)...});
#endif
}

// Set lane i of values[0] to the lanes of values[i], i < lanes, combined by `of`, such as their sum.
template <class T, int width = lanes<T>, class Of>
FASTKD_INLINE void combine_lanes(Vec<T>* values, const Of& of) {
    if constexpr (width > 1) {
        constexpr auto all = std::make_integer_sequence<int, lanes<T>>{};
#pragma GCC unroll 16
        for (int i = 0; i < width / 2; ++i) {
            const Vec<T> a = values[i], b = values[i + width / 2];
            values[i] = of(halves<T, width, false>(a, b, all), halves<T, width, true>(a, b, all));
        }
        combine_lanes<T, width / 2>(values, of);
    }
}
// The same for one vector: set all lanes to the combination of all lanes, in the same order.
template <class T, int width = lanes<T>, class Of>
FASTKD_INLINE Vec<T> combine_lanes_of(Vec<T> value, const Of& of) {
    if constexpr (width > 1) {
        constexpr auto all = std::make_integer_sequence<int, lanes<T>>{};
        value = of(halves<T, width, false>(value, value, all), halves<T, width, true>(value, value, all));
        return combine_lanes_of<T, width / 2>(value, of);
    } else {
        return value;
    }
}
template <class T>
FASTKD_INLINE void add_lanes(Vec<T>* values) {
    combine_lanes<T>(values, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return a + b; });
}

// Compute up to dot_rows x dot_cols elements of A B^T. Row indices are clamped to the last row.
template <class T>
void dot_tile(const T* a, std::int64_t a_row, std::int64_t rows, const T* b, std::int64_t b_row, std::int64_t cols,
              std::int64_t depth, T* out) {
    constexpr int count = dot_rows * dot_cols;
    static_assert(count % lanes<T> == 0);
    const T* left[dot_rows];
    const T* right[dot_cols];
    for (int i = 0; i < dot_rows; ++i) {
        left[i] = a + smaller(i, rows - 1) * a_row;
    }
    for (int j = 0; j < dot_cols; ++j) {
        right[j] = b + smaller(j, cols - 1) * b_row;
    }
    Vec<T> sums[count] = {};
    for (std::int64_t k = 0; k < depth; k += lanes<T>) {
        Vec<T> right_k[dot_cols];
#pragma GCC unroll 16
        for (int j = 0; j < dot_cols; ++j) {
            right_k[j] = load(right[j] + k);
        }
#pragma GCC unroll 16
        for (int i = 0; i < dot_rows; ++i) {
            const Vec<T> left_k = load(left[i] + k);
#pragma GCC unroll 16
            for (int j = 0; j < dot_cols; ++j) {
                sums[i * dot_cols + j] += left_k * right_k[j];
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < count; i += lanes<T>) {
        add_lanes<T>(sums + i);
        store(out + i, sums[i]);
    }
}

// C (rows x cols) = A (rows x depth) B^T (B: cols x depth), added to C if `accumulate`. `depth` is a multiple of
// `lanes`. With `symmetric`, only the lower triangle is complete; tiles on the diagonal also write to the upper one.
template <class T, class C>
void multiply_transposed(const T* a, std::int64_t a_row, const T* b, std::int64_t b_row, C* c, std::int64_t c_row,
                         std::int64_t rows, std::int64_t cols, std::int64_t depth, bool accumulate,
                         bool symmetric = false, Prefetch fetch = {}) {
    fetch.spread(ceil_div(rows, dot_rows) * ceil_div(cols, dot_cols));
    for (std::int64_t j = 0; j < cols; j += dot_cols) {
        const std::int64_t width = smaller(dot_cols, cols - j);
        for (std::int64_t i = symmetric ? j / dot_rows * dot_rows : 0; i < rows; i += dot_rows) {
            const std::int64_t height = smaller(dot_rows, rows - i);
            T tile[dot_rows * dot_cols];
            fetch.step();
            dot_tile(a + i * a_row, a_row, height, b + j * b_row, b_row, width, depth, tile);
            for (std::int64_t y = 0; y < height; ++y) {
                for (std::int64_t x = 0; x < width; ++x) {
                    C& to = c[(i + y) * c_row + j + x];
                    const C sum = static_cast<C>(tile[y * dot_cols + x]);
                    to = accumulate ? to + sum : sum;
                }
            }
        }
    }
}

} // namespace fastkd::cpu::FASTKD_ISA
