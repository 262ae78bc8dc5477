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
