// The products of gemm/small.h for bfloat16 without widening: operands hold pairs of elements adjacent along K, and one
// AVX512-BF16 instruction adds two exact products to a float. Used only if bf16_products() is true.
#pragma once

#include "cpu/gemm/bf16.h"
#include "cpu/gemm/small.h"

#if defined(FASTKD_BF16_PRODUCTS)

namespace fastkd::cpu::FASTKD_ISA {

constexpr std::int64_t pair_strip = 2 * lanes<float>; // columns of a tile: one vector of bfloat16, two of pairs

FASTKD_INLINE __m512i load_pairs(const void* from) {
    return _mm512_loadu_si512(from);
}

// Interleave two vectors of bfloat16 into two vectors of pairs.
FASTKD_INLINE void interleave(__m512i even, __m512i odd, __m512i (&pairs)[2]) {
    const Words index = lane_index<float>(), first = index | (index + 32) << 16;
    pairs[0] = _mm512_permutex2var_epi16(even, bit_cast<__m512i>(first), odd);
    pairs[1] = _mm512_permutex2var_epi16(even, bit_cast<__m512i>(first + 0x100010), odd);
}

// The right operand of a product, packed as pairs.
struct PackedPairs {
    const PairWord* data; // [pair][column]
    std::int64_t row;

    FASTKD_INLINE PackedPairs from(std::int64_t pair, std::int64_t column) const {
        return {data + pair * row + column, row};
    }
    FASTKD_INLINE void load(std::int64_t pair, __m512i (&pairs)[2]) const {
        pairs[0] = load_pairs(data + pair * row);
        pairs[1] = load_pairs(data + pair * row + lanes<float>);
    }
};
// The right operand as plain rows; every two rows are interleaved into a row of pairs.
struct PairsOfRows {
    const BFloat16* data;
    std::int64_t row;

    FASTKD_INLINE PairsOfRows from(std::int64_t pair, std::int64_t column) const {
        return {data + 2 * pair * row + column, row};
    }
    FASTKD_INLINE void load(std::int64_t pair, __m512i (&pairs)[2]) const {
        interleave(load_pairs(data + 2 * pair * row), load_pairs(data + (2 * pair + 1) * row), pairs);
    }
};

// Compute a tile of rows x pair_strip, accumulated in registers.
template <int rows, class B, class C>
FASTKD_WITH_BF16 FASTKD_NOINLINE void pair_tile(Matrix<PairWord> a, B b, C* c, std::int64_t c_row, std::int64_t depth,
                                                Store mode) {
    __m512 sums[rows][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
        sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    }
    for (std::int64_t k = 0; k < depth; ++k) {
        __m512i right[2];
        b.load(k, right);
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i) {
            const __m512i left = _mm512_set1_epi32(static_cast<int>(a.data[i * a.row + k * a.col]));
            for (int j = 0; j < 2; ++j) {
                sums[i][j] = _mm512_dpbf16_ps(sums[i][j], bit_cast<__m512bh>(left), bit_cast<__m512bh>(right[j]));
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
        C* to = c + i * c_row;
        if constexpr (sizeof(C) == sizeof(BFloat16)) {
            const auto both = bit_cast<Vec<float>>(_mm512_cvtne2ps_pbh(sums[i][1], sums[i][0]));
            if (mode == Store::stream) {
                store_stream(reinterpret_cast<float*>(to), both);
            } else {
                _mm512_storeu_si512(to, bit_cast<__m512i>(both));
            }
        } else {
            for (int j = 0; j < 2; ++j) {
                const auto sum = bit_cast<Vec<float>>(sums[i][j]);
                store(to + j * lanes<float>, mode == Store::add ? load(to + j * lanes<float>) + sum : sum);
            }
        }
    }
}

// Call pair_tile with `rows` as a template argument.
template <class B, class C, int most = broadcast_rows>
FASTKD_INLINE void pair_rows(std::int64_t rows, Matrix<PairWord> a, B b, C* c, std::int64_t c_row, std::int64_t depth,
                             Store mode) {
    if (rows == most) {
        pair_tile<most>(a, b, c, c_row, depth, mode);
    } else if constexpr (most > 1) {
        pair_rows<B, C, most - 1>(rows, a, b, c, c_row, depth, mode);
    }
}

// C (rows x cols) = A (rows x depth pairs) B (depth pairs x cols); `cols` is a multiple of pair_strip. A bfloat16 C
// does not support Store::add.
template <class B, class C>
void multiply_pairs(Matrix<PairWord> a, B b, C* c, std::int64_t c_row, std::int64_t rows, std::int64_t cols,
                    std::int64_t depth, Store mode, Prefetch fetch = {}) {
    constexpr bool rounds = sizeof(C) == sizeof(BFloat16);
    const std::int64_t most_depth = rounds ? depth : 64; // two-level sums are more accurate
    const std::int64_t strips = ceil_div(rows, broadcast_rows);
    const std::int64_t each = strips > 0 ? ceil_div(rows, strips) : 0;
    fetch.spread(strips * (cols / pair_strip) * (rounds ? 1 : ceil_div(depth, most_depth)));
    const auto tile = [&](std::int64_t i, std::int64_t j, std::int64_t k) __attribute__((always_inline)) {
        fetch.step();
        pair_rows(smaller(each, rows - i), Matrix<PairWord>{a.data + i * a.row + k * a.col, a.row, a.col}, b.from(k, j),
                  c + i * c_row + j, c_row, smaller(most_depth, depth - k), k > 0 ? Store::add : mode);
    };
    if constexpr (rounds) { // C is large
        for (std::int64_t i = 0; i < rows; i += each) {
            for (std::int64_t j = 0; j < cols; j += pair_strip) {
                tile(i, j, 0);
            }
        }
    } else {
        for (std::int64_t k = 0; k < depth; k += most_depth) {
            for (std::int64_t j = 0; j < cols; j += pair_strip) {
                for (std::int64_t i = 0; i < rows; i += each) {
                    tile(i, j, k);
                }
            }
        }
    }
}

// Like dot_tile, for rows of bfloat16.
FASTKD_WITH_BF16 FASTKD_NOINLINE void pair_dot_tile(const BFloat16* a, std::int64_t a_row, std::int64_t rows,
                                                    const BFloat16* b, std::int64_t b_row, std::int64_t cols,
                                                    std::int64_t depth, float* out) {
    constexpr int count = dot_rows * dot_cols;
    const BFloat16* left[dot_rows];
    const BFloat16* right[dot_cols];
    for (int i = 0; i < dot_rows; ++i) {
        left[i] = a + smaller(i, rows - 1) * a_row;
    }
    for (int j = 0; j < dot_cols; ++j) {
        right[j] = b + smaller(j, cols - 1) * b_row;
    }
    __m512 sums[count];
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) {
        sums[i] = _mm512_setzero_ps();
    }
    for (std::int64_t k = 0; k < depth; k += pair_strip) {
        __m512i right_k[dot_cols];
#pragma GCC unroll 16
        for (int j = 0; j < dot_cols; ++j) {
            right_k[j] = load_pairs(right[j] + k);
        }
#pragma GCC unroll 16
        for (int i = 0; i < dot_rows; ++i) {
            const __m512i left_k = load_pairs(left[i] + k);
#pragma GCC unroll 16
            for (int j = 0; j < dot_cols; ++j) {
                sums[i * dot_cols + j] = _mm512_dpbf16_ps(sums[i * dot_cols + j], bit_cast<__m512bh>(left_k),
                                                          bit_cast<__m512bh>(right_k[j]));
            }
        }
    }
    static_assert(count == lanes<float>);
    Vec<float> values[count];
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) {
        values[i] = bit_cast<Vec<float>>(sums[i]);
    }
    add_lanes<float>(values);
    store(out, values[0]);
}

