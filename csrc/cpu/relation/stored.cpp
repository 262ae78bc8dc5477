// relation on the CPU, form "stored": the forward stores the tiles of E, which are small compared with the inputs if
// rows are channels. The formulas are in common/relation.h.
//
// Rows are packed and multiplied `stored_chunk` columns at a time. The backward computes H from the stored tiles and
// multiplies it by the unscaled rows: scale_i and q_i are folded into H.
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/relation/blocks.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

template <class S>
struct Stored : Relation<S> {
    using Base = Relation<S>;
    using T = typename Base::T;
    using Base::add_tile;
    using Base::finish_norms;
    using Base::finish_rows;
    using Base::make_h;
    using Base::make_m;
    using Base::options;
    using Base::plan;
    using Base::rows_of;
    using Base::scales_of;
    using Base::scratch;
    using Base::student;
    using Base::teacher;

    // Tiles are stored in the order of pairs_within.
    template <class P>
    FASTKD_INLINE static P* stored_tile(P* stored, std::int64_t blocks, std::int64_t i, std::int64_t j) {
        return stored + place_within(blocks, i, j) * 2 * relation::stored_block * relation::stored_block;
    }
    // Prefetch the next tile while this one is processed.
    FASTKD_INLINE void fetch_next(const Tile<T>& tile) const {
        constexpr std::int64_t line = 64 / sizeof(T);
        const std::int64_t size = 2 * plan.block * plan.block;
        for (std::int64_t k = 0; k < size; k += line) {
            __builtin_prefetch(tile.e_s + size + k, 0, 2);
        }
    }
    FASTKD_INLINE Tile<T> stored_view(const T* stored, std::int64_t i, std::int64_t j) const {
        const T* e = stored_tile(stored, plan.blocks, i, j);
        return {e, e + plan.block * plan.block, plan.block, rows_of(i), rows_of(j)};
    }

    void forward(std::int64_t team, std::int64_t problem, T* stored, T* loss) const {
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
        // The same number of bytes: pairs take half of it, or are packed twice.
        const std::int64_t chunk = this->pairs && !plan.amx ? 2 * stored_chunk : stored_chunk;
        for (int network = 0; network < 2; ++network) {
            const Rows& rows = network == 0 ? student : teacher;
            for (std::int64_t from = 0; from < rows.width; from += chunk) {
                const std::int64_t width = rows.width - from < chunk ? rows.width - from : chunk;
                T* packs = this->at(team, plan.packs);
                parallel_for(plan.team_threads, n, [&](std::int64_t block, int) {
                    this->pack_block_of(rows, network, problem, block, from, width,
                                        packs + block * plan.block * stored_chunk);
                });
                parallel_for(plan.team_threads, count, [&](std::int64_t index, int) {
                    const auto [i, j] = pairs(index);
                    T* e = stored_tile(stored, n, i, j) + network * plan.block * plan.block;
                    if (from == 0 && (rows_of(i) < plan.block || rows_of(j) < plan.block)) {
                        __builtin_memset(e, 0, plan.block * plan.block * sizeof(T));
                    }
                    this->multiply_blocks(packs + i * plan.block * stored_chunk, i,
                                          packs + j * plan.block * stored_chunk, j, width, e, from > 0);
                });
            }
        }
        const int passes = options.distance == Distance::row_cosine ? 2 : 1;
        for (int pass = 0; pass < passes; ++pass) {
            pairs_within(0, n, plan.team_threads, [&](std::int64_t i, std::int64_t j, int thread) {
                const Tile<T> tile = stored_view(stored, i, j);
                fetch_next(tile);
                if (pass == 0) {
                    T* e = stored_tile(stored, n, i, j);
                    this->finish_products(problem, i, j, e, e + plan.block * plan.block);
                }
                add_tile(tile, problem, i, j, pass, plan.teams > 1 ? team : thread);
            });
            if (pass + 1 < passes) {
                finish_norms(problem);
            }
        }
        finish_rows(problem, loss);
    }

