// Check relation, forward and backward, against plain loops in double: every form and distance, features by rows and by
// columns, and the smallest possible workspaces.
#include <algorithm>

#include "tests/sanitize.h"

namespace fastkd::sanitize {
namespace {

using relation::Distance;
using relation::Similarity;

struct Case {
    relation::Options options;
    std::int64_t width_s, width_t;
    bool gram, stored, tight; // the form (streamed if neither), and the smallest workspace
    bool columns;             // features are (batch, width, rows), as in maps
    Layout student, teacher, grad;
    int threads;
};

struct Matrix {
    std::int64_t rows, cols;
    std::vector<double> data;
    Matrix(std::int64_t rows, std::int64_t cols) : rows(rows), cols(cols), data(rows * cols) {}
    double* operator[](std::int64_t r) { return data.data() + r * cols; }
};

// x^ of all samples, and the rows' scales.
struct Scaled {
    Matrix x;
    std::vector<double> scale;
};

template <class S>
double element(const Case& c, Rows<S>& x, std::int64_t b, std::int64_t r, std::int64_t k) {
    return to_double(c.columns ? x.row(b, k)[r] : x.row(b, r)[k]);
}

template <class S>
Scaled scaled(const Case& c, Rows<S>& x, std::int64_t width) {
    const std::int64_t rows = c.options.rows;
    Scaled to{Matrix(c.options.batch * rows, width), std::vector<double>(c.options.batch * rows)};
    for (std::int64_t r = 0; r < to.x.rows; ++r) {
        double square = 0;
        for (std::int64_t k = 0; k < width; ++k) {
            to.x[r][k] = element(c, x, r / rows, r % rows, k);
            square += to.x[r][k] * to.x[r][k];
        }
        to.scale[r] = c.options.similarity == Similarity::cosine
                          ? 1 / std::fmax(std::sqrt(square), relation::norm_floor)
                      : c.options.similarity == Similarity::mean ? 1 / std::sqrt(static_cast<double>(width))
                                                                 : 1;
        for (std::int64_t k = 0; k < width; ++k) {
            to.x[r][k] *= to.scale[r];
        }
    }
    return to;
}

double dot(const double* a, const double* b, std::int64_t count) {
    double sum = 0;
    for (std::int64_t k = 0; k < count; ++k) {
        sum += a[k] * b[k];
    }
    return sum;
}

void softmax(std::vector<double>& logits, double& log_sum) {
    const double max = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const double x : logits) {
        sum += std::exp(x - max);
    }
    log_sum = max + std::log(sum);
    for (double& x : logits) {
        x = std::exp(x - log_sum);
    }
}

// Return one row's loss. Write its derivative with respect to each element of the student's row of E to `slope`, and
// the magnitude of the terms whose difference this is to `size`.
double distance(const relation::Options& o, const std::vector<double>& e_s, const std::vector<double>& e_t,
                std::vector<double>& slope, std::vector<double>& size) {
    const auto count = static_cast<std::int64_t>(e_s.size());
    double loss = 0;
    if (o.distance == Distance::kl) {
        const double factor = (o.negate ? -1 : 1) / o.temperature;
        std::vector<double> p_s(e_s), p_t(e_t);
        double lse_s, lse_t;
        for (std::int64_t j = 0; j < count; ++j) {
            p_s[j] *= factor;
            p_t[j] *= factor;
        }
        softmax(p_s, lse_s);
        softmax(p_t, lse_t);
        for (std::int64_t j = 0; j < count; ++j) {
            loss += p_t[j] * (factor * (e_t[j] - e_s[j]) - lse_t + lse_s);
            slope[j] = factor * (p_s[j] - p_t[j]);
            size[j] = std::fabs(factor) * (p_s[j] + p_t[j]);
        }
        return loss;
    }
    if (o.distance == Distance::mse) {
        for (std::int64_t j = 0; j < count; ++j) {
            loss += (e_s[j] - e_t[j]) * (e_s[j] - e_t[j]) / static_cast<double>(count);
            slope[j] = 2 * (e_s[j] - e_t[j]) / static_cast<double>(count);
            size[j] = 2 * (std::fabs(e_s[j]) + std::fabs(e_t[j])) / static_cast<double>(count);
        }
        return loss;
    }
    const double n = std::sqrt(dot(e_s.data(), e_s.data(), count)), m = std::sqrt(dot(e_t.data(), e_t.data(), count));
    const double cosine = dot(e_s.data(), e_t.data(), count) / (n * m);
    for (std::int64_t j = 0; j < count; ++j) {
        slope[j] = -2 * (e_t[j] / (n * m) - cosine * e_s[j] / (n * n));
        size[j] = 2 * (std::fabs(e_t[j]) / (n * m) + std::fabs(e_s[j]) / (n * n));
    }
    return 2 - 2 * cosine;
}

// Magnitudes of the gradient's summands, before and after taking the networks' difference.
struct Sizes {
    double terms, products;
};

// Compute the expected losses and gradient.
Sizes oracle(const Case& c, Scaled& s, Scaled& t, const std::vector<double>& grad, std::vector<double>& loss,
             Matrix& dx) {
    const relation::Options& o = c.options;
    const double share = o.cross ? 1.0 / static_cast<double>(o.batch) : 1;
    std::vector<double> e_s(o.rows), e_t(o.rows), slope(o.rows), size(o.rows), bound(o.batch * o.rows),
        products(o.batch * o.rows);
    const auto largest = [](const double* row, std::int64_t count) {
        double most = 0;
        for (std::int64_t k = 0; k < count; ++k) {
            most = std::fmax(most, std::fabs(row[k]));
        }
        return most;
    };
    for (std::int64_t i = 0; i < o.batch * o.rows; ++i) {
        for (std::int64_t other = 0; other < o.batch; ++other) {
            if (!o.cross && other != i / o.rows) {
                continue;
            }
            for (std::int64_t j = 0; j < o.rows; ++j) {
                e_s[j] = dot(s.x[i], s.x[other * o.rows + j], c.width_s);
                e_t[j] = dot(t.x[i], t.x[other * o.rows + j], c.width_t);
            }
            loss[i] += share * distance(o, e_s, e_t, slope, size);
            for (std::int64_t j = 0; j < o.rows; ++j) {
                const double h = share * grad[i] * slope[j];
                const std::int64_t to = other * o.rows + j;
                bound[i] += share * std::fabs(grad[i]) * size[j] * largest(s.x[to], c.width_s);
                bound[to] += share * std::fabs(grad[i]) * size[j] * largest(s.x[i], c.width_s);
                products[i] += std::fabs(h) * largest(s.x[to], c.width_s);
                products[to] += std::fabs(h) * largest(s.x[i], c.width_s);
                for (std::int64_t k = 0; k < c.width_s; ++k) {
                    dx[i][k] += h * s.x[to][k];
                    dx[to][k] += h * s.x[i][k];
                }
            }
        }
    }
    for (std::int64_t i = 0; i < dx.rows; ++i) {
        const bool cosine = o.similarity == Similarity::cosine;
        const double along = cosine ? dot(dx[i], s.x[i], c.width_s) : 0;
        for (std::int64_t k = 0; k < c.width_s; ++k) {
            const bool floored = cosine && s.scale[i] >= 1 / relation::norm_floor;
            dx[i][k] = floored ? 0 : s.scale[i] * (dx[i][k] - s.x[i][k] * along);
        }
        const double outer = s.scale[i] < 1 / relation::norm_floor ? s.scale[i] : 0;
        bound[i] *= outer;
        products[i] *= outer;
    }
    return {largest(bound.data(), dx.rows), largest(products.data(), dx.rows)};
}

template <class S>
relation::Rows described(const Case& c, Rows<S>& x, const Layout& layout, std::int64_t width) {
    return {x.data(), width, layout.stride_batch, c.columns ? 1 : layout.stride_row, c.columns ? layout.stride_row : 1};
}

// Call `plan(limit)` with the default limit, or with the smallest possible one.
template <class Plan>
auto within_limit(bool tight, Plan plan) {
    return plan(tight ? plan(0).minimum : std::int64_t(32) << 20);
}
cpu::RelationPlan tiled_plan(const Case& c, bool backward) {
    return within_limit(c.tight, [&](std::int64_t limit) {
        return cpu::plan_relation(c.options, c.width_s, c.width_t, c.stored, backward, c.threads, limit);
    });
}
cpu::GramPlan gram_plan(const Case& c, bool backward) {
    return within_limit(c.tight, [&](std::int64_t limit) {
        return cpu::plan_gram(c.options, c.width_s, c.width_t, backward, c.threads, limit);
    });
}

std::int64_t stored_bytes(const Case& c) {
    const std::int64_t size = c.options.dtype == DType::Float64 ? 8 : 4;
    if (c.gram) {
        const cpu::GramPlan plan = gram_plan(c, false);
        const std::int64_t side = relation::gram_side(c.width_s, c.width_t);
        return plan.problems * side * side * plan.size;
    }
    return c.stored ? c.options.batch * relation::stored_elements(c.options.rows) * size : 0;
}

template <class S>
void compare(Case c) {
    using T = Compute<S>;
    const relation::Options& o = c.options;
    Random random(static_cast<std::uint64_t>(o.rows * 131 + c.width_s * 7 + c.threads));
    const auto tensor = [&](const Layout& layout, std::int64_t width) {
        return c.columns ? Rows<S>(o.batch, width, o.rows, layout, Values::normal, random)
                         : Rows<S>(o.batch, o.rows, width, layout, Values::normal, random);
    };
    Rows<S> student = tensor(c.student, c.width_s), teacher = tensor(c.teacher, c.width_t);
    if (o.rows > 3 && o.distance != Distance::row_cosine) { // a row of zero norm
        for (std::int64_t k = 0; k < c.width_s; ++k) {
            *(c.columns ? &student.row(0, k)[2] : &student.row(0, 2)[k]) = to_storage<S>(0);
        }
    }
    Rows<T> grad_loss(o.batch, o.rows, 1, c.grad, Values::normal, random);
    Buffer<T> loss(o.batch * o.rows);
    const std::int64_t planes = c.gram ? 2 : relation::statistic_planes * o.others() + 2;
    Buffer<double> statistics(planes * o.batch * o.rows);
    Buffer<char> stored(stored_bytes(c));
    Buffer<S> grad(o.batch * o.rows * c.width_s);

    const cpu::RelationPlan forward_tiled = tiled_plan(c, false), backward_tiled = tiled_plan(c, true);
    const cpu::GramPlan forward_gram = gram_plan(c, false), backward_gram = gram_plan(c, true);
    {
        Buffer<char> workspace(c.gram ? forward_gram.bytes : forward_tiled.bytes);
        relation::Forward args{};
        args.student = described(c, student, c.student, c.width_s);
        args.teacher = described(c, teacher, c.teacher, c.width_t);
        args.options = o;
        args.loss = loss.data();
        args.statistics = statistics.data();
        args.stored = stored.size() > 0 ? stored.data() : nullptr;
        args.workspace = workspace.data();
        c.gram     ? cpu::kernels().relation_gram_forward(args, forward_gram, c.threads)
        : c.stored ? cpu::kernels().relation_stored_forward(args, forward_tiled, c.threads)
                   : cpu::kernels().relation_streamed_forward(args, forward_tiled, c.threads);
    }
    {
        Buffer<char> workspace(c.gram ? backward_gram.bytes : backward_tiled.bytes);
        relation::Backward args{};
        args.grad_loss = grad_loss.data();
        args.grad_batch_stride = c.grad.stride_batch;
        args.grad_row_stride = c.grad.stride_row;
        args.student = described(c, student, c.student, c.width_s);
        args.teacher = described(c, teacher, c.teacher, c.width_t);
        args.options = o;
        args.statistics = statistics.data();
        args.stored = stored.size() > 0 ? stored.data() : nullptr;
        args.grad_student = grad.data();
        args.out_batch_stride = o.rows * c.width_s;
        args.out_row_stride = c.columns ? 1 : c.width_s;
        args.out_col_stride = c.columns ? o.rows : 1;
        args.workspace = workspace.data();
        c.gram     ? cpu::kernels().relation_gram_backward(args, backward_gram)
        : c.stored ? cpu::kernels().relation_stored_backward(args, backward_tiled)
                   : cpu::kernels().relation_streamed_backward(args, backward_tiled);
    }

    Scaled s = scaled(c, student, c.width_s), t = scaled(c, teacher, c.width_t);
    std::vector<double> weights, want(o.batch * o.rows);
    for (std::int64_t i = 0; i < o.batch * o.rows; ++i) {
        weights.push_back(to_double(*grad_loss.row(i / o.rows, i % o.rows)));
    }
    Matrix dx(o.batch * o.rows, c.width_s);
    const Sizes size = oracle(c, s, t, weights, want, dx);
    // The matrix that multiplies bfloat16 rows may be rounded to bfloat16.
    const double error =
        200 * rounding<T> * size.terms + (dtype_of<S> == DType::BFloat16 ? rounding<S> * size.products : 0);
    const std::string where =
        std::string(name_of(dtype_of<S>)) + " " + std::to_string(o.batch) + "x" + std::to_string(o.rows) + "x" +
        std::to_string(c.width_s) + " (teacher " + std::to_string(c.width_t) + ") distance " +
        std::to_string(static_cast<int>(o.distance)) + " similarity " + std::to_string(static_cast<int>(o.similarity)) +
        (c.gram     ? " gram"
         : c.stored ? " stored"
                    : " streamed") +
        (o.cross ? " cross" : "") + (c.tight ? " tight" : "") + (c.columns ? " columns " : " ") + c.student.name + "/" +
        c.teacher.name + ", " + std::to_string(c.threads) + " threads, row ";
    for (std::int64_t i = 0; i < o.batch * o.rows; ++i) {
        expect(near(loss[i], want[i], 1e3 * rounding<T>, 1e3 * rounding<T>),
               where + std::to_string(i) + ": loss " + std::to_string(loss[i]) + ", not " + std::to_string(want[i]));
        bool right = true;
        for (std::int64_t k = 0; k < c.width_s; ++k) {
            const std::int64_t b = i / o.rows, r = i % o.rows;
            const S& got = grad[b * o.rows * c.width_s + (c.columns ? k * o.rows + r : r * c.width_s + k)];
            right = right && near(to_double(got), dx[i][k], 2 * rounding<S>, smallest<S> + error);
        }
        expect(right, where + std::to_string(i) + ": gradient");
    }
}

template <class S>
void shapes(int offset) {
    int turn = offset; // cycles through options instead of a full product
    int shape = 0;
    for (const std::int64_t rows : {1, 2, 5, 31, 47, 48, 49, 95, 96, 97, 145, 200}) { // around both block sizes
        for (const std::int64_t width : {1, 3, 16, 17, 49, 257}) {
            if (rows * width > 20000 || shape++ % shape_stride != 0) {
                continue;
            }
            const Distance distances[] = {Distance::kl, Distance::mse, Distance::row_cosine};
            const Similarity similarities[] = {Similarity::cosine, Similarity::mean, Similarity::dot};
            Case c{};
            const std::int64_t batch = 1 + turn % 3;
            const Similarity similarity = similarities[turn / 3 % 3];
            const bool cosine = similarity == Similarity::cosine;
            c.gram = distances[turn % 3] == Distance::mse && turn / 3 % 2 == 0;
            c.stored = turn % 2 == 0 && !c.gram;
            c.options = {batch,
                         rows,
                         !c.stored && turn % 5 == 1,
                         similarity,
                         distances[turn % 3],
                         cosine ? (turn % 4 == 3 ? 0.01 : 0.1) : 10.0,
                         turn % 7 == 0,
                         dtype_of<S>};
            c.width_s = width;
            c.width_t = turn % 4 == 2 ? width + 3 : width;
            c.tight = turn % 3 == 1;
            c.columns = turn % 4 < 2;
            c.threads = thread_counts[turn / 2 % 4];
            // The layout "one row" makes all relations equal: only for the teacher.
            const auto s = c.columns ? layouts(batch, c.width_s, rows) : layouts(batch, rows, c.width_s);
            const auto t = c.columns ? layouts(batch, c.width_t, rows) : layouts(batch, rows, c.width_t);
            c.student = s[turn % 4];
            c.teacher = t[turn * 2 % 5];
            c.grad = layouts(batch, rows, 1)[turn * 3 % 5];
            compare<S>(c);
            ++turn;
        }
    }
}

void run() {
    shapes<float>(0);
    shapes<BFloat16>(3);
    if (every_dtype) {
        shapes<double>(1);
        shapes<Half>(2);
    }
}

const Check check{"relation", run};

} // namespace
} // namespace fastkd::sanitize
