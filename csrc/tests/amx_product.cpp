// Check amx_product of cpu/gemm/amx.h, with emulated tile instructions, against sums in double and against the
// products of pairs that it replaces. Exit status: 0 success, 1 wrong results, 77 the machine lacks AVX512-BF16.
//
//     c++ -std=c++17 -O1 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -DFASTKD_ISA=avx512
//         -Icsrc/tests/emulation -Icsrc csrc/tests/amx_product.cpp
#include "cpu/gemm/amx.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

using namespace fastkd;
using namespace fastkd::cpu::avx512;

namespace {

int failures = 0;

void expect(bool passed, const char* what, std::int64_t rows, std::int64_t cols, std::int64_t inner) {
    failures += !passed;
    if (!passed && failures <= 20) {
        std::printf("FAILED %s: %d x %d, %d columns multiplied\n", what, static_cast<int>(rows), static_cast<int>(cols),
                    static_cast<int>(inner));
    }
}

BFloat16 rounded(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return {static_cast<std::uint16_t>(bits >> 16)};
}
double value(BFloat16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

struct Random {
    std::uint64_t state = 1;
    float operator()() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<float>(static_cast<double>(state >> 40) / (1 << 24) - 0.45); // sums do not cancel
    }
} number;

struct Matrix {
    std::int64_t rows, cols;
    std::vector<BFloat16> data;
    Matrix(std::int64_t rows, std::int64_t cols) : rows(rows), cols(cols), data(rows * cols) {
        for (BFloat16& x : data) {
            x = rounded(number());
        }
    }
    BFloat16& at(std::int64_t r, std::int64_t c) { return data[r * cols + c]; }
};

constexpr float unwritten = 12345;

// Errors of both products, relative to the magnitude of their summands.
struct Errors {
    double tiles = 0, pairs = 0;
};

// Multiply x y^T, once stored and once added to 1, by tiles and by pairs.
Errors compare(Matrix& x, Matrix& y) {
    const std::int64_t inner = x.cols, pairs = pairs_of(inner);
    const Panels<float> x_panels(x.rows), y_panels(y.rows);
    std::vector<PairWord> left(x_panels.elements() * pairs), right(y_panels.elements() * pairs), by_rows(left.size());
    pack_pairs(x.data.data(), inner, 1, x.rows, inner, left.data());
    pack_pairs(y.data.data(), inner, 1, y.rows, inner, right.data());
    rows_of_pairs(left.data(), x.rows, pairs, by_rows.data());
    const std::int64_t ld = y_panels.elements() + 16, height = x_panels.elements();
    Errors worst;
    for (const bool add : {false, true}) {
        std::vector<float> tiles((height + 1) * ld, unwritten), vectors = tiles;
        for (std::int64_t r = 0; add && r < height; ++r) {
            for (std::int64_t c = 0; c < y_panels.elements(); ++c) {
                tiles[r * ld + c] = vectors[r * ld + c] = 1;
            }
        }
        amx_product(by_rows.data(), pairs, x.rows, right.data(), y_panels, pairs, tiles.data(), ld, add);
        packed_product_pairs(left.data(), x_panels, right.data(), y_panels, pairs, vectors.data(), ld, add);
        for (std::int64_t r = 0; r < height + 1; ++r) {
            for (std::int64_t c = 0; c < ld; ++c) {
                const float tile = tiles[r * ld + c], vector = vectors[r * ld + c];
                if (r >= height || c >= y_panels.elements()) {
                    expect(tile == unwritten, "writes beyond the result", x.rows, y.rows, inner);
                } else if (r >= x.rows || c >= y.rows) {
                    expect(tile == (add ? 1 : 0) || std::isnan(vector), "padding", x.rows, y.rows, inner);
                } else {
                    double sum = add, size = add;
                    for (std::int64_t k = 0; k < inner; ++k) {
                        sum += value(x.at(r, k)) * value(y.at(c, k));
                        size += std::fabs(value(x.at(r, k)) * value(y.at(c, k)));
                    }
                    expect(std::isnan(sum) == std::isnan(tile) && std::isnan(vector) == std::isnan(tile), "NaN", x.rows,
                           y.rows, inner);
                    if (std::isfinite(sum)) {
                        worst.tiles = std::fmax(worst.tiles, std::fabs(tile - sum) / size);
                        worst.pairs = std::fmax(worst.pairs, std::fabs(vector - sum) / size);
                    } else {
                        expect(std::isnan(sum) || tile == sum, "infinity", x.rows, y.rows, inner);
                    }
                }
            }
        }
    }
    return worst;
}

} // namespace

int main() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512bf16")) {
        return 77;
    }
    Errors worst;
    const auto check = [&](std::int64_t rows, std::int64_t cols, std::int64_t inner) {
        Matrix x(rows, inner), y(cols, inner);
        const Errors errors = compare(x, y);
        worst.tiles = std::fmax(worst.tiles, errors.tiles);
        worst.pairs = std::fmax(worst.pairs, errors.pairs);
    };
    for (const std::int64_t rows : {1, 15, 16, 17, 33, 48, 96}) {
        for (const std::int64_t cols : {1, 16, 17, 48, 64, 96}) {
            for (const std::int64_t inner : {1, 2, 31, 32, 33, 64, 97}) {
                check(rows, cols, inner);
            }
        }
    }
    check(16, 48, 4096); // a long sum: the error grows with its square root
    std::printf("largest error relative to the summands: tiles %.2e, pairs %.2e\n", worst.tiles, worst.pairs);
    expect(worst.tiles <= 2 * worst.pairs && worst.tiles < 1e-6, "error", 0, 0, 0);

    Matrix x(17, 40), y(20, 40);
    const float special[] = {std::numeric_limits<float>::quiet_NaN(), HUGE_VALF, -HUGE_VALF, 1e-40f};
    for (int i = 0; i < 4; ++i) { // reach only their own rows and columns
        x.at(i, 39) = rounded(special[i]);
        y.at(5 + i, 33) = rounded(special[i]);
    }
    compare(x, y);
    return failures == 0 ? 0 : 1;
}
