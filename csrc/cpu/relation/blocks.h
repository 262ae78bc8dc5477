// The blocks and tiles of a relation, shared by the forms "streamed" and "stored": schedule, row statistics, losses, H.
//
// Rows are divided into blocks; a pair of blocks is a tile of both relation matrices. Only tiles of the upper triangle
// are computed. Pairs are scheduled in rounds in which every block occurs once, so the threads of a round write to
// disjoint rows, and each row's sums are added in the order of the rounds, independent of the number of threads.
#pragma once

#include "cpu/gemm/amx.h"
#include "cpu/pages.h"
#include "cpu/relation/bf16_tiles.h"
#include "cpu/relation/plan.h"
#include "cpu/relation/rows.h"
#include "cpu/relation/tiles.h"

namespace fastkd::cpu::FASTKD_ISA {

using relation::Backward;
using relation::Distance;
using relation::Forward;

// Call visit(i, j, thread) for all pairs i <= j of [begin, end), in rounds of disjoint pairs.
template <class Visit>
FASTKD_INLINE void pairs_within(std::int64_t begin, std::int64_t end, int threads, const Visit& visit) {
    const std::int64_t n = end - begin;
    parallel_for(threads, n, [&](std::int64_t i, int thread) { visit(begin + i, begin + i, thread); });
    const std::int64_t even = n + n % 2, rotating = even - 1;
    for (std::int64_t round = 0; round < rotating; ++round) { // round-robin: all indices but the last rotate
        parallel_for(threads, even / 2, [&](std::int64_t k, int thread) {
            const std::int64_t i = k == 0 ? rotating : (round + k) % rotating;
            const std::int64_t j = (round + rotating - k) % rotating;
            if (i < n && j < n) {
                visit(begin + (i < j ? i : j), begin + (i < j ? j : i), thread);
            }
        });
    }
}

// Return the position of the pair i <= j in the order of pairs_within(0, n).
FASTKD_INLINE std::int64_t place_within(std::int64_t n, std::int64_t i, std::int64_t j) {
    if (i == j) {
        return i;
    }
    const std::int64_t rotating = n + n % 2 - 1;
    if (j == rotating) { // the index that does not rotate comes first in its round
        return n + i * (n / 2);
    }
    const std::int64_t sum = i + j, round = (sum % 2 == 0 ? sum : sum + rotating) / 2 % rotating;
    const std::int64_t k = i > round ? i - round : i - round + rotating, opposite = rotating - k;
    return n + round * (n / 2) + (k < opposite ? k : opposite) - n % 2;
}

// Call visit(i, j, thread) for all i of the first range and j of the second, in rounds of disjoint pairs.
template <class Visit>
FASTKD_INLINE void pairs_between(std::int64_t i_begin, std::int64_t i_end, std::int64_t j_begin, std::int64_t j_end,
                                 int threads, const Visit& visit) {
    const std::int64_t n = i_end - i_begin, m = j_end - j_begin, rounds = n > m ? n : m;
    for (std::int64_t round = 0; round < rounds; ++round) {
        parallel_for(threads, n, [&](std::int64_t i, int thread) {
            const std::int64_t j = (i + round) % rounds;
            if (j < m) {
                visit(i_begin + i, j_begin + j, thread);
            }
        });
    }
}

// The arguments of one call, for storage type S.
template <class S>
struct Relation {
    using T = Compute<S>;
    const Options& options;
    const RelationPlan& plan;
    const Rows& student;
    const Rows& teacher;
    double* statistics; // written by the forward only
    char* workspace;

    std::int64_t others = options.others();
    bool pairs = false; // see use_pairs
    ScaledExp<T> exp{static_cast<T>(1 / options.temperature)};
    T sign = options.negate && options.distance == Distance::kl ? T(-1) : T(1);