    void backward(const Backward& args, std::int64_t team, std::int64_t problem, const T* stored) const {
        const std::int64_t n = plan.blocks, rows = n * plan.block, ld = rows;
        double* q = this->template at<double>(team, plan.row_sums);
        __builtin_memset(q, 0, rows * sizeof(double));
        T* matrix = this->at(team, plan.matrix); // outer_i (H_ij - q_i delta_ij) scale_j
        const double* scales = scales_of(0, problem, 0);
        pairs_within(0, n, plan.team_threads, [&](std::int64_t i, std::int64_t j, int thread) {
            const Tile<T> tile = stored_view(stored, i, j);
            fetch_next(tile);
            T* h = scratch(plan.teams > 1 ? team : thread, plan.tiles);
            T* transposed = h + plan.block * plan.block;
            make_h(args, tile, problem, i, j, h, q);
            transpose_tile(h, plan.block, plan.block, plan.block, transposed);
            scatter(h, tile.rows, tile.cols, i, j, scales, matrix, ld);
            if (i != j) {
                scatter(transposed, tile.cols, tile.rows, j, i, scales, matrix, ld);
            }
        });
        bool any_zero = false; // some row has a zero gradient
        if (options.similarity == Similarity::cosine) {
            for (std::int64_t r = 0; r < options.rows; ++r) {
                const double outer = outer_scale(options, scales[r]);
                any_zero = any_zero || outer == 0;
                matrix[r * ld + r] -= outer == 0 ? T(0) : static_cast<T>(outer * q[r] * scales[r]);
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
            for (std::int64_t r = 0; any_zero && r < options.rows; ++r) { // 0 times another row's NaN is not 0
                if (outer_scale(options, scales[r]) == 0) {
                    __builtin_memset(result + r * elements, 0, elements * sizeof(T));
                }
            }
            unpack<S>(result, elements, options.rows, cols, out + begin * args.out_col_stride, args.out_row_stride,
                      args.out_col_stride);
        });
    }
    // Like backward, with H rounded to bfloat16: see bf16_tiles.h.
    void backward_pairs(const Backward& args, std::int64_t team, std::int64_t problem, const T* stored) const {
        const std::int64_t n = plan.blocks, ld = n * plan.block;
        double* q = this->template at<double>(team, plan.row_sums);
        __builtin_memset(q, 0, ld * sizeof(double));
        auto* matrix = this->template at<BFloat16>(team, plan.matrix); // M
        const auto* words = reinterpret_cast<const PairWord*>(matrix); // pairs of its columns
        pairs_within(0, n, plan.team_threads, [&](std::int64_t i, std::int64_t j, int thread) {
            const Tile<T> tile = stored_view(stored, i, j);
            fetch_next(tile);
            T* h = scratch(plan.teams > 1 ? team : thread, plan.tiles);
            auto* mirror = reinterpret_cast<PairWord*>(h + plan.block * plan.block);
            make_m(args, tile, problem, i, j, h, {matrix + (i * ld + j) * plan.block, ld, mirror}, q);
            if (i != j) {
                transpose_pairs(mirror, plan.block, plan.block / 2, tile.cols,
                                reinterpret_cast<PairWord*>(matrix + (j * ld + i) * plan.block), ld / 2);
            }
        });
        const double* scales = scales_of(0, problem, 0);
        const S* x = static_cast<const S*>(student.data) + problem * student.batch_stride;
        S* out = static_cast<S*>(args.grad_student) + problem * args.out_batch_stride;
        const Panels<T> width(student.width);
        parallel_for(plan.team_threads, width.size, [&](std::int64_t p, int thread) {
            const std::int64_t begin = width.begin(p), elements = width.width(p) * lanes<T>;
            const std::int64_t cols = student.width - begin < elements ? student.width - begin : elements;
            auto* panel = this->template scratch<PairWord>(plan.teams > 1 ? team : thread, plan.panel);
            T* result = scratch(plan.teams > 1 ? team : thread, plan.panel) + ld * 48;
            pack_pairs(x + begin * student.col_stride, student.col_stride, student.row_stride, cols, options.rows,
                       panel);
            const std::int64_t inner = pairs_of(options.rows);
            if (plan.amx) {
                amx_product(words, ld / 2, options.rows, panel, Panels<T>(elements), inner, result, elements, false);
            } else {
                panel_product_pairs(width.width(p), words, ld / 2, 1, options.rows, panel, inner, result, elements,
                                    false);
            }
            for (std::int64_t r = 0; r < options.rows; r += tile_side) {
                const std::int64_t count = options.rows - r < tile_side ? options.rows - r : tile_side;
                T outer[tile_side], along[tile_side];
                for (std::int64_t k = 0; k < count; ++k) {
                    outer[k] = static_cast<T>(outer_scale(options, scales[r + k]));
                    along[k] =
                        options.similarity == Similarity::cosine ? static_cast<T>(q[r + k] * scales[r + k]) : T(0);
                }
                project_pairs(panel + r / 2 * elements, count, elements, outer, along, result + r * elements);
            }
            unpack<S>(result, elements, options.rows, cols, out + begin * args.out_col_stride, args.out_row_stride,
                      args.out_col_stride);
        });
    }
    // Write a tile of outer_i H_ij scale_j to the matrix.
    FASTKD_INLINE void scatter(const T* h, std::int64_t count, std::int64_t cols, std::int64_t i, std::int64_t j,
                               const double* scales, T* matrix, std::int64_t ld) const {
        T right[tile_side] = {};
        for (std::int64_t c = 0; c < cols; ++c) {
            right[c] = static_cast<T>(scales[j * plan.block + c]);
        }
        for (std::int64_t r = 0; r < plan.block; ++r) {
            const T left = r < count ? static_cast<T>(outer_scale(options, scales[i * plan.block + r])) : T(0);
            for (std::int64_t c = 0; c < plan.block; c += lanes<T>) {
                // Select 0 instead of multiplying by 0: another row's NaN must not reach a row with a zero gradient.
                const Vec<T> value =
                    left == T(0) || c >= cols ? Vec<T>{} : load(h + r * plan.block + c) * left * load(right + c);
                store(matrix + (i * plan.block + r) * ld + j * plan.block + c, value);
            }
        }
    }
};

