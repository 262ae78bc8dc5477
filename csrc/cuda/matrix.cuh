// A warp's matrix products on tensor cores (mma.sync), loads of fragments from smem (ldmatrix), and asynchronous copies
// to smem (cp.async). sm_80 and later. All lanes of the warp must call everything except the copies.
//
// Fragments, with g = lane / 4, t = lane % 4; a register holds two 16-bit elements, the lower index in the lower half:
//
//     C (16 x 8)    c[0], c[1]: row g, columns 2t, 2t + 1        c[2], c[3]: row g + 8, same columns
//     16-bit A (16 x 16)    a[0]: row g, columns 2t, 2t + 1      a[1]: row g + 8     a[2], a[3]: columns + 8
//     16-bit B (16 x 8)     b[0]: rows 2t, 2t + 1 of column g    b[1]: rows + 8
//     tf32 A (16 x 8)       a[0]: row g, column t                a[1]: row g + 8     a[2], a[3]: column + 4
//     tf32 B (8 x 8)        b[0]: row t of column g              b[1]: row + 4
#pragma once

#include "cuda/device.cuh"

namespace fastkd::cuda {

// C += A B of 16-bit elements: exact products, fp32 sums.
template <class Storage>
FASTKD_DEVICE void multiply_16x8x16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    if constexpr (std::is_same<Storage, Half>::value) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        static_assert(std::is_same<Storage, BFloat16>::value, "16-bit elements");
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// C += A B in tf32: the lower 13 bits of A and B are ignored.
FASTKD_DEVICE void multiply_16x8x8(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Return a float rounded to tf32's 11 significant bits; value - result is exact in fp32.
FASTKD_DEVICE float round_to_tf32(float value) {
    std::uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return __uint_as_float(bits);
}

FASTKD_DEVICE std::uint32_t bits_of(float value) {
    return __float_as_uint(value);
}

FASTKD_DEVICE float float_of(std::uint32_t bits) {
    return __uint_as_float(bits);
}

// Return two floats rounded to 16 bits each, `low` in the lower half.
template <class Storage>
FASTKD_DEVICE std::uint32_t pack_pair(float low, float high) {
    return narrow<Storage>(low).bits | static_cast<std::uint32_t>(narrow<Storage>(high).bits) << 16;
}

// Load four 8 x 8 matrices of 16-bit elements (or 8 x 4 of 32 bits) from smem: lane 8 i + r passes the address of row
// r of matrix i, 16 bytes at a multiple of 16. r[i] gets elements 2t and 2t + 1 (32 bits: element t) of row g of matrix
// i.
FASTKD_DEVICE void load_matrices(std::uint32_t (&r)[4], const void* row) {
    const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Load the matrices transposed (16-bit elements): r[i] gets rows 2t and 2t + 1 of column g of matrix i.
FASTKD_DEVICE void load_matrices_transposed(std::uint32_t (&r)[4], const void* row) {
    const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Start copying 16, 8 or 4 bytes to smem; both addresses must be multiples of the size. If `inside` is false, write
// zeros without reading `from`. This thread may read the bytes after waiting for the copy's group; other threads also
// need a barrier.
template <int bytes = 16>
FASTKD_DEVICE void copy_async(void* to, const void* from, bool inside) {
    const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
    if constexpr (bytes == 16) { // .cg bypasses L1; it supports only 16 bytes
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(inside ? 16 : 0)
                     : "memory");
    } else {
        static_assert(bytes == 8 || bytes == 4, "16, 8 or 4 bytes");
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(bytes),
                     "r"(inside ? bytes : 0)
                     : "memory");
    }
}

// Commit the thread's copies since the last commit as a group.
FASTKD_DEVICE void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until at most the latest `groups` of the thread's groups are pending.
template <int groups>
FASTKD_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

} // namespace fastkd::cuda
