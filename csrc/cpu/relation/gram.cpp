// relation on the CPU, form "gram": distance mse from width x width Gram matrices (common/relation.h):
//
//     loss_i = w_i^T G w_i/columns,     G = sum_j z_j z_j^T,     W = [D | B],     Z = [A | D]
//
// G: rows are packed a chunk at a time as [row][width], and their products are added to every panel of G. G W and the
// sums over the width: rows are packed a block at a time as [width][row] and vectorised along the rows.
#include "common/relation.h"

#include "cpu/kernels.h"
#include "cpu/pages.h"
#include "cpu/relation/plan.h"
#include "cpu/relation/rows.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

using relation::Backward;
using relation::Forward;

// The template parameter A is the type of G and of all products.
template <class S, class A>
struct Gram {
    using T = Compute<S>;
    const Options& options;
    const GramPlan& plan;
    const Rows& student;
    const Rows& teacher;
    const double* scales; // (2, batch, rows)
    char* workspace;

    std::int64_t common = student.width < teacher.width ? student.width : teacher.width;
    double columns = static_cast<double>(plan.samples * options.rows);

    FASTKD_INLINE A* at(std::int64_t team, std::int64_t offset) const {
        return reinterpret_cast<A*>(workspace + team * plan.team_bytes + offset);
    }
    FASTKD_INLINE A* scratch(std::int64_t thread, std::int64_t offset) const {
        return reinterpret_cast<A*>(workspace + plan.teams * plan.team_bytes + thread * plan.thread_bytes + offset);
    }
    FASTKD_INLINE void typed_scales(int network, std::int64_t b, std::int64_t row, std::int64_t count, A* out) const {
        const double* from = scales + (network * options.batch + b) * options.rows + row;
        for (std::int64_t r = 0; r < count; ++r) {
            out[r] = static_cast<A>(from[r]);
        }
    }
    FASTKD_INLINE const S* rows_at(const Rows& rows, std::int64_t b, std::int64_t row) const {
        return static_cast<const S*>(rows.data) + b * rows.batch_stride + row * rows.row_stride;
    }
    // Pack rows [row, row + count) of Z as [row][width]: `first` is A, `second` is D as wide as B.
    void pack_z(std::int64_t b, std::int64_t row, std::int64_t count, A* first, A* second) const {
        A by[gram_chunk];
        typed_scales(0, b, row, count, by);
        pack<S, A>(rows_at(student, b, row), student.col_stride, student.row_stride, student.width, count, nullptr, by,
                   first);
        typed_scales(1, b, row, count, by);
        pack<S, A>(rows_at(teacher, b, row), teacher.col_stride, teacher.row_stride, teacher.width, count, nullptr, by,
                   second);
        const Panels<A> own(student.width), others(teacher.width);
        for (std::int64_t p = 0; p < others.size; ++p) {
            const std::int64_t width = others.width(p) * lanes<A>;
            for (std::int64_t v = 0; v < width; v += lanes<A>) {
                const std::int64_t column = others.begin(p) + v;
                A* to = second + others.begin(p) * count + v;
                if (column >= own.elements()) {
                    for (std::int64_t r = 0; r < count; ++r) {
                        store(to + r * width, -load(to + r * width));
                    }
                    continue;
                }
                const std::int64_t panel = own.find(column), step = own.width(panel) * lanes<A>;
                const A* from = first + own.begin(panel) * count + column - own.begin(panel);
                for (std::int64_t r = 0; r < count; ++r) {
                    store(to + r * width, load(from + r * step) - load(to + r * width));
                }
            }
        }
    }
    // Pack the same rows of W as [width][row]: `first` is D as wide as A, `second` is B.
    void pack_w(std::int64_t b, std::int64_t row, std::int64_t count, A* first, A* second) const {
        A by[streamed_block];
        typed_scales(0, b, row, count, by);
        pack<S, A>(rows_at(student, b, row), student.row_stride, student.col_stride, count, student.width, by, nullptr,
                   first);
        typed_scales(1, b, row, count, by);
        pack<S, A>(rows_at(teacher, b, row), teacher.row_stride, teacher.col_stride, count, teacher.width, by, nullptr,
                   second);
        const Panels<A> panels(count);
        for (std::int64_t p = 0; p < panels.size; ++p) {
            A* to = first + panels.begin(p) * student.width;
            const A* from = second + panels.begin(p) * teacher.width;
            for (std::int64_t i = 0; i < common * panels.width(p) * lanes<A>; i += lanes<A>) {
                store(to + i, load(to + i) - load(from + i));
            }
        }
    }

