// Macros and helpers for headers shared by the host compiler, nvcc and the host emulation of CUDA.
#pragma once

#include <cstdint>

// Formulas are always inlined: the CPU kernels compile them once per instruction set, and the linker must not pick an
// out-of-line AVX-512 copy for the other instruction sets.
#if defined(__CUDACC__)
#define FASTKD_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FASTKD_HD inline __attribute__((always_inline))
#else
#define FASTKD_HD inline
#endif

namespace fastkd {

// Return a b, rounded before any addition. Where equal products are subtracted, a fused multiply-add would leave one of
// them unrounded, and the difference would not be 0.
template <class T>
FASTKD_HD T rounded_product(T a, T b) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(T) == sizeof(float)) {
        return __fmul_rn(a, b);
    } else {
        return __dmul_rn(a, b);
    }
#else
    volatile T product = a * b; // host emulation only: the CPU kernels do not call this
    return product;
#endif
}

} // namespace fastkd
