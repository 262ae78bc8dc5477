// Rows of both attention maps: logits, sums, losses, and the rows of H.
#pragma once

#include "common/attention_kl.h"
#include "cpu/attention_kl/plan.h"
#include "cpu/gemm/bf16.h"
#include "cpu/gemm/small.h"
#include "cpu/log.h"
#include "cpu/softmax_kl/row.h"
#include "cpu/storage.h"

namespace fastkd::cpu::FASTKD_ISA {

// Return a b, rounded: a fused multiply-add would leave one of two equal products unrounded.
template <class T>
FASTKD_INLINE Vec<T> rounded_product(Vec<T> a, Vec<T> b) {
    Vec<T> product = a * b;
#if defined(__AVX512F__)
    __asm__("" : "+v"(product));
#elif defined(__SSE2__)
    __asm__("" : "+x"(product));
#elif defined(__aarch64__)
    __asm__("" : "+w"(product));
#else
    volatile Vec<T> stored = product;
    product = stored;
#endif
    return product;
}

// Copy x[r][c] to out[r][c], whose rows are contiguous.
template <class S, class T = Compute<S>>
FASTKD_NOINLINE void copy_rows(const S* x, std::int64_t row_stride, std::int64_t col_stride, std::int64_t rows,
                               std::int64_t cols, T* out) {
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < cols; c += lanes<T>) {
            const std::int64_t some = cols - c < lanes<T> ? cols - c : lanes<T>;
            const S* from = x + r * row_stride + c * col_stride;
            S gathered[lanes<T>] = {};
            if (col_stride != 1) {
                for (std::int64_t l = 0; l < some; ++l) {
                    gathered[l] = from[l * col_stride];
                }
                from = gathered;
            }
            store_first(out + r * cols + c, load_first(from, some), some);
        }
    }
}

// Copy x[r][c] to out[r][c], as pairs of columns; the last one is padded with 0.
FASTKD_NOINLINE void copy_pairs(const BFloat16* x, std::int64_t row_stride, std::int64_t col_stride, std::int64_t rows,
                                std::int64_t cols, PairWord* out) {
    const std::int64_t pairs = pairs_of(cols);
    for (std::int64_t r = 0; r < rows; ++r) {
        const BFloat16* from = x + r * row_stride;
        PairWord* to = out + r * pairs;
        to[pairs - 1] = 0;
        if (col_stride == 1) {
            __builtin_memcpy(to, from, cols * sizeof(BFloat16));
            continue;
        }
        for (std::int64_t c = 0; c < cols; ++c) {
            __builtin_memcpy(reinterpret_cast<char*>(to) + c * sizeof(BFloat16), from + c * col_stride,
                             sizeof(BFloat16));
        }
    }
}

// out[c] = b[c] for c < count, converted to T.
template <class T>
FASTKD_NOINLINE void load_bias(const attention_kl::Bias& bias, std::int64_t offset, std::int64_t count, T* out) {
    with_storage(bias.dtype, [&](auto storage) {
        const auto* from = static_cast<const decltype(storage)*>(bias.data) + offset;
        if constexpr (sizeof(Compute<decltype(storage)>) <= sizeof(T)) { // fp64 biases make T double
            for (std::int64_t c = 0; c < count; c += lanes<T>) {
                store_first(out + c, load_first_as<T>(from + c, count - c), count - c);
            }
        }
    });
}

// ---- a group of rows: exponentials and sums of each row, then of all of them, then the rows of H -------------------

constexpr std::int64_t row_group = 16;
constexpr std::int64_t most_rest = 2; // one or two columns, and one or two rows of a group, are processed separately

// Return how many of a row's last columns are processed per column, with one lane per row. One or two columns would
// leave the lanes of a vector idle in every row: a quarter of the work for 49 keys.
template <class T>
FASTKD_INLINE std::int64_t rest_of(std::int64_t keys) {
    const std::int64_t rest = keys % lanes<T>;
    return keys > lanes<T> && keys < 8 * lanes<T> && rest <= most_rest && rest < lanes<T> / 4 ? rest : 0;
}

// One network's part of a group: per row, what turns products into probabilities.
template <class T>
struct GroupNetwork {
    alignas(64) T max[row_group];
    alignas(64) T inverse[row_group];         // 1/z
    alignas(64) T rest[most_rest][row_group]; // products of the last columns, then exponentials
};
// KLSums without initial values.
template <class T>
struct RowSums {
    Vec<T> z_s, z_t, a;
};
template <class T>
struct RowGroup {
    GroupNetwork<T> s, t;
    RowSums<T> sums[row_group];
    alignas(64) T factor[row_group]; // g scale/tau
};
// The sums of all rows of a block. Their logarithms are computed together: one alone is bound by latency.
struct BlockSums {
    alignas(64) double z_s[attention_max_block], z_t[attention_max_block], a[attention_max_block];
};