    // Compute G of the problem; with `grad` its rows G_A, every term weighted by the row's gradient.
    void sum_gram(std::int64_t team, std::int64_t problem, const Backward* grad, A* gram) const {
        const Panels<A> first(student.width), second(teacher.width);
        const std::int64_t height = grad == nullptr ? plan.side : plan.student_side;
        __builtin_memset(gram, 0, height * plan.side * sizeof(A));
        A* rows = at(team, plan.rows);
        A* weighted = grad == nullptr ? rows : at(team, plan.scaled_rows);
        for (std::int64_t b = problem * plan.samples; b < (problem + 1) * plan.samples; ++b) {
            for (std::int64_t row = 0; row < options.rows; row += plan.chunk) {
                const std::int64_t count = options.rows - row < plan.chunk ? options.rows - row : plan.chunk;
                A* z1 = rows;
                A* z2 = rows + first.elements() * count;
                pack_z(b, row, count, z1, z2);
                if (grad != nullptr) {
                    A by[gram_chunk];
                    typed_scales(0, b, row, count, by);
                    for (std::int64_t r = 0; r < count; ++r) {
                        by[r] *= static_cast<A>(gradient(*grad, b, row + r));
                    }
                    pack<S, A>(rows_at(student, b, row), student.col_stride, student.row_stride, student.width, count,
                               nullptr, by, weighted);
                }
                parallel_for(plan.team_threads, first.size + second.size, [&](std::int64_t task, int) {
                    const bool in_first = task < first.size;
                    const Panels<A>& panels = in_first ? first : second;
                    const std::int64_t q = in_first ? task : task - first.size;
                    const A* y = (in_first ? z1 : z2) + panels.begin(q) * count;
                    A* to = gram + (in_first ? 0 : plan.student_side) + panels.begin(q);
                    // The upper triangle is enough unless the weighting makes the product asymmetric.
                    const std::int64_t height = in_first && grad == nullptr ? q + 1 : first.size;
                    add_rows(weighted, first, height, y, panels.width(q), count, to);
                    if (!in_first && grad == nullptr) {
                        add_rows(z2, second, q + 1, y, panels.width(q), count, to + plan.student_side * plan.side);
                    }
                });
            }
        }
    }
    // Add one column panel of sum_r x_r y_r^T, for the first `size` panels of x.
    FASTKD_INLINE void add_rows(const A* x, const Panels<A>& panels, std::int64_t size, const A* y, int width,
                                std::int64_t count, A* to) const {
        for (std::int64_t p = 0; p < size; ++p) {
            const std::int64_t height = panels.width(p) * lanes<A>;
            panel_product<A>(width, x + panels.begin(p) * count, 1, height, height, y, count,
                             to + panels.begin(p) * plan.side, plan.side, true);
        }
    }
    FASTKD_INLINE static double gradient(const Backward& args, std::int64_t b, std::int64_t row) {
        return static_cast<double>(
            static_cast<const T*>(args.grad_loss)[b * args.grad_batch_stride + row * args.grad_row_stride]);
    }