    // ---- addresses
    template <class P = T>
    FASTKD_INLINE P* at(std::int64_t team, std::int64_t offset) const {
        return reinterpret_cast<P*>(workspace + team * plan.team_bytes + offset);
    }
    template <class P = T>
    FASTKD_INLINE P* scratch(std::int64_t thread, std::int64_t offset) const {
        return reinterpret_cast<P*>(workspace + plan.teams * plan.team_bytes + thread * plan.thread_bytes + offset);
    }
    FASTKD_INLINE std::int64_t first_row(std::int64_t block) const { return block % plan.group_blocks * plan.block; }
    FASTKD_INLINE std::int64_t rows_of(std::int64_t block) const {
        const std::int64_t left = options.rows - first_row(block);
        return left < plan.block ? left : plan.block;
    }
    FASTKD_INLINE std::int64_t sample(std::int64_t problem, std::int64_t block) const {
        return options.cross ? block / plan.group_blocks : problem;
    }
    // Return the statistics of the rows of `block` with respect to the group of blocks that contains `other`.
    FASTKD_INLINE RowStatistics statistics_of(std::int64_t problem, std::int64_t block, std::int64_t other) const {
        const std::int64_t o = options.cross ? other / plan.group_blocks : 0;
        const std::int64_t index = (o * options.batch + sample(problem, block)) * options.rows + first_row(block);
        return {statistics + index, others * options.batch * options.rows};
    }
    // Return the scales of the student's (network 0) or the teacher's (1) rows from `row` on.
    FASTKD_INLINE double* scales_of(int network, std::int64_t b, std::int64_t row) const {
        const std::int64_t plane = relation::statistic_planes * others + network;
        return statistics + (plane * options.batch + b) * options.rows + row;
    }
    FASTKD_INLINE const S* rows_at(const Rows& rows, std::int64_t problem, std::int64_t block) const {
        return static_cast<const S*>(rows.data) + sample(problem, block) * rows.batch_stride +
               first_row(block) * rows.row_stride;
    }
    // Write the scales of a block's rows, padded with zeros.
    FASTKD_INLINE void typed_scales(int network, std::int64_t problem, std::int64_t block, T (&out)[tile_side]) const {
        const double* scales = scales_of(network, sample(problem, block), first_row(block));
        const std::int64_t rows = rows_of(block);
        for (std::int64_t r = 0; r < rows; ++r) {
            out[r] = static_cast<T>(scales[r]);
        }
        for (std::int64_t r = rows; r < plan.block; ++r) {
            out[r] = 0;
        }
    }

    // Set `pairs`: multiply bfloat16 rows in pairs, unscaled, and scale the products, unless these could overflow.
    void use_pairs() {
        pairs = sizeof(S) == 2 && plan.pairs;
        const double* scales = scales_of(0, 0, 0);
        for (std::int64_t r = 0; r < 2 * options.batch * options.rows && pairs; ++r) {
            pairs = !(scales[r] < 1e-15); // NaN passes
        }
    }
    // Pack columns [from, from + width) of a block as [width][rows], scaled unless `pairs`. With plan.amx, rows of
    // pairs follow: the left operand of AMX products.
    FASTKD_INLINE void pack_block_of(const Rows& rows, int network, std::int64_t problem, std::int64_t block,
                                     std::int64_t from, std::int64_t width, T* to) const {
        const S* x = rows_at(rows, problem, block) + from * rows.col_stride;
        if constexpr (is_bf16<S>) {
            if (pairs) {
                auto* packed = reinterpret_cast<PairWord*>(to);
                pack_pairs(x, rows.row_stride, rows.col_stride, rows_of(block), width, packed);
                if (plan.amx) {
                    rows_of_pairs(packed, rows_of(block), pairs_of(width), packed + plan.block * pairs_of(width));
                }
                return;
            }
        }
        T scales[tile_side];
        typed_scales(network, problem, block, scales);
        pack<S>(x, rows.row_stride, rows.col_stride, rows_of(block), width, scales, nullptr, to);
    }
    // e (+)= the products of the packed blocks i and j.
    FASTKD_INLINE void multiply_blocks(const T* x, std::int64_t i, const T* y, std::int64_t j, std::int64_t width, T* e,
                                       bool add) const {
        const Panels<T> rows(rows_of(i)), cols(rows_of(j));
        if constexpr (is_bf16<S>) {
            const auto* left = reinterpret_cast<const PairWord*>(x);
            const auto* right = reinterpret_cast<const PairWord*>(y);
            const std::int64_t inner = pairs_of(width);
            if (pairs && plan.amx) {
                return amx_product(left + plan.block * inner, inner, rows_of(i), right, cols, inner, e, plan.block,
                                   add);
            }
            if (pairs) {
                return packed_product_pairs(left, rows, right, cols, inner, e, plan.block, add);
            }
        }
        packed_product<T>(x, rows, y, cols, width, e, plan.block, add);
    }
    // Apply the sign, and with `pairs` the scales, to both networks' products.
    FASTKD_INLINE void finish_products(std::int64_t problem, std::int64_t i, std::int64_t j, T* e_s, T* e_t) const {
        if (pairs) {
            T row[tile_side], col[tile_side];
            for (int network = 0; network < 2; ++network) {
                typed_scales(network, problem, i, row);
                typed_scales(network, problem, j, col);
                scale_tile(network == 0 ? e_s : e_t, plan.block, rows_of(i), rows_of(j), row, col);
            }
        }
        if (sign < 0) {
            negate_tile(e_s, plan.block, rows_of(i), rows_of(j));
            negate_tile(e_t, plan.block, rows_of(i), rows_of(j));
        }
    }