// Return a vector whose lane l is the combination of all lanes of value(l), l < count, such as their sum.
template <class T, class Value, class Of>
FASTKD_INLINE Vec<T> combined_lanes(std::int64_t count, const Value& value, const Of& of) {
    if (count <= most_rest) {
        Vec<T> result = combine_lanes_of<T>(value(0), of);
        for (std::int64_t l = 1; l < count; ++l) {
            const Bits<T> index = lane_index<T>();
            result = index < static_cast<typename BitsOf<T>::type>(l) ? result : combine_lanes_of<T>(value(l), of);
        }
        return result;
    }
    Vec<T> values[lanes<T>];
#pragma GCC unroll 16
    for (int l = 0; l < lanes<T>; ++l) {
        values[l] = value(smaller(l, count - 1));
    }
    combine_lanes<T>(values, of);
    return values[0];
}

// Turn the products of row r of a group into logits, with -inf from column `valid` on and where `mask` is 0. `bias` and
// `mask` may be null. `cols` is a multiple of lanes; the `rest` columns after it are in `group`.
template <class T>
FASTKD_NOINLINE void logits_row(T* row, GroupNetwork<T>& group, std::int64_t r, std::int64_t cols, std::int64_t rest,
                                std::int64_t valid, T scale, T inv_temperature, const T* bias, const T* mask) {
    const Vec<T> none = broadcast(softmax_kl::minus_infinity<T>());
    for (std::int64_t c = 0; c < cols; c += lanes<T>) {
        Vec<T> u = load(row + c) * scale;
        if (bias != nullptr) {
            u += load(bias + c) * inv_temperature;
        }
        if (mask != nullptr) {
            u = load(mask + c) == T(0) ? none : u;
        }
        if (c + lanes<T> > valid) {
            u = lane_index<T>() < static_cast<typename BitsOf<T>::type>(valid > c ? valid - c : 0) ? u : none;
        }
        store(row + c, u);
    }
    for (std::int64_t j = 0; j < rest; ++j) { // valid, unless masked
        T u = group.rest[j][r] * scale;
        if (bias != nullptr) {
            u += bias[cols + j] * inv_temperature;
        }
        group.rest[j][r] = mask != nullptr && mask[cols + j] == T(0) ? softmax_kl::minus_infinity<T>() : u;
    }
}

// Set the maxima of a group's rows of logits, and subtract them from the rest. Logits are `scale` times the columns.
template <class T>
FASTKD_NOINLINE void max_rows(const T* x, std::int64_t ld, std::int64_t rows, std::int64_t cols, std::int64_t rest,
                              T scale, GroupNetwork<T>& group) {
    const Vec<T> none = broadcast(softmax_kl::minus_infinity<T>());
    for (std::int64_t first = 0; first < rows; first += lanes<T>) {
        const auto most_of = [&](std::int64_t l) __attribute__((always_inline)) {
            const T* row = x + (first + l) * ld;
            Vec<T> most = max(load(row) * scale, none);
            for (std::int64_t c = lanes<T>; c < cols; c += lanes<T>) {
                most = max(load(row + c) * scale, most);
            }
            return most;
        };
        Vec<T> all = combined_lanes<T>(rows - first, most_of,
                                       [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return max(a, b); });
        for (std::int64_t j = 0; j < rest; ++j) {
            all = max(load(group.rest[j] + first) * scale, all);
        }
        all = all == softmax_kl::minus_infinity<T>() ? Vec<T>{} : all; // softmax_kl::shift_of
        store(group.max + first, all);
        for (std::int64_t j = 0; j < rest; ++j) {
            store(group.rest[j] + first, load(group.rest[j] + first) * scale - all);
        }
    }
}

