// The floating types a kernel may be given. Arithmetic is in float, in double for double.
#pragma once

#include "common/platform.h"

namespace fastkd {

enum class DType { Float32, Float16, BFloat16, Float64 };

// Storage only: each backend converts these with what its hardware offers.
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

// The type in which a kernel computes on elements of type Storage, and in which it returns losses.
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
