// relation on the CPU, form "streamed": no rows x rows matrix is stored. The formulas are in common/relation.h:
//
//     loss_i = distance(E^S_i, E^T_i),     E = X^ X^^T,     d/d x^_i = sum_j H_ij x^_j
//
// Blocks of rows are normalised and packed: all of them, or two groups at a time if the workspace is smaller. A tile of
// E is computed, reduced and discarded; the backward recomputes it.
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/relation/blocks.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

template <class S>
struct Streamed : Relation<S> {
    using Base = Relation<S>;
    using T = typename Base::T;
    using Base::add_tile;
    using Base::at;
    using Base::finish_norms;
    using Base::finish_rows;
    using Base::first_row;
    using Base::make_h;
    using Base::make_m;
    using Base::options;
    using Base::plan;
    using Base::rows_at;
    using Base::rows_of;
    using Base::sample;
    using Base::scales_of;
    using Base::scratch;
    using Base::student;
    using Base::teacher;
    using Base::typed_scales;

    // Offsets of the teacher's part of a packed block, and of its [rows][width].
    FASTKD_INLINE std::int64_t teacher_offset() const { return plan.block * plan.packed_widths[0]; }
    FASTKD_INLINE std::int64_t rows_offset() const { return teacher_offset() + plan.block * plan.packed_widths[1]; }
    // A packed block: the student's and the teacher's [width][rows], then the student's [rows][width] for the backward.
    // With `pairs`, pairs along the first index.
    FASTKD_INLINE T* packed(std::int64_t team, std::int64_t slot) const {
        return at(team, plan.packs) + slot * (rows_offset() + (plan.backward ? plan.block * plan.student_width : 0));
    }
    void pack_block(std::int64_t team, std::int64_t slot, std::int64_t problem, std::int64_t block) const {
        T* to = packed(team, slot);
        this->pack_block_of(student, 0, problem, block, 0, student.width, to);
        this->pack_block_of(teacher, 1, problem, block, 0, teacher.width, to + teacher_offset());
        if (plan.backward) {
            const S* x = rows_at(student, problem, block);
            T* by_rows = to + rows_offset();
            if constexpr (is_bf16<S>) {
                if (this->pairs) {
                    return pack_pairs(x, student.col_stride, student.row_stride, student.width, rows_of(block),
                                      reinterpret_cast<PairWord*>(by_rows));
                }
            }
            T scales[tile_side];
            typed_scales(0, problem, block, scales);
            pack<S>(x, student.col_stride, student.row_stride, student.width, rows_of(block), nullptr, scales, by_rows);
        }
    }
    // Compute both networks' E in the thread's first two tiles.
    Tile<T> make_tile(std::int64_t team, std::int64_t thread, std::int64_t problem, std::int64_t slot_i,
                      std::int64_t slot_j, std::int64_t i, std::int64_t j) const {
        T* e_s = scratch(thread, plan.tiles);
        T* e_t = e_s + plan.block * plan.block;
        const T* x = packed(team, slot_i);
        const T* y = packed(team, slot_j);
        this->multiply_blocks(x, i, y, j, student.width, e_s, false);
        this->multiply_blocks(x + teacher_offset(), i, y + teacher_offset(), j, teacher.width, e_t, false);
        this->finish_products(problem, i, j, e_s, e_t);
        return {e_s, e_t, plan.block, rows_of(i), rows_of(j)};
    }

