// The host's answer to cuda/matrix.cuh, which tells what each of these does and how fragments lie.
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
    if ((bits >> 23 & 255) != 255) { // to nearest, halves away from zero; Inf and NaN stay
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
        const auto element = [&](int of_row) {
            return slots[8 * i + of_row][column / 2] >> 16 * (column % 2) & 0xffff;
        };
        r[i] = element(first) | element(first + 1) << 16;
    }
}

inline void copy_now(emulation::Copy copy) {
    *static_cast<Pack<std::uint32_t>*>(copy.to) =
        copy.from == nullptr ? Pack<std::uint32_t>{} : *static_cast<const Pack<std::uint32_t>*>(copy.from);
}

inline void copy_async(void* to, const void* from, bool inside) {
    check_aligned(to);
    check_aligned(inside ? from : nullptr);
    const emulation::Copy copy{to, inside ? from : nullptr};
    if (emulation::copies_at_once()) {
        copy_now(copy);
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
        copy_now(copy);
    }
}

} // namespace fastkd::cuda