// Replace row r of a group by exponentials, and set its sums. With a constant `count`, it is cols/lanes.
template <class T, int count>
FASTKD_INLINE void exp_row(T* s, T* t, std::int64_t cols, T scale_s, T scale_t, RowGroup<T>& group, std::int64_t r) {
    const Vec<T> max_s = broadcast(group.s.max[r]), max_t = broadcast(group.t.max[r]);
    const ScaledExp<T> exp{T(1)};
    const auto terms_at = [&](std::int64_t c) __attribute__((always_inline)) {
        const KLSums<T> terms = kl_terms<T>(load(s + c) * scale_s - max_s, load(t + c) * scale_t - max_t, exp);
        store(s + c, terms.z_s);
        store(t + c, terms.z_t);
        return terms;
    };
    if constexpr (count > 0) {
        KLSums<T> sums = terms_at(0);
#pragma GCC unroll 4
        for (int v = 1; v < count; ++v) {
            sums += terms_at(v * lanes<T>);
        }
        group.sums[r] = {sums.z_s, sums.z_t, sums.a};
    } else {
        KLSums<T> sums;
        for (std::int64_t c = 0; c < cols;) { // two-level sums, as in softmax_kl
            KLSums<T> part;
            const std::int64_t end = c + 16 * lanes<T> < cols ? c + 16 * lanes<T> : cols;
            for (; c < end; c += lanes<T>) {
                part += terms_at(c);
            }
            sums += part;
        }
        group.sums[r] = {sums.z_s, sums.z_t, sums.a};
    }
}
// Replace a group's rows of logits by exponentials, and set the maxima and sums. A row's maximum takes long to compute
// and all its exponentials wait for it, so all maxima are computed first.
template <class T, int count = 0>
FASTKD_NOINLINE void exp_rows(T* s, T* t, std::int64_t ld, std::int64_t rows, std::int64_t cols, T scale_s, T scale_t,
                              RowGroup<T>& group) {
    for (std::int64_t r = 0; r < rows; ++r) {
        exp_row<T, count>(s + r * ld, t + r * ld, cols, scale_s, scale_t, group, r);
    }
}

// Return the lane sums of one of the sums of up to lanes<double> rows, in double: the last few sums are the largest and
// would have the largest rounding errors.
template <class T>
FASTKD_INLINE Vec<double> lane_sums(const RowSums<T>* rows, std::int64_t count, Vec<T> RowSums<T>::* sum) {
    const auto in_double = [&](std::int64_t r) __attribute__((always_inline)) {
        const Vec<T> value = rows[r].*sum;
        if constexpr (sizeof(T) == sizeof(double)) {
            return value;
        } else {
            typename VectorOf<float, lanes<double>>::type half[2];
            __builtin_memcpy(half, &value, sizeof(half));
            return __builtin_convertvector(half[0], Vec<double>) + __builtin_convertvector(half[1], Vec<double>);
        }
    };
    return combined_lanes<double>(count, in_double,
                                  [](Vec<double> a, Vec<double> b) __attribute__((always_inline)) { return a + b; });
}

// Set the inverse sums of a group and, from row `first` on, the sums of its block. Replace the rest by H; `h` is the
// first row's first column of the rest, or null.
template <class T>
FASTKD_NOINLINE void finish_rows(RowGroup<T>& group, std::int64_t rest, std::int64_t rows, T* h, std::int64_t ld,
                                 BlockSums& block, std::int64_t first) {
    alignas(64) T a[most_rest][row_group];
    const ScaledExp<T> exp{T(1)};
    for (std::int64_t j = 0; j < rest; ++j) {
        for (std::int64_t r = 0; r < rows; r += lanes<T>) {
            const KLSums<T> terms = kl_terms<T>(load(group.s.rest[j] + r), load(group.t.rest[j] + r), exp);
            store(group.s.rest[j] + r, terms.z_s);
            store(group.t.rest[j] + r, terms.z_t);
            store(a[j] + r, terms.a);
        }
    }
    const auto store_inverse = [](T* to, Vec<double> z) __attribute__((always_inline)) {
        const auto inverse = __builtin_convertvector(1.0 / z, typename VectorOf<T, lanes<double>>::type);
        __builtin_memcpy(to, &inverse, sizeof(inverse));
    };
    for (std::int64_t r = 0; r < rows; r += lanes<double>) {
        const RowSums<T>* sums = group.sums + r;
        Vec<double> z_s = lane_sums(sums, rows - r, &RowSums<T>::z_s),
                    z_t = lane_sums(sums, rows - r, &RowSums<T>::z_t);
        Vec<double> sum_a = lane_sums(sums, rows - r, &RowSums<T>::a);
        for (std::int64_t j = 0; j < rest; ++j) {
            z_s += load_as<double>(group.s.rest[j] + r);
            z_t += load_as<double>(group.t.rest[j] + r);
            sum_a += load_as<double>(a[j] + r);
        }
        store(block.z_s + first + r, z_s);
        store(block.z_t + first + r, z_t);
        store(block.a + first + r, sum_a);
        store_inverse(group.s.inverse + r, z_s);
        store_inverse(group.t.inverse + r, z_t);
    }
    for (std::int64_t j = 0; j < rest && h != nullptr; ++j) {
        alignas(64) T column[row_group];
        for (std::int64_t r = 0; r < rows; r += lanes<T>) {
            store(column + r, (rounded_product<T>(load(group.s.rest[j] + r), load(group.s.inverse + r)) -
                               rounded_product<T>(load(group.t.rest[j] + r), load(group.t.inverse + r))) *
                                  load(group.factor + r));
        }
        for (std::int64_t r = 0; r < rows; ++r) {
            h[r * ld + j] = column[r];
        }
    }
}