    // Call visit(tile, i, j, slot_i, slot_j, thread) for every tile of the problem.
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
                visit(make_tile(team, own, problem, a - i, b - i, a, b), a, b, a - i, b - i, own);
            });
            for (std::int64_t j = i_end; j < n; j += half) {
                const std::int64_t j_end = j + half < n ? j + half : n;
                load_blocks(j, j_end, half);
                pairs_between(i, i_end, j, j_end, plan.team_threads, [&](std::int64_t a, std::int64_t b, int thread) {
                    const std::int64_t own = plan.teams > 1 ? team : thread;
                    visit(make_tile(team, own, problem, a - i, half + b - j, a, b), a, b, a - i, half + b - j, own);
                });
            }
        }
    }

    void forward(std::int64_t team, std::int64_t problem, T* loss) const {
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

    void backward(const Backward& args, std::int64_t team, std::int64_t problem) const {
        const std::int64_t ld = Panels<T>(student.width).elements();
        const std::int64_t rows = plan.blocks * plan.block;
        T* sums = at(team, plan.accumulator); // of H X^
        double* q = this->template at<double>(team, plan.row_sums);
        parallel_for(plan.team_threads, plan.blocks, [&](std::int64_t block, int) {
            __builtin_memset(sums + block * plan.block * ld, 0, plan.block * ld * sizeof(T));
        });
        __builtin_memset(q, 0, rows * sizeof(double));
        const Panels<T> width(student.width);
        stream(team, problem,
               [&](Tile<T> tile, std::int64_t i, std::int64_t j, std::int64_t slot_i, std::int64_t slot_j,
                   std::int64_t thread) {
                   T* h = scratch(thread, plan.tiles) + 2 * plan.block * plan.block;
                   T* own = sums + i * plan.block * ld;
                   T* other = sums + j * plan.block * ld;
                   const T* x_own = packed(team, slot_i) + rows_offset();
                   const T* x_other = packed(team, slot_j) + rows_offset();
                   if constexpr (is_bf16<S>) {
                       if (this->pairs) {
                           auto* m = reinterpret_cast<BFloat16*>(h + plan.block * plan.block);
                           auto* mirror = reinterpret_cast<PairWord*>(m + plan.block * plan.block);
                           make_m(args, tile, problem, i, j, h, {m, plan.block, mirror}, q);
                           const auto* words = reinterpret_cast<const PairWord*>(m);
                           const auto* right = reinterpret_cast<const PairWord*>(x_other);
                           const auto* right_own = reinterpret_cast<const PairWord*>(x_own);
                           const std::int64_t pairs = plan.block / 2;
                           if (plan.amx) {
                               amx_product(words, pairs, tile.rows, right, width, pairs_of(tile.cols), own, ld, true);
                               if (i != j) {
                                   auto* left = reinterpret_cast<PairWord*>(h); // no longer needed
                                   transpose_pairs(mirror, plan.block, pairs, tile.cols, left, pairs);
                                   amx_product(left, pairs, tile.cols, right_own, width, pairs_of(tile.rows), other, ld,
                                               true);
                               }
                               return;
                           }
                           strided_product_pairs(words, pairs, 1, tile.rows, right, width, pairs_of(tile.cols), own, ld,
                                                 true);
                           if (i != j) {
                               strided_product_pairs(mirror, 1, plan.block, tile.cols, right_own, width,
                                                     pairs_of(tile.rows), other, ld, true);
                           }
                           return;
                       }
                   }
                   make_h(args, tile, problem, i, j, h, q);
                   strided_product<T>(h, tile.ld, 1, tile.rows, x_other, width, tile.cols, own, ld, true);
                   if (i != j) {
                       strided_product<T>(h, 1, tile.ld, tile.cols, x_own, width, tile.rows, other, ld, true);
                   }
               });
        parallel_for(plan.team_threads, plan.blocks, [&](std::int64_t block, int thread) {
            const std::int64_t count = rows_of(block), b = sample(problem, block);
            const double* scales = scales_of(0, b, first_row(block));
            T* own = sums + block * plan.block * ld;
            T* radial = scratch(plan.teams > 1 ? team : thread, plan.panel); // q_i x^_i in panels over the width
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
                        // Select 0 instead of multiplying by 0: other rows may hold NaN.
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
};

template <class S>
void forward(const Forward& args, const RelationPlan& plan, int threads) {
    Streamed<S> relation{
        {args.options, plan, args.student, args.teacher, args.statistics, static_cast<char*>(args.workspace)}};
    relation.clear_statistics();
    find_scales<S>(args.options, args.student, args.teacher, relation.scales_of(0, 0, 0), threads);
    relation.use_pairs();
    auto* loss = static_cast<Compute<S>*>(args.loss);
    parallel_for(static_cast<int>(plan.teams), plan.problems,
                 [&](std::int64_t problem, int team) { relation.forward(team, problem, loss); });
}

template <class S>
void backward(const Backward& args, const RelationPlan& plan) {
    Streamed<S> relation{{args.options, plan, args.student, args.teacher,
                          const_cast<double*>(args.statistics), // read only
                          static_cast<char*>(args.workspace)}};
    relation.use_pairs();
    advise_huge_pages(args.grad_student, args.options.batch * args.options.rows * args.student.width * sizeof(S));
    parallel_for(static_cast<int>(plan.teams), plan.problems,
                 [&](std::int64_t problem, int team) { relation.backward(args, team, problem); });
}

} // namespace

void relation_streamed_forward(const Forward& args, const RelationPlan& plan, int threads) {
    advise_huge_pages(args.workspace, plan.bytes);
    with_storage(args.options.dtype, [&](auto storage) { forward<decltype(storage)>(args, plan, threads); });
}

void relation_streamed_backward(const Backward& args, const RelationPlan& plan) {
    advise_huge_pages(args.workspace, plan.bytes);
    with_storage(args.options.dtype, [&](auto storage) { backward<decltype(storage)>(args, plan); });
}

} // namespace fastkd::cpu::FASTKD_ISA
