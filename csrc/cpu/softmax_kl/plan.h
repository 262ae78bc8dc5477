// Distribution of softmax_kl's rows over threads.
#pragma once

#include "common/softmax_kl.h"
#include "cpu/simd.h"

namespace fastkd::cpu::FASTKD_ISA {

constexpr std::int64_t thread_elements = 1 << 14; // for fewer, starting a thread costs more than it saves

FASTKD_INLINE int useful_threads(softmax_kl::Shape shape, int threads) {
    const std::int64_t useful = shape.count() * shape.cols / thread_elements + 1;
    return useful < threads ? static_cast<int>(useful) : threads;
}

FASTKD_INLINE std::int64_t row_offset(softmax_kl::RowStrides strides, std::int64_t rows, std::int64_t index) {
    return index / rows * strides.batch + index % rows * strides.row;
}

} // namespace fastkd::cpu::FASTKD_ISA
