// Shared by pixel_word's kernels: the layout of 16 pixels x 8 words in a warp, loads of logits, split-precision
// numbers.
//
// It is the layout of the tensor cores' C fragments (matrix.cuh). Lane (g, t) = (lane / 4, lane % 4) holds pixels 2g
// and 2g + 1 and words 2t and 2t + 1 of a tile x[4]: x[2 h + c] is pixel 2g + h, word 2t + c. Two tiles are also an A
// fragment of a 16-bit product over 16 words, where the fragment's row g + 8 h is pixel 2g + h. A softmax over words
// needs shuffles only among the four lanes with the same g, and a warp reads 64 contiguous bytes.
#pragma once

#include "common/pixel_word.h"
#include "common/softmax_kl.h"
#include "cuda/matrix.cuh"
#include "cuda/pixel_word/plan.h"

namespace fastkd::cuda::pixel_word {

constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

template <class S>
struct alignas(2 * sizeof(S)) Pair {
    S at[2];
};

// Write two elements with one instruction, at a multiple of their size. (The compiler may split the copy of a Pair.)
template <class S>
FASTKD_DEVICE void store_pair(S* to, S first, S second) {
    if constexpr (sizeof(S) == 4) {
        const std::uint64_t bits = bits_of(first) | static_cast<std::uint64_t>(bits_of(second)) << 32;
        *reinterpret_cast<std::uint64_t*>(to) = bits;
    } else {
        const std::uint32_t bits = first.bits | static_cast<std::uint32_t>(second.bits) << 16;
        *reinterpret_cast<std::uint32_t*>(to) = bits;
    }
}

struct Lane {
    int warp, lane, g, t;
    FASTKD_DEVICE Lane() : warp(thread_x() / warp_size), lane(thread_x() % warp_size), g(lane / 4), t(lane % 4) {}
};

// Return whether a word or pixel exists and is not masked.
FASTKD_DEVICE bool valid(const std::uint8_t* mask, std::int64_t sample, std::int64_t index, std::int64_t count) {
    return index < count && (mask == nullptr || mask[sample * count + index] != 0);
}

// The student's or the teacher's logits: inputs, or computed from features.
struct Logits {
    const void* data;
    DType dtype;
    std::int64_t batch, pixel, word; // strides
    const std::uint8_t* mask;
    int count;
    float scale;
    bool pairs; // adjacent pixels are read together
};

template <class S>
inline bool aligned(const void* address, std::int64_t elements) {
    return reinterpret_cast<std::uintptr_t>(address) % (elements * sizeof(S)) == 0;
}

// Return whether each pair of adjacent pixels can be accessed as one aligned element.
inline bool even_pixels(const void* data, std::int64_t size, std::int64_t pixels, std::int64_t batch,
                        std::int64_t pixel, std::int64_t word) {
    return pixel == 1 && pixels % 2 == 0 && batch % 2 == 0 && word % 2 == 0 &&
           reinterpret_cast<std::uintptr_t>(data) % (2 * size) == 0;
}

// Return one network's logits. `kept` holds those computed from features, (B, words of the student + words of the
// teacher, N).
inline Logits logits_of(const Problem& problem, const void* kept, bool of_student) {
    const Side& side = of_student ? problem.student : problem.teacher;
    Logits logits{side.pixels.data,
                  side.pixels.dtype,
                  side.pixels.batch,
                  side.pixels.pixel,
                  side.pixels.column,
                  side.word_mask,
                  static_cast<int>(side.word_count),
                  static_cast<float>(side.scale),
                  false};
    if (problem.student.width > 0) {
        const std::int64_t rows = problem.student.word_count + problem.teacher.word_count;
        const std::int64_t first = of_student ? 0 : problem.student.word_count * problem.pixels;
        logits.data = static_cast<const char*>(kept) + first * element_size(problem.dtype);
        logits.dtype = problem.dtype;
        logits.batch = rows * problem.pixels;
        logits.pixel = 1;
        logits.word = problem.pixels;
    }
    logits.pairs =
        even_pixels(logits.data, element_size(logits.dtype), problem.pixels, logits.batch, logits.pixel, logits.word);
    return logits;
}

// Return bits: 2 i + c is set if word first + 8 i + 2 t + c exists and is not masked.
template <int tiles>
FASTKD_DEVICE std::uint32_t valid_words(const std::uint8_t* mask, std::int64_t sample, int count, int first, int t) {
    std::uint32_t bits = 0;
    for (int i = 0; i < tiles; ++i) {
        for (int c = 0; c < 2; ++c) {
            const bool ok = valid(mask, sample, first + tile_words * i + 2 * t + c, count);
            bits |= static_cast<std::uint32_t>(ok) << (2 * i + c);
        }
    }
    return bits;
}

// Load M of a lane's two pixels and its words, 0 where masked. `from` is the first pixel's first word.
template <class S, int tiles>
FASTKD_DEVICE void load_logits(const Logits& logits, const S* from, std::uint32_t words, const bool (&pixel_ok)[2],
                               float (&x)[tiles][4]) {
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float first = 0, second = 0;
            if ((words >> (2 * i + c) & 1) != 0) {
                if (logits.pairs) {
                    if (pixel_ok[0] || pixel_ok[1]) {
                        const Pair<S> pair = *reinterpret_cast<const Pair<S>*>(from);
                        first = widen(pair.at[0]);
                        second = widen(pair.at[1]);
                    }
                } else {
                    first = pixel_ok[0] ? widen(from[0]) : 0.0f;
                    second = pixel_ok[1] ? widen(from[logits.pixel]) : 0.0f;
                }
            }
            from += (c == 0 ? 1 : tile_words - 1) * logits.word; // incremented, to save registers
            x[i][c] = pixel_ok[0] ? first : 0.0f;
            x[i][2 + c] = pixel_ok[1] ? second : 0.0f;
        }
    }
}

