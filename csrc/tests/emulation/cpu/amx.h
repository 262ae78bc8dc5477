// The tile instructions of cpu/amx.h in plain C++, for machines without them. Their conditions are checked: a violated
// one, which would fault, ends the process.
//
// One product adds pairs along K in order, even and odd elements separately, then both sums to the result; subnormal
// numbers count as 0 (Intel's instruction-set reference, TDPBF16PS).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/simd.h"

#define FASTKD_AMX

namespace fastkd::cpu {

struct TileShapes {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

FASTKD_INLINE bool request_tiles() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

// Internal linkage: object files are compiled for different instruction sets.
namespace {

struct Tiles {
    bool configured = false;
    TileShapes shapes;
    std::uint32_t data[8][16][16];
};
inline Tiles& tiles() {
    static thread_local Tiles state;
    return state;
}
inline void require(bool condition) {
    if (!condition) {
        __builtin_trap();
    }
}
inline void clear(int tile) {
    __builtin_memset(tiles().data[tile], 0, sizeof(tiles().data[tile]));
}
inline float flushed(std::uint32_t bits) {
    bits = (bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits;
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
}
inline float flushed(float value) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    return flushed(bits);
}
inline void require_shaped(int tile) {
    require(tiles().configured && tiles().shapes.rows[tile] > 0 && tiles().shapes.row_bytes[tile] > 0);
}

inline void configure_tiles(const TileShapes& shapes) {
    require(shapes.palette == 1 && shapes.start_row == 0);
    for (int tile = 0; tile < 16; ++tile) {
        const int rows = shapes.rows[tile], bytes = shapes.row_bytes[tile];
        require(rows <= 16 && bytes <= 64 && (rows == 0) == (bytes == 0) && (tile < 8 || rows == 0));
    }
    tiles().configured = true;
    tiles().shapes = shapes;
    for (int tile = 0; tile < 8; ++tile) {
        clear(tile);
    }
}
inline void release_tiles() {
    tiles().configured = false;
}
template <int tile>
inline void zero_tile() {
    require_shaped(tile);
    clear(tile);
}
template <int tile>
inline void load_tile(const void* from, std::ptrdiff_t stride) {
    require_shaped(tile);
    clear(tile);
    for (int r = 0; r < tiles().shapes.rows[tile]; ++r) {
        __builtin_memcpy(tiles().data[tile][r], static_cast<const char*>(from) + r * stride,
                         tiles().shapes.row_bytes[tile]);
    }
}
template <int tile>
inline void store_tile(void* to, std::ptrdiff_t stride) {
    require_shaped(tile);
    for (int r = 0; r < tiles().shapes.rows[tile]; ++r) {
        __builtin_memcpy(static_cast<char*>(to) + r * stride, tiles().data[tile][r], tiles().shapes.row_bytes[tile]);
    }
}
template <int sum, int a, int b>
inline void multiply_tiles() {
    static_assert(sum != a && sum != b && a != b);
    require_shaped(sum);
    require_shaped(a);
    require_shaped(b);
    Tiles& t = tiles();
    const TileShapes& shapes = t.shapes;
    const int depth = shapes.row_bytes[a] / 4;
    require(shapes.row_bytes[a] % 4 == 0 && shapes.row_bytes[sum] % 4 == 0 && shapes.rows[sum] == shapes.rows[a] &&
            depth == shapes.rows[b] && shapes.row_bytes[sum] == shapes.row_bytes[b]);
    for (int m = 0; m < shapes.rows[sum]; ++m) {
        for (int n = 0; n < shapes.row_bytes[sum] / 4; ++n) {
            float even = 0, odd = 0;
            for (int k = 0; k < depth; ++k) {
                const std::uint32_t left = t.data[a][m][k], right = t.data[b][k][n];
                even = flushed(__builtin_fmaf(flushed(left << 16), flushed(right << 16), even));
                odd = flushed(__builtin_fmaf(flushed(left & 0xffff0000u), flushed(right & 0xffff0000u), odd));
            }
            float total;
            __builtin_memcpy(&total, &t.data[sum][m][n], sizeof(total));
            total = flushed(flushed(total) + flushed(even + odd));
            __builtin_memcpy(&t.data[sum][m][n], &total, sizeof(total));
        }
    }
}

} // namespace

} // namespace fastkd::cpu
