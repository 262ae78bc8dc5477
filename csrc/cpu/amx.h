// The instructions of Intel AMX: eight tiles of up to 16 rows of 64 bytes, and the product of two tiles of bfloat16.
//
// Inline assembly, because compilers' intrinsics take no template parameters as tile numbers and GCC's do not tell the
// optimiser which memory they read. For tests, tests/emulation/cpu/amx.h replaces this file.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/simd.h"

#if defined(FASTKD_AMX_ASSEMBLER) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastkd::cpu {

// Operand of LDTILECFG: the shapes of all tiles.
struct TileShapes {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

// Return whether this process may use tiles of bfloat16, after asking the system for permission: tiles add 8 KiB to
// the state of a thread, so Linux (5.16 and newer) saves them only for processes that have asked.
FASTKD_INLINE bool request_tiles() {
#if defined(FASTKD_AMX_ASSEMBLER) && defined(__linux__)
    constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24; // edx of leaf 7
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned eax = 7, ebx, ecx = 0, edx;
    if (__builtin_cpu_supports("avx512bf16")) { // so leaf 7 exists
        asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
        return (edx & amx_bf16) != 0 && (edx & amx_tile) != 0 &&
               syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    }
#endif
    return false;
}

#if defined(FASTKD_AMX_ASSEMBLER)
#define FASTKD_AMX

// Set the shapes of all tiles, and all tiles to 0.
FASTKD_INLINE void configure_tiles(const TileShapes& shapes) {
    asm volatile("ldtilecfg %0" : : "m"(shapes));
}
// Clear all tiles, so that the system need not save them.
FASTKD_INLINE void release_tiles() {
    asm volatile("tilerelease");
}
template <int tile>
FASTKD_INLINE void zero_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
// Load or store a tile whose rows are `stride` bytes apart.
template <int tile>
FASTKD_INLINE void load_tile(const void* from, std::ptrdiff_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
FASTKD_INLINE void store_tile(void* to, std::ptrdiff_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}
// sum[m][n] += sum_k a[m][2k] b[k][2n] + a[m][2k + 1] b[k][2n + 1] for tiles a, b of bfloat16 and sum of float.
template <int sum, int a, int b>
FASTKD_INLINE void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
}
#endif

} // namespace fastkd::cpu