// Load M of pixels `pixel` and `pixel` + 1 and of words from `first_word` on, in any dtype.
template <int tiles>
FASTKD_DEVICE void load_logits(const Logits& logits, std::int64_t sample, int pixel, int first_word,
                               std::uint32_t words, const bool (&pixel_ok)[2], float (&x)[tiles][4]) {
    const std::int64_t offset = sample * logits.batch + pixel * logits.pixel + first_word * logits.word;
    if (logits.dtype == DType::Float32) {
        load_logits(logits, static_cast<const float*>(logits.data) + offset, words, pixel_ok, x);
    } else if (logits.dtype == DType::Float16) {
        load_logits(logits, static_cast<const Half*>(logits.data) + offset, words, pixel_ok, x);
    } else {
        load_logits(logits, static_cast<const BFloat16*>(logits.data) + offset, words, pixel_ok, x);
    }
}

// Return the maximum over the lanes whose index differs in the bits from `from` to below `to`.
template <class T>
FASTKD_DEVICE T max_over(T value, int from, int to) {
#pragma unroll
    for (int mask = from; mask < to; mask *= 2) {
        const T other = shuffle_xor(value, mask);
        value = other > value ? other : value;
    }
    return value;
}

// Return the sum over these lanes.
template <class T>
FASTKD_DEVICE T sum_over(T value, int from, int to) {
#pragma unroll
    for (int mask = from; mask < to; mask *= 2) {
        value += shuffle_xor(value, mask);
    }
    return value;
}

// Compute the maxima of M over the warp's words for a lane's two pixels.
template <int tiles>
FASTKD_DEVICE void row_maxima(const float (&x)[tiles][4], std::uint32_t words, float (&top)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        top[h] = softmax_kl::minus_infinity<float>();
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const bool larger = x[i][2 * h + c] > top[h] && (words >> (2 * i + c) & 1) != 0;
                top[h] = larger ? x[i][2 * h + c] : top[h];
            }
        }
        top[h] = max_over(top[h], 1, 4);
    }
}

