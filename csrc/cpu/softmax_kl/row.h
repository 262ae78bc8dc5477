// Vectorised KL sums over a segment of a row.
#pragma once

#include "common/softmax_kl.h"
#include "cpu/exp.h"

namespace fastkd::cpu::FASTKD_ISA {

template <class T>
struct KLSums {
    Vec<T> z_s{}, z_t{}, a{};
    FASTKD_INLINE void operator+=(const KLSums& other) {
        z_s += other.z_s;
        z_t += other.z_t;
        a += other.a;
    }
};

// Return e^{d_s/tau}, e^{d_t/tau} and e^{d_t/tau} (d_t - d_s); the last lacks a factor of 1/tau.
template <class T>
FASTKD_INLINE KLSums<T> kl_terms(Vec<T> d_s, Vec<T> d_t, ScaledExp<T> exp) {
    const Vec<T> e_t = exp(d_t);
    // 0 * log 0 = 0: where the teacher's probability is 0, the student's may be too.
    return {exp(d_s), e_t, e_t == T(0) ? Vec<T>{} : e_t * (d_t - d_s)};
}

// Add the sums over these elements, whose maxima the state already includes. Also prefetch the next `count` elements
// from next_s and next_t, so that finding their maxima does not wait for memory.
template <class S, class T = Compute<S>>
FASTKD_INLINE void accumulate(softmax_kl::KLState<double>& state, const S* s, const S* t, std::int64_t count,
                              ScaledExp<T> exp, const S* next_s, const S* next_t) {
    const T shift_s = static_cast<T>(softmax_kl::shift_of(state.max_s));
    const T shift_t = static_cast<T>(softmax_kl::shift_of(state.max_t));
    KLSums<T> sums;
    std::int64_t i = 0;
    while (i + lanes<T> <= count) { // two-level sums: rounding errors grow with the square root of each length
        KLSums<T> part;
        const std::int64_t end = i + 16 * lanes<T> <= count ? i + 16 * lanes<T> : count;
        for (; i + lanes<T> <= end; i += lanes<T>) {
            __builtin_prefetch(next_s + i);
            __builtin_prefetch(next_t + i);
            part += kl_terms<T>(load(s + i) - shift_s, load(t + i) - shift_t, exp);
        }
        sums += part;
    }
    if (i < count) {
        const T nothing = softmax_kl::minus_infinity<T>();
        sums += kl_terms<T>(load_tail(s, count, count - i, nothing) - shift_s,
                            load_tail(t, count, count - i, nothing) - shift_t, exp);
    }
    state.add(sum(sums.z_s), sum(sums.z_t), sum(sums.a) * exp.scale);
}

template <class S, class T = Compute<S>>
FASTKD_INLINE T block_max(const S* x, std::int64_t count) {
    const T nothing = softmax_kl::minus_infinity<T>();
    Vec<T> most = broadcast(nothing), most2 = most;
    std::int64_t i = 0;
    for (; i + 2 * lanes<T> <= count; i += 2 * lanes<T>) {
        most = max(load(x + i), most);
        most2 = max(load(x + i + lanes<T>), most2);
    }
    for (; i + lanes<T> <= count; i += lanes<T>) {
        most = max(load(x + i), most);
    }
    if (i < count) {
        most = max(load_tail(x, count, count - i, nothing), most);
    }
    return max<T>(max(most2, most));
}

} // namespace fastkd::cpu::FASTKD_ISA