// Write the losses of a block; `mask` is null or 0 where a loss is 0.
template <class T>
FASTKD_NOINLINE void block_losses(const BlockSums& block, std::int64_t rows, const unsigned char* mask, T* loss) {
    for (std::int64_t r = 0; r < rows; r += lanes<double>) {
        const Vec<double> z_s = load(block.z_s + r), z_t = load(block.z_t + r);
        alignas(64) double values[lanes<double>];
        store(values, load(block.a + r) / z_t + log(z_s / z_t));
        for (std::int64_t l = 0; l < lanes<double> && r + l < rows; ++l) {
            loss[r + l] = mask != nullptr && mask[r + l] == 0 ? T(0) : static_cast<T>(values[l]);
        }
    }
}

// Replace the student's exponentials by the rows of H of a group. With a constant `count`, it is cols/lanes.
template <class T, int count = 0>
FASTKD_NOINLINE void gradient_rows(T* s, const T* t, std::int64_t ld, std::int64_t rows, std::int64_t cols,
                                   const RowGroup<T>& group) {
    for (std::int64_t r = 0; r < rows; ++r) {
        const Vec<T> by_s = broadcast(group.s.inverse[r]), by_t = broadcast(group.t.inverse[r]);
        const Vec<T> factor = broadcast(group.factor[r]);
        const auto at = [&](std::int64_t c) __attribute__((always_inline)) {
            const Vec<T> p_s = rounded_product<T>(load(s + r * ld + c), by_s);
            const Vec<T> p_t = rounded_product<T>(load(t + r * ld + c), by_t);
            store(s + r * ld + c, (p_s - p_t) * factor);
        };
        if constexpr (count > 0) {
#pragma GCC unroll 4
            for (int v = 0; v < count; ++v) {
                at(v * lanes<T>);
            }
        } else {
            for (std::int64_t c = 0; c < cols; c += lanes<T>) {
                at(c);
            }
        }
    }
}

// out[r] = q_r . k for the rows of a group, with contiguous columns.
template <class T>
FASTKD_NOINLINE void column_product(const T* q, std::int64_t q_row, std::int64_t rows, const T* k, std::int64_t width,
                                    T* out) {
    std::int64_t first = 0;
    for (; rows - first > most_rest; first += lanes<T>) {
        Vec<T> sums[lanes<T>] = {};
        const auto add = [&](std::int64_t c, std::int64_t count) __attribute__((always_inline)) {
            const Vec<T> right = load_first(k + c, count);
#pragma GCC unroll 16
            for (int l = 0; l < lanes<T>; ++l) { // rows after the last repeat it
                const std::int64_t r = first + l < rows ? first + l : rows - 1;
                sums[l] += load_first(q + r * q_row + c, count) * right;
            }
        };
        const std::int64_t whole = width / lanes<T> * lanes<T>;
        for (std::int64_t c = 0; c < whole; c += lanes<T>) {
            add(c, lanes<T>);
        }
        if (whole < width) {
            add(whole, width - whole);
        }
        add_lanes<T>(sums);
        store(out + first, sums[0]);
    }
    if (first < rows) {
        const auto product = [&](std::int64_t l) __attribute__((always_inline)) {
            Vec<T> sum{};
            for (std::int64_t c = 0; c < width; c += lanes<T>) {
                sum += load_first(q + (first + l) * q_row + c, width - c) * load_first(k + c, width - c);
            }
            return sum;
        };
        store(out + first, combined_lanes<T>(rows - first, product,
                                             [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return a + b; }));
    }
}

template <class T>
FASTKD_NOINLINE void clear(T* to, std::int64_t count) { // a multiple of lanes
    for (std::int64_t c = 0; c < count; c += lanes<T>) {
        store(to + c, Vec<T>{});
    }
}

} // namespace fastkd::cpu::FASTKD_ISA
