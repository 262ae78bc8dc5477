// Vectors of one instruction set, using the vector extensions of GCC and Clang, which provide arithmetic, comparisons
// and `mask ? a : b`. This file adds conversions of the storage types, row tails, reductions in a fixed order, and
// non-temporal stores.
#pragma once

#include "common/dtype.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FASTKD_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTKD_VECTOR_BYTES 32
#else
#define FASTKD_VECTOR_BYTES 16
#endif

#define FASTKD_INLINE inline __attribute__((always_inline))
#define FASTKD_NOINLINE inline __attribute__((noinline)) // one copy for all callers

namespace fastkd::cpu::FASTKD_ISA {

template <class T, int count>
struct VectorOf {
    typedef T type __attribute__((vector_size(sizeof(T) * count)));
};

template <class T>
constexpr int lanes = FASTKD_VECTOR_BYTES / sizeof(T);

// A vector of T (float or double), and the vector of unsigned integers with the same lanes.
template <class T>
using Vec = typename VectorOf<T, lanes<T>>::type;

template <class T>
struct BitsOf {
    using type = std::uint32_t;
};
template <>
struct BitsOf<double> {
    using type = std::uint64_t;
};
template <class T>
using Bits = typename VectorOf<typename BitsOf<T>::type, lanes<T>>::type;

template <class To, class From>
FASTKD_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

template <class T>
FASTKD_INLINE Vec<T> broadcast(T value) {
    return value - Vec<T>{}; // no instruction, unlike 0 + value, which is 0 for -0
}

// a > b ? a : b, which ignores a NaN in `a` and returns a NaN in `b`.
FASTKD_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
    return _mm_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}
FASTKD_INLINE Vec<double> max(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
    return _mm512_max_pd(a, b);
#elif defined(__AVX2__)
    return _mm256_max_pd(a, b);
#elif defined(__SSE2__)
    return _mm_max_pd(a, b);
#else
    return a > b ? a : b;
#endif
}

// ---- unaligned loads and stores of lanes<Compute<S>> elements ------------------------------------------------------

template <class V, class S>
FASTKD_INLINE V load_raw(const S* from) {
    V value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
}

using Shorts = typename VectorOf<std::uint16_t, lanes<float>>::type;
using Words = Bits<float>;

FASTKD_INLINE Vec<float> load(const float* from) {
    return load_raw<Vec<float>>(from);
}
FASTKD_INLINE Vec<double> load(const double* from) {
    return load_raw<Vec<double>>(from);
}
// Intrinsics, because GCC emits several instructions for these conversions.
FASTKD_INLINE Words widen(Shorts value) {
#if defined(__AVX512F__)
    return bit_cast<Words>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(value)));
#elif defined(__AVX2__)
    return bit_cast<Words>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(value)));
#else
    return __builtin_convertvector(value, Words);
#endif
}
FASTKD_INLINE Shorts low_halves(Words value) {
#if defined(__AVX512F__)
    return bit_cast<Shorts>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(value)));
#else
    return __builtin_convertvector(value, Shorts);
#endif
}

FASTKD_INLINE Vec<float> load(const BFloat16* from) {
    return bit_cast<Vec<float>>(widen(load_raw<Shorts>(from)) << 16);
}
FASTKD_INLINE Vec<float> load(const Half* from) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(load_raw<__m256i>(from));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(load_raw<__m128i>(from));
#else
    const Words half = widen(load_raw<Shorts>(from));
    const Words magnitude = (half & 0x7fff) << 13;
    // The product changes the exponent's bias from 15 to 127 and makes subnormals normal.
    const Words finite = bit_cast<Words>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);
    const Words sign = (half & 0x8000) << 16;
    return bit_cast<Vec<float>>(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
#endif
}

