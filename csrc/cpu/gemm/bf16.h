// Matrix products of bfloat16 operands without widening: AVX512-BF16 multiplies pairs of bfloat16 exactly and adds them
// in float. Used only if bf16_products() is true; otherwise operands are widened to float first.
#pragma once

#include "cpu/gemm/packing.h"

#if defined(__AVX512F__) && ((defined(__GNUC__) && __GNUC__ >= 10) || defined(__clang__))
#define FASTKD_BF16_PRODUCTS
#define FASTKD_WITH_BF16 __attribute__((target("avx512bf16")))
#endif

namespace fastkd::cpu::FASTKD_ISA {

template <class S>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<BFloat16> = true;

using PairWord = std::uint32_t; // two bfloat16, adjacent along K

FASTKD_INLINE std::int64_t pairs_of(std::int64_t count) {
    return (count + 1) / 2;
}

// Pack x[p][i] = x[p p_stride + i i_stride], p < count, i < inner, into panels over p: [pair of i][panel].
// The padding of the last pair and the last panel is 0.
FASTKD_NOINLINE void pack_pairs(const BFloat16* x, std::int64_t p_stride, std::int64_t i_stride, std::int64_t count,
                                std::int64_t inner, PairWord* out) {
    constexpr int n = lanes<float>;
    const Panels<float> panels(count);
    const std::int64_t pairs = pairs_of(inner);
    for (std::int64_t panel = 0; panel < panels.size; ++panel) {
        const std::int64_t width = panels.width(panel) * n, begin = panels.begin(panel);
        PairWord* to = out + begin * pairs;
        for (std::int64_t v = 0; v < width; v += n) {
            const std::int64_t p = begin + v;
            const std::int64_t valid = count - p < n ? count - p : n;
            const BFloat16* from = x + p * p_stride;
            if (p_stride == 1) {
                for (std::int64_t k = 0; k < pairs; ++k) {
                    const auto column = [&](std::int64_t i) __attribute__((always_inline)) {
                        Shorts raw{};
                        if (valid == n && i < inner) {
                            raw = load_raw<Shorts>(from + i * i_stride);
                        } else if (i < inner) {
                            __builtin_memcpy(&raw, from + i * i_stride, valid * sizeof(BFloat16));
                        }
                        return widen(raw);
                    };
                    const Words both = column(2 * k) | (column(2 * k + 1) << 16);
                    __builtin_memcpy(to + k * width + v, &both, sizeof(both));
                }
            } else if (i_stride == 1) {
                for (std::int64_t k = 0; k < pairs; k += n) {
                    const std::int64_t rest = inner - 2 * k < 2 * n ? inner - 2 * k : 2 * n;
                    Vec<float> block[n] = {};
                    if (rest == 2 * n && valid == n) {
#pragma GCC unroll 16
                        for (int l = 0; l < n; ++l) {
                            block[l] = load_raw<Vec<float>>(from + l * p_stride + 2 * k);
                        }
                    } else {
                        for (int l = 0; l < valid; ++l) {
                            __builtin_memcpy(&block[l], from + l * p_stride + 2 * k, rest * sizeof(BFloat16));
                        }
                    }
                    transpose<float>(block);
                    if (k + n <= pairs) {
#pragma GCC unroll 16
                        for (int l = 0; l < n; ++l) {
                            __builtin_memcpy(to + (k + l) * width + v, &block[l], sizeof(block[l]));
                        }
                    } else {
                        for (int l = 0; l < pairs - k; ++l) {
                            __builtin_memcpy(to + (k + l) * width + v, &block[l], sizeof(block[l]));
                        }
                    }
                }
            } else {
                for (std::int64_t k = 0; k < pairs; ++k) {
                    for (std::int64_t l = 0; l < n; ++l) {
                        const auto at = [&](std::int64_t i) -> PairWord {
                            return l < valid && i < inner ? from[l * p_stride + i * i_stride].bits : 0;
                        };
                        to[k * width + v + l] = at(2 * k) | (at(2 * k + 1) << 16);
                    }
                }
            }
        }
    }
}

#if defined(FASTKD_BF16_PRODUCTS)
// to[c][pair] = from[pair][c] for `pairs` pairs and `cols` rounded up to whole vectors. `to_ld` counts words.
FASTKD_NOINLINE void transpose_pairs(const PairWord* from, std::int64_t ld, std::int64_t pairs, std::int64_t cols,
                                     PairWord* to, std::int64_t to_ld) {
    constexpr int n = lanes<float>;
    for (std::int64_t p = 0; p < pairs && pairs < n; ++p) {
        for (std::int64_t c = 0; c < round_up(cols, n); ++c) {
            to[c * to_ld + p] = from[p * ld + c];
        }
    }
    for (std::int64_t p = 0; p < pairs && pairs >= n; p += n) {
        const std::int64_t first = p + n <= pairs ? p : pairs - n; // the last vectors overlap
        for (std::int64_t c = 0; c < cols; c += n) {
            Vec<float> block[n];
#pragma GCC unroll 16
            for (int l = 0; l < n; ++l) {
                block[l] = load_raw<Vec<float>>(from + (first + l) * ld + c);
            }
            transpose<float>(block);
#pragma GCC unroll 16
            for (int l = 0; l < n; ++l) {
                __builtin_memcpy(to + (c + l) * to_ld + first, &block[l], sizeof(block[l]));
            }
        }
    }
}

// Like micro_product, panel_product and the products of packed blocks in gemm/packed.h; `inner` counts pairs.
template <int width>
FASTKD_WITH_BF16 FASTKD_INLINE void micro_product_pairs(const PairWord* a, std::int64_t a_row, std::int64_t a_inner,
                                                        const PairWord* b, std::int64_t inner, float* c,
                                                        std::int64_t c_row, bool add) {
    constexpr int rows = micro_rows<float>;
    __m512 sums[rows][width];
    for (int m = 0; m < rows; ++m) {
        for (int v = 0; v < width; ++v) {
            sums[m][v] = _mm512_setzero_ps();
        }
    }
    for (std::int64_t i = 0; i < inner; ++i) {
        __m512i panel[width];
        for (int v = 0; v < width; ++v) {
            panel[v] = _mm512_loadu_si512(b + v * lanes<float>);
        }
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m) {
            const __m512i factor = _mm512_set1_epi32(static_cast<int>(a[m * a_row]));
            for (int v = 0; v < width; ++v) {
                sums[m][v] = _mm512_dpbf16_ps(sums[m][v], bit_cast<__m512bh>(factor), bit_cast<__m512bh>(panel[v]));
            }
        }
        a += a_inner;
        b += width * lanes<float>;
    }
    for (int m = 0; m < rows; ++m) {
        for (int v = 0; v < width; ++v) {
            float* to = c + m * c_row + v * lanes<float>;
            _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sums[m][v]) : sums[m][v]);
        }
    }
}
template <int width>
FASTKD_WITH_BF16 FASTKD_INLINE void panel_product_pairs_of(const PairWord* a, std::int64_t a_row, std::int64_t a_inner,
                                                           std::int64_t rows, const PairWord* b, std::int64_t inner,
                                                           float* c, std::int64_t c_row, bool add) {
    for (std::int64_t from = 0; from < inner; from += inner_chunk) {
        const std::int64_t count = inner - from < inner_chunk ? inner - from : inner_chunk;
        for (std::int64_t m = 0; m < rows; m += micro_rows<float>) {
            micro_product_pairs<width>(a + m * a_row + from * a_inner, a_row, a_inner, b + from * width * lanes<float>,
                                       count, c + m * c_row, c_row, add || from > 0);
        }
    }
}
FASTKD_WITH_BF16 FASTKD_NOINLINE void panel_product_pairs(int width, const PairWord* a, std::int64_t a_row,
                                                          std::int64_t a_inner, std::int64_t rows, const PairWord* b,
                                                          std::int64_t inner, float* c, std::int64_t c_row, bool add) {
    switch (width) {
    case 3:
        return panel_product_pairs_of<3>(a, a_row, a_inner, rows, b, inner, c, c_row, add);
    case 2:
        return panel_product_pairs_of<2>(a, a_row, a_inner, rows, b, inner, c, c_row, add);
    default:
        return panel_product_pairs_of<1>(a, a_row, a_inner, rows, b, inner, c, c_row, add);
    }
}
#else // never called: see bf16_products()
FASTKD_INLINE void transpose_pairs(const PairWord*, std::int64_t, std::int64_t, std::int64_t, PairWord*, std::int64_t) {
}
FASTKD_INLINE void panel_product_pairs(int, const PairWord*, std::int64_t, std::int64_t, std::int64_t, const PairWord*,
                                       std::int64_t, float*, std::int64_t, bool) {
}
#endif

