// Dispatch over the storage types.
#pragma once

#include "cpu/simd.h"

namespace fastkd::cpu::FASTKD_ISA {

// Call body(S{}) with the storage type S of `dtype`, where Compute<S> is T.
template <class T, class Body>
FASTKD_INLINE void with_storage_of(DType dtype, const Body& body) {
    if constexpr (sizeof(T) == 8) {
        body(double{});
    } else if (dtype == DType::Float16) {
        body(Half{});
    } else if (dtype == DType::BFloat16) {
        body(BFloat16{});
    } else {
        body(float{});
    }
}

// Call body(S{}) with the storage type S of `dtype`.
template <class Body>
FASTKD_INLINE void with_storage(DType dtype, const Body& body) {
    dtype == DType::Float64 ? with_storage_of<double>(dtype, body) : with_storage_of<float>(dtype, body);
}

} // namespace fastkd::cpu::FASTKD_ISA
