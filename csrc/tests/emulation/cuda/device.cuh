// Host version of csrc/cuda/device.cuh: the same names, for kernels that run under tests/emulation/engine.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#include "tests/emulation/engine.h"
#include "tests/emulation/recording.h"

#define FASTKD_KERNEL static
#define FASTKD_DEVICE inline
#define FASTKD_SHARED static // one block runs at a time
#define FASTKD_DYNAMIC_SHARED(name) unsigned char* const name = ::fastkd::emulation::dynamic_shared()
#define FASTKD_LAUNCH_BOUNDS(threads)
#define FASTKD_LAUNCH_BOUNDS_OF(threads, blocks)

namespace fastkd::cuda {

constexpr int warp_size = 32;

using emulation::block_barrier;
using emulation::block_x;
using emulation::grid_x;
using emulation::thread_x;
using emulation::thread_y;
using emulation::warp_barrier;

template <class T>
T shuffle(T value, int lane) {
    static_assert(sizeof(T) % 4 == 0 && sizeof(T) <= 4 * emulation::slot_words, "whole registers");
    std::uint32_t words[sizeof(T) / 4];
    std::memcpy(words, &value, sizeof(T));
    const auto& slots = emulation::exchange(emulation::Operation::shuffle, words, sizeof(T) / 4);
    for (unsigned i = 0; i < sizeof(T) / 4; ++i) {
        words[i] = slots[lane % warp_size][i];
    }
    std::memcpy(&value, words, sizeof(T));
    return value;
}

template <class T>
T shuffle_xor(T value, int mask) {
    return shuffle(value, emulation::lane() ^ mask);
}

inline float exp2_of(float x) {
    return std::isnan(x) ? x : (x < -126 ? 0.0f : std::exp2(x));
}

inline float multiply_without_fma(float a, float b) {
    const volatile float product = a * b; // volatile: the compiler must not contract it into an FMA
    return product;
}

inline float widen(float value) {
    return value;
}
inline double widen(double value) {
    return value;
}
inline float widen(Half value) {
    _Float16 half;
    std::memcpy(&half, &value, sizeof(half));
    return static_cast<float>(half);
}
inline float widen(BFloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    return wide;
}
template <class Storage>
Storage narrow(Compute<Storage> value) {
    if constexpr (sizeof(Storage) >= 4) {
        return value;
    } else if constexpr (std::is_same<Storage, Half>::value) {
        const auto half = static_cast<_Float16>(value);
        Half stored;
        std::memcpy(&stored, &half, sizeof(stored));
        return stored;
    } else {
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof(bits));
        if (std::isnan(value)) {
            return {0x7fff};
        }
        return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
    }
}

template <class Storage>
struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(Storage);
    Storage at[size];
};

inline void check_aligned(const void* address) {
    emulation::check(reinterpret_cast<std::uintptr_t>(address) % 16 == 0,
                     "16 bytes at an address that is not a multiple of 16");
}

template <class Storage>
Pack<Storage> load_pack(const Storage* from) {
    check_aligned(from);
    return *reinterpret_cast<const Pack<Storage>*>(from);
}

template <class Storage>
void store_pack(Storage* to, const Pack<Storage>& pack) {
    check_aligned(to);
    *reinterpret_cast<Pack<Storage>*>(to) = pack;
}

struct Grid {
    std::int64_t blocks;
    int threads_x;
    int threads_y = 1;
    int shared_bytes = 0;
};

constexpr int shared_limit = 99 * 1024; // of sm_86, 89 and 120

template <class Kernel, class... Args>
cudaError_t launch(Kernel kernel, Grid grid, cudaStream_t, Args... args) {
    if (grid.blocks < 1 || grid.blocks > 0x7fffffff || grid.shared_bytes > shared_limit) {
        return cudaErrorInvalidConfiguration;
    }
    if (emulation::recorded(__PRETTY_FUNCTION__, grid.blocks, grid.threads_x * grid.threads_y, grid.shared_bytes)) {
        return cudaSuccess;
    }
    emulation::run(grid.blocks, grid.threads_x, grid.threads_y, grid.shared_bytes, [&] { kernel(args...); });
    return cudaSuccess;
}

} // namespace fastkd::cuda