    // ---- forward
    // Add a tile to the row statistics; pass 1 of row_cosine follows finish_norms().
    FASTKD_INLINE void add_tile(Tile<T> tile, std::int64_t problem, std::int64_t i, std::int64_t j, int pass,
                                std::int64_t thread) const {
        const RowStatistics row = statistics_of(problem, i, j);
        const RowStatistics col = i == j ? RowStatistics{} : statistics_of(problem, j, i);
        switch (options.distance) {
        case Distance::mse:
            return add_symmetric<T>(tile, SquareTerm<T>{}, row, col);
        case Distance::row_cosine:
            return pass == 0 ? add_symmetric<T>(tile, NormTerm<T>{}, row, col) : add_cosine<T>(tile, row, col);
        case Distance::kl:
            break;
        }
        if (options.fixed_shift()) {
            return add_symmetric<T>(tile, KLTerm<T>{exp}, row, col);
        }
        add_kl_rows<T>(tile, exp, row);
        if (i != j) {
            T* transposed = scratch(thread, plan.tiles) + 2 * plan.block * plan.block;
            T* transposed_t = transposed + plan.block * plan.block;
            transpose_tile(tile.e_s, tile.ld, tile.rows, tile.cols, transposed);
            transpose_tile(tile.e_t, tile.ld, tile.rows, tile.cols, transposed_t);
            add_kl_rows<T>({transposed, transposed_t, tile.ld, tile.cols, tile.rows}, exp, col);
        }
    }

    // Set the statistics to those of no tiles.
    void clear_statistics() const {
        const std::int64_t plane = others * options.batch * options.rows;
        const bool maxima = options.distance == Distance::kl && !options.fixed_shift();
        for (int k = 0; k < relation::statistic_planes; ++k) {
            const double start = maxima && k < 2 ? softmax_kl::minus_infinity<double>() : 0;
            for (std::int64_t r = 0; r < plane; ++r) {
                statistics[k * plane + r] = start;
            }
        }
    }
    // Turn the sums of squares of one problem into norms, between the passes of row_cosine.
    void finish_norms(std::int64_t problem) const {
        for (std::int64_t o = 0; o < others; ++o) {
            for (std::int64_t block = 0; block < plan.blocks; ++block) {
                const RowStatistics row = statistics_of(problem, block, o * plan.group_blocks);
                for (std::int64_t r = 0; r < rows_of(block); ++r) {
                    const double n = __builtin_sqrt(row[0][r]), m = __builtin_sqrt(row[1][r]);
                    row[0][r] = n <= relation::norm_floor ? relation::norm_floor : n;
                    row[1][r] = m <= relation::norm_floor ? relation::norm_floor : m;
                    row[3][r] = m / row[1][r] * (m / row[1][r]);
                }
            }
        }
    }
    // Compute the losses and the statistics that the backward reads.
    void finish_rows(std::int64_t problem, T* loss) const {
        for (std::int64_t block = 0; block < plan.blocks; ++block) {
            for (std::int64_t r = 0; r < rows_of(block); ++r) {
                double total = 0;
                for (std::int64_t o = 0; o < others; ++o) {
                    const RowStatistics row = statistics_of(problem, block, o * plan.group_blocks);
                    total += finish_row(row, r);
                }
                loss[sample(problem, block) * options.rows + first_row(block) + r] =
                    static_cast<T>(total / static_cast<double>(others));
            }
        }
    }
    // Return one row's loss, and replace its sums by the statistics that the backward reads.
    FASTKD_INLINE double finish_row(RowStatistics row, std::int64_t r) const {
        if (options.distance == Distance::mse) {
            return row[0][r] / static_cast<double>(options.rows);
        }
        if (options.distance == Distance::row_cosine) {
            return row[2][r];
        }
        const double inverse = 1 / options.temperature;
        if (options.fixed_shift()) {
            row[2][r] *= inverse;
            return row[2][r] / row[1][r] + __builtin_log(row[0][r] / row[1][r]);
        }
        const softmax_kl::KLState<double> state{row[0][r], row[1][r], row[2][r], row[3][r], row[4][r]};
        row[0][r] = softmax_kl::log_sum_exp(state.max_s, __builtin_log(state.z_s), inverse);
        row[1][r] = softmax_kl::log_sum_exp(state.max_t, __builtin_log(state.z_t), inverse);
        return state.loss();
    }

