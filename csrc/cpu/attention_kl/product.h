// The products of a block of queries: Q K^T with packed keys, H K and H^T Q with rows as they are stored.
#pragma once

#include "cpu/gemm/packed.h"
#include "cpu/gemm/small.h"

namespace fastkd::cpu::FASTKD_ISA {

// The left operand: element (r, k) at data[r row + k col].
template <class T>
struct Rows {
    const T* data;
    std::int64_t row, col;
};

// The right operand, divided into panels of columns: packed by pack(), or rows with contiguous columns.
template <class T>
struct Columns {
    const T* data;
    bool packed;
    std::int64_t row = 0; // unless packed

    FASTKD_INLINE const T* panel(std::int64_t begin, std::int64_t inner) const {
        return data + (packed ? begin * inner : begin);
    }
    FASTKD_INLINE std::int64_t step(int width) const { return packed ? width * lanes<T> : row; }
};

// As many rows as leave registers for a panel and a scalar.
template <int width>
constexpr int most_rows = FASTKD_VECTOR_BYTES == 64 ? (width == 3 ? 8 : 10) : (width == 3 ? 4 : 6);

// c[r][:] (+)= sum_k a[r][k] b[k][:], r < rows, for a panel of `width` vectors.
template <class T, int width, int rows>
FASTKD_INLINE void tile_product(Rows<T> a, const T* b, std::int64_t b_row, std::int64_t inner, T* c, std::int64_t c_row,
                                Store mode) {
    // One pointer for three rows: more would not fit the registers, fewer need more address arithmetic.
    const T* left[(rows + 2) / 3];
#pragma GCC unroll 8
    for (int g = 0; g < (rows + 2) / 3; ++g) {
        left[g] = a.data + 3 * g * a.row;
    }
    Vec<T> sums[rows][width] = {};
    for (std::int64_t k = 0; k < inner; ++k) {
        Vec<T> panel[width];
#pragma GCC unroll 3
        for (int v = 0; v < width; ++v) {
            panel[v] = load(b + v * lanes<T>);
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            const T factor = left[r / 3][r % 3 * a.row];
#pragma GCC unroll 3
            for (int v = 0; v < width; ++v) {
                sums[r][v] += factor * panel[v];
            }
        }
#pragma GCC unroll 8
        for (int g = 0; g < (rows + 2) / 3; ++g) {
            left[g] += a.col;
        }
        b += b_row;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < width; ++v) {
            T* to = c + r * c_row + v * lanes<T>;
            if (mode == Store::stream) {
                store_stream(to, sums[r][v]);
            } else {
                store(to, mode == Store::add ? load(to) + sums[r][v] : sums[r][v]);
            }
        }
    }
}
// Call tile_product with `rows` as a template argument.
template <class T, int width, int most>
FASTKD_INLINE void tile_of(std::int64_t rows, Rows<T> a, const T* b, std::int64_t b_row, std::int64_t inner, T* c,
                           std::int64_t c_row, Store mode) {
    if (rows == most) {
        tile_product<T, width, most>(a, b, b_row, inner, c, c_row, mode);
    } else if constexpr (most > 1) {
        tile_of<T, width, most - 1>(rows, a, b, b_row, inner, c, c_row, mode);
    }
}
// The same for any `inner` and `rows`, exactly `rows` of which are read and written.
template <class T, int width>
FASTKD_INLINE void strip_product(Rows<T> a, std::int64_t rows, const T* b, std::int64_t b_row, std::int64_t inner, T* c,
                                 std::int64_t c_row, Store mode, Prefetch& fetch) {
    constexpr int most = most_rows<width>;
    const std::int64_t each = ceil_div(rows, ceil_div(rows, most));
    for (std::int64_t k = 0; k < inner; k += inner_chunk) {
        const std::int64_t some = inner - k < inner_chunk ? inner - k : inner_chunk;
        const Store how = k > 0 ? Store::add : (mode == Store::stream && some < inner ? Store::set : mode);
        for (std::int64_t r = 0; r < rows; r += each) {
            fetch.step();
            tile_of<T, width, most>(rows - r < each ? rows - r : each, {a.data + r * a.row + k * a.col, a.row, a.col},
                                    b + k * b_row, b_row, some, c + r * c_row, c_row, how);
        }
    }
}

// c[r][:] (+)= sum_k a[r][k] b[k][:] for the first panels of b, up to `cols` columns.
template <class T>
FASTKD_NOINLINE void product(Rows<T> a, std::int64_t rows, Columns<T> b, Panels<T> panels, std::int64_t cols,
                             std::int64_t inner, T* c, std::int64_t c_row, Store mode, Prefetch fetch = {}) {
    fetch.spread(ceil_div(rows, most_rows<2>) * panels.size * ceil_div(inner, inner_chunk));
    for (std::int64_t p = 0; p < panels.size && panels.begin(p) < cols; ++p) {
        const std::int64_t begin = panels.begin(p);
        const T* panel = b.panel(begin, inner);
        const std::int64_t step = b.step(panels.width(p));
        switch (panels.width(p)) {
        case 3:
            strip_product<T, 3>(a, rows, panel, step, inner, c + begin, c_row, mode, fetch);
            break;
        case 2:
            strip_product<T, 2>(a, rows, panel, step, inner, c + begin, c_row, mode, fetch);
            break;
        default:
            strip_product<T, 1>(a, rows, panel, step, inner, c + begin, c_row, mode, fetch);
        }
    }
}

} // namespace fastkd::cpu::FASTKD_ISA
