// log x of a vector of doubles, within 2 ulp: x = 2^n m, sqrt(1/2) <= m < sqrt(2), log m = 2 artanh s by its series,
// s = (m - 1)/(m + 1), |s| < 0.172. Exactly 0 for 1; for normal positive x only, else NaN.
#pragma once

#include "cpu/simd.h"

namespace fastkd::cpu::FASTKD_ISA {

FASTKD_INLINE Vec<double> log(Vec<double> x) {
    constexpr std::uint64_t root_half = 0x3fe6a09e667f3bcd, exponent_of_1 = 0x3ff0000000000000;
    // Subtracting the bits of sqrt(1/2) leaves n in the exponent, biased by adding 1023 to keep it positive.
    const Bits<double> n = (bit_cast<Bits<double>>(x) - root_half + exponent_of_1) >> 52;
    const Vec<double> m = bit_cast<Vec<double>>(bit_cast<Bits<double>>(x) - (n << 52) + exponent_of_1);
    const Vec<double> count = bit_cast<Vec<double>>(n | 0x4330000000000000) - (0x1p52 + 1023); // n as a double
    const Vec<double> s = (m - 1.0) / (m + 1.0), s2 = s * s;
    Vec<double> series = broadcast(1.0 / 21);
    for (int k = 19; k >= 3; k -= 2) {
        series = series * s2 + 1.0 / k;
    }
    const Vec<double> log_m = 2.0 * (s + s * s2 * series);
    const Vec<double> value = log_m + count * 0.693147180559945309417;
    return x > 0.0 && x < __builtin_inf() ? value : broadcast(__builtin_nan(""));
}

} // namespace fastkd::cpu::FASTKD_ISA
