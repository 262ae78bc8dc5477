// Loops that run at the peak rate of a core's vector units, for the roofline of the benchmarks (benchmarks/measure.py).
// Operands stay in registers, or in the first-level cache for exponentials.
#include "cpu/exp.h"
#include "cpu/gemm/amx.h"
#include "cpu/kernels.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

constexpr int chains = 12; // independent sums: more than latency x units, fewer than registers
constexpr int unroll = 64;

// Keep a value in a register, as if it were used and changed here.
template <class V>
FASTKD_INLINE void keep(V& value) {
#if defined(__x86_64__)
    asm volatile("" : "+x"(value));
#else
    asm volatile("" : "+w"(value));
#endif
}

template <class T>
double fused_multiply_adds(std::int64_t repeats) {
    Vec<T> sums[chains] = {}, factor = broadcast(T(0.5)), term = broadcast(T(1));
    for (std::int64_t i = 0; i < repeats; ++i) {
        for (int step = 0; step < unroll; ++step) {
#pragma GCC unroll 12
            for (int chain = 0; chain < chains; ++chain) {
                sums[chain] = sums[chain] * factor + term;
                keep(sums[chain]);
            }
        }
    }
    return 2.0 * lanes<T> * chains * unroll * static_cast<double>(repeats); // FLOP
}

#if defined(FASTKD_BF16_PRODUCTS)
FASTKD_WITH_BF16 double bf16_dot_products(std::int64_t repeats) {
    __m512 sums[chains] = {};
    __m512i pairs = _mm512_set1_epi16(0x3f80); // 1
    for (std::int64_t i = 0; i < repeats; ++i) {
        for (int step = 0; step < unroll; ++step) {
#pragma GCC unroll 12
            for (int chain = 0; chain < chains; ++chain) {
                sums[chain] = _mm512_dpbf16_ps(sums[chain], bit_cast<__m512bh>(pairs), bit_cast<__m512bh>(pairs));
                keep(sums[chain]);
            }
        }
    }
    return 4.0 * 16 * chains * unroll * static_cast<double>(repeats); // FLOP
}
#endif

#if defined(FASTKD_AMX) && defined(FASTKD_BF16_PRODUCTS)
double amx_dot_products(std::int64_t repeats) {
    configure_tiles(tile_shapes(tile_pairs));
    for_constants<8>([](auto tile) { zero_tile<decltype(tile)::value>(); });
    constexpr int steps = 8, sums = 6;
    for (std::int64_t i = 0; i < steps * repeats; ++i) {
        for_constants<sums>([](auto sum) { multiply_tiles<decltype(sum)::value, left_tile, right_tile>(); });
    }
    release_tiles();
    return 4.0 * tile_rows * tile_rows * tile_pairs * sums * steps * static_cast<double>(repeats); // FLOP
}
#endif

double exponentials(std::int64_t repeats) {
    constexpr int count = 1024;
    const ScaledExp<float> exp{1.0f};
    float x[count], y[count];
    for (int i = 0; i < count; ++i) {
        x[i] = static_cast<float>(-i) / count;
    }
    for (std::int64_t i = 0; i < repeats; ++i) {
        for (int at = 0; at < count; at += lanes<float>) {
            store(y + at, exp(load(x + at)));
        }
        asm volatile("" : : "r"(x), "r"(y) : "memory"); // compute them again
    }
    return static_cast<double>(count) * static_cast<double>(repeats);
}

} // namespace

double peak(Peak operation, std::int64_t repeats) {
    switch (operation) {
    case Peak::float_product:
        return fused_multiply_adds<float>(repeats);
    case Peak::double_product:
        return fused_multiply_adds<double>(repeats);
    case Peak::bf16_product:
#if defined(FASTKD_AMX) && defined(FASTKD_BF16_PRODUCTS)
        if (amx_products()) {
            return amx_dot_products(repeats);
        }
#endif
#if defined(FASTKD_BF16_PRODUCTS)
        if (bf16_products()) {
            return bf16_dot_products(repeats);
        }
#endif
        return fused_multiply_adds<float>(repeats);
    default:
        return exponentials(repeats);
    }
}

} // namespace fastkd::cpu::FASTKD_ISA
