// Matrix products of packed blocks.
//
// A dimension is split into panels of one to three vectors. A packed operand is stored panel by panel, [K][panel], with
// K named `inner`: the micro-kernel reads one contiguous stream of panel vectors, multiplies them by `micro_rows`
// scalars of the other operand, and accumulates in registers.
#pragma once

#include "common/arena.h"
#include "cpu/simd.h"

namespace fastkd::cpu::FASTKD_ISA {

// 24 (AVX-512) or 12 accumulators, three panel vectors and a scalar fit the register file.
#if defined(__AVX512F__)
template <class T>
constexpr int micro_rows = 8;
#elif defined(__AVX2__)
template <class T>
constexpr int micro_rows = 4;
#else
template <class T>
constexpr int micro_rows = lanes<T> < 4 ? lanes<T> : 4; // divides a panel
#endif

constexpr std::int64_t inner_chunk = 64; // two-level sums: rounding errors grow with the square root of each length

// Division of `count` elements into panels of three vectors; the last one or two have two if that wastes less.
template <class T>
struct Panels {
    std::int64_t vectors, size, narrow;

    FASTKD_INLINE explicit Panels(std::int64_t count)
        : vectors(ceil_div(count, lanes<T>)), size((vectors + 2) / 3), narrow(3 * size - vectors) {}
    FASTKD_INLINE std::int64_t elements() const { return vectors * lanes<T>; }
    FASTKD_INLINE int width(std::int64_t panel) const { // in vectors
        return size == 1 ? static_cast<int>(vectors) : (panel < size - narrow ? 3 : 2);
    }
    FASTKD_INLINE std::int64_t begin(std::int64_t panel) const { // in elements
        const std::int64_t late = panel - (size - narrow);
        return (3 * panel - (size > 1 && late > 0 ? late : 0)) * lanes<T>;
    }
    FASTKD_INLINE std::int64_t find(std::int64_t element) const { // the panel that contains it
        const std::int64_t vector = element / lanes<T>, whole = 3 * (size - narrow);
        return size == 1 || vector < whole ? vector / 3 : size - narrow + (vector - whole) / 2;
    }
};

// c[m][:] (+)= sum_i a[m][i] b[i][:], m < micro_rows, over a panel of `width` vectors, where a[m][i] is
// a[m a_row + i a_inner].
template <class T, int width>
FASTKD_INLINE void micro_product(const T* a, std::int64_t a_row, std::int64_t a_inner, const T* b, std::int64_t inner,
                                 T* c, std::int64_t c_row, bool add) {
    constexpr int rows = micro_rows<T>;
    Vec<T> sums[rows][width] = {};
    for (std::int64_t i = 0; i < inner; ++i) {
        Vec<T> panel[width];
        for (int v = 0; v < width; ++v) {
            panel[v] = load(b + v * lanes<T>);
        }
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m) {
            const T factor = a[m * a_row];
            for (int v = 0; v < width; ++v) {
                sums[m][v] += factor * panel[v];
            }
        }
        a += a_inner;
        b += width * lanes<T>;
    }
    for (int m = 0; m < rows; ++m) {
        for (int v = 0; v < width; ++v) {
            T* to = c + m * c_row + v * lanes<T>;
            store(to, add ? load(to) + sums[m][v] : sums[m][v]);
        }
    }
}

// Like micro_product, for any `inner` and `rows`; a and c must have `rows` rounded up to micro_rows.
template <class T, int width>
FASTKD_INLINE void panel_product_of(const T* a, std::int64_t a_row, std::int64_t a_inner, std::int64_t rows, const T* b,
                                    std::int64_t inner, T* c, std::int64_t c_row, bool add) {
    for (std::int64_t from = 0; from < inner; from += inner_chunk) {
        const std::int64_t count = inner - from < inner_chunk ? inner - from : inner_chunk;
        for (std::int64_t m = 0; m < rows; m += micro_rows<T>) {
            micro_product<T, width>(a + m * a_row + from * a_inner, a_row, a_inner, b + from * width * lanes<T>, count,
                                    c + m * c_row, c_row, add || from > 0);
        }
    }
}
template <class T>
FASTKD_NOINLINE void panel_product(int width, const T* a, std::int64_t a_row, std::int64_t a_inner, std::int64_t rows,
                                   const T* b, std::int64_t inner, T* c, std::int64_t c_row, bool add) {
    switch (width) {
    case 3:
        return panel_product_of<T, 3>(a, a_row, a_inner, rows, b, inner, c, c_row, add);
    case 2:
        return panel_product_of<T, 2>(a, a_row, a_inner, rows, b, inner, c, c_row, add);
    default:
        return panel_product_of<T, 1>(a, a_row, a_inner, rows, b, inner, c, c_row, add);
    }
}

// c[x][y] (+)= sum_i x_packed[i][x] y_packed[i][y], for two blocks packed in panels over x and over y.
template <class T>
FASTKD_INLINE void packed_product(const T* x, Panels<T> x_panels, const T* y, Panels<T> y_panels, std::int64_t inner,
                                  T* c, std::int64_t c_row, bool add) {
    for (std::int64_t q = 0; q < y_panels.size; ++q) {
        for (std::int64_t p = 0; p < x_panels.size; ++p) {
            const std::int64_t width = x_panels.width(p) * lanes<T>;
            panel_product<T>(y_panels.width(q), x + x_panels.begin(p) * inner, 1, width, width,
                             y + y_panels.begin(q) * inner, inner, c + x_panels.begin(p) * c_row + y_panels.begin(q),
                             c_row, add);
        }
    }
}

// c[m][y] (+)= sum_i a[m][i] y_packed[i][y], where a[m][i] is a[m a_row + i a_inner].
template <class T>
FASTKD_INLINE void strided_product(const T* a, std::int64_t a_row, std::int64_t a_inner, std::int64_t rows, const T* y,
                                   Panels<T> y_panels, std::int64_t inner, T* c, std::int64_t c_row, bool add) {
    for (std::int64_t q = 0; q < y_panels.size; ++q) {
        panel_product<T>(y_panels.width(q), a, a_row, a_inner, rows, y + y_panels.begin(q) * inner, inner,
                         c + y_panels.begin(q), c_row, add);
    }
}

} // namespace fastkd::cpu::FASTKD_ISA
