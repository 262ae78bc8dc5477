// Matrix products of packed blocks.
//
// A dimension is cut into panels of one to three vectors. A packed operand is stored panel by panel, [inner][panel]: the
// inner loop of a product then reads one contiguous stream of panel vectors, and multiplies them with `micro_rows`
// scalars of the other operand, whose results stay in registers.
#pragma once

#include <utility>

#include "cpu/simd.h"

namespace fastkd::cpu::FASTKD_ISA {

// 24 (AVX-512) or 12 accumulators, three vectors and a scalar fit the registers.
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

constexpr std::int64_t inner_chunk = 64; // sums of sums: rounding grows with the square root of both

// How `count` elements are cut into panels: of three vectors, the last one or two of two where that wastes less.
template <class T>
struct Panels {
    std::int64_t vectors, size, narrow;

    FASTKD_INLINE explicit Panels(std::int64_t count)
        : vectors((count + lanes<T> - 1) / lanes<T>), size((vectors + 2) / 3), narrow(3 * size - vectors) {}
    FASTKD_INLINE std::int64_t elements() const { return vectors * lanes<T>; }
    FASTKD_INLINE int width(std::int64_t panel) const { // in vectors
        return size == 1 ? static_cast<int>(vectors) : (panel < size - narrow ? 3 : 2);
    }
    FASTKD_INLINE std::int64_t begin(std::int64_t panel) const { // in elements
        const std::int64_t late = panel - (size - narrow);
        return (3 * panel - (size > 1 && late > 0 ? late : 0)) * lanes<T>;
    }
};

// c[m][:] (+)= sum_i a[m][i] b[i][:], m < micro_rows, over a panel of `width` vectors; a[m][i] = a[m a_row + i a_inner].
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

// As micro_product over `rows` rows (rounded up to micro_rows, which a, c must have) and any `inner`.
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
FASTKD_NOINLINE void panel_product(int width, const T* a, std::int64_t a_row, std::int64_t a_inner,
                                                    std::int64_t rows, const T* b, std::int64_t inner, T* c,
                                                    std::int64_t c_row, bool add) {
    switch (width) {
    case 3:
        return panel_product_of<T, 3>(a, a_row, a_inner, rows, b, inner, c, c_row, add);
    case 2:
        return panel_product_of<T, 2>(a, a_row, a_inner, rows, b, inner, c, c_row, add);
    default:
        return panel_product_of<T, 1>(a, a_row, a_inner, rows, b, inner, c, c_row, add);
    }
}

// c[x][y] (+)= sum_i x_packed[i][x] y_packed[i][y] of two blocks packed in panels over x and over y.
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

// c[m][y] (+)= sum_i a[m][i] y_packed[i][y]; a[m][i] = a[m a_row + i a_inner].
template <class T>
FASTKD_INLINE void strided_product(const T* a, std::int64_t a_row, std::int64_t a_inner, std::int64_t rows, const T* y,
                                   Panels<T> y_panels, std::int64_t inner, T* c, std::int64_t c_row, bool add) {
    for (std::int64_t q = 0; q < y_panels.size; ++q) {
        panel_product<T>(y_panels.width(q), a, a_row, a_inner, rows, y + y_panels.begin(q) * inner, inner,
                         c + y_panels.begin(q), c_row, add);
    }
}

// ---- lanes x lanes transposes --------------------------------------------------------------------------------------

template <int... index, class V>
FASTKD_INLINE V shuffle(V a, V b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, index...);
#else
    using Index = decltype(a == b);
    return __builtin_shuffle(a, b, Index{index...});
#endif
}

template <int distance, class V, int... c>
FASTKD_INLINE void swap_blocks(V& a, V& b, std::integer_sequence<int, c...>) {
    constexpr int n = sizeof...(c);
    const V low = shuffle<((c & distance) ? n + c - distance : c)...>(a, b);
    b = shuffle<((c & distance) ? n + c : c + distance)...>(a, b);
    a = low;
}

template <class T, int distance = lanes<T> / 2>
FASTKD_INLINE void transpose(Vec<T> (&rows)[lanes<T>]) {
    if constexpr (distance > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes<T>; ++i) {
            if ((i & distance) == 0) {
                swap_blocks<distance>(rows[i], rows[i + distance], std::make_integer_sequence<int, lanes<T>>{});
            }
        }
        transpose<T, distance / 2>(rows);
    }
}

// The first `count` (at most lanes) elements at `from`, zeros after them.
template <class S, class T = Compute<S>>
FASTKD_INLINE Vec<T> load_first(const S* from, std::int64_t count) {
    if (count >= lanes<T>) {
        return load(from);
    }
    S padded[lanes<T>] = {};
    if (count > 0) {
        __builtin_memcpy(padded, from, count * sizeof(S));
    }
    return load(padded);
}
template <class S, class V>
FASTKD_INLINE void store_first(S* to, V value, std::int64_t count) {
    constexpr std::int64_t all = sizeof(V) / sizeof(Compute<S>);
    if (count >= all) {
        return store(to, value);
    }
    S padded[all];
    store(padded, value);
    if (count > 0) {
        __builtin_memcpy(to, padded, count * sizeof(S));
    }
}

