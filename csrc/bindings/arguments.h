// Python arguments to kernel arguments. Whatever could make a kernel read or write astray is refused here; that the
// pointers have the memory behind them that the shapes claim is the caller's (fastkd.ops') duty.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <string>

#include "common/dtype.h"

namespace fastkd::bindings {

namespace py = pybind11;

inline DType parse_dtype(const std::string& name) {
    if (name == "float32") {
        return DType::Float32;
    }
    if (name == "float16") {
        return DType::Float16;
    }
    if (name == "bfloat16") {
        return DType::BFloat16;
    }
    if (name == "float64") {
        return DType::Float64;
    }
    throw py::value_error("dtype: expected float32, float16, bfloat16 or float64, got '" + name + "'");
}

// The address `address`, of elements of `alignment` bytes each.
inline void* parse_pointer(std::uintptr_t address, const char* name, std::int64_t alignment) {
    if (address == 0) {
        throw py::value_error(std::string(name) + ": a null pointer");
    }
    if (address % static_cast<std::uintptr_t>(alignment) != 0) {
        throw py::value_error(std::string(name) + ": the address is not a multiple of the element size " +
                              std::to_string(alignment));
    }
    return reinterpret_cast<void*>(address);
}

inline double parse_temperature(double temperature) {
    if (!(temperature > 0) || std::isinf(temperature)) {
        throw py::value_error("temperature: expected a finite number above 0, got " + std::to_string(temperature));
    }
    return temperature;
}

} // namespace fastkd::bindings