template <class S>
void forward(const Forward& args, const RelationPlan& plan, int threads) {
    Stored<S> relation{
        {args.options, plan, args.student, args.teacher, args.statistics, static_cast<char*>(args.workspace)}};
    relation.clear_statistics();
    find_scales<S>(args.options, args.student, args.teacher, relation.scales_of(0, 0, 0), threads);
    relation.use_pairs();
    using T = Compute<S>;
    auto* stored = static_cast<T*>(args.stored);
    auto* loss = static_cast<T*>(args.loss);
    const std::int64_t size = relation::stored_elements(args.options.rows);
    advise_huge_pages(stored, args.options.batch * size * sizeof(T));
    parallel_for(static_cast<int>(plan.teams), plan.problems, [&](std::int64_t problem, int team) {
        relation.forward(team, problem, stored + problem * size, loss);
    });
}

template <class S>
void backward(const Backward& args, const RelationPlan& plan) {
    Stored<S> relation{{args.options, plan, args.student, args.teacher,
                        const_cast<double*>(args.statistics), // read only
                        static_cast<char*>(args.workspace)}};
    relation.use_pairs();
    advise_huge_pages(args.grad_student, args.options.batch * args.options.rows * args.student.width * sizeof(S));
    auto* stored = static_cast<const Compute<S>*>(args.stored);
    const std::int64_t size = relation::stored_elements(args.options.rows);
    parallel_for(static_cast<int>(plan.teams), plan.problems, [&](std::int64_t problem, int team) {
        if constexpr (is_bf16<S>) {
            if (relation.pairs) {
                return relation.backward_pairs(args, team, problem, stored + problem * size);
            }
        }
        relation.backward(args, team, problem, stored + problem * size);
    });
}

} // namespace

void relation_stored_forward(const Forward& args, const RelationPlan& plan, int threads) {
    advise_huge_pages(args.workspace, plan.bytes);
    with_storage(args.options.dtype, [&](auto storage) { forward<decltype(storage)>(args, plan, threads); });
}

void relation_stored_backward(const Backward& args, const RelationPlan& plan) {
    advise_huge_pages(args.workspace, plan.bytes);
    with_storage(args.options.dtype, [&](auto storage) { backward<decltype(storage)>(args, plan); });
}

} // namespace fastkd::cpu::FASTKD_ISA