// ---- packing -------------------------------------------------------------------------------------------------------

// Packs x[p][i] = x[p p_stride + i i_stride], p < count, i < inner, into panels over p, times p_scale[p] and i_scale[i]
// where they are given. What pads the last panel is 0.
template <class S>
FASTKD_NOINLINE void pack(const S* x, std::int64_t p_stride, std::int64_t i_stride, std::int64_t count,
                                           std::int64_t inner, const Compute<S>* p_scale, const Compute<S>* i_scale,
                                           Compute<S>* out) {
    using T = Compute<S>;
    const Panels<T> panels(count);
    for (std::int64_t panel = 0; panel < panels.size; ++panel) {
        const std::int64_t width = panels.width(panel) * lanes<T>;
        const std::int64_t begin = panels.begin(panel);
        T* to = out + begin * inner;
        for (std::int64_t v = 0; v < width; v += lanes<T>) {
            const std::int64_t p = begin + v;
            const std::int64_t valid = count - p < lanes<T> ? count - p : lanes<T>; // at least 1
            const S* from = x + p * p_stride;
            const Vec<T> scale = p_scale == nullptr ? broadcast(T(1)) : load_first(p_scale + p, valid);
            if (p_stride == 1) {
                for (std::int64_t i = 0; i < inner; ++i) {
                    const Vec<T> value = load_first(from + i * i_stride, valid);
                    const T by = i_scale == nullptr ? T(1) : i_scale[i];
                    store(to + i * width + v, value * scale * by);
                }
            } else if (i_stride == 1) {
                for (std::int64_t i = 0; i < inner; i += lanes<T>) {
                    const std::int64_t rest = inner - i < lanes<T> ? inner - i : lanes<T>;
                    Vec<T> block[lanes<T>];
                    const Vec<T> by = i_scale == nullptr ? broadcast(T(1)) : load_first(i_scale + i, rest);
                    if (rest == lanes<T> && valid == lanes<T>) {
#pragma GCC unroll 16
                        for (int l = 0; l < lanes<T>; ++l) {
                            block[l] = load(from + l * p_stride + i) * by;
                        }
                    } else {
                        for (int l = 0; l < lanes<T>; ++l) {
                            block[l] = l < valid ? load_first(from + l * p_stride + i, rest) * by : Vec<T>{};
                        }
                    }
                    transpose<T>(block);
                    if (rest == lanes<T>) {
#pragma GCC unroll 16
                        for (int l = 0; l < lanes<T>; ++l) {
                            store(to + (i + l) * width + v, block[l] * scale);
                        }
                    } else {
                        for (int l = 0; l < rest; ++l) {
                            store(to + (i + l) * width + v, block[l] * scale);
                        }
                    }
                }
            } else {
                for (std::int64_t i = 0; i < inner; ++i) {
                    S gathered[lanes<T>] = {};
                    for (std::int64_t l = 0; l < valid; ++l) {
                        gathered[l] = from[l * p_stride + i * i_stride];
                    }
                    const T by = i_scale == nullptr ? T(1) : i_scale[i];
                    store(to + i * width + v, load(gathered) * scale * by);
                }
            }
        }
    }
}

// out[r r_stride + k k_stride] = buffer[r][k], r < rows, k < cols; rows of the buffer lie `ld` apart, and it has whole
// vectors of columns.
template <class S>
FASTKD_NOINLINE void unpack(const Compute<S>* buffer, std::int64_t ld, std::int64_t rows,
                                             std::int64_t cols, S* out, std::int64_t r_stride, std::int64_t k_stride) {
    using T = Compute<S>;
    if (k_stride == 1) {
        for (std::int64_t r = 0; r < rows; ++r) {
            for (std::int64_t k = 0; k < cols; k += lanes<T>) {
                store_first(out + r * r_stride + k, load(buffer + r * ld + k), cols - k);
            }
        }
        return;
    }
    for (std::int64_t r = 0; r < rows; r += lanes<T>) {
        const std::int64_t valid = rows - r < lanes<T> ? rows - r : lanes<T>;
        for (std::int64_t k = 0; k < cols; k += lanes<T>) {
            Vec<T> block[lanes<T>];
            for (int l = 0; l < lanes<T>; ++l) {
                block[l] = l < valid ? load(buffer + (r + l) * ld + k) : Vec<T>{};
            }
            transpose<T>(block);
            const std::int64_t some = cols - k < lanes<T> ? cols - k : lanes<T>;
            for (int l = 0; l < some; ++l) {
                S* to = out + r * r_stride + (k + l) * k_stride;
                if (r_stride == 1) {
                    store_first(to, block[l], valid);
                } else {
                    S stored[lanes<T>];
                    store(stored, block[l]);
                    for (std::int64_t v = 0; v < valid; ++v) {
                        to[v * r_stride] = stored[v];
                    }
                }
            }
        }
    }
}

} // namespace fastkd::cpu::FASTKD_ISA
