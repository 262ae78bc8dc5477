// Host version of csrc/cuda/matrix.cuh, which documents the functions and the layout of fragments.
#pragma once

#include "cuda/device.cuh"

namespace fastkd::cuda {

template <class Storage>
void multiply_16x8x16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    static_assert(sizeof(Storage) == 2, "16-bit elements");
    constexpr bool half = std::is_same<Storage, Half>::value;
    emulation::multiply(half ? emulation::Operation::multiply_f16 : emulation::Operation::multiply_bf16, c, a, b);
}

inline void multiply_16x8x8(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    emulation::multiply(emulation::Operation::multiply_tf32, c, a, b);
}

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline float round_to_tf32(float value) {
    std::uint32_t bits = bits_of(value);
    if ((bits >> 23 & 255) != 255) { // to nearest, ties away from zero; Inf and NaN unchanged
        bits = (bits + 0x1000) & 0xffffe000u;
    }
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

template <class Storage>
std::uint32_t pack_pair(float low, float high) {
    return narrow<Storage>(low).bits | static_cast<std::uint32_t>(narrow<Storage>(high).bits) << 16;
}

inline void load_matrices(std::uint32_t (&r)[4], const void* row) {
    check_aligned(row);
    const auto words = *static_cast<const Pack<std::uint32_t>*>(row);
    const auto& slots = emulation::exchange(emulation::Operation::load_matrices, words.at, 4);
    for (int i = 0; i < 4; ++i) {
        r[i] = slots[8 * i + emulation::lane() / 4][emulation::lane() % 4];
    }
}

inline void load_matrices_transposed(std::uint32_t (&r)[4], const void* row) {
    check_aligned(row);
    const auto words = *static_cast<const Pack<std::uint32_t>*>(row);
    const auto& slots = emulation::exchange(emulation::Operation::load_matrices, words.at, 4);
    const int column = emulation::lane() / 4, first = emulation::lane() % 4 * 2;
    for (int i = 0; i < 4; ++i) {
        const auto element = [&](int row_index) {
            return slots[8 * i + row_index][column / 2] >> 16 * (column % 2) & 0xffff;
        };
        r[i] = element(first) | element(first + 1) << 16;
    }
}

inline void execute_copy(emulation::Copy copy) {
    if (copy.from == nullptr) {
        std::memset(copy.to, 0, copy.bytes);
    } else {
        std::memcpy(copy.to, copy.from, copy.bytes);
    }
}

template <int bytes = 16>
void copy_async(void* to, const void* from, bool inside) {
    static_assert(bytes == 16 || bytes == 8 || bytes == 4, "16, 8 or 4 bytes");
    for (const void* address : {static_cast<const void*>(to), inside ? from : nullptr}) {
        emulation::check(reinterpret_cast<std::uintptr_t>(address) % bytes == 0,
                         "an asynchronous copy at an address that is not a multiple of its size");
    }
    const emulation::Copy copy{to, inside ? from : nullptr, bytes};
    if (emulation::copies_at_once()) {
        execute_copy(copy);
    } else {
        emulation::copy_start(copy);
    }
}

inline void copy_async_commit() {
    emulation::copy_commit();
}

template <int groups>
void copy_async_wait() {
    emulation::Copy copy;
    while (emulation::copy_next(groups, &copy)) {
        execute_copy(copy);
    }
}

} // namespace fastkd::cuda
