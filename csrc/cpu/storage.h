// Code for each type that elements are stored in.
#pragma once

#include "cpu/simd.h"

namespace fastkd::cpu::FASTKD_ISA {

// body(S{}) for the storage type S, of those whose arithmetic is in T.
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

// Of all of them.
template <class Body>
FASTKD_INLINE void with_storage(DType dtype, const Body& body) {
    dtype == DType::Float64 ? with_storage_of<double>(dtype, body) : with_storage_of<float>(dtype, body);
}

} // namespace fastkd::cpu::FASTKD_ISA
