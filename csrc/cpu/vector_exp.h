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
    static constexpr float smallest = -125.9f; // a little below it, 2^x is no normal number
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

// e^(x scale - high - low) for many x, with an exponent that is at most about 0: all a softmax needs. `high` is a small
// multiple of 2^-15 (2^-41 for double), `low` less than that. Where the machine has fused multiply-adds nothing is
// rounded before n ln 2 has made the exponent small, so the result is as exact far from 0 as near it.
template <class T>
struct ScaledExp {
    using C = ExpConstants<T>;
    T scale;
    T scale_log2_e = scale * C::log2_e;

    // `high` and `low` are numbers, or vectors of a number per lane.
    template <class Part>
    FASTKD_INLINE Vec<T> operator()(Vec<T> x, Part high, Part low) const {
        const Vec<T> exponent = x * scale_log2_e - high * C::log2_e; // of 2
        const Vec<T> shifted = exponent + C::round;
        const Vec<T> n = shifted - C::round;
        const Vec<T> r = ((x * scale - (n * C::ln_2_high + high)) - n * C::ln_2_low) - low;
        constexpr int degree = sizeof(C::q) / sizeof(T) - 1;
        Vec<T> q = broadcast(C::q[degree]);
        for (int i = degree - 1; i >= 0; --i) {
            q = q * r + C::q[i];
        }
        const Vec<T> e_r = (r * r * q + r) + T(1);
        const Vec<T> y = bit_cast<Vec<T>>(bit_cast<Bits<T>>(e_r) + (bit_cast<Bits<T>>(shifted) << C::mantissa_bits));
        return exponent < C::smallest ? Vec<T>{} : (e_r == e_r ? y : e_r);
    }
};

} // namespace fastkd::cpu::FASTKD_ISA
