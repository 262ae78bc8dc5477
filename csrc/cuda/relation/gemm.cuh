// Block-wise matrix products C[m][n] = sum_k A[m][k] B[n][k] on tensor cores, for relation's kernels: operands of any
// layout in global memory, chunks of them in shared memory, a warp's share of one chunk's product.
//
// An operand's chunk lies in shared memory as [index][k] or, where the index is what is contiguous in global memory, as
// [k][index]; 16-bit fragments are then loaded transposed. Lines are padded by 16 bytes (floats as [k][index]: 32), so
// that the eight rows of an 8 x 8 matrix, or the lanes of a fragment of floats, fall into different banks.
#pragma once

#include "cuda/matrix.cuh"

namespace fastkd::cuda::relation {

// (index, k) -> data[index * index_stride + k * k_stride], in elements. `unit` elements of whichever is contiguous can
// be copied at once: what they are a multiple of begins at a multiple of their size, and none of them is outside alone.
struct Operand {
    const void* data;
    std::int64_t index_stride;
    std::int64_t k_stride;
    int unit;
    bool k_major; // the index is contiguous
};

FASTKD_DEVICE constexpr int log2_of(int n) {
    return n <= 1 ? 0 : 1 + log2_of(n / 2);
}

template <class S, int count, int depth>
struct SharedOperand {
    static constexpr int by_index = depth + 16 / static_cast<int>(sizeof(S)); // pitch of [index][k]
    static constexpr int by_k = count + (sizeof(S) == 4 ? 8 : 8);             // pitch of [k][index]
    static constexpr int elements = count * by_index > depth* by_k ? count * by_index : depth * by_k;
    static constexpr int bytes = elements * static_cast<int>(sizeof(S));
    static_assert(bytes % 128 == 0, "operands follow each other at multiples of 128 bytes");
};

// Copies the chunk whose first element is `from` to shared memory, zeros in place of indices from `indices` and of k
// from `ks` on. Returns at once; copies may be under way.
template <class S, int count, int depth, int threads>
struct OperandCopy {
    using Shared = SharedOperand<S, count, depth>;

    template <int bytes>
    static FASTKD_DEVICE void pieces(S* to, const S* from, const Operand& operand, int outer_left, int inner_left) {
        constexpr int size = bytes / static_cast<int>(sizeof(S));
        constexpr int all = count * depth / size;
        static_assert(all % threads == 0, "every thread copies as much");
        const int shift = operand.k_major ? log2_of(count / size) : log2_of(depth / size);
        const int pitch = operand.k_major ? Shared::by_k : Shared::by_index;
        const std::int64_t outer_stride = operand.k_major ? operand.k_stride : operand.index_stride;
        const std::int64_t inner_stride = operand.k_major ? operand.index_stride : operand.k_stride;
#pragma unroll(bytes == 16 ? all / threads : 2) // the narrow ones are seldom, and would take registers from all
        for (int round = 0; round < all / threads; ++round) {
            const int piece = round * threads + thread_x();
            const int outer = piece >> shift;
            const int inner = (piece & ((1 << shift) - 1)) * size;
            const bool inside = outer < outer_left && inner < inner_left;
            const S* at = inside ? from + outer * outer_stride + inner * inner_stride : from;
            copy_async<bytes>(to + outer * pitch + inner, at, inside);
        }
    }

    // 16-bit elements too narrow for an asynchronous copy, or of any strides.
    static FASTKD_DEVICE void elements(S* to, const S* from, const Operand& operand, int outer_left, int inner_left) {
        constexpr int all = count * depth, batch = 8; // loads under way at a time
        static_assert(all % (threads * batch) == 0, "every thread copies as much");
        const int shift = operand.k_major ? log2_of(count) : log2_of(depth);
        const int pitch = operand.k_major ? Shared::by_k : Shared::by_index;
        const std::int64_t outer_stride = operand.k_major ? operand.k_stride : operand.index_stride;
        const std::int64_t inner_stride = operand.k_major ? operand.index_stride : operand.k_stride;
#pragma unroll 1
        for (int first = thread_x(); first < all; first += threads * batch) {
            S held[batch];
#pragma unroll
            for (int i = 0; i < batch; ++i) {
                const int outer = (first + i * threads) >> shift, inner = (first + i * threads) & ((1 << shift) - 1);
                const bool inside = outer < outer_left && inner < inner_left;
                held[i] = inside ? from[outer * outer_stride + inner * inner_stride] : S{};
            }
#pragma unroll
            for (int i = 0; i < batch; ++i) {
                const int outer = (first + i * threads) >> shift, inner = (first + i * threads) & ((1 << shift) - 1);
                to[outer * pitch + inner] = held[i];
            }
        }
    }

