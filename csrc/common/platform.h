// What lets one header serve the host compiler, nvcc, and the tests that run device code on the host.
#pragma once

#include <cstdint>

// Formulas are always inlined: the CPU kernels compile them once per instruction set, and no copy made for AVX-512 may
// be left for the linker to hand to the others.
#if defined(__CUDACC__)
#define FASTKD_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FASTKD_HD inline __attribute__((always_inline))
#else
#define FASTKD_HD inline
#endif

namespace fastkd {

// a b, rounded before anything is added to it: where equal numbers are subtracted, neither may be the unrounded product
// of a fused multiply-add.
template <class T>
FASTKD_HD T rounded_product(T a, T b) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(T) == sizeof(float)) {
        return __fmul_rn(a, b);
    } else {
        return __dmul_rn(a, b);
    }
#else
    volatile T product = a * b; // tests only: the CPU kernels have no use for it
    return product;
#endif
}

} // namespace fastkd