FASTKD_INLINE void packed_product_pairs(const PairWord* x, Panels<float> x_panels, const PairWord* y,
                                        Panels<float> y_panels, std::int64_t inner, float* c, std::int64_t c_row,
                                        bool add) {
    for (std::int64_t q = 0; q < y_panels.size; ++q) {
        for (std::int64_t p = 0; p < x_panels.size; ++p) {
            const std::int64_t width = x_panels.width(p) * lanes<float>;
            panel_product_pairs(y_panels.width(q), x + x_panels.begin(p) * inner, 1, width, width,
                                y + y_panels.begin(q) * inner, inner, c + x_panels.begin(p) * c_row + y_panels.begin(q),
                                c_row, add);
        }
    }
}
FASTKD_INLINE void strided_product_pairs(const PairWord* a, std::int64_t a_row, std::int64_t a_inner, std::int64_t rows,
                                         const PairWord* y, Panels<float> y_panels, std::int64_t inner, float* c,
                                         std::int64_t c_row, bool add) {
    for (std::int64_t q = 0; q < y_panels.size; ++q) {
        panel_product_pairs(y_panels.width(q), a, a_row, a_inner, rows, y + y_panels.begin(q) * inner, inner,
                            c + y_panels.begin(q), c_row, add);
    }
}

} // namespace fastkd::cpu::FASTKD_ISA
