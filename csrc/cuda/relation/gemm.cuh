// Tiled matrix products C[m][n] = sum_k A[m][k] B[n][k] on tensor cores, for relation's kernels: operands of any layout
// in gmem, copies of their tiles to smem, and a warp's part of one k-tile's product.
//
// A tile has the same layout in smem as in gmem: K-major, [mn][k], or MN-major, [k][mn], where 16-bit fragments are
// loaded transposed. Lines are padded by 16 bytes (MN-major floats: 32), so that the eight rows of an 8 x 8 matrix, or
// the lanes of a fragment of floats, fall into different banks.
#pragma once

#include "cuda/matrix.cuh"

namespace fastkd::cuda::relation {

// (mn, k) -> data[mn * mn_stride + k * k_stride], in elements. Along the contiguous mode, each group of `alignment`
// elements, of 4 to 16 bytes, starts at a multiple of its size, so one copy moves it. It lies inside or outside the
// operand, or ends with zeros.
struct Operand {
    const void* data;
    std::int64_t mn_stride;
    std::int64_t k_stride;
    int alignment;
    bool mn_major; // mn is the contiguous mode, else k
};

FASTKD_DEVICE constexpr int log2_of(int n) {
    return n <= 1 ? 0 : 1 + log2_of(n / 2);
}

template <class S, int block_mn, int block_k>
struct SmemTile {
    static constexpr int k_major_pitch = block_k + 16 / static_cast<int>(sizeof(S));
    static constexpr int mn_major_pitch = block_mn + 8;
    static constexpr int k_major_elements = block_mn * k_major_pitch, mn_major_elements = block_k * mn_major_pitch;
    static constexpr int elements = k_major_elements > mn_major_elements ? k_major_elements : mn_major_elements;
    static constexpr int bytes = elements * static_cast<int>(sizeof(S));
    static_assert(bytes % 128 == 0, "the tile after it is aligned to 128 bytes");
};

// Copy the tile at `from` to smem, with zeros from mn = `mn_left` and k = `k_left` on. The copies are
// asynchronous.
template <class S, int block_mn, int block_k, int threads>
struct GmemToSmem {
    using Smem = SmemTile<S, block_mn, block_k>;

    template <int bytes>
    static FASTKD_DEVICE void copy_vectors(S* to, const S* from, const Operand& operand, int outer_left,
                                           int inner_left) {
        constexpr int size = bytes / static_cast<int>(sizeof(S));
        constexpr int vectors = block_mn * block_k / size;
        static_assert(vectors % threads == 0, "threads copy equal shares");
        const int shift = operand.mn_major ? log2_of(block_mn / size) : log2_of(block_k / size);
        const int pitch = operand.mn_major ? Smem::mn_major_pitch : Smem::k_major_pitch;
        const std::int64_t outer_stride = operand.mn_major ? operand.k_stride : operand.mn_stride;
        // Only floats may have no contiguous mode.
        const std::int64_t inner_stride = sizeof(S) == 2 ? 1 : operand.mn_major ? operand.mn_stride : operand.k_stride;
#pragma unroll(bytes == 16 ? vectors / threads : 1) // narrow copies are rare; unrolled, they would cost registers
        for (int round = 0; round < vectors / threads; ++round) {
            const int vector = round * threads + thread_x();
            const int outer = vector >> shift;
            const int inner = (vector & ((1 << shift) - 1)) * size;
            const bool inside = outer < outer_left && inner < inner_left;
            const S* at = inside ? from + outer * outer_stride + inner * inner_stride : from;
            copy_async<bytes>(to + outer * pitch + inner, at, inside);
        }
    }

