// e^x of a vector, within 1 ulp: x = n ln 2 + r, |r| <= (ln 2)/2, e^x = 2^n e^r with a minimax polynomial for e^r.
// e^-inf is 0, NaN gives NaN, and results too small for a normal number are flushed to 0.
#pragma once

#include "cpu/simd.h"

namespace fastkd::cpu::FASTKD_ISA {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
    static constexpr float log2_e = 1.44269504088896341f;
    static constexpr float ln_2_high = 0x1.62e4p-1f; // a multiple of 2^-15: n times it is exact
    static constexpr float ln_2_low = 1.42860682031e-6f;
    static constexpr float round = 0x1.8p23f; // adding it leaves the nearest integer in the low bits
    static constexpr int mantissa_bits = 23;
    static constexpr float smallest = -125.9f; // 2^x stops being a normal number a little below this
    // e^r = 1 + r + r^2 q(r)
    static constexpr float q[] = {0.4999999345f, 0.1666652063f, 0.04166838807f, 0.00836871685f, 0.001381459647f};
};

template <>
struct ExpConstants<double> {
    static constexpr double log2_e = 1.4426950408889634074;
    static constexpr double ln_2_high = 0x1.62e42fefa4p-1; // a multiple of 2^-41
    static constexpr double ln_2_low = -1.723944452561483477316e-13;
    static constexpr double round = 0x1.8p52;
    static constexpr int mantissa_bits = 52;
    static constexpr double smallest = -1021.9;
    static constexpr double q[] = {
        0.500000000000000004,   0.166666666666666834,    0.0416666666666660944,    0.0083333333333170346,
        0.00138888888891155865, 0.000198412698963830855, 0.0000248015869267112119, 2.75572348625520993e-6,
        2.75575817837713013e-7, 2.51120366465273855e-8,  2.08266464986001898e-9,
    };
};

// The integer n nearest to x, and 2^n y for y near 1: 0 for x below `smallest`, including -inf; NaN if y is NaN.
template <class T>
struct Rounded {
    using C = ExpConstants<T>;
#if defined(__AVX512F__)
    Vec<T> x, value;

    FASTKD_INLINE explicit Rounded(Vec<T> x) : x(x), value(nearest(x)) {}
    FASTKD_INLINE Vec<float> power_of_2_times(Vec<float> y) const {
        return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, broadcast(C::smallest), _CMP_NLT_UQ), y, value);
    }
    FASTKD_INLINE Vec<double> power_of_2_times(Vec<double> y) const {
        return _mm512_maskz_scalef_pd(_mm512_cmp_pd_mask(x, broadcast(C::smallest), _CMP_NLT_UQ), y, value);
    }

  private:
    FASTKD_INLINE static Vec<float> nearest(Vec<float> x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
    FASTKD_INLINE static Vec<double> nearest(Vec<double> x) {
        return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT);
    }
#else
    Vec<T> x, shifted, value;

    FASTKD_INLINE explicit Rounded(Vec<T> x) : x(x), shifted(x + C::round), value(shifted - C::round) {}
    FASTKD_INLINE Vec<T> power_of_2_times(Vec<T> y) const {
        const Vec<T> product =
            bit_cast<Vec<T>>(bit_cast<Bits<T>>(y) + (bit_cast<Bits<T>>(shifted) << C::mantissa_bits));
        return x < C::smallest ? Vec<T>{} : (y == y ? product : y);
    }
#endif
};

// e^(x scale - high - low) for many x, with an exponent of at most about 0, which is enough for a softmax. `high` is a
// small multiple of 2^-15 (2^-41 for double), and |low| is below that step. With fused multiply-adds nothing is rounded
// until n ln 2 has made the exponent small, so the result is as accurate far from 0 as near it.
template <class T>
struct ScaledExp {
    using C = ExpConstants<T>;
    T scale;
    T scale_log2_e = scale * C::log2_e;

    // `high` and `low` are scalars or vectors.
    template <class Part>
    FASTKD_INLINE Vec<T> operator()(Vec<T> x, Part high, Part low) const {
        const Vec<T> exponent = x * scale_log2_e - high * C::log2_e; // to base 2
        const Rounded<T> n(exponent);
        return of_rest(n, ((x * scale - (n.value * C::ln_2_high + high)) - n.value * C::ln_2_low) - low);
    }
    FASTKD_INLINE Vec<T> operator()(Vec<T> x) const {
        const Rounded<T> n(x * scale_log2_e);
        return of_rest(n, (x * scale - n.value * C::ln_2_high) - n.value * C::ln_2_low);
    }

  private:
    // Return 2^n e^r.
    FASTKD_INLINE static Vec<T> of_rest(const Rounded<T>& n, Vec<T> r) {
        constexpr int terms = sizeof(C::q) / sizeof(T);
        Vec<T> q = broadcast(C::q[terms - 1]);
        for (int i = terms - 2; i >= 0; --i) {
            q = q * r + C::q[i];
        }
#if defined(__FMA__) // each step rounds once
        return n.power_of_2_times((q * r + T(1)) * r + T(1));
#else
        return n.power_of_2_times((r * r * q + r) + T(1));
#endif
    }
};

} // namespace fastkd::cpu::FASTKD_ISA