    // ---- backward
    // Write the coefficients of a block's rows, zero beyond the last row.
    FASTKD_INLINE void coefficients(const Backward& args, std::int64_t problem, std::int64_t block, std::int64_t other,
                                    RowCoefficients<T>& out) const {
        const RowStatistics row = statistics_of(problem, block, other);
        const T* grad = static_cast<const T*>(args.grad_loss) + sample(problem, block) * args.grad_batch_stride +
                        first_row(block) * args.grad_row_stride;
        const std::int64_t rows = rows_of(block);
        double g[tile_side];
        for (std::int64_t r = 0; r < rows; ++r) {
            g[r] = static_cast<double>(grad[r * args.grad_row_stride]) / static_cast<double>(others);
        }
        // One branch-free loop per distance: tiles are small, so these divisions matter.
        if (options.distance == Distance::mse) {
            for (std::int64_t r = 0; r < rows; ++r) {
                out.a[r] = out.b[r] = static_cast<T>(2 * g[r] / static_cast<double>(options.rows));
            }
        } else if (options.distance == Distance::row_cosine) {
            for (std::int64_t r = 0; r < rows; ++r) {
                const double n = row[0][r], m = row[1][r];
                const bool flat = n <= relation::norm_floor;      // zero gradient, as for rows of zero norm
                const double c = (1 + row[3][r] - row[2][r]) / 2; // |u - v|^2 = |u|^2 + |v|^2 - 2 c
                out.a[r] = flat ? T(0) : static_cast<T>(2 * g[r] * c / (n * n));
                out.b[r] = flat ? T(0) : static_cast<T>(2 * g[r] / (n * m));
            }
        } else if (options.fixed_shift()) {
            const double *z_s = row[0], *z_t = row[1];
            for (std::int64_t r = 0; r < rows; ++r) {
                out.a[r] = static_cast<T>(g[r] / options.temperature / z_s[r]);
                out.b[r] = static_cast<T>(g[r] / options.temperature / z_t[r]);
            }
        } else {
            for (std::int64_t r = 0; r < rows; ++r) {
                out.a[r] = static_cast<T>(g[r] / options.temperature);
                out.b[r] = 0;
                const softmax_kl::LogSoftmax<T> s(row[0][r], options.temperature, 1 / options.temperature);
                const softmax_kl::LogSoftmax<T> t(row[1][r], options.temperature, 1 / options.temperature);
                out.center_s[r] = s.center;
                out.high_s[r] = s.high;
                out.low_s[r] = s.low;
                out.center_t[r] = t.center;
                out.high_t[r] = t.high;
                out.low_t[r] = t.low;
            }
        }
        for (std::int64_t r = rows; r < plan.block; ++r) {
            out.a[r] = out.b[r] = 0;
            out.center_s[r] = out.high_s[r] = out.low_s[r] = 0;
            out.center_t[r] = out.high_t[r] = out.low_t[r] = 0;
        }
    }
    // Write a tile of H to h, which may alias the tile's e_t. Add its row sums to q unless null.
    FASTKD_INLINE void make_h(const Backward& args, Tile<T> tile, std::int64_t problem, std::int64_t i, std::int64_t j,
                              T* h, double* q) const {
        RowCoefficients<T> row, col;
        coefficients(args, problem, i, j, row);
        coefficients(args, problem, j, i, col);
        double* q_row = q == nullptr ? nullptr : q + i * plan.block;
        double* q_col = q == nullptr || i == j ? nullptr : q + j * plan.block;
        if (options.distance == Distance::row_cosine) {
            gradient_tile_cosine<T>(tile, row, col, sign, h, q_row, q_col);
        } else if (options.distance == Distance::mse) {
            gradient_tile<T, false>(tile, Identity<T>{}, row, col, sign, h, q_row, q_col);
        } else if (options.fixed_shift()) {
            options.cross ? gradient_tile<T, true>(tile, KLFunction<T>{exp}, row, col, sign, h, q_row, q_col)
                          : gradient_tile<T, false>(tile, KLFunction<T>{exp}, row, col, sign, h, q_row, q_col);
        } else {
            gradient_tile_kl<T>(tile, exp, row, col, sign, h, q_row, q_col);
        }
    }
    // Write a tile of M (see bf16_tiles.h), off the diagonal also its transpose, and add the row sums of M to q.
    FASTKD_INLINE void make_m(const Backward& args, Tile<T> tile, std::int64_t problem, std::int64_t i, std::int64_t j,
                              T* h, RoundedTile out, double* q) const {
        make_h(args, tile, problem, i, j, h, nullptr);
        TileScales scales;
        typed_scales(0, problem, i, scales.row);
        typed_scales(0, problem, j, scales.col);
        for (std::int64_t r = 0; r < plan.block; ++r) {
            scales.row_inverse[r] = scales.row[r] == 0 ? 0 : sign / scales.row[r];
            scales.col_inverse[r] = scales.col[r] == 0 ? 0 : sign / scales.col[r];
        }
        out.mirror = i == j ? nullptr : out.mirror;
        round_tile(tile, h, scales, out, q + i * plan.block, i == j ? nullptr : q + j * plan.block);
    }
};

} // namespace fastkd::cpu::FASTKD_ISA
