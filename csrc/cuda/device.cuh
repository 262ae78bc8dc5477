// What a GPU has and a host has not: thread indices, warp shuffles, barriers, shared memory, vector loads, launches.
// Kernels include this and matrix.cuh (tensor cores, asynchronous copies) and nothing of CUDA: tests/emulation/cuda has
// headers of the same names that run the same kernels on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "common/dtype.h"

#define FASTKD_KERNEL __global__
#define FASTKD_DEVICE __device__ __forceinline__
// An array or object of fixed size in shared memory.
#define FASTKD_SHARED __shared__
// Declares `name`, a pointer to the shared memory that the launch asked for (Grid::shared_bytes), aligned to 128 bytes.
#define FASTKD_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// One block to a multiprocessor is enough: left to choose, ptxas spills registers for the sake of more.
#define FASTKD_LAUNCH_BOUNDS(threads) __launch_bounds__(threads, 1)
// At least so many blocks to a multiprocessor, where a kernel is known to have the registers for it.
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

// Waits for every thread of the block.
FASTKD_DEVICE void block_barrier() {
    __syncthreads();
}

// Waits for every lane of the warp; what they wrote to shared memory before is seen by all after.
FASTKD_DEVICE void warp_barrier() {
    __syncwarp();
}

// The value of lane `lane`; every lane of the warp takes part.
template <class T>
FASTKD_DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

// The value of the lane whose index differs from this one's in the bits of `mask`; every lane of the warp takes part.
template <class T>
FASTKD_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// 2^x to two roundings, in one instruction; 0 below 2^-126.
FASTKD_DEVICE float exp2_of(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// a b rounded by itself: never fused with a sum, so that the difference of two equal products is 0.
FASTKD_DEVICE float multiply_alone(float a, float b) {
    return __fmul_rn(a, b);
}

// One element in the type that kernels compute in, and back, rounded to nearest.
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

// 16 bytes of elements, read or written by one instruction at an address that is a multiple of 16.
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

constexpr int unasked_shared_bytes = 48 * 1024; // beyond it a kernel has to be told first

// Starts kernel<<<grid>>>(args...) on the stream and returns what the launch itself reports; waits for nothing.
template <class Kernel, class... Args>
cudaError_t launch(Kernel kernel, Grid grid, cudaStream_t stream, Args... args) {
    if (grid.shared_bytes > unasked_shared_bytes) {
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

// The multiprocessors of the current device: how many blocks run side by side at least.
inline cudaError_t multiprocessors(int* count) {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    return error != cudaSuccess ? error : cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

} // namespace fastkd::cuda