    // Call visit(b, row, count, thread) for every block of rows of the problem.
    template <class Visit>
    FASTKD_INLINE void blocks(std::int64_t team, std::int64_t problem, const Visit& visit) const {
        const std::int64_t per_sample = ceil_div(options.rows, plan.block);
        parallel_for(plan.team_threads, plan.samples * per_sample, [&](std::int64_t task, int thread) {
            const std::int64_t row = task % per_sample * plan.block;
            const std::int64_t count = options.rows - row < plan.block ? options.rows - row : plan.block;
            visit(problem * plan.samples + task / per_sample, row, count, plan.teams > 1 ? team : thread);
        });
    }
    // out[k][row] = sum_l matrix[k][l] w[l][row], for the k that belong to A.
    FASTKD_INLINE void multiply(const A* matrix, const A* first, const A* second, std::int64_t count, A* out) const {
        const Panels<A> rows(count);
        strided_product<A>(matrix, plan.side, 1, plan.student_side, first, rows, student.width, out, plan.block, false);
        strided_product<A>(matrix + plan.student_side, plan.side, 1, plan.student_side, second, rows, teacher.width,
                           out, plan.block, true);
    }
    // Like multiply, for all k, but summed over l >= k only; entries within micro_rows below the diagonal must be 0.
    FASTKD_INLINE void multiply_upper(const A* gram, const A* first, const A* second, std::int64_t count,
                                      A* out) const {
        const Panels<A> rows(count);
        const A* teachers = gram + plan.student_side;
        for (std::int64_t q = 0; q < rows.size; ++q) {
            const A* own = first + rows.begin(q) * student.width;
            const A* other = second + rows.begin(q) * teacher.width;
            A* to = out + rows.begin(q);
            upper_panel(gram, own, rows.width(q), student.width, to);
            panel_product<A>(rows.width(q), teachers, plan.side, 1, plan.student_side, other, teacher.width, to,
                             plan.block, true);
            upper_panel(teachers + plan.student_side * plan.side, other, rows.width(q), teacher.width,
                        to + plan.student_side * plan.block);
        }
    }
    FASTKD_INLINE void upper_panel(const A* matrix, const A* w, int width, std::int64_t inner, A* out) const {
        const std::int64_t lane = width * lanes<A>;
        for (std::int64_t from = 0; from < inner; from += inner_chunk) {
            const std::int64_t end = inner - from < inner_chunk ? inner : from + inner_chunk;
            panel_product<A>(width, matrix + from, plan.side, 1, from, w + from * lane, end - from, out, plan.block,
                             true);
            for (std::int64_t k = from; k < end; k += micro_rows<A>) {
                panel_product<A>(width, matrix + k * plan.side + k, plan.side, 1, micro_rows<A>, w + k * lane, end - k,
                                 out + k * plan.block, plan.block, false);
            }
        }
    }
    // Prepare G for multiply_upper: w^T G w is twice the sum over the upper triangle with a halved diagonal.
    FASTKD_INLINE void halve_diagonal(A* gram) const {
        for (std::int64_t k = 0; k < plan.side; ++k) {
            for (std::int64_t l = k / micro_rows<A> * micro_rows<A>; l < k; ++l) {
                gram[k * plan.side + l] = 0;
            }
            gram[k * plan.side + k] *= A(0.5);
        }
    }
    // Undo halve_diagonal and fill the lower triangle of G_A.
    FASTKD_INLINE void restore(A* gram) const {
        for (std::int64_t k = 0; k < plan.student_side; ++k) {
            for (std::int64_t l = 0; l < k; ++l) {
                gram[k * plan.side + l] = gram[l * plan.side + k];
            }
            gram[k * plan.side + k] *= 2;
        }
    }

    void forward(std::int64_t team, std::int64_t problem, A* gram, T* loss) const {
        sum_gram(team, problem, nullptr, gram);
        halve_diagonal(gram);
        blocks(team, problem, [&](std::int64_t b, std::int64_t row, std::int64_t count, std::int64_t thread) {
            A* first = scratch(thread, plan.own);
            A* second = scratch(thread, plan.other);
            A* product = scratch(thread, plan.product);
            pack_w(b, row, count, first, second);
            multiply_upper(gram, first, second, count, product);
            const Panels<A> rows(count);
            for (std::int64_t p = 0; p < rows.size; ++p) {
                const std::int64_t width = rows.width(p) * lanes<A>, begin = rows.begin(p);
                for (std::int64_t v = 0; v < width; v += lanes<A>) {
                    Vec<A> total{};
                    for (std::int64_t k = 0; k < student.width; ++k) {
                        total += load(first + begin * student.width + k * width + v) *
                                 load(product + k * plan.block + begin + v);
                    }
                    Vec<A> total2{};
                    for (std::int64_t k = 0; k < teacher.width; ++k) {
                        total2 += load(second + begin * teacher.width + k * width + v) *
                                  load(product + (plan.student_side + k) * plan.block + begin + v);
                    }
                    total += total2;
                    for (std::int64_t l = 0; l < lanes<A> && begin + v + l < count; ++l) {
                        loss[b * options.rows + row + begin + v + l] =
                            static_cast<T>(2 * static_cast<double>(total[l]) / columns);
                    }
                }
            }
        });
        restore(gram);
    }

    // Return whether all rows of the problem have the same gradient g: then sum_j g_j a_j z_j^T = g G_A.
    bool uniform(const Backward& args, std::int64_t problem) const {
        const double g = gradient(args, problem * plan.samples, 0);
        for (std::int64_t b = problem * plan.samples; b < (problem + 1) * plan.samples; ++b) {
            for (std::int64_t r = 0; r < options.rows; ++r) {
                if (gradient(args, b, r) != g) {
                    return false;
                }
            }
        }
        return true;
    }

