// Conversion of Python arguments to kernel arguments. Values that could make a kernel access memory out of bounds raise
// an error here; the caller (fastkd.ops) guarantees that the memory behind each pointer matches the shapes.
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

// Convert an address. Throws if it is 0 or not a multiple of `alignment` bytes.
inline void* parse_pointer(std::uintptr_t address, const char* name, std::int64_t alignment) {
    if (address == 0) {
        throw py::value_error(std::string(name) + ": expected an address, got 0");
    }
    if (address % static_cast<std::uintptr_t>(alignment) != 0) {
        throw py::value_error(std::string(name) + ": expected an address that is a multiple of " +
                              std::to_string(alignment) + " bytes, got " + std::to_string(address));
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
