// Shared by the checks under sanitizers: exactly sized memory, extreme layouts, storage conversions, and the list of
// checks. A family adds one file check_FAMILY.cpp that defines a `const Check`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fastkd::sanitize {

// A static Check registers its function in the list that main runs.
struct Check {
    Check(const char* name, void (*run)());
    const char* name;
    void (*run)();
};

// Count the result, and print `what` if it is wrong.
void expect(bool passed, const std::string& what);

constexpr int thread_counts[] = {1, 2, 3, 5};

// Run one shape in so many, and whether to run every dtype or only float and bfloat16. The division of work between
// threads, all that ThreadSanitizer checks, needs few shapes and depends on the dtype little.
#if defined(FASTKD_SANITIZE_THREAD)
constexpr int shape_stride = 3;
constexpr bool every_dtype = false;
#else
constexpr int shape_stride = 1;
constexpr bool every_dtype = true;
#endif

// ---- storage -------------------------------------------------------------------------------------------------------

template <class S>
constexpr DType dtype_of = DType::Float32;
template <>
inline constexpr DType dtype_of<double> = DType::Float64;
template <>
inline constexpr DType dtype_of<Half> = DType::Float16;
template <>
inline constexpr DType dtype_of<BFloat16> = DType::BFloat16;

const char* name_of(DType dtype);

inline double to_double(float x) {
    return x;
}
inline double to_double(double x) {
    return x;
}
double to_double(Half x);
double to_double(BFloat16 x);

// Convert to S. Accurate enough for tests: excess bits are truncated, not rounded.
template <class S>
S to_storage(double x);

// Half a unit in the last place of S, relative; and the absolute error of its subnormals.
template <class S>
constexpr double rounding = sizeof(S) == 8   ? 0x1p-53
                            : sizeof(S) == 4 ? 0x1p-24
                                             : 0x1p-11;
template <>
inline constexpr double rounding<BFloat16> = 0x1p-8;
template <class S>
constexpr double smallest = 0;
template <>
inline constexpr double smallest<Half> = 0x1p-24;

// ---- memory --------------------------------------------------------------------------------------------------------

// `count` elements on the heap; the allocation ends with the last one.
template <class T>
class Buffer {
  public:
    explicit Buffer(std::int64_t count) : count_(count), data_(static_cast<T*>(std::malloc(count * sizeof(T)))) {
        // NaN, which reveals reads before writes and missing writes.
        std::memset(static_cast<void*>(data_), 0xff, count * sizeof(T));
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* data() { return data_; }
    const T* data() const { return data_; }
    T& operator[](std::int64_t i) { return data_[i]; }
    const T& operator[](std::int64_t i) const { return data_[i]; }
    std::int64_t size() const { return count_; }

  private:
    std::int64_t count_;
    T* data_;
};

// ---- layouts of (batch, rows, cols) with innermost stride 1 --------------------------------------------------------

struct Layout {
    const char* name;
    std::int64_t stride_batch, stride_row, offset;
};

// Contiguous; unaligned with gaps between rows; rows outermost; one sample broadcast; one row broadcast.
std::vector<Layout> layouts(std::int64_t batch, std::int64_t rows, std::int64_t cols);

// Elements from a tensor's start to its last element.
inline std::int64_t extent(const Layout& layout, std::int64_t batch, std::int64_t rows, std::int64_t cols) {
    return layout.offset + (batch - 1) * layout.stride_batch + (rows - 1) * layout.stride_row + cols;
}

// ---- values --------------------------------------------------------------------------------------------------------

enum class Values { normal, far, holes }; // of magnitude 1; of 1e4; normal with some -inf
constexpr Values every_kind[] = {Values::normal, Values::far, Values::holes};

class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed) {}
    std::uint64_t bits();
    double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
    double value(Values kind);

  private:
    std::uint64_t state_;
};

// A strided tensor of random values; the gaps between its rows stay NaN.
template <class S>
class Rows {
  public:
    Rows(std::int64_t batch, std::int64_t rows, std::int64_t cols, const Layout& layout, Values kind, Random& random)
        : layout_(layout), buffer_(extent(layout, batch, rows, cols)) {
        for (std::int64_t b = 0; b < batch; ++b) {
            for (std::int64_t r = 0; r < rows; ++r) {
                for (std::int64_t c = 0; c < cols; ++c) {
                    row(b, r)[c] = to_storage<S>(random.value(kind));
                }
            }
        }
    }
    S* data() { return buffer_.data() + layout_.offset; }
    S* row(std::int64_t b, std::int64_t r) { return data() + b * layout_.stride_batch + r * layout_.stride_row; }

  private:
    Layout layout_;
    Buffer<S> buffer_;
};

inline bool near(double got, double want, double relative, double absolute) {
    return (std::isnan(want) && std::isnan(got)) || got == want ||
           std::fabs(got - want) <= relative * std::fabs(want) + absolute;
}

} // namespace fastkd::sanitize
