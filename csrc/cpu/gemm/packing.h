// Conversion between strided arrays of any dtype and the packed blocks of gemm/packed.h.
#pragma once

#include <utility>

#include "cpu/gemm/packed.h"

namespace fastkd::cpu::FASTKD_ISA {

// ---- lanes x lanes transposes --------------------------------------------------------------------------------------

// Return the lanes of (a, b) at the given indices.
template <int... index, class V>
FASTKD_INLINE V shuffle(V a, V b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, index...);
#else
    using Index = decltype(a == b);
    return __builtin_shuffle(a, b, Index{index...});
#endif
}

// Swap the off-diagonal blocks of `distance` lanes between two rows: one step of a transpose.
template <int distance, class V, int... c>
FASTKD_INLINE void swap_blocks(V& a, V& b, std::integer_sequence<int, c...>) {
    constexpr int n = sizeof...(c);
    const V low = shuffle<((c & distance) ? n + c - distance : c)...>(a, b);
    b = shuffle<((c & distance) ? n + c : c + distance)...>(a, b);
    a = low;
}

// Transpose a square of vectors in place.
template <class T, int distance = lanes<T> / 2>
FASTKD_INLINE void transpose(Vec<T> (&rows)[lanes<T>]) {
    if constexpr (distance > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes<T>; ++i) {
            if ((i & distance) == 0) {
                swap_blocks<distance>(rows[i], rows[i + distance], std::make_integer_sequence<int, lanes<T>>{});
            }
        }
        transpose<T, distance / 2>(rows);
    }
}

// Store the first `count` lanes, or all if there are fewer.
template <class S, class V>
FASTKD_INLINE void store_first(S* to, V value, std::int64_t count) {
    constexpr std::int64_t all = sizeof(V) / sizeof(Compute<S>);
    if (count >= all) {
        return store(to, value);
    }
    S padded[all];
    store(padded, value);
    if (count > 0) {
        __builtin_memcpy(to, padded, count * sizeof(S));
    }
}

// Load lanes<A> elements and convert them to A, which may be double for any S.
template <class A, class S>
FASTKD_INLINE Vec<A> load_as(const S* from) {
    if constexpr (sizeof(A) == sizeof(Compute<S>)) {
        return load(from);
    } else {
        typename VectorOf<float, lanes<A>>::type narrow;
        if constexpr (sizeof(S) == sizeof(float)) {
            __builtin_memcpy(&narrow, from, sizeof(narrow));
        } else {
            S padded[lanes<float>] = {};
            __builtin_memcpy(padded, from, lanes<A> * sizeof(S));
            const Vec<float> wide = load(padded);
            __builtin_memcpy(&narrow, &wide, sizeof(narrow));
        }
        return __builtin_convertvector(narrow, Vec<A>);
    }
}
// Load the first `count` (at most lanes) elements, padded with zeros.
template <class A, class S>
FASTKD_INLINE Vec<A> load_first_as(const S* from, std::int64_t count) {
    if (count >= lanes<A>) {
        return load_as<A>(from);
    }
    S padded[lanes<A>] = {};
    if (count > 0) {
        __builtin_memcpy(padded, from, count * sizeof(S));
    }
    return load_as<A>(padded);
}

template <class S>
FASTKD_INLINE Vec<Compute<S>> load_first(const S* from, std::int64_t count) {
    return load_first_as<Compute<S>>(from, count);
}

// ---- packing -------------------------------------------------------------------------------------------------------

// T, but not deduced from the argument.
template <class T>
struct SameAs {
    using type = T;
};
template <class T>
using Same = typename SameAs<T>::type;

