// relation on the CPU. The formulas are those of common/relation.h; here is how the matrices are walked.
//
// Rows are cut into blocks; a pair of blocks is a tile of both relation matrices. Only the upper triangle's tiles are
// made. Pairs are visited in rounds in which every block occurs once: the threads of a round never meet, and every
// row's sums are added in the order of the rounds, whatever the number of threads.
//
// Streamed: the blocks are normalised and packed (all of them, or as many as the workspace holds, half against half);
// a tile is made, used and forgotten, in the backward once more.
// Kept: where the matrices are small beside the inputs (channels), the forward keeps their tiles, and the backward
// makes H from them and multiplies it with the rows as they come: scale_i and q_i go into H.
#include "common/relation.h"

#include "cpu/kernels.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/relation_plan.h"
#include "cpu/relation_rows.h"
#include "cpu/relation_tiles.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

using relation::Backward;
using relation::Distance;
using relation::Forward;

constexpr std::int64_t kept_chunk = 256; // columns packed at a time, as the plan has it

// visit(i, j, thread) for all pairs i <= j of [begin, end), in rounds without a common index.
template <class Visit>
FASTKD_INLINE void pairs_within(std::int64_t begin, std::int64_t end, int threads, const Visit& visit) {
    const std::int64_t n = end - begin;
    parallel_for(threads, n, [&](std::int64_t i, int thread) { visit(begin + i, begin + i, thread); });
    const std::int64_t even = n + n % 2, turning = even - 1;
    for (std::int64_t round = 0; round < turning; ++round) { // everyone but the last sits on a wheel
        parallel_for(threads, even / 2, [&](std::int64_t k, int thread) {
            const std::int64_t i = k == 0 ? turning : (round + k) % turning;
            const std::int64_t j = (round + turning - k) % turning;
            if (i < n && j < n) {
                visit(begin + (i < j ? i : j), begin + (i < j ? j : i), thread);
            }
        });
    }
}

// visit(i, j, thread) for all i of the first range, j of the second, in rounds without a common index.
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

