// exp of an array, for tests of cpu/exp.h.
#include "cpu/exp.h"

#include "cpu/kernels.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

template <class T>
void exp_all(const T* input, T* output, std::int64_t count) {
    const ScaledExp<T> exp{T(1)};
    const std::int64_t rest = count % lanes<T>;
    for (std::int64_t i = 0; i + lanes<T> <= count; i += lanes<T>) {
        store(output + i, exp(load(input + i), T(0), T(0)));
    }
    if (rest > 0) {
        T padded[lanes<T>] = {};
        __builtin_memcpy(padded, input + count - rest, rest * sizeof(T));
        store(padded, exp(load(padded), T(0), T(0)));
        __builtin_memcpy(output + count - rest, padded, rest * sizeof(T));
    }
}

} // namespace

void exp(const void* input, void* output, std::int64_t count, DType dtype) {
    if (dtype == DType::Float64) {
        exp_all(static_cast<const double*>(input), static_cast<double*>(output), count);
    } else {
        exp_all(static_cast<const float*>(input), static_cast<float*>(output), count);
    }
}

} // namespace fastkd::cpu::FASTKD_ISA