    static FASTKD_DEVICE void start(S* to, const S* from, const Operand& operand, std::int64_t indices,
                                    std::int64_t ks) {
        const int here = static_cast<int>(indices < count ? indices : count);
        const int deep = static_cast<int>(ks < depth ? ks : depth);
        const int outer_left = operand.k_major ? deep : here, inner_left = operand.k_major ? here : deep;
        const int bytes = operand.unit * static_cast<int>(sizeof(S));
        if (bytes == 16) {
            pieces<16>(to, from, operand, outer_left, inner_left);
        } else if (bytes == 8) {
            pieces<8>(to, from, operand, outer_left, inner_left);
        } else if (bytes == 4) {
            pieces<4>(to, from, operand, outer_left, inner_left);
        } else if constexpr (sizeof(S) == 2) {
            elements(to, from, operand, outer_left, inner_left);
        }
    }
};

// A's fragment of rows m to m + 15 and, from k on, 16 columns (8 of floats).
template <bool k_major, int pitch, class S>
FASTKD_DEVICE void load_a(std::uint32_t (&a)[4], const S* chunk, int m, int k) {
    const int lane = thread_x() % warp_size, row = lane % 8, matrix = lane / 8;
    if constexpr (sizeof(S) == 2) {
        if constexpr (k_major) {
            load_matrices_transposed(a, chunk + (k + matrix / 2 * 8 + row) * pitch + m + matrix % 2 * 8);
        } else {
            load_matrices(a, chunk + (m + matrix % 2 * 8 + row) * pitch + k + matrix / 2 * 8);
        }
    } else if constexpr (k_major) {
        const float* at = chunk + (k + lane % 4) * pitch + m + lane / 4;
        a[0] = bits_of(at[0]);
        a[1] = bits_of(at[8]);
        a[2] = bits_of(at[4 * pitch]);
        a[3] = bits_of(at[4 * pitch + 8]);
    } else {
        load_matrices(a, chunk + (m + matrix % 2 * 8 + row) * pitch + k + matrix / 2 * 4);
    }
}

// Two of B's fragments, of columns n to n + 7 (b[0], b[1]) and n + 8 to n + 15 (b[2], b[3]).
template <bool k_major, int pitch, class S>
FASTKD_DEVICE void load_b(std::uint32_t (&b)[4], const S* chunk, int n, int k) {
    const int lane = thread_x() % warp_size, row = lane % 8, matrix = lane / 8;
    if constexpr (sizeof(S) == 2) {
        if constexpr (k_major) {
            load_matrices_transposed(b, chunk + (k + matrix % 2 * 8 + row) * pitch + n + matrix / 2 * 8);
        } else {
            load_matrices(b, chunk + (n + matrix / 2 * 8 + row) * pitch + k + matrix % 2 * 8);
        }
    } else if constexpr (k_major) {
        const float* at = chunk + (k + lane % 4) * pitch + n + lane / 4;
        b[0] = bits_of(at[0]);
        b[1] = bits_of(at[4 * pitch]);
        b[2] = bits_of(at[8]);
        b[3] = bits_of(at[4 * pitch + 8]);
    } else {
        load_matrices(b, chunk + (n + matrix / 2 * 8 + row) * pitch + k + matrix % 2 * 4);
    }
}

// Floats as a sum of two of tf32's precision: value = high + low to 2^-22. `finite` is `high`, or 0 for an infinity:
// what the cross products take, lest inf * low = NaN appear where the product is infinite.
template <int count>
struct SplitFloats {
    std::uint32_t high[count], low[count], finite[count];

    FASTKD_DEVICE void split(const std::uint32_t (&bits)[count]) {
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const float value = float_of(bits[i]);
            const float rounded = round_to_tf32(value);
            const bool infinite = rounded - rounded != 0.0f; // or NaN, which `high` carries on
            high[i] = bits_of(rounded);
            low[i] = bits_of(infinite ? 0.0f : round_to_tf32(value - rounded));
            finite[i] = bits_of(infinite ? 0.0f : rounded);
        }
    }
};

// 16-bit floats as a sum of two bfloat16: exact for fp16, whose 11 bits they hold.
template <int count>
struct SplitHalves {
    std::uint32_t high[count], low[count];

    FASTKD_DEVICE explicit SplitHalves(const std::uint32_t (&bits)[count]) {
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const float first = widen(Half{static_cast<std::uint16_t>(bits[i])});
            const float second = widen(Half{static_cast<std::uint16_t>(bits[i] >> 16)});
            high[i] = pack_pair<BFloat16>(first, second);
            const float first_high = widen(BFloat16{static_cast<std::uint16_t>(high[i])});
            const float second_high = widen(BFloat16{static_cast<std::uint16_t>(high[i] >> 16)});
            low[i] = pack_pair<BFloat16>(first - first_high, second - second_high);
        }
    }
};

template <int at, int count>
FASTKD_DEVICE void two_of(std::uint32_t (&two)[2], const std::uint32_t (&all)[count]) {
    two[0] = all[at];
    two[1] = all[at + 1];
}

// C += A B of 16-bit elements, or of floats as three products in tf32 (without low * low, which is below 2^-22).
template <class S, int down, int across>
struct Accumulator {
    float c[down][across][4];