// One call's arguments with their types, and its way through the blocks.
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
    ScaledExp<T> exp{static_cast<T>(1 / options.temperature)};
    T sign = options.negate && options.distance == Distance::kl ? T(-1) : T(1);

    // ---- where things are
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
    // Of the rows of `block` against the blocks of the group of `other`.
    FASTKD_INLINE RowStatistics statistics_of(std::int64_t problem, std::int64_t block, std::int64_t other) const {
        const std::int64_t o = options.cross ? other / plan.group_blocks : 0;
        const std::int64_t index = (o * options.batch + sample(problem, block)) * options.rows + first_row(block);
        return {statistics + index, others * options.batch * options.rows};
    }
    FASTKD_INLINE double* scales_of(int network, std::int64_t b, std::int64_t row) const {
        const std::int64_t plane = relation::statistic_planes * others + network;
        return statistics + (plane * options.batch + b) * options.rows + row;
    }
    FASTKD_INLINE const S* rows_at(const Rows& rows, std::int64_t problem, std::int64_t block) const {
        return static_cast<const S*>(rows.data) + sample(problem, block) * rows.batch_stride +
               first_row(block) * rows.row_stride;
    }
    FASTKD_INLINE void typed_scales(int network, std::int64_t problem, std::int64_t block, T (&out)[tile_side]) const {
        const double* scales = scales_of(network, sample(problem, block), first_row(block));
        for (std::int64_t r = 0; r < rows_of(block); ++r) {
            out[r] = static_cast<T>(scales[r]);
        }
    }

    // ---- packed blocks, while streaming: student's and teacher's [width][rows], then the student's [rows][width]
    FASTKD_INLINE T* packed(std::int64_t team, std::int64_t slot) const {
        const std::int64_t width = student.width + teacher.width + (plan.backward ? plan.student_width : 0);
        return at(team, plan.packs) + slot * plan.block * width;
    }
    void pack_block(std::int64_t team, std::int64_t slot, std::int64_t problem, std::int64_t block) const {
        T scales[tile_side];
        T* to = packed(team, slot);
        const std::int64_t rows = rows_of(block);
        typed_scales(1, problem, block, scales);
        pack<S>(rows_at(teacher, problem, block), teacher.row_stride, teacher.col_stride, rows, teacher.width, scales,
                nullptr, to + plan.block * student.width);
        typed_scales(0, problem, block, scales);
        const S* x = rows_at(student, problem, block);
        pack<S>(x, student.row_stride, student.col_stride, rows, student.width, scales, nullptr, to);
        if (plan.backward) {
            pack<S>(x, student.col_stride, student.row_stride, student.width, rows, nullptr, scales,
                    to + plan.block * (student.width + teacher.width));
        }
    }
    // Both networks' E into the thread's first two tiles.
    Tile<T> make_tile(std::int64_t team, std::int64_t thread, std::int64_t slot_i, std::int64_t slot_j, std::int64_t i,
                      std::int64_t j) const {
        T* e_s = scratch(thread, plan.tiles);
        T* e_t = e_s + plan.block * plan.block;
        const std::int64_t rows = rows_of(i), cols = rows_of(j);
        const T* x = packed(team, slot_i);
        const T* y = packed(team, slot_j);
        packed_product<T>(x, Panels<T>(rows), y, Panels<T>(cols), student.width, e_s, plan.block, false);
        packed_product<T>(x + plan.block * student.width, Panels<T>(rows), y + plan.block * student.width,
                          Panels<T>(cols), teacher.width, e_t, plan.block, false);
        if (sign < 0) {
            negate_tile(e_s, plan.block, rows, cols);
            negate_tile(e_t, plan.block, rows, cols);
        }
        return {e_s, e_t, plan.block, rows, cols};
    }

    // visit(tile, i, j, slot_j, thread) for every tile of the problem, streamed.
    template <class Visit>
    FASTKD_INLINE void stream(std::int64_t team, std::int64_t problem, const Visit& visit) const {
        const std::int64_t n = plan.blocks;
        const std::int64_t half = plan.resident == n ? n : plan.resident / 2;
        const auto load_blocks = [&](std::int64_t begin, std::int64_t end, std::int64_t slot) {
            parallel_for(plan.team_threads, end - begin,
                         [&](std::int64_t k, int) { pack_block(team, slot + k, problem, begin + k); });
        };
        for (std::int64_t i = 0; i < n; i += half) {
            const std::int64_t i_end = i + half < n ? i + half : n;
            load_blocks(i, i_end, 0);
            pairs_within(i, i_end, plan.team_threads, [&](std::int64_t a, std::int64_t b, int thread) {
                const std::int64_t own = plan.teams > 1 ? team : thread;
                visit(make_tile(team, own, a - i, b - i, a, b), a, b, a - i, b - i, own);
            });
            for (std::int64_t j = i_end; j < n; j += half) {
                const std::int64_t j_end = j + half < n ? j + half : n;
                load_blocks(j, j_end, half);
                pairs_between(i, i_end, j, j_end, plan.team_threads, [&](std::int64_t a, std::int64_t b, int thread) {
                    const std::int64_t own = plan.teams > 1 ? team : thread;
                    visit(make_tile(team, own, a - i, half + b - j, a, b), a, b, a - i, half + b - j, own);
                });
            }
        }
    }

    // ---- kept tiles
    FASTKD_INLINE static T* kept_tile(T* kept, std::int64_t blocks, std::int64_t i, std::int64_t j) {
        const std::int64_t index = i * blocks - i * (i - 1) / 2 + (j - i); // of the upper triangle
        return kept + index * 2 * relation::kept_block * relation::kept_block;
    }
    FASTKD_INLINE Tile<T> kept_view(T* kept, std::int64_t i, std::int64_t j) const {
        T* e = kept_tile(kept, plan.blocks, i, j);
        return {e, e + plan.block * plan.block, plan.block, rows_of(i), rows_of(j)};
    }

    // ---- forward
    // Adds one tile's share; pass 1 of row_cosine comes after finish_norms().
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
            T* turned = scratch(thread, plan.tiles) + 2 * plan.block * plan.block;
            T* turned_t = turned + plan.block * plan.block;
            transpose_tile(tile.e_s, tile.ld, tile.rows, tile.cols, turned);
            transpose_tile(tile.e_t, tile.ld, tile.rows, tile.cols, turned_t);
            add_kl_rows<T>({turned, turned_t, tile.ld, tile.cols, tile.rows}, exp, col);
        }
    }

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
    // Of all rows of one problem, between the passes of row_cosine.
    void finish_norms(std::int64_t problem) const {
        for (std::int64_t o = 0; o < others; ++o) {
            for (std::int64_t block = 0; block < plan.blocks; ++block) {
                const RowStatistics row = statistics_of(problem, block, o * plan.group_blocks);
                for (std::int64_t r = 0; r < rows_of(block); ++r) {
                    for (int k = 0; k < 2; ++k) {
                        const double norm = __builtin_sqrt(row[k][r]);
                        row[k][r] = norm <= relation::norm_floor ? relation::norm_floor : norm;
                    }
                }
            }
        }
    }
    // The losses, and what the backward needs, from the sums.
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

    void forward_streamed(std::int64_t team, std::int64_t problem, T* loss) const {
        const int passes = options.distance == Distance::row_cosine ? 2 : 1;
        for (int pass = 0; pass < passes; ++pass) {
            stream(team, problem,
                   [&](Tile<T> tile, std::int64_t i, std::int64_t j, std::int64_t, std::int64_t, std::int64_t thread) {
                       add_tile(tile, problem, i, j, pass, thread);
                   });
            if (pass + 1 < passes) {
                finish_norms(problem);
            }
        }
        finish_rows(problem, loss);
    }

    void forward_kept(std::int64_t team, std::int64_t problem, T* kept, T* loss) const {
        const std::int64_t n = plan.blocks;
        struct Pair {
            std::int64_t i, j;
        };
        const auto pairs = [&](std::int64_t index) { // the index-th pair i <= j
            std::int64_t i = 0;
            while (index >= n - i) {
                index -= n - i++;
            }
            return Pair{i, i + index};
        };
        const std::int64_t count = n * (n + 1) / 2;
        for (int network = 0; network < 2; ++network) {
            const Rows& rows = network == 0 ? student : teacher;
            for (std::int64_t from = 0; from < rows.width; from += kept_chunk) {
                const std::int64_t width = rows.width - from < kept_chunk ? rows.width - from : kept_chunk;
                T* packs = at(team, plan.packs);
                parallel_for(plan.team_threads, n, [&](std::int64_t block, int) {
                    T scales[tile_side];
                    typed_scales(network, problem, block, scales);
                    pack<S>(rows_at(rows, problem, block) + from * rows.col_stride, rows.row_stride, rows.col_stride,
                            rows_of(block), width, scales, nullptr, packs + block * plan.block * kept_chunk);
                });
                parallel_for(plan.team_threads, count, [&](std::int64_t index, int) {
                    const auto [i, j] = pairs(index);
                    T* e = kept_tile(kept, n, i, j) + network * plan.block * plan.block;
                    if (from == 0 && (rows_of(i) < plan.block || rows_of(j) < plan.block)) {
                        __builtin_memset(e, 0, plan.block * plan.block * sizeof(T));
                    }
                    packed_product<T>(packs + i * plan.block * kept_chunk, Panels<T>(rows_of(i)),
                                      packs + j * plan.block * kept_chunk, Panels<T>(rows_of(j)), width, e, plan.block,
                                      from > 0);
                });
            }
        }
        const int passes = options.distance == Distance::row_cosine ? 2 : 1;
        for (int pass = 0; pass < passes; ++pass) {
            pairs_within(0, n, plan.team_threads, [&](std::int64_t i, std::int64_t j, int thread) {
                Tile<T> tile = kept_view(kept, i, j);
                if (sign < 0 && pass == 0) {
                    T* e = kept_tile(kept, n, i, j);
                    negate_tile(e, plan.block, 2 * plan.block, plan.block);
                }
                add_tile(tile, problem, i, j, pass, plan.teams > 1 ? team : thread);
            });
            if (pass + 1 < passes) {
                finish_norms(problem);
            }
        }
        finish_rows(problem, loss);
    }

    // ---- backward
    FASTKD_INLINE void coefficients(const Backward& args, std::int64_t problem, std::int64_t block, std::int64_t other,
                                    RowCoefficients<T>& out) const {
        const RowStatistics row = statistics_of(problem, block, other);
        const T* grad = static_cast<const T*>(args.grad_loss) + sample(problem, block) * args.grad_batch_stride +
                        first_row(block) * args.grad_row_stride;
        const std::int64_t rows = rows_of(block);
        for (std::int64_t r = 0; r < tile_side; ++r) {
            if (r >= rows) {
                out.a[r] = out.b[r] = 0;
                out.center_s[r] = out.high_s[r] = out.low_s[r] = 0;
                out.center_t[r] = out.high_t[r] = out.low_t[r] = 0;
                continue;
            }
            const double g = static_cast<double>(grad[r * args.grad_row_stride]) / static_cast<double>(others);
            double a = 0, b = 0;
            if (options.distance == Distance::mse) {
                a = b = 2 * g / static_cast<double>(options.rows);
            } else if (options.distance == Distance::row_cosine) {
                const double n = row[0][r], m = row[1][r];
                const bool flat = n <= relation::norm_floor; // no gradient, as for inputs
                a = flat ? 0 : 2 * g * (1 - row[2][r] / 2) / (n * n);
                b = flat ? 0 : 2 * g / (n * m);
            } else if (options.fixed_shift()) {
                a = g / options.temperature / row[0][r];
                b = g / options.temperature / row[1][r];
            } else {
                a = g / options.temperature;
                const softmax_kl::LogSoftmax<T> s(row[0][r], options.temperature, 1 / options.temperature);
                const softmax_kl::LogSoftmax<T> t(row[1][r], options.temperature, 1 / options.temperature);
                out.center_s[r] = s.center;
                out.high_s[r] = s.high;
                out.low_s[r] = s.low;
                out.center_t[r] = t.center;
                out.high_t[r] = t.high;
                out.low_t[r] = t.low;
            }
            out.a[r] = static_cast<T>(a);
            out.b[r] = static_cast<T>(b);
        }
    }
    // A tile of H into h, which may be the tile's own e_t.
    FASTKD_INLINE void make_h(const Backward& args, Tile<T> tile, std::int64_t problem, std::int64_t i, std::int64_t j,
                              T* h, double* q) const {
        RowCoefficients<T> row, col;
        coefficients(args, problem, i, j, row);
        coefficients(args, problem, j, i, col);
        double* q_row = q + i * plan.block;
        double* q_col = i == j ? nullptr : q + j * plan.block;
        if (options.distance != Distance::kl) {
            gradient_tile<T, false>(tile, Identity<T>{}, row, col, sign, h, q_row, q_col);
        } else if (options.fixed_shift()) {
            options.cross ? gradient_tile<T, true>(tile, KLFunction<T>{exp}, row, col, sign, h, q_row, q_col)
                          : gradient_tile<T, false>(tile, KLFunction<T>{exp}, row, col, sign, h, q_row, q_col);
        } else {
            gradient_tile_kl<T>(tile, exp, row, col, sign, h, q_row, q_col);
        }
    }
    void backward_streamed(const Backward& args, std::int64_t team, std::int64_t problem) const {
        const std::int64_t ld = Panels<T>(student.width).elements();
        const std::int64_t rows = plan.blocks * plan.block;
        T* sums = at(team, plan.accumulator); // of H X^
        double* q = at<double>(team, plan.row_sums);
        parallel_for(plan.team_threads, plan.blocks, [&](std::int64_t block, int) {
            __builtin_memset(sums + block * plan.block * ld, 0, plan.block * ld * sizeof(T));
        });
        __builtin_memset(q, 0, rows * sizeof(double));
        const Panels<T> width(student.width);
        const std::int64_t by_rows = plan.block * (student.width + teacher.width); // in a packed block
        stream(team, problem,
               [&](Tile<T> tile, std::int64_t i, std::int64_t j, std::int64_t slot_i, std::int64_t slot_j,
                   std::int64_t thread) {
                   T* h = scratch(thread, plan.tiles) + 2 * plan.block * plan.block;
                   make_h(args, tile, problem, i, j, h, q);
                   strided_product<T>(h, tile.ld, 1, tile.rows, packed(team, slot_j) + by_rows, width, tile.cols,
                                      sums + i * plan.block * ld, ld, true);
                   if (i != j) {
                       strided_product<T>(h, 1, tile.ld, tile.cols, packed(team, slot_i) + by_rows, width, tile.rows,
                                          sums + j * plan.block * ld, ld, true);
                   }
               });
        parallel_for(plan.team_threads, plan.blocks, [&](std::int64_t block, int thread) {
            const std::int64_t count = rows_of(block), b = sample(problem, block);
            const double* scales = scales_of(0, b, first_row(block));
            T* own = sums + block * plan.block * ld;
            T* radial = scratch(plan.teams > 1 ? team : thread, plan.panel); // q_i x^_i, in panels over the width
            const bool cosine = options.similarity == Similarity::cosine;
            if (cosine) {
                T factor[tile_side];
                for (std::int64_t r = 0; r < count; ++r) {
                    factor[r] = static_cast<T>(q[block * plan.block + r] * scales[r]);
                }
                pack<S>(rows_at(student, problem, block), student.col_stride, student.row_stride, student.width, count,
                        nullptr, factor, radial);
            }
            for (std::int64_t r = 0; r < count; ++r) {
                const T outer = static_cast<T>(outer_scale(options, scales[r]));
                for (std::int64_t p = 0; p < width.size; ++p) {
                    const std::int64_t elements = width.width(p) * lanes<T>, begin = width.begin(p);
                    for (std::int64_t k = 0; k < elements; k += lanes<T>) {
                        T* to = own + r * ld + begin + k;
                        const Vec<T> along = cosine ? load(radial + begin * count + r * elements + k) : Vec<T>{};
                        // A row without a gradient has none whatever the others hold.
                        store(to, outer == T(0) ? Vec<T>{} : (load(to) - along) * outer);
                    }
                }
            }
            unpack<S>(own, ld, count, student.width,
                      static_cast<S*>(args.grad_student) + b * args.out_batch_stride +
                          first_row(block) * args.out_row_stride,
                      args.out_row_stride, args.out_col_stride);
        });
    }

    void backward_kept(const Backward& args, std::int64_t team, std::int64_t problem, T* kept) const {
        const std::int64_t n = plan.blocks, rows = n * plan.block, ld = rows;
        double* q = at<double>(team, plan.row_sums);
        __builtin_memset(q, 0, rows * sizeof(double));
        T* matrix = at(team, plan.matrix); // outer_i (H_ij - q_i delta_ij) scale_j
        const double* scales = scales_of(0, problem, 0);
        pairs_within(0, n, plan.team_threads, [&](std::int64_t i, std::int64_t j, int thread) {
            const Tile<T> tile = kept_view(kept, i, j);
            T* h = scratch(plan.teams > 1 ? team : thread, plan.tiles);
            T* turned = h + plan.block * plan.block;
            make_h(args, tile, problem, i, j, h, q);
            transpose_tile(h, plan.block, plan.block, plan.block, turned);
            scatter(h, tile.rows, tile.cols, i, j, scales, matrix, ld);
            if (i != j) {
                scatter(turned, tile.cols, tile.rows, j, i, scales, matrix, ld);
            }
        });
        if (options.similarity == Similarity::cosine) {
            for (std::int64_t r = 0; r < options.rows; ++r) {
                matrix[r * ld + r] -= static_cast<T>(outer_scale(options, scales[r]) * q[r] * scales[r]);
            }
        }
        const S* x = static_cast<const S*>(student.data) + problem * student.batch_stride;
        S* out = static_cast<S*>(args.grad_student) + problem * args.out_batch_stride;
        const Panels<T> width(student.width);
        parallel_for(plan.team_threads, width.size, [&](std::int64_t p, int thread) {
            const std::int64_t begin = width.begin(p), elements = width.width(p) * lanes<T>;
            const std::int64_t cols = student.width - begin < elements ? student.width - begin : elements;
            T* panel = scratch(plan.teams > 1 ? team : thread, plan.panel);
            T* result = panel + rows * 48;
            pack<S>(x + begin * student.col_stride, student.col_stride, student.row_stride, cols, options.rows, nullptr,
                    nullptr, panel);
            panel_product<T>(width.width(p), matrix, ld, 1, options.rows, panel, options.rows, result, elements, false);
            unpack<S>(result, elements, options.rows, cols, out + begin * args.out_col_stride, args.out_row_stride,
                      args.out_col_stride);
        });
    }
    FASTKD_INLINE void scatter(const T* h, std::int64_t count, std::int64_t cols, std::int64_t i, std::int64_t j,
                               const double* scales, T* matrix, std::int64_t ld) const {
        T right[tile_side] = {};
        for (std::int64_t c = 0; c < cols; ++c) {
            right[c] = static_cast<T>(scales[j * plan.block + c]);
        }
        for (std::int64_t r = 0; r < plan.block; ++r) {
            const T left = r < count ? static_cast<T>(outer_scale(options, scales[i * plan.block + r])) : T(0);
            for (std::int64_t c = 0; c < plan.block; c += lanes<T>) {
                // Left out, not multiplied by 0: another row's NaN must not reach a row without a gradient.
                const Vec<T> value =
                    left == T(0) || c >= cols ? Vec<T>{} : load(h + r * plan.block + c) * left * load(right + c);
                store(matrix + (i * plan.block + r) * ld + j * plan.block + c, value);
            }
        }
    }
};

