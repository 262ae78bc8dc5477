// The scales of a relation's rows: scale_i of common/relation.h.
#pragma once

#include "common/relation.h"
#include "cpu/gemm/packing.h"
#include "cpu/parallel.h"
#include "cpu/storage.h"

namespace fastkd::cpu::FASTKD_ISA {

using relation::Options;
using relation::Rows;
using relation::Similarity;

// Write the scales of rows [0, count) of x.
template <class S, class T = Compute<S>>
FASTKD_NOINLINE void row_scales(const S* x, const Rows& rows, std::int64_t count, Similarity similarity,
                                double* scales) {
    if (similarity != Similarity::cosine) {
        for (std::int64_t r = 0; r < count; ++r) {
            scales[r] = similarity == Similarity::mean ? 1 / __builtin_sqrt(static_cast<double>(rows.width)) : 1.0;
        }
        return;
    }
    const auto scale_of = [](double square) __attribute__((always_inline)) {
        const double floor = relation::norm_floor * relation::norm_floor;
        return square <= floor ? 1 / relation::norm_floor : 1 / __builtin_sqrt(square);
    };
    const auto square_in_double = [&](std::int64_t r) {
        double square = 0;
        for (std::int64_t k = 0; k < rows.width; ++k) {
            S padded[lanes<T>] = {x[r * rows.row_stride + k * rows.col_stride]};
            const double value = static_cast<double>(load(padded)[0]);
            square += value * value;
        }
        return square;
    };
    // Squares of floats may overflow or underflow.
    const auto safe = [](double square) { return square > 1e-30 && square < 1e30; };
    for (std::int64_t r = 0; r < count; r += lanes<T>) {
        const std::int64_t some = count - r < lanes<T> ? count - r : lanes<T>;
        double squares[lanes<T>] = {};
        if (rows.row_stride == 1) {
            constexpr std::int64_t chunk = 16; // two-level sums, the outer ones in double
            for (std::int64_t from = 0; from < rows.width; from += chunk) {
                const std::int64_t end = from + chunk < rows.width ? from + chunk : rows.width;
                Vec<T> part{};
                for (std::int64_t k = from; k < end; ++k) {
                    const Vec<T> value = load_first(x + r + k * rows.col_stride, some);
                    part += value * value;
                }
                for (int l = 0; l < lanes<T>; ++l) {
                    squares[l] += static_cast<double>(part[l]);
                }
            }
        } else if (rows.col_stride == 1) {
            for (std::int64_t l = 0; l < some; ++l) {
                const S* from = x + (r + l) * rows.row_stride;
                for (std::int64_t k = 0; k < rows.width;) {
                    const std::int64_t end = k + 16 * lanes<T> < rows.width ? k + 16 * lanes<T> : rows.width;
                    Vec<T> part{}, part2{};
                    for (; k + 2 * lanes<T> <= end; k += 2 * lanes<T>) {
                        const Vec<T> value = load(from + k), value2 = load(from + k + lanes<T>);
                        part += value * value;
                        part2 += value2 * value2;
                    }
                    for (; k < end; k += lanes<T>) {
                        const Vec<T> value = load_first(from + k, end - k);
                        part += value * value;
                    }
                    squares[l] += sum(part + part2);
                }
            }
        } else {
            for (std::int64_t l = 0; l < some; ++l) {
                squares[l] = square_in_double(r + l);
            }
        }
        for (std::int64_t l = 0; l < some; ++l) {
            scales[r + l] = scale_of(safe(squares[l]) ? squares[l] : square_in_double(r + l));
        }
    }
}

// Write both networks' scales, (2, batch, rows).
template <class S>
FASTKD_INLINE void find_scales(const Options& options, const Rows& student, const Rows& teacher, double* scales,
                               int threads) {
    constexpr std::int64_t block = 96;
    const std::int64_t blocks = ceil_div(options.rows, block);
    parallel_for(threads, 2 * options.batch * blocks, [&](std::int64_t task, int) {
        const std::int64_t network = task % 2, b = task / 2 / blocks, row = task / 2 % blocks * block;
        const std::int64_t count = options.rows - row < block ? options.rows - row : block;
        const Rows& rows = network == 0 ? student : teacher;
        row_scales(static_cast<const S*>(rows.data) + b * rows.batch_stride + row * rows.row_stride, rows, count,
                   options.similarity, scales + (network * options.batch + b) * options.rows + row);
    });
}

// Return the factor of a row's gradient: its scale, or 0 if the norm was clamped to norm_floor.
FASTKD_INLINE double outer_scale(const Options& options, double scale) {
    return options.similarity == Similarity::cosine && scale >= 1 / relation::norm_floor ? 0 : scale;
}

} // namespace fastkd::cpu::FASTKD_ISA
