// Panels of bfloat16 pixels for the products of gemm/small_bf16.h, without widening.
#pragma once

#include "cpu/gemm/small_bf16.h"
#include "cpu/pixel_word/panel.h"

#if defined(FASTKD_BF16_PRODUCTS)

namespace fastkd::cpu::FASTKD_ISA {

// Return the mask of the valid pixels among the pair_strip pixels from `p` on.
FASTKD_INLINE __mmask32 valid_mask(const Pixels<float>& pixels, std::int64_t p) {
    if (pixels.valid == nullptr && pixels.count - p >= pair_strip) {
        return ~__mmask32{0};
    }
    __mmask32 there = 0;
    for (std::int64_t i = 0; i < pair_strip && p + i < pixels.count; ++i) {
        there |= __mmask32{pixels.valid == nullptr || pixels.valid[p + i] != 0.0f} << i;
    }
    return there;
}

// Pack the panel as out[pair of columns][pixel]. Invalid pixels, an odd last column and the padding to whole strips are
// zero.
FASTKD_NOINLINE void pack_panel(const Array& array, const Pixels<float>& pixels, std::int64_t columns, PairWord* out,
                                std::int64_t stride) {
    constexpr int n = lanes<float>;
    const BFloat16* from = address(array, pixels, BFloat16{});
    const std::int64_t pairs = (columns + 1) / 2;
    if (by_pixel(array)) {
        for (std::int64_t p = 0; p < round_up(pixels.count, pair_strip); p += n) {
            const __mmask32 there = valid_mask(pixels, p);
            for (std::int64_t k = 0; k < pairs; k += n) {
                const __mmask32 whole = leading_mask(columns - 2 * k);
                Vec<float> block[n];
#pragma GCC unroll 16
                for (int i = 0; i < n; ++i) {
                    const bool valid = (there >> i & 1) != 0; // masked elements are not read
                    block[i] = bit_cast<Vec<float>>(_mm512_maskz_loadu_epi16(
                        valid ? whole : 0, from + (valid ? (p + i) * array.pixel : 0) + 2 * k));
                }
                transpose<float>(block);
                PairWord* to = out + k * stride + p;
                if (pairs - k >= n) {
#pragma GCC unroll 16
                    for (int i = 0; i < n; ++i) {
                        _mm512_storeu_si512(to + i * stride, bit_cast<__m512i>(block[i]));
                    }
                } else {
                    for (int i = 0; i < pairs - k; ++i) {
                        _mm512_storeu_si512(to + i * stride, bit_cast<__m512i>(block[i]));
                    }
                }
            }
        }
        return;
    }
    for (std::int64_t p = 0; p < pixels.count; p += pair_strip) {
        const __mmask32 there = valid_mask(pixels, p);
        for (std::int64_t k = 0; k < pairs; ++k) {
            const BFloat16* row = from + 2 * k * array.column + p;
            const bool odd = 2 * k + 1 < columns;
            __m512i both[2];
            interleave(_mm512_maskz_loadu_epi16(there, row),
                       _mm512_maskz_loadu_epi16(odd ? there : 0, row + (odd ? array.column : 0)), both);
            _mm512_storeu_si512(out + k * stride + p, both[0]);
            _mm512_storeu_si512(out + k * stride + p + lanes<float>, both[1]);
        }
    }
}

// A panel in place, or copied to scratch memory with rows padded to whole strips.
struct PanelBF16 {
    const BFloat16* data;
    std::int64_t stride;
    bool by_pixel;
};

FASTKD_NOINLINE PanelBF16 load_panel_bf16(const Array& array, const Pixels<float>& pixels, std::int64_t columns,
                                          BFloat16* scratch) {
    const BFloat16* from = address(array, pixels, BFloat16{});
    const bool rows = by_pixel(array);
    const std::int64_t length = rows ? columns : pixels.count, padded = round_up(length, pair_strip);
    if (pixels.valid == nullptr && length == padded) {
        return {from, rows ? array.pixel : array.column, rows};
    }
    for (std::int64_t i = 0; i < (rows ? pixels.width : columns); ++i) {
        const bool there = !rows || (i < pixels.count && (pixels.valid == nullptr || pixels.valid[i] != 0.0f));
        const BFloat16* row = from + (there ? i * (rows ? array.pixel : array.column) : 0);
        for (std::int64_t j = 0; j < padded; j += pair_strip) {
            const __mmask32 some = rows ? leading_mask(columns - j) : valid_mask(pixels, j);
            _mm512_storeu_si512(scratch + i * padded + j, _mm512_maskz_loadu_epi16(there ? some : 0, row + j));
        }
    }
    return {scratch, padded, rows};
}

// Destination of a panel's gradient; finish_panel_bf16 copies it to memory unless it was written in place.
struct PanelBF16Out {
    BFloat16* data;
    std::int64_t stride;
    bool in_memory;
    Store mode;
};

FASTKD_INLINE PanelBF16Out start_panel_bf16(const Array& array, const Pixels<float>& pixels, std::int64_t columns,
                                            bool stream, BFloat16* scratch) {
    const bool rows = by_pixel(array);
    const std::int64_t length = rows ? columns : pixels.count, row = rows ? array.pixel : array.column;
    if (pixels.valid != nullptr || length % pair_strip != 0) {
        return {scratch, round_up(length, pair_strip), false, Store::set};
    }
    BFloat16* to = address(array, pixels, BFloat16{});
    const bool whole_lines = (reinterpret_cast<std::uintptr_t>(to) | static_cast<std::uintptr_t>(2 * row)) % 64 == 0;
    return {to, row, true, stream && whole_lines ? Store::stream : Store::set};
}

FASTKD_NOINLINE void finish_panel_bf16(const PanelBF16Out& panel, const Array& array, const Pixels<float>& pixels,
                                       std::int64_t columns) {
    const bool rows = by_pixel(array);
    BFloat16* to = address(array, pixels, BFloat16{});
    for (std::int64_t i = 0; !panel.in_memory && i < (rows ? pixels.count : columns); ++i) {
        BFloat16* row = to + i * (rows ? array.pixel : array.column);
        const bool there = !rows || pixels.valid == nullptr || pixels.valid[i] != 0.0f;
        const std::int64_t length = rows ? columns : pixels.count;
        for (std::int64_t j = 0; j < length; j += pair_strip) {
            const __mmask32 some = rows ? ~__mmask32{0} : valid_mask(pixels, j);
            const __m512i values = load_pairs(panel.data + i * panel.stride + j);
            _mm512_mask_storeu_epi16(row + j, leading_mask(length - j),
                                     _mm512_maskz_mov_epi16(there ? some : 0, values));
        }
    }
}

} // namespace fastkd::cpu::FASTKD_ISA

#endif