// Add A (rows x depth) B^T (B: cols x depth) to C (rows x cols); `depth` is a multiple of pair_strip.
FASTKD_NOINLINE void add_transposed_pairs(const BFloat16* a, std::int64_t a_row, const BFloat16* b, std::int64_t b_row,
                                          float* c, std::int64_t c_row, std::int64_t rows, std::int64_t cols,
                                          std::int64_t depth, Prefetch fetch) {
    fetch.spread(ceil_div(rows, dot_rows) * ceil_div(cols, dot_cols));
    for (std::int64_t j = 0; j < cols; j += dot_cols) {
        const std::int64_t width = smaller(dot_cols, cols - j);
        for (std::int64_t i = 0; i < rows; i += dot_rows) {
            const std::int64_t height = smaller(dot_rows, rows - i);
            float tile[dot_rows * dot_cols];
            fetch.step();
            pair_dot_tile(a + i * a_row, a_row, height, b + j * b_row, b_row, width, depth, tile);
            for (std::int64_t y = 0; y < height; ++y) {
                for (std::int64_t x = 0; x < width; ++x) {
                    c[(i + y) * c_row + j + x] += tile[y * dot_cols + x];
                }
            }
        }
    }
}

// Return the mask of the first `count` of pair_strip elements.
FASTKD_INLINE __mmask32 leading_mask(std::int64_t count) {
    return count >= pair_strip ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

// Split rows of floats into x = high + low, both bfloat16, with a relative error of 2^-17. Write the rows of each and
// the pairs (high, low), padded with zeros to whole strips.
FASTKD_NOINLINE void split_rows(const float* from, std::int64_t rows, std::int64_t width, std::int64_t stride,
                                BFloat16* high, BFloat16* low, PairWord* pairs) {
    for (std::int64_t k = 0; k < rows; ++k) {
        for (std::int64_t p = 0; p < round_up(width, pair_strip); p += lanes<float>) {
            const std::int64_t at = k * stride + p;
            const Vec<float> x = p < width ? load(from + at) : Vec<float>{};
            store(high + at, x);
            const Vec<float> rest = x - load(high + at);
            store(low + at, rest == rest ? rest : Vec<float>{}); // Inf and NaN are in `high` alone
            const Words both = widen(load_raw<Shorts>(high + at)) | widen(load_raw<Shorts>(low + at)) << 16;
            __builtin_memcpy(pairs + at, &both, sizeof(both));
        }
    }
}

} // namespace fastkd::cpu::FASTKD_ISA

#endif