    void backward(const Backward& args, std::int64_t team, std::int64_t problem, const A* gram) const {
        const bool same_gradient = uniform(args, problem);
        A* weighted = at(team, plan.weighted);
        if (!same_gradient) {
            sum_gram(team, problem, &args, weighted);
        }
        blocks(team, problem, [&](std::int64_t b, std::int64_t row, std::int64_t count, std::int64_t thread) {
            A* first = scratch(thread, plan.own);
            A* second = scratch(thread, plan.other);
            A* product = scratch(thread, plan.product);
            A* product2 = scratch(thread, plan.product2);
            T* result = reinterpret_cast<T*>(scratch(thread, plan.result));
            pack_w(b, row, count, first, second);
            multiply(gram, first, second, count, product);
            if (!same_gradient) {
                multiply(weighted, first, second, count, product2);
            }
            A by[streamed_block] = {}, outer[streamed_block] = {}, plus[streamed_block] = {};
            typed_scales(0, b, row, count, by);
            for (std::int64_t r = 0; r < count; ++r) {
                outer[r] = static_cast<A>(outer_scale(options, scales[b * options.rows + row + r]));
                const double g = 2 * gradient(args, b, row + r) / columns;
                plus[r] = static_cast<A>(same_gradient ? 2 * g : g);
            }
            const A rest = static_cast<A>(same_gradient ? 0 : 2 / columns);
            const bool cosine = options.similarity == Similarity::cosine;
            if (cosine) { // repack A to subtract the radial part
                pack<S, A>(rows_at(student, b, row), student.row_stride, student.col_stride, count, student.width, by,
                           nullptr, first);
            }
            const Panels<A> rows(count);
            for (std::int64_t p = 0; p < rows.size; ++p) {
                const std::int64_t width = rows.width(p) * lanes<A>, begin = rows.begin(p);
                for (std::int64_t v = 0; v < width; v += lanes<A>) {
                    const std::int64_t at = begin + v;
                    const A* own = first + begin * student.width + v;
                    const Vec<A> factor = load(plus + at), out = load(outer + at);
                    Vec<A> radial{};
                    for (std::int64_t k = 0; k < student.width; ++k) {
                        Vec<A> value = load(product + k * plan.block + at) * factor;
                        if (!same_gradient) {
                            value += load(product2 + k * plan.block + at) * rest;
                        }
                        store(product + k * plan.block + at, value);
                        if (cosine) {
                            radial += value * load(own + k * width);
                        }
                    }
                    for (std::int64_t k = 0; k < student.width; ++k) {
                        Vec<A> value = load(product + k * plan.block + at);
                        if (cosine) {
                            value -= radial * load(own + k * width);
                        }
                        value = out == A(0) ? Vec<A>{} : value * out; // select 0: other rows may hold NaN
                        for (int l = 0; l < lanes<A>; ++l) {
                            result[k * plan.block + at + l] = static_cast<T>(value[l]);
                        }
                    }
                }
            }
            unpack<S>(result, plan.block, student.width, count,
                      static_cast<S*>(args.grad_student) + b * args.out_batch_stride + row * args.out_row_stride,
                      args.out_col_stride, args.out_row_stride);
        });
    }
};

template <class S, class A>
void forward(const Forward& args, const GramPlan& plan, int threads) {
    double* scales = args.statistics;
    find_scales<S>(args.options, args.student, args.teacher, scales, threads);
    const Gram<S, A> gram{args.options, plan, args.student, args.teacher, scales, static_cast<char*>(args.workspace)};
    parallel_for(static_cast<int>(plan.teams), plan.problems, [&](std::int64_t problem, int team) {
        gram.forward(team, problem, static_cast<A*>(args.stored) + problem * plan.side * plan.side,
                     static_cast<Compute<S>*>(args.loss));
    });
}

template <class S, class A>
void backward(const Backward& args, const GramPlan& plan) {
    const Gram<S, A> gram{
        args.options, plan, args.student, args.teacher, args.statistics, static_cast<char*>(args.workspace)};
    advise_huge_pages(args.grad_student, args.options.batch * args.options.rows * args.student.width * sizeof(S));
    parallel_for(static_cast<int>(plan.teams), plan.problems, [&](std::int64_t problem, int team) {
        gram.backward(args, team, problem, static_cast<const A*>(args.stored) + problem * plan.side * plan.side);
    });
}

} // namespace

void relation_gram_forward(const Forward& args, const GramPlan& plan, int threads) {
    with_storage(args.options.dtype, [&](auto storage) {
        using S = decltype(storage);
        plan.size == 8 ? forward<S, double>(args, plan, threads) : forward<S, Compute<S>>(args, plan, threads);
    });
}

void relation_gram_backward(const Backward& args, const GramPlan& plan) {
    with_storage(args.options.dtype, [&](auto storage) {
        using S = decltype(storage);
        plan.size == 8 ? backward<S, double>(args, plan) : backward<S, Compute<S>>(args, plan);
    });
}

} // namespace fastkd::cpu::FASTKD_ISA
