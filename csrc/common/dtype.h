// The floating-point types of kernel arguments. Arithmetic is in float, or in double for double.
#pragma once

#include "common/platform.h"

namespace fastkd {

enum class DType { Float32, Float16, BFloat16, Float64 };

// Storage types: each backend converts them with its hardware's instructions.
struct Half {
    std::uint16_t bits;
};
struct BFloat16 {
    std::uint16_t bits;
};

template <class Storage>
struct ComputeType {
    using type = float;
};
template <>
struct ComputeType<double> {
    using type = double;
};

// The type of arithmetic on elements of type Storage, and of the losses.
template <class Storage>
using Compute = typename ComputeType<Storage>::type;

inline std::int64_t element_size(DType dtype) {
    switch (dtype) {
    case DType::Float64:
        return 8;
    case DType::Float32:
        return 4;
    default:
        return 2;
    }
}

} // namespace fastkd