// Pack x[p][i] = x[p p_stride + i i_stride], p < count, i < inner, into panels over p, multiplied by p_scale[p] and
// i_scale[i] unless null. The padding of the last panel is 0.
template <class S, class T = Compute<S>>
FASTKD_NOINLINE void pack(const S* x, std::int64_t p_stride, std::int64_t i_stride, std::int64_t count,
                          std::int64_t inner, const Same<T>* p_scale, const Same<T>* i_scale, Same<T>* out) {
    const Panels<T> panels(count);
    for (std::int64_t panel = 0; panel < panels.size; ++panel) {
        const std::int64_t width = panels.width(panel) * lanes<T>;
        const std::int64_t begin = panels.begin(panel);
        T* to = out + begin * inner;
        for (std::int64_t v = 0; v < width; v += lanes<T>) {
            const std::int64_t p = begin + v;
            const std::int64_t valid = count - p < lanes<T> ? count - p : lanes<T>; // at least 1
            const S* from = x + p * p_stride;
            const Vec<T> scale = p_scale == nullptr ? broadcast(T(1)) : load_first(p_scale + p, valid);
            if (p_stride == 1) {
                for (std::int64_t i = 0; i < inner; ++i) {
                    const Vec<T> value = load_first_as<T>(from + i * i_stride, valid);
                    const T by = i_scale == nullptr ? T(1) : i_scale[i];
                    store(to + i * width + v, value * scale * by);
                }
            } else if (i_stride == 1) {
                for (std::int64_t i = 0; i < inner; i += lanes<T>) {
                    const std::int64_t rest = inner - i < lanes<T> ? inner - i : lanes<T>;
                    Vec<T> block[lanes<T>];
                    const Vec<T> by = i_scale == nullptr ? broadcast(T(1)) : load_first(i_scale + i, rest);
                    if (rest == lanes<T> && valid == lanes<T>) {
#pragma GCC unroll 16
                        for (int l = 0; l < lanes<T>; ++l) {
                            block[l] = load_as<T>(from + l * p_stride + i) * by;
                        }
                    } else {
                        for (int l = 0; l < lanes<T>; ++l) {
                            block[l] = l < valid ? load_first_as<T>(from + l * p_stride + i, rest) * by : Vec<T>{};
                        }
                    }
                    transpose<T>(block);
                    if (rest == lanes<T>) {
#pragma GCC unroll 16
                        for (int l = 0; l < lanes<T>; ++l) {
                            store(to + (i + l) * width + v, block[l] * scale);
                        }
                    } else {
                        for (int l = 0; l < rest; ++l) {
                            store(to + (i + l) * width + v, block[l] * scale);
                        }
                    }
                }
            } else {
                for (std::int64_t i = 0; i < inner; ++i) {
                    S gathered[lanes<T>] = {};
                    for (std::int64_t l = 0; l < valid; ++l) {
                        gathered[l] = from[l * p_stride + i * i_stride];
                    }
                    const T by = i_scale == nullptr ? T(1) : i_scale[i];
                    store(to + i * width + v, load_as<T>(gathered) * scale * by);
                }
            }
        }
    }
}

// out[r r_stride + k k_stride] = buffer[r][k], r < rows, k < cols; `ld` is the buffer's row
// stride, and its rows are padded to whole vectors.
template <class S>
FASTKD_NOINLINE void unpack(const Compute<S>* buffer, std::int64_t ld, std::int64_t rows, std::int64_t cols, S* out,
                            std::int64_t r_stride, std::int64_t k_stride) {
    using T = Compute<S>;
    if (k_stride == 1) {
        for (std::int64_t r = 0; r < rows; ++r) {
            for (std::int64_t k = 0; k < cols; k += lanes<T>) {
                store_first(out + r * r_stride + k, load(buffer + r * ld + k), cols - k);
            }
        }
        return;
    }
    for (std::int64_t r = 0; r < rows; r += lanes<T>) {
        const std::int64_t valid = rows - r < lanes<T> ? rows - r : lanes<T>;
        for (std::int64_t k = 0; k < cols; k += lanes<T>) {
            Vec<T> block[lanes<T>];
            for (int l = 0; l < lanes<T>; ++l) {
                block[l] = l < valid ? load(buffer + (r + l) * ld + k) : Vec<T>{};
            }
            transpose<T>(block);
            const std::int64_t some = cols - k < lanes<T> ? cols - k : lanes<T>;
            for (int l = 0; l < some; ++l) {
                S* to = out + r * r_stride + (k + l) * k_stride;
                if (r_stride == 1) {
                    store_first(to, block[l], valid);
                } else {
                    S stored[lanes<T>];
                    store(stored, block[l]);
                    for (std::int64_t v = 0; v < valid; ++v) {
                        to[v * r_stride] = stored[v];
                    }
                }
            }
        }
    }
}

} // namespace fastkd::cpu::FASTKD_ISA
