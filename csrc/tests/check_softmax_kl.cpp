// Check softmax_kl, forward and backward, against plain loops in double.
#include "tests/sanitize.h"

namespace fastkd::sanitize {
namespace {

struct Case {
    std::int64_t batch, rows, cols;
    double temperature;
    Values values;
    int threads;
    Layout student, teacher;
    Layout grad; // of (batch, rows) with one column
};

template <class S>
struct Results {
    explicit Results(const Case& c)
        : loss(c.batch * c.rows), lse_s(c.batch * c.rows), lse_t(c.batch * c.rows), grad(c.batch * c.rows * c.cols) {}
    Buffer<Compute<S>> loss;
    Buffer<double> lse_s, lse_t;
    Buffer<S> grad;
};

template <class S>
void call(const Case& c, Rows<S>& student, Rows<S>& teacher, Rows<Compute<S>>& grad_loss, Results<S>& results) {
    softmax_kl::Forward forward{};
    forward.student = student.data();
    forward.teacher = teacher.data();
    forward.loss = results.loss.data();
    forward.lse_student = results.lse_s.data();
    forward.lse_teacher = results.lse_t.data();
    forward.shape = {c.batch, c.rows, c.cols};
    forward.student_strides = {c.student.stride_batch, c.student.stride_row};
    forward.teacher_strides = {c.teacher.stride_batch, c.teacher.stride_row};
    forward.dtype = dtype_of<S>;
    forward.temperature = c.temperature;
    forward.inv_temperature = 1 / c.temperature;
    cpu::kernels().softmax_kl_forward(forward, c.threads);

    softmax_kl::Backward backward{};
    backward.grad_loss = grad_loss.data();
    backward.grad_loss_strides = {c.grad.stride_batch, c.grad.stride_row};
    backward.student = student.data();
    backward.teacher = teacher.data();
    backward.lse_student = results.lse_s.data();
    backward.lse_teacher = results.lse_t.data();
    backward.grad_student = results.grad.data();
    backward.shape = forward.shape;
    backward.student_strides = forward.student_strides;
    backward.teacher_strides = forward.teacher_strides;
    backward.dtype = forward.dtype;
    backward.temperature = forward.temperature;
    backward.inv_temperature = forward.inv_temperature;
    cpu::kernels().softmax_kl_backward(backward, c.threads);
}

// At logits of 1e4, a log-sum-exp with a double's accuracy needs more than double arithmetic.
template <class S>
long double log_sum_exp(const S* row, std::int64_t cols, double temperature) {
    double max = -HUGE_VAL, sum = 0;
    for (std::int64_t c = 0; c < cols; ++c) {
        max = std::fmax(max, to_double(row[c]) / temperature);
    }
    for (std::int64_t c = 0; c < cols && max > -HUGE_VAL; ++c) {
        sum += std::exp(to_double(row[c]) / temperature - max);
    }
    return max > -HUGE_VAL ? static_cast<long double>(max) + std::log(sum) : std::nan("");
}

template <class S>
void compare(const Case& c) {
    using T = Compute<S>;
    Random random(static_cast<std::uint64_t>(c.cols * 31 + c.rows * 7 + c.threads));
    Rows<S> student(c.batch, c.rows, c.cols, c.student, c.values, random);
    Rows<S> teacher(c.batch, c.rows, c.cols, c.teacher, c.values, random);
    Rows<T> grad_loss(c.batch, c.rows, 1, c.grad, Values::normal, random);
    Results<S> results(c);
    call<S>(c, student, teacher, grad_loss, results);
    const std::string where = std::string(name_of(dtype_of<S>)) + " " + std::to_string(c.batch) + "x" +
                              std::to_string(c.rows) + "x" + std::to_string(c.cols) + " student " + c.student.name +
                              ", teacher " + c.teacher.name + ", " + std::to_string(c.threads) + " threads, row ";
    const long double tau = c.temperature;
    const std::int64_t step = c.rows > 1000 ? 7 : 1; // the plain loop is slow; the sanitizers still see every row
    for (std::int64_t b = 0; b < c.batch; ++b) {
        for (std::int64_t r = 0; r < c.rows; r += step) {
            const std::int64_t index = b * c.rows + r;
            const S *s = student.row(b, r), *t = teacher.row(b, r);
            const long double lse_s = log_sum_exp(s, c.cols, c.temperature);
            const long double lse_t = log_sum_exp(t, c.cols, c.temperature);
            const double scale = to_double(*grad_loss.row(b, r)) / c.temperature;
            // The backward receives the log-sum-exp as a double.
            const double far = rounding<double> * static_cast<double>(std::fabs(lse_s) + std::fabs(lse_t));
            double loss = 0;
            bool right = true;
            for (std::int64_t i = 0; i < c.cols; ++i) {
                const double log_s = static_cast<double>(to_double(s[i]) / tau - lse_s);
                const double log_t = static_cast<double>(to_double(t[i]) / tau - lse_t);
                const double p_t = std::exp(log_t);
                // As in fp32: values that underflow there become 0.
                loss += p_t < std::numeric_limits<T>::min() ? 0 : p_t * (log_t - log_s);
                right = right && near(to_double(results.grad[index * c.cols + i]), scale * (std::exp(log_s) - p_t),
                                      2 * rounding<S>, smallest<S> + (64 * rounding<T> + far) * std::fabs(scale));
            }
            loss = std::isnan(lse_s) || std::isnan(lse_t) ? std::nan("") : loss;
            expect(near(results.loss[index], loss, 1e3 * rounding<T>, 1e2 * rounding<T>),
                   where + std::to_string(index) + ": loss " + std::to_string(results.loss[index]) + ", not " +
                       std::to_string(loss));
            expect(right || std::isnan(loss), where + std::to_string(index) + ": gradient");
        }
    }
}

template <class S>
void shapes() {
    int turn = 0; // cycles through layouts, values and threads instead of a full product
    const auto compare_in_turn = [&](std::int64_t batch, std::int64_t rows, std::int64_t cols) {
        const auto choices = layouts(batch, rows, cols);
        const auto grads = layouts(batch, rows, 1);
        const double temperatures[] = {1, 4, 0.05};
        const Values values = every_kind[turn % 3];
        // At large logits and low temperatures fp32 rounding itself exceeds these tolerances.
        const double temperature = values == Values::far ? 4 : temperatures[turn / 3 % 3];
        compare<S>({batch, rows, cols, temperature, values, thread_counts[turn % 4], choices[turn % 5],
                    choices[turn * 2 % 5], grads[turn * 3 % 5]});
        ++turn;
    };
    for (std::int64_t cols = 1; cols <= 70; ++cols) {
        compare_in_turn(2, 3, cols);
    }
    for (const std::int64_t cols : {2047, 2048, 2049, 4095, 4097, 8209}) { // around the forward's blocks
        for (int repeat = 0; repeat < 4; ++repeat) {
            compare_in_turn(2, 7, cols);
        }
    }
    for (const std::int64_t cols : {16, 33, 225}) { // several threads, many rows each
        for (int repeat = 0; repeat < 5; ++repeat) {
            compare_in_turn(3, 90000 / cols / 3, cols);
        }
    }
    // A gradient large enough for non-temporal stores, rows at every alignment, two threads and more.
    turn += (5 - turn % 4) % 4;
    const std::int64_t large = 4 * 1024 * 1024 / static_cast<std::int64_t>(sizeof(S));
    compare_in_turn(1, large / 37 + 1, 37);
}

void run() {
    shapes<float>();
    shapes<BFloat16>();
    if (every_dtype) {
        shapes<double>();
        shapes<Half>();
    }
}

const Check check{"softmax_kl", run};

} // namespace
} // namespace fastkd::sanitize