    static FASTKD_DEVICE void start(S* to, const S* from, const Operand& operand, std::int64_t mn_left,
                                    std::int64_t k_left) {
        const int mns = static_cast<int>(mn_left < block_mn ? mn_left : block_mn);
        const int ks = static_cast<int>(k_left < block_k ? k_left : block_k);
        const int outer_left = operand.mn_major ? ks : mns, inner_left = operand.mn_major ? mns : ks;
        const int bytes = operand.alignment * static_cast<int>(sizeof(S));
        if (bytes == 16) {
            copy_vectors<16>(to, from, operand, outer_left, inner_left);
        } else if (bytes == 8) {
            copy_vectors<8>(to, from, operand, outer_left, inner_left);
        } else {
            copy_vectors<4>(to, from, operand, outer_left, inner_left);
        }
    }
};

// Load A's fragment of rows m to m + 15 and columns k to k + 15 (floats: to k + 7).
template <bool mn_major, int pitch, class S>
FASTKD_DEVICE void load_a(std::uint32_t (&a)[4], const S* smem, int m, int k) {
    const int lane = thread_x() % warp_size, row = lane % 8, matrix = lane / 8;
    if constexpr (sizeof(S) == 2) {
        if constexpr (mn_major) {
            load_matrices_transposed(a, smem + (k + matrix / 2 * 8 + row) * pitch + m + matrix % 2 * 8);
        } else {
            load_matrices(a, smem + (m + matrix % 2 * 8 + row) * pitch + k + matrix / 2 * 8);
        }
    } else if constexpr (mn_major) {
        const float* at = smem + (k + lane % 4) * pitch + m + lane / 4;
        a[0] = bits_of(at[0]);
        a[1] = bits_of(at[8]);
        a[2] = bits_of(at[4 * pitch]);
        a[3] = bits_of(at[4 * pitch + 8]);
    } else {
        load_matrices(a, smem + (m + matrix % 2 * 8 + row) * pitch + k + matrix / 2 * 4);
    }
}

// Load two of B's fragments, of columns n to n + 7 (b[0], b[1]) and n + 8 to n + 15 (b[2], b[3]).
template <bool mn_major, int pitch, class S>
FASTKD_DEVICE void load_b(std::uint32_t (&b)[4], const S* smem, int n, int k) {
    const int lane = thread_x() % warp_size, row = lane % 8, matrix = lane / 8;
    if constexpr (sizeof(S) == 2) {
        if constexpr (mn_major) {
            load_matrices_transposed(b, smem + (k + matrix % 2 * 8 + row) * pitch + n + matrix / 2 * 8);
        } else {
            load_matrices(b, smem + (n + matrix / 2 * 8 + row) * pitch + k + matrix % 2 * 8);
        }
    } else if constexpr (mn_major) {
        const float* at = smem + (k + lane % 4) * pitch + n + lane / 4;
        b[0] = bits_of(at[0]);
        b[1] = bits_of(at[4 * pitch]);
        b[2] = bits_of(at[8]);
        b[3] = bits_of(at[4 * pitch + 8]);
    } else {
        load_matrices(b, smem + (n + matrix / 2 * 8 + row) * pitch + k + matrix % 2 * 4);
    }
}

// Floats split into two tf32 numbers: value = high + low to 2^-22. `finite` is `high`, or 0 for an infinity; the cross
// products use it, since inf * low would be NaN where the product is infinite.
template <int count>
struct SplitFloats {
    std::uint32_t high[count], low[count], finite[count];

    FASTKD_DEVICE void split(const std::uint32_t (&bits)[count]) {
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const float value = float_of(bits[i]);
            const float rounded = round_to_tf32(value);
            const bool infinite = rounded - rounded != 0.0f; // or NaN, which stays in `high`
            high[i] = bits_of(rounded);
            low[i] = bits_of(infinite ? 0.0f : round_to_tf32(value - rounded));
            finite[i] = bits_of(infinite ? 0.0f : rounded);
        }
    }
};

// fp16 numbers split into two bfloat16 numbers, exactly: together they hold its 11 bits.
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

template <int first, int count>
FASTKD_DEVICE void select_pair(std::uint32_t (&pair)[2], const std::uint32_t (&all)[count]) {
    pair[0] = all[first];
    pair[1] = all[first + 1];
}

// C += A B of 16-bit elements, or of floats as three products in tf32 (low * low, below 2^-22, is omitted).
template <class S, int fragments_m, int fragments_n>
struct Accumulator {
    float c[fragments_m][fragments_n][4];

