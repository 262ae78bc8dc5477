// Integer rounding, and the workspace allocator, which divides one workspace into aligned pieces.
#pragma once

#include "common/platform.h"

namespace fastkd {

template <class A, class B>
constexpr FASTKD_HD auto ceil_div(A a, B b) {
    return (a + b - 1) / b;
}
template <class A, class B>
constexpr FASTKD_HD auto round_up(A a, B multiple) {
    return ceil_div(a, multiple) * multiple;
}

// Pieces start at multiples of `alignment` bytes: a cache line on a CPU, 256 bytes on a GPU, as in cudaMalloc.
template <int alignment>
class Arena {
  public:
    // Without a base the arena only counts bytes: take() returns null.
    FASTKD_HD explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}

    // Reserve `bytes` and return their offset from the start.
    FASTKD_HD std::int64_t take_bytes(std::int64_t bytes) {
        const std::int64_t offset = bytes_;
        bytes_ += round_up(bytes, std::int64_t{alignment});
        return offset;
    }
    // Reserve `count` elements and return their address.
    template <class T>
    FASTKD_HD T* take(std::int64_t count) {
        const std::int64_t offset = take_bytes(count * static_cast<std::int64_t>(sizeof(T)));
        return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + offset);
    }
    // Bytes reserved so far.
    FASTKD_HD std::int64_t bytes() const { return bytes_; }

  private:
    char* base_;
    std::int64_t bytes_ = 0;
};

} // namespace fastkd
