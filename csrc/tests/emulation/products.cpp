// Compiled without -fsanitize, like engine.cpp.
#include "tests/emulation/products.h"

#include <cmath>
#include <cstring>

namespace fastkd::emulation {
namespace {

double half_value(std::uint32_t bits) {
    const std::uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double size =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, static_cast<int>(exponent) - 25);
    if (exponent == 31) {
        size = mantissa == 0 ? HUGE_VAL : std::nan("");
    }
    return (bits & 0x8000) != 0 ? -size : size;
}

float float_value(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// Return a double truncated to a float.
float truncate(double value) {
    const float nearest = static_cast<float>(value);
    return std::isfinite(nearest) && std::fabs(static_cast<double>(nearest)) > std::fabs(value)
               ? std::nextafter(nearest, 0.0f)
               : nearest;
}

// Assemble the fragments of matrix.cuh and multiply them; `wide` elements have 32 bits, otherwise two share a word.
template <bool wide, class Value>
void multiply_as(const Slots& slots, float (&products)[32][4], Value value) {
    constexpr int depth = wide ? 8 : 16;
    double a[16][depth], b[depth][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int part = 0; part < (wide ? 1 : 2); ++part) {
            const auto element = [&](int word) {
                return value(wide ? slots[lane][word] : slots[lane][word] >> 16 * part & 0xffff);
            };
            const int k = wide ? t : 2 * t + part;
            for (int i = 0; i < 4; ++i) {
                a[g + 8 * (i % 2)][k + depth / 2 * (i / 2)] = element(i);
            }
            for (int i = 0; i < 2; ++i) {
                b[k + depth / 2 * i][g] = element(4 + i);
            }
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
            float sum = products[lane][i];
            for (int begin = 0; begin < depth; begin += depth / 2) {
                double exact = sum;
                for (int k = begin; k < begin + depth / 2; ++k) {
                    exact += a[row][k] * b[k][column];
                }
                sum = truncate(exact);
            }
            products[lane][i] = sum;
        }
    }
}

} // namespace

void multiply_fragments(Operation operation, const Slots& slots, float (&products)[32][4]) {
    if (operation == Operation::multiply_f16) {
        multiply_as<false>(slots, products, half_value);
    } else if (operation == Operation::multiply_bf16) {
        multiply_as<false>(slots, products,
                           [](std::uint32_t bits) { return static_cast<double>(float_value(bits << 16)); });
    } else { // tf32 ignores the lower bits of a float
        multiply_as<true>(slots, products,
                          [](std::uint32_t bits) { return static_cast<double>(float_value(bits & 0xffffe000u)); });
    }
}

} // namespace fastkd::emulation