// Round to nearest, ties to even; NaN stays NaN.
FASTKD_INLINE Shorts narrow(Vec<float> value, BFloat16) {
    const Words bits = bit_cast<Words>(value);
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return low_halves(value == value ? rounded : ((bits >> 16) | 0x40));
}
FASTKD_INLINE Shorts narrow(Vec<float> value, Half) {
#if defined(__AVX512F__)
    return bit_cast<Shorts>(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    return bit_cast<Shorts>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
    const Words bits = bit_cast<Words>(value);
    const Words sign = bits & 0x80000000u;
    const Words size = bits ^ sign;
    const Words normal = (size + 0xc8000fffu + ((size >> 13) & 1)) >> 13; // re-biased and rounded; 65520 becomes inf
    // Adding 0.5 aligns the last bit of a subnormal half with the float's and rounds.
    const Words tiny = bit_cast<Words>(bit_cast<Vec<float>>(size) + 0.5f) - 0x3f000000u;
    const Words infinite = bit_cast<Words>(size > 0x7f800000u ? Words{} + 0x7e00u : Words{} + 0x7c00u);
    const Words half = size < 0x38800000u ? tiny : (size >= 0x47800000u ? infinite : normal);
    return low_halves(half | (sign >> 16));
#endif
}

template <class S, class V>
FASTKD_INLINE auto as_stored(V value) {
    if constexpr (sizeof(S) == 2) {
        return narrow(value, S{});
    } else {
        return value;
    }
}

template <class S, class V>
FASTKD_INLINE void store(S* to, V value) {
    const auto raw = as_stored<S>(value);
    __builtin_memcpy(to, &raw, sizeof(raw));
}

// Store to an address aligned to the stored size, non-temporally if the instruction set can. Finish with stream_fence.
template <class S, class V>
FASTKD_INLINE void store_stream(S* to, V value) {
    const auto raw = as_stored<S>(value);
#if defined(FASTKD_SANITIZE) // sanitizers do not track the instructions below, which fault on unaligned addresses
    if (reinterpret_cast<std::uintptr_t>(to) % sizeof(raw) != 0) {
        __builtin_trap();
    }
    __builtin_memcpy(to, &raw, sizeof(raw));
#elif defined(__AVX512F__)
    if constexpr (sizeof(raw) == 64) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bit_cast<__m512i>(raw));
    } else {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(raw));
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(raw) == 32) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(raw));
    } else {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to), bit_cast<__m128i>(raw));
    }
#else
    __builtin_memcpy(to, &raw, sizeof(raw));
#endif
}

FASTKD_INLINE void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// ---- row tails -----------------------------------------------------------------------------------------------------

template <class T>
FASTKD_INLINE Bits<T> lane_index() {
    Bits<T> index;
    for (int i = 0; i < lanes<T>; ++i) {
        index[i] = i;
    }
    return index;
}

// Load the last `rest` (0 < rest < lanes) of a row's `count` elements, with all other lanes set to `fill`. If the row
// has at least `lanes` elements, its last vector is read, so the tail is in the upper lanes.
template <class S, class T = Compute<S>>
FASTKD_INLINE Vec<T> load_tail(const S* row, std::int64_t count, std::int64_t rest, T fill) {
    using Bit = typename BitsOf<T>::type;
    if (count >= lanes<T>) {
        return lane_index<T>() < static_cast<Bit>(lanes<T> - rest) ? broadcast(fill) : load(row + count - lanes<T>);
    }
    S padded[lanes<T>] = {};
    __builtin_memcpy(padded, row, rest * sizeof(S));
    return lane_index<T>() < static_cast<Bit>(rest) ? load(padded) : broadcast(fill);
}

// ---- reductions: halves are added pairwise, in the same order on every call ----------------------------------------

template <class T, int count>
FASTKD_INLINE T sum_lanes(typename VectorOf<T, count>::type value) {
    if constexpr (count == 2) {
        return value[0] + value[1];
    } else {
        typename VectorOf<T, count / 2>::type half[2];
        __builtin_memcpy(half, &value, sizeof(half));
        return sum_lanes<T, count / 2>(half[0] + half[1]);
    }
}
// Lanes are added in double: the last few sums are the largest and would have the largest rounding errors.
FASTKD_INLINE double sum(Vec<float> value) {
    constexpr int count = lanes<float> / 2;
    using Doubles = VectorOf<double, count>::type;
    VectorOf<float, count>::type half[2];
    __builtin_memcpy(half, &value, sizeof(half));
    return sum_lanes<double, count>(__builtin_convertvector(half[0], Doubles) +
                                    __builtin_convertvector(half[1], Doubles));
}
FASTKD_INLINE double sum(Vec<double> value) {
    return sum_lanes<double, lanes<double>>(value);
}

template <class T, int count>
FASTKD_INLINE T max_lanes(typename VectorOf<T, count>::type value) {
    if constexpr (count == 2) {
        return value[0] > value[1] ? value[0] : value[1];
    } else {
        typename VectorOf<T, count / 2>::type half[2];
        __builtin_memcpy(half, &value, sizeof(half));
        return max_lanes<T, count / 2>(half[0] > half[1] ? half[0] : half[1]);
    }
}
template <class T>
FASTKD_INLINE T max(Vec<T> value) {
    return max_lanes<T, lanes<T>>(value);
}

} // namespace fastkd::cpu::FASTKD_ISA