// Split two numbers in [-1, 1], times 4096, into sums of two fp16 numbers, with errors of 2^-22 relative and 2^-36
// absolute: below a float's rounding of a difference of two probabilities.
constexpr float unit_of_halves = 0x1p-24f; // undoes both factors of 4096 in a product
FASTKD_DEVICE void split_halves(float x, float y, std::uint32_t& high, std::uint32_t& low) {
    x *= 4096;
    y *= 4096;
    high = pack_pair<Half>(x, y);
    low = pack_pair<Half>(x - widen(Half{static_cast<std::uint16_t>(high)}),
                          y - widen(Half{static_cast<std::uint16_t>(high >> 16)}));
}

// Add `step` to `sum` with rounding. Tensor cores truncate sums towards 0, which loses 1e-6 or more over many steps, so
// accumulators start at 0 every few steps.
FASTKD_DEVICE void add(float (&sum)[4], const float (&step)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        sum[k] += step[k];
    }
}

// C += A B of numbers from split_halves, without the products of two low parts.
FASTKD_DEVICE void multiply_halves(float (&c)[4], const std::uint32_t (&a_high)[4], const std::uint32_t (&a_low)[4],
                                   const std::uint32_t (&b_high)[2], const std::uint32_t (&b_low)[2]) {
    multiply_16x8x16<Half>(c, a_low, b_high);
    multiply_16x8x16<Half>(c, a_high, b_low);
    multiply_16x8x16<Half>(c, a_high, b_high);
}

// Split x = high + low in tf32: to 2^-22, or exactly with low = 0 if x is a 16-bit number.
FASTKD_DEVICE void split(float x, std::uint32_t& high, std::uint32_t& low) {
    const float rounded = round_to_tf32(x);
    high = bits_of(rounded);
    low = bits_of(x - rounded);
}

// Return the sum over a thread block, to all its threads. `scratch` holds one element per warp.
template <class T>
FASTKD_DEVICE T block_sum(T value, T* scratch, int warps) {
    value = sum_over(value, 1, warp_size);
    block_barrier(); // before scratch is overwritten
    if (thread_x() % warp_size == 0) {
        scratch[thread_x() / warp_size] = value;
    }
    block_barrier();
    T sum = scratch[0];
    for (int w = 1; w < warps; ++w) {
        sum += scratch[w];
    }
    return sum;
}

// Return the number of set entries of a sample's mask, or `count` without a mask.
FASTKD_DEVICE int count_valid(const std::uint8_t* mask, std::int64_t sample, std::int64_t count, int threads,
                              int* scratch) {
    if (mask == nullptr) {
        return static_cast<int>(count);
    }
    int found = 0;
    for (std::int64_t i = thread_x(); i < count; i += threads) {
        found += mask[sample * count + i] != 0 ? 1 : 0;
    }
    return block_sum(found, scratch, threads / warp_size);
}

// The steps of a call, one launch each.
cudaError_t compute_logits(const Problem& problem, const Plan& plan, void* logits, void* norms, cudaStream_t stream);
cudaError_t sum_terms(const pixel_word::Forward& args, const Plan& plan, cudaStream_t stream);
cudaError_t merge_terms(const pixel_word::Forward& args, const Plan& plan, cudaStream_t stream);
cudaError_t prepare_gradient(const pixel_word::Backward& args, const Plan& plan, cudaStream_t stream);
cudaError_t differentiate_logits(const pixel_word::Backward& args, const Plan& plan, cudaStream_t stream);
cudaError_t differentiate_features(const pixel_word::Backward& args, const Plan& plan, cudaStream_t stream);
cudaError_t merge_words(const pixel_word::Backward& args, const Plan& plan, cudaStream_t stream);

// The same steps in fp64 without tensor cores: fp64.cu.
cudaError_t compute_logits_fp64(const Problem& problem, void* logits, void* norms, cudaStream_t stream);
cudaError_t sum_terms_fp64(const pixel_word::Forward& args, const Plan& plan, cudaStream_t stream);
cudaError_t differentiate_logits_fp64(const pixel_word::Backward& args, const Plan& plan, cudaStream_t stream);
cudaError_t differentiate_features_fp64(const pixel_word::Backward& args, const Plan& plan, cudaStream_t stream);

template <class T>
T* at_bytes(void* workspace, std::int64_t offset) {
    return reinterpret_cast<T*>(static_cast<char*>(workspace) + offset);
}

} // namespace fastkd::cuda::pixel_word
