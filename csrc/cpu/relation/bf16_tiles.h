// H of bfloat16 rows, rounded to bfloat16 for its product with the unscaled rows.
//
// M_ij = bfloat16(H_ij scale_j), so that d/d x^_i = sum_j M_ij x_j. Where rows are similar, the rounding errors of M
// would accumulate along x^_i, a direction in which the gradient has no component. The projection removes them if q is
// computed from the rounded matrix: q_i = sum_j (M_ij/scale_j) E_ij.
#pragma once

#include "cpu/gemm/bf16.h"
#include "cpu/relation/tiles.h"

namespace fastkd::cpu::FASTKD_ISA {

// A tile of M: `own` is [row][col] with row stride `own_ld`; `mirror`, unless null, is the transposed tile as [pair of
// rows][col] with stride tile.ld. The padding of the last pair is 0.
struct RoundedTile {
    BFloat16* own;
    std::int64_t own_ld;
    PairWord* mirror;
};
// The scales of the tile's rows and columns, and their inverses times the sign of E.
struct TileScales {
    float row[tile_side], col[tile_side], row_inverse[tile_side], col_inverse[tile_side];
};

#if defined(FASTKD_BF16_PRODUCTS)
FASTKD_WITH_BF16 FASTKD_NOINLINE void round_tile(Tile<float> tile, const float* h, const TileScales& scales,
                                                 RoundedTile out, double* q_row, double* q_col) {
    constexpr int n = lanes<float>;
    const auto widened = [](__m256i raw) __attribute__((always_inline)) {
        return bit_cast<Vec<float>>(widen(bit_cast<Shorts>(raw)) << 16);
    };
    // Index that interleaves two rounded vectors into one word per lane.
    const __m512i interleave =
        _mm512_add_epi32(_mm512_set1_epi32(0x00100000),
                         _mm512_mullo_epi32(_mm512_set1_epi32(0x00010001),
                                            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)));
    float col_sums[tile_side] = {};
    for (std::int64_t r = 0; r < tile.rows; r += 2) {
        const bool both = r + 1 < tile.rows;
        const float scale = scales.row[r], scale2 = both ? scales.row[r + 1] : 0;
        const float inverse = scales.row_inverse[r], inverse2 = both ? scales.row_inverse[r + 1] : 0;
        Vec<float> along{}, along2{};
        for (std::int64_t c = 0; c < tile.cols; c += n) {
            const std::int64_t at = r * tile.ld + c;
            const Bits<float> valid = bit_cast<Bits<float>>(inside<float>(tile.cols, c));
            const auto masked = [&](const float* from) __attribute__((always_inline)) {
                return bit_cast<Vec<float>>(bit_cast<Bits<float>>(load(from)) & valid);
            };
            const Vec<float> h1 = load(h + at), h2 = both ? load(h + at + tile.ld) : Vec<float>{};
            const Vec<float> e1 = masked(tile.e_s + at), e2 = both ? masked(tile.e_s + at + tile.ld) : Vec<float>{};
            const Vec<float> right = load(scales.col + c), right_inverse = load(scales.col_inverse + c);
            const __m512i own =
                bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(h2 * right), bit_cast<__m512>(h1 * right)));
            const __m256i own1 = _mm512_castsi512_si256(own), own2 = _mm512_extracti64x4_epi64(own, 1);
            __builtin_memcpy(out.own + r * out.own_ld + c, &own1, sizeof(own1));
            __builtin_memcpy(out.own + (r + 1) * out.own_ld + c, &own2, sizeof(own2));
            along += widened(own1) * (e1 * right_inverse);
            along2 += widened(own2) * (e2 * right_inverse);
            if (out.mirror != nullptr) {
                const __m512i other =
                    bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(h2 * scale2), bit_cast<__m512>(h1 * scale)));
                const Words words = bit_cast<Words>(_mm512_permutexvar_epi16(interleave, other));
                __builtin_memcpy(out.mirror + r / 2 * tile.ld + c, &words, sizeof(words));
                const Vec<float> down = bit_cast<Vec<float>>(words << 16) * (e1 * inverse) +
                                        bit_cast<Vec<float>>(words & 0xffff0000u) * (e2 * inverse2);
                store(col_sums + c, load(col_sums + c) + down);
            }
        }
        q_row[r] += sum(along);
        if (both) {
            q_row[r + 1] += sum(along2);
        }
    }
    for (std::int64_t c = 0; q_col != nullptr && c < tile.cols; ++c) {
        q_col[c] += static_cast<double>(col_sums[c]);
    }
}
#else // never called: see bf16_products()
FASTKD_INLINE void round_tile(Tile<float>, const float*, const TileScales&, RoundedTile, double*, double*) {
}
#endif

// g[r][:] = outer[r] (g[r][:] - along[r] x[r][:]), and 0 if outer[r] is 0 even for NaN. x is packed in pairs of rows,
// one panel of `width` columns.
FASTKD_NOINLINE void project_pairs(const PairWord* x, std::int64_t rows, std::int64_t width, const float* outer,
                                   const float* along, float* g) {
    for (std::int64_t r = 0; r < rows; ++r) {
        const int up = r % 2 == 0 ? 16 : 0;
        for (std::int64_t c = 0; c < width; c += lanes<float>) {
            const Words words = load_raw<Words>(x + r / 2 * width + c);
            const Vec<float> value = bit_cast<Vec<float>>((words << up) & 0xffff0000u);
            float* to = g + r * width + c;
            store(to, outer[r] == 0 ? Vec<float>{} : (load(to) - value * along[r]) * outer[r]);
        }
    }
}

} // namespace fastkd::cpu::FASTKD_ISA
