// Run every kernel under sanitizers with extreme shapes, layouts, values and numbers of threads.
//
//     sanitize [CHECK...]     FASTKD_CPU_ISA selects the instruction set
//
// Exit status: 0 success, 3 wrong results, 77 the machine lacks the instruction set; other values: a sanitizer's.
#include "tests/sanitize.h"

#include <cstdio>
#include <stdexcept>

namespace fastkd::sanitize {
namespace {

std::int64_t passed_count = 0, failed_count = 0;

std::vector<const Check*>& checks() {
    static std::vector<const Check*> all;
    return all;
}

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

} // namespace

Check::Check(const char* name, void (*run)()) : name(name), run(run) {
    checks().push_back(this);
}

void expect(bool passed, const std::string& what) {
    passed ? ++passed_count : ++failed_count;
    if (!passed && failed_count <= 20) {
        std::printf("FAILED %s\n", what.c_str());
    }
}

const char* name_of(DType dtype) {
    switch (dtype) {
    case DType::Float32:
        return "float32";
    case DType::Float16:
        return "float16";
    case DType::BFloat16:
        return "bfloat16";
    default:
        return "float64";
    }
}

double to_double(BFloat16 x) {
    return bits_as<float>(static_cast<std::uint32_t>(x.bits) << 16);
}
double to_double(Half x) {
    const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    double size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
    if (exponent == 31) {
        size = mantissa == 0 ? HUGE_VAL : std::nan("");
    }
    return x.bits & 0x8000 ? -size : size;
}

template <>
double to_storage<double>(double x) {
    return x;
}
template <>
float to_storage<float>(double x) {
    return static_cast<float>(x);
}
template <>
BFloat16 to_storage<BFloat16>(double x) {
    return {static_cast<std::uint16_t>(bits_as<std::uint32_t>(static_cast<float>(x)) >> 16)};
}
template <>
Half to_storage<Half>(double x) {
    const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const double size = std::fabs(x);
    if (std::isnan(x)) {
        return {0x7e00};
    }
    if (std::isinf(x) || size >= 65520) {
        return {static_cast<std::uint16_t>(sign | 0x7c00)};
    }
    if (size < 0x1p-14) {
        return {static_cast<std::uint16_t>(sign | static_cast<int>(size * 0x1p24))};
    }
    int exponent;
    const double fraction = std::frexp(size, &exponent); // [0.5, 1)
    const int mantissa = static_cast<int>(fraction * 2048) - 1024;
    return {static_cast<std::uint16_t>(sign | (exponent + 14) << 10 | mantissa)};
}

std::vector<Layout> layouts(std::int64_t batch, std::int64_t rows, std::int64_t cols) {
    return {{"contiguous", rows * cols, cols, 0},
            {"gaps", rows * (cols + 5) + 1, cols + 5, 3},
            {"rows outermost", cols, batch * cols, 1},
            {"one sample", 0, cols, 0},
            {"one row", 0, 0, 2}};
}

std::uint64_t Random::bits() { // splitmix64
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

double Random::value(Values kind) {
    const double normal = (uniform() + uniform() + uniform() + uniform() - 2) * 1.7;
    if (kind == Values::far) {
        return normal * 1e4;
    }
    return kind == Values::holes && bits() % 5 == 0 ? -HUGE_VAL : normal;
}

} // namespace fastkd::sanitize

int main(int count, char** arguments) {
    using namespace fastkd;
    try {
        std::printf("instruction set %s\n", cpu::isa_name(cpu::isa()));
    } catch (const std::runtime_error& error) {
        std::printf("%s\n", error.what());
        return 77;
    }
    for (const sanitize::Check* check : sanitize::checks()) {
        bool wanted = count == 1;
        for (int i = 1; i < count; ++i) {
            wanted = wanted || std::string(arguments[i]) == check->name;
        }
        if (wanted) {
            const std::int64_t before = sanitize::passed_count + sanitize::failed_count;
            check->run();
            std::printf("%s: %lld results\n", check->name,
                        static_cast<long long>(sanitize::passed_count + sanitize::failed_count - before));
        }
    }
    std::printf("%lld right, %lld wrong\n", static_cast<long long>(sanitize::passed_count),
                static_cast<long long>(sanitize::failed_count));
    return sanitize::failed_count == 0 ? 0 : 3;
}