template <class S>
void forward(const Forward& args, const RelationPlan& plan, int threads) {
    using T = Compute<S>;
    const Relation<S> relation{
        args.options, plan, args.student, args.teacher, args.statistics, static_cast<char*>(args.workspace)};
    auto* loss = static_cast<T*>(args.loss);
    auto* kept = static_cast<T*>(args.kept);
    relation.clear_statistics();
    find_scales<S>(args.options, args.student, args.teacher, relation.scales_of(0, 0, 0), threads);
    const auto one = [&](std::int64_t problem, int team) {
        if (kept == nullptr) {
            relation.forward_streamed(team, problem, loss);
        } else {
            relation.forward_kept(team, problem, kept + problem * relation::kept_elements(args.options.rows), loss);
        }
    };
    if (kept != nullptr) {
        advise_huge_pages(kept, args.options.batch * relation::kept_elements(args.options.rows) * sizeof(T));
    }
    parallel_for(static_cast<int>(plan.teams), plan.problems, one);
}

template <class S>
void backward(const Backward& args, const RelationPlan& plan) {
    using T = Compute<S>;
    const Relation<S> relation{args.options,
                               plan,
                               args.student,
                               args.teacher,
                               const_cast<double*>(args.statistics), // read only
                               static_cast<char*>(args.workspace)};
    auto* kept = static_cast<T*>(const_cast<void*>(args.kept)); // read only
    advise_huge_pages(args.grad_student, args.options.batch * args.options.rows * args.student.width * sizeof(S));
    const auto one = [&](std::int64_t problem, int team) {
        if (kept == nullptr) {
            relation.backward_streamed(args, team, problem);
        } else {
            relation.backward_kept(args, team, problem, kept + problem * relation::kept_elements(args.options.rows));
        }
    };
    parallel_for(static_cast<int>(plan.teams), plan.problems, one);
}

} // namespace

void relation_forward(const Forward& args, const RelationPlan& plan, int threads) {
    advise_huge_pages(args.workspace, plan.bytes);
    switch (args.options.dtype) {
    case DType::Float32:
        return forward<float>(args, plan, threads);
    case DType::Float16:
        return forward<Half>(args, plan, threads);
    case DType::BFloat16:
        return forward<BFloat16>(args, plan, threads);
    case DType::Float64:
        return forward<double>(args, plan, threads);
    }
}

void relation_backward(const Backward& args, const RelationPlan& plan) {
    advise_huge_pages(args.workspace, plan.bytes);
    switch (args.options.dtype) {
    case DType::Float32:
        return backward<float>(args, plan);
    case DType::Float16:
        return backward<Half>(args, plan);
    case DType::BFloat16:
        return backward<BFloat16>(args, plan);
    case DType::Float64:
        return backward<double>(args, plan);
    }
}

} // namespace fastkd::cpu::FASTKD_ISA