    // put(i, j, e) for every element.
    template <class Put>
    static FASTKD_DEVICE void visit(const Put& put) {
#pragma unroll
        for (int i = 0; i < down; ++i) {
#pragma unroll
            for (int j = 0; j < across; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    put(i, j, e);
                }
            }
        }
    }

    FASTKD_DEVICE void clear() {
        visit([&](int i, int j, int e) { c[i][j][e] = 0.0f; });
    }

    // One chunk, `m` and `n` being the warp's first row and column.
    template <bool a_k_major, bool b_k_major, int depth, int pitch_a, int pitch_b>
    FASTKD_DEVICE void add(const S* a, const S* b, int m, int n) {
        if constexpr (sizeof(S) == 2) {
#pragma unroll
            for (int k = 0; k < depth; k += 16) {
                std::uint32_t rows[down][4];
#pragma unroll
                for (int i = 0; i < down; ++i) {
                    load_a<a_k_major, pitch_a>(rows[i], a, m + 16 * i, k);
                }
#pragma unroll
                for (int j = 0; j < across; j += 2) {
                    std::uint32_t columns[4];
                    load_b<b_k_major, pitch_b>(columns, b, n + 8 * j, k);
#pragma unroll
                    for (int i = 0; i < down; ++i) {
                        pair<S>(c[i][j], c[i][j + 1], rows[i], columns);
                    }
                }
            }
        } else {
            // Tensor cores cut sums off instead of rounding them: a chunk's sum is taken by itself and added here.
            Accumulator of_chunk;
            of_chunk.clear();
#pragma unroll
            for (int k = 0; k < depth; k += 8) {
                SplitFloats<4> rows[down];
#pragma unroll
                for (int i = 0; i < down; ++i) {
                    std::uint32_t bits[4];
                    load_a<a_k_major, pitch_a>(bits, a, m + 16 * i, k);
                    rows[i].split(bits);
                }
#pragma unroll
                for (int j = 0; j < across; j += 2) {
                    std::uint32_t bits[4];
                    load_b<b_k_major, pitch_b>(bits, b, n + 8 * j, k);
                    SplitFloats<4> columns;
                    columns.split(bits);
#pragma unroll
                    for (int i = 0; i < down; ++i) {
                        float (&left)[4] = of_chunk.c[i][j];
                        float (&right)[4] = of_chunk.c[i][j + 1];
                        pair_of_floats(left, right, rows[i].low, columns.finite);
                        pair_of_floats(left, right, rows[i].finite, columns.low);
                        pair_of_floats(left, right, rows[i].high, columns.high);
                    }
                }
            }
            visit([&](int i, int j, int e) { c[i][j][e] += of_chunk.c[i][j][e]; });
        }
    }

    // The same where A is the sum of two bfloat16 matrices and B's fp16 elements are split alike.
    template <bool a_k_major, bool b_k_major, int depth, int pitch_a, int pitch_b>
    FASTKD_DEVICE void add_split(const BFloat16* a_high, const BFloat16* a_low, const Half* b, int m, int n) {
#pragma unroll
        for (int k = 0; k < depth; k += 16) {
            std::uint32_t high[down][4], low[down][4];
#pragma unroll
            for (int i = 0; i < down; ++i) {
                load_a<a_k_major, pitch_a>(high[i], a_high, m + 16 * i, k);
                load_a<a_k_major, pitch_a>(low[i], a_low, m + 16 * i, k);
            }
#pragma unroll
            for (int j = 0; j < across; j += 2) {
                std::uint32_t columns[4];
                load_b<b_k_major, pitch_b>(columns, b, n + 8 * j, k);
                const SplitHalves<4> halves(columns);
#pragma unroll
                for (int i = 0; i < down; ++i) {
                    pair<BFloat16>(c[i][j], c[i][j + 1], low[i], halves.high);
                    pair<BFloat16>(c[i][j], c[i][j + 1], high[i], halves.low);
                    pair<BFloat16>(c[i][j], c[i][j + 1], high[i], halves.high);
                }
            }
        }
    }

  private:
    template <class Multiplied>
    static FASTKD_DEVICE void pair(float (&left)[4], float (&right)[4], const std::uint32_t (&a)[4],
                                   const std::uint32_t (&b)[4]) {
        std::uint32_t two[2];
        two_of<0>(two, b);
        multiply_16x8x16<Multiplied>(left, a, two);
        two_of<2>(two, b);
        multiply_16x8x16<Multiplied>(right, a, two);
    }
    static FASTKD_DEVICE void pair_of_floats(float (&left)[4], float (&right)[4], const std::uint32_t (&a)[4],
                                             const std::uint32_t (&b)[4]) {
        std::uint32_t two[2];
        two_of<0>(two, b);
        multiply_16x8x8(left, a, two);
        two_of<2>(two, b);
        multiply_16x8x8(right, a, two);
    }
};

} // namespace fastkd::cuda::relation