    // Call put(i, j, e) for every element.
    template <class Put>
    static FASTKD_DEVICE void visit(const Put& put) {
#pragma unroll
        for (int i = 0; i < fragments_m; ++i) {
#pragma unroll
            for (int j = 0; j < fragments_n; ++j) {
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

    // Add the product of one k-tile; `m` and `n` are the warp's first row and column.
    //
    // Tensor cores truncate sums instead of rounding them. Sums of floats start from 0 at each k-tile and are added
    // here, and with `restart` those of 16-bit elements at each step of 16, which is not unrolled to save registers.
    template <bool a_mn_major, bool b_mn_major, int block_k, int pitch_a, int pitch_b, bool restart>
    FASTKD_DEVICE void add(const S* a, const S* b, int m, int n) {
        if constexpr (sizeof(S) == 2) {
#pragma unroll(restart ? 1 : block_k / 16)
            for (int k = 0; k < block_k; k += 16) {
                std::uint32_t rows[fragments_m][4];
#pragma unroll
                for (int i = 0; i < fragments_m; ++i) {
                    load_a<a_mn_major, pitch_a>(rows[i], a, m + 16 * i, k);
                }
#pragma unroll
                for (int j = 0; j < fragments_n; j += 2) {
                    std::uint32_t columns[4];
                    load_b<b_mn_major, pitch_b>(columns, b, n + 8 * j, k);
#pragma unroll
                    for (int i = 0; i < fragments_m; ++i) {
                        if constexpr (restart) {
                            float left[4] = {}, right[4] = {};
                            multiply_pair<S>(left, right, rows[i], columns);
#pragma unroll
                            for (int e = 0; e < 4; ++e) {
                                c[i][j][e] += left[e];
                                c[i][j + 1][e] += right[e];
                            }
                        } else {
                            multiply_pair<S>(c[i][j], c[i][j + 1], rows[i], columns);
                        }
                    }
                }
            }
        } else {
            Accumulator k_tile_sum;
            k_tile_sum.clear();
#pragma unroll
            for (int k = 0; k < block_k; k += 8) {
                SplitFloats<4> rows[fragments_m];
#pragma unroll
                for (int i = 0; i < fragments_m; ++i) {
                    std::uint32_t bits[4];
                    load_a<a_mn_major, pitch_a>(bits, a, m + 16 * i, k);
                    rows[i].split(bits);
                }
#pragma unroll
                for (int j = 0; j < fragments_n; j += 2) {
                    std::uint32_t bits[4];
                    load_b<b_mn_major, pitch_b>(bits, b, n + 8 * j, k);
                    SplitFloats<4> columns;
                    columns.split(bits);
#pragma unroll
                    for (int i = 0; i < fragments_m; ++i) {
                        float (&left)[4] = k_tile_sum.c[i][j];
                        float (&right)[4] = k_tile_sum.c[i][j + 1];
                        multiply_float_pair(left, right, rows[i].low, columns.finite);
                        multiply_float_pair(left, right, rows[i].finite, columns.low);
                        multiply_float_pair(left, right, rows[i].high, columns.high);
                    }
                }
            }
            visit([&](int i, int j, int e) { c[i][j][e] += k_tile_sum.c[i][j][e]; });
        }
    }

    // Add the product of A, given as the sum of two bfloat16 matrices, and B, whose fp16 elements are split here.
    template <bool a_mn_major, bool b_mn_major, int block_k, int pitch_a, int pitch_b>
    FASTKD_DEVICE void add_split(const BFloat16* a_high, const BFloat16* a_low, const Half* b, int m, int n) {
#pragma unroll
        for (int k = 0; k < block_k; k += 16) {
            std::uint32_t high[fragments_m][4], low[fragments_m][4];
#pragma unroll
            for (int i = 0; i < fragments_m; ++i) {
                load_a<a_mn_major, pitch_a>(high[i], a_high, m + 16 * i, k);
                load_a<a_mn_major, pitch_a>(low[i], a_low, m + 16 * i, k);
            }
#pragma unroll
            for (int j = 0; j < fragments_n; j += 2) {
                std::uint32_t columns[4];
                load_b<b_mn_major, pitch_b>(columns, b, n + 8 * j, k);
                const SplitHalves<4> halves(columns);
#pragma unroll
                for (int i = 0; i < fragments_m; ++i) {
                    multiply_pair<BFloat16>(c[i][j], c[i][j + 1], low[i], halves.high);
                    multiply_pair<BFloat16>(c[i][j], c[i][j + 1], high[i], halves.low);
                    multiply_pair<BFloat16>(c[i][j], c[i][j + 1], high[i], halves.high);
                }
            }
        }
    }

  private:
    template <class Multiplied>
    static FASTKD_DEVICE void multiply_pair(float (&left)[4], float (&right)[4], const std::uint32_t (&a)[4],
                                            const std::uint32_t (&b)[4]) {
        std::uint32_t b_pair[2];
        select_pair<0>(b_pair, b);
        multiply_16x8x16<Multiplied>(left, a, b_pair);
        select_pair<2>(b_pair, b);
        multiply_16x8x16<Multiplied>(right, a, b_pair);
    }
    static FASTKD_DEVICE void multiply_float_pair(float (&left)[4], float (&right)[4], const std::uint32_t (&a)[4],
                                                  const std::uint32_t (&b)[4]) {
        std::uint32_t b_pair[2];
        select_pair<0>(b_pair, b);
        multiply_16x8x8(left, a, b_pair);
        select_pair<2>(b_pair, b);
        multiply_16x8x8(right, a, b_pair);
    }
};

} // namespace fastkd::cuda::relation
