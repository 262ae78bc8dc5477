// GPU primitives: thread indices, warp shuffles, barriers, smem, vector loads, launches.
//
// Kernels include this and matrix.cuh (tensor cores, asynchronous copies), never CUDA's own headers:
// tests/emulation/cuda has headers of the same names that run the same kernels on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "common/dtype.h"

#define FASTKD_KERNEL __global__
#define FASTKD_DEVICE __device__ __forceinline__
// A statically sized array or object in smem.
#define FASTKD_SHARED __shared__
// Declare `name`, a pointer to the launch's dynamic smem (Grid::shared_bytes), aligned to 128 bytes.
#define FASTKD_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// At least one thread block per SM. Without this bound, ptxas may spill registers to fit more blocks.
#define FASTKD_LAUNCH_BOUNDS(threads) __launch_bounds__(threads, 1)
// At least `blocks` thread blocks per SM, for kernels known to have the registers.
#define FASTKD_LAUNCH_BOUNDS_OF(threads, blocks) __launch_bounds__(threads, blocks)

namespace fastkd::cuda {

constexpr int warp_size = 32;

FASTKD_DEVICE int thread_x() {
    return static_cast<int>(threadIdx.x);
}
FASTKD_DEVICE int thread_y() {
    return static_cast<int>(threadIdx.y);
}
FASTKD_DEVICE std::int64_t block_x() {
    return static_cast<std::int64_t>(blockIdx.x);
}
FASTKD_DEVICE std::int64_t grid_x() {
    return static_cast<std::int64_t>(gridDim.x);
}

// Wait for every thread of the block.
FASTKD_DEVICE void block_barrier() {
    __syncthreads();
}

// Wait for every lane of the warp; smem written before the barrier is visible to all lanes after it.
FASTKD_DEVICE void warp_barrier() {
    __syncwarp();
}

// Return the value of lane `lane`. All lanes of the warp must call it.
template <class T>
FASTKD_DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

// Return the value of the lane with index (own index ^ mask). All lanes of the warp must call it.
template <class T>
FASTKD_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Return 2^x to 2 ulp, with one instruction; 0 if the result is below 2^-126.
FASTKD_DEVICE float exp2_of(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// Return a b, never contracted into an FMA, so that the difference of equal products is 0.
FASTKD_DEVICE float multiply_without_fma(float a, float b) {
    return __fmul_rn(a, b);
}

// Conversions between storage and compute types; `narrow` rounds to nearest.
FASTKD_DEVICE float widen(float value) {
    return value;
}
FASTKD_DEVICE double widen(double value) {
    return value;
}
FASTKD_DEVICE float widen(Half value) {
    return __half2float(__half(__half_raw{value.bits}));
}
FASTKD_DEVICE float widen(BFloat16 value) {
    return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{value.bits}));
}
template <class Storage>
FASTKD_DEVICE Storage narrow(Compute<Storage> value) {
    if constexpr (sizeof(Storage) >= 4) {
        return value;
    }
}
template <>
FASTKD_DEVICE Half narrow<Half>(float value) {
    return {static_cast<__half_raw>(__float2half_rn(value)).x};
}
template <>
FASTKD_DEVICE BFloat16 narrow<BFloat16>(float value) {
    return {static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(value)).x};
}

// 16 bytes of elements, loaded or stored by one instruction at an address that is a multiple of 16.
template <class Storage>
struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(Storage);
    Storage at[size];
};

template <class Storage>
FASTKD_DEVICE Pack<Storage> load_pack(const Storage* from) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from));
    Pack<Storage> pack;
    memcpy(&pack, &raw, sizeof(pack));
    return pack;
}

template <class Storage>
FASTKD_DEVICE void store_pack(Storage* to, const Pack<Storage>& pack) {
    uint4 raw;
    memcpy(&raw, &pack, sizeof(raw));
    *reinterpret_cast<uint4*>(to) = raw;
}

struct Grid {
    std::int64_t blocks;
    int threads_x;
    int threads_y = 1;
    int shared_bytes = 0;
};

constexpr int default_shared_limit = 48 * 1024; // larger dynamic smem has to be enabled per kernel

// Launch kernel<<<grid>>>(args...) on the stream without waiting, and return the launch's error.
template <class Kernel, class... Args>
cudaError_t launch(Kernel kernel, Grid grid, cudaStream_t stream, Args... args) {
    if (grid.shared_bytes > default_shared_limit) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
        if (error != cudaSuccess) {
            return error;
        }
    }
    kernel<<<dim3(static_cast<unsigned>(grid.blocks)), dim3(grid.threads_x, grid.threads_y), grid.shared_bytes,
             stream>>>(args...);
    return cudaGetLastError();
}

} // namespace fastkd::cuda
