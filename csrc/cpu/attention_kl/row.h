// One query's row of both attention maps: logits, sums, and the row of H.
#pragma once

#include "common/attention_kl.h"
#include "cpu/gemm/packing.h"
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

// Turn the products in `row` into logits u, and return their maximum. Columns from `valid` on, up to `cols`, a multiple
// of lanes, and those where `mask` is 0 become -inf. `bias` and `mask` may be null; both have `cols` elements.
template <class T>
FASTKD_NOINLINE T logits_row(T* row, std::int64_t valid, std::int64_t cols, T scale, T inv_temperature, const T* bias,
                             const T* mask) {
    const T nothing = softmax_kl::minus_infinity<T>();
    const Vec<T> none = broadcast(nothing);
    Vec<T> most = none;
    for (std::int64_t c = 0; c < valid; c += lanes<T>) {
        Vec<T> u = load(row + c) * scale;
        if (bias != nullptr) {
            u += load(bias + c) * inv_temperature;
        }
        if (mask != nullptr) {
            u = load(mask + c) == T(0) ? none : u;
        }
        if (c + lanes<T> > valid) {
            u = lane_index<T>() < static_cast<typename BitsOf<T>::type>(valid - c) ? u : none;
        }
        most = max(u, most);
        store(row + c, u);
    }
    for (std::int64_t c = round_up(valid, lanes<T>); c < cols; c += lanes<T>) {
        store(row + c, none);
    }
    return max<T>(most);
}

struct AttentionSums {
    double z_s, z_t, a;
    FASTKD_INLINE double loss() const { return a / z_t + __builtin_log(z_s / z_t); }
};

// Replace the logits by e^{u - m}, if `keep`, and return their sums. `cols` is a multiple of lanes.
template <class T, bool keep>
FASTKD_NOINLINE AttentionSums exp_rows(T* s, T* t, std::int64_t cols, T max_s, T max_t) {
    const T shift_s = softmax_kl::shift_of(max_s), shift_t = softmax_kl::shift_of(max_t);
    const ScaledExp<T> exp{T(1)};
    KLSums<T> sums;
    for (std::int64_t c = 0; c < cols;) { // two-level sums, as in softmax_kl
        KLSums<T> part;
        const std::int64_t end = c + 16 * lanes<T> < cols ? c + 16 * lanes<T> : cols;
        for (; c < end; c += lanes<T>) {
            const KLSums<T> terms = kl_terms<T>(load(s + c) - shift_s, load(t + c) - shift_t, exp);
            part += terms;
            if constexpr (keep) {
                store(s + c, terms.z_s);
                store(t + c, terms.z_t);
            }
        }
        sums += part;
    }
    return {sum(sums.z_s), sum(sums.z_t), sum(sums.a)};
}

// Replace the student's exponentials by the row of H, for the factor g scale/tau.
template <class T>
FASTKD_NOINLINE void gradient_row(T* s, const T* t, std::int64_t cols, const AttentionSums& sums, T factor) {
    const Vec<T> by_s = broadcast(static_cast<T>(1 / sums.z_s)), by_t = broadcast(static_cast<T>(1 / sums.z_t));
    for (std::int64_t c = 0; c < cols; c += lanes<T>) {
        store(s + c, (rounded_product<T>(load(s + c), by_s) - rounded_product<T>(load(t + c), by_t)) * factor);
    }
}

template <class T>
FASTKD_NOINLINE void clear(T* to, std::int64_t count) { // a multiple of lanes
    for (std::int64_t c = 0; c < count; c += lanes<T>) {
        store(to + c, Vec<T>{});
    }
}

} // namespace fastkd::cpu::FASTKD_ISA
