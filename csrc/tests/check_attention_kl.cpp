// Check attention_kl, losses and gradients, against plain loops in double.
#include "tests/sanitize.h"

namespace fastkd::sanitize {
namespace {

struct Case {
    attention_kl::Problem problem;
    bool masked, biased;
    int threads;
};

// Exactly sized contiguous arrays of one call.
template <class S>
struct Inputs {
    Inputs(const Case& c, Random& random)
        : p(c.problem), q_s(p.batch * p.heads * p.queries * p.student_width),
          k_s(p.batch * p.heads * p.keys * p.student_width), q_t(p.batch * p.heads * p.queries * p.teacher_width),
          k_t(p.batch * p.heads * p.keys * p.teacher_width), bias(p.heads * p.queries * p.keys),
          grad(p.batch * p.heads * p.queries), scales(p.heads), key_mask(p.batch * p.keys),
          query_mask(p.batch * p.queries) {
        for (Buffer<S>* x : {&q_s, &k_s, &q_t, &k_t, &bias}) {
            for (std::int64_t i = 0; i < x->size(); ++i) {
                (*x)[i] = to_storage<S>(random.value(Values::normal));
            }
        }
        for (std::int64_t i = 0; i < grad.size(); ++i) {
            grad[i] = static_cast<Compute<S>>(random.uniform() + 0.5);
        }
        for (std::int64_t i = 0; i < scales.size(); ++i) {
            scales[i] = random.uniform() + 0.2;
        }
        for (std::int64_t i = 0; i < key_mask.size(); ++i) { // the first key is always valid
            key_mask[i] = !c.masked || i % p.keys == 0 || random.uniform() < 0.7;
        }
        for (std::int64_t i = 0; i < query_mask.size(); ++i) {
            query_mask[i] = !c.masked || random.uniform() < 0.7;
        }
    }
    attention_kl::Problem p;
    Buffer<S> q_s, k_s, q_t, k_t, bias;
    Buffer<Compute<S>> grad;
    Buffer<double> scales;
    Buffer<unsigned char> key_mask, query_mask;
};

template <class S>
attention_kl::Array array_of(const Buffer<S>& x, std::int64_t heads, std::int64_t rows, std::int64_t width) {
    return {x.data(), heads * rows * width, rows * width, width, 1};
}

template <class S>
void compare(const Case& c, Random& random) {
    using T = Compute<S>;
    const attention_kl::Problem& p = c.problem;
    const Inputs<S> x(c, random);
    Buffer<T> loss(p.batch * p.heads * p.queries);
    Buffer<S> grad_q(p.for_q ? p.batch * p.heads * p.queries * p.student_width : 1);
    Buffer<S> grad_k(p.for_k ? p.batch * p.heads * p.keys * p.student_width : 1);
    attention_kl::Call call{};
    call.problem = p;
    attention_kl::Bias bias{x.bias.data(), 0, p.queries * p.keys, p.keys, dtype_of<S>};
    call.student = {array_of(x.q_s, p.heads, p.queries, p.student_width),
                    array_of(x.k_s, p.heads, p.keys, p.student_width), p.student_width, x.scales.data(),
                    c.biased ? bias : attention_kl::Bias{}};
    call.teacher = {array_of(x.q_t, p.heads, p.queries, p.teacher_width),
                    array_of(x.k_t, p.heads, p.keys, p.teacher_width), p.teacher_width, x.scales.data(),
                    attention_kl::Bias{}};
    call.key_mask = c.masked ? x.key_mask.data() : nullptr;
    call.query_mask = c.masked ? x.query_mask.data() : nullptr;
    call.grad_loss = x.grad.data();
    call.grad_batch_stride = p.heads * p.queries;
    call.grad_head_stride = p.queries;
    call.grad_row_stride = 1;
    call.loss = loss.data();
    call.grad_q = grad_q.data();
    call.grad_k = grad_k.data();
    const cpu::AttentionPlan plan = cpu::plan_attention(p, c.threads, std::int64_t{1} << 30);
    Buffer<char> workspace(plan.bytes);
    call.workspace = workspace.data();
    cpu::kernels().attention_kl_run(call, plan);

    const std::string where = std::string("attention_kl ") + name_of(p.dtype) + " " + std::to_string(p.queries) +
                              " x " + std::to_string(p.keys) + ", " + std::to_string(c.threads) + " threads: ";
    std::vector<double> want_q(p.batch * p.heads * p.queries * p.student_width), // H K and H^T Q
        want_k(p.batch * p.heads * p.keys * p.student_width);
    for (std::int64_t row = 0; row < p.batch * p.heads * p.queries; ++row) {
        const std::int64_t group = row / p.queries, b = group / p.heads, h = group % p.heads, i = row % p.queries;
        std::vector<double> u_s(p.keys, -HUGE_VAL), u_t(p.keys, -HUGE_VAL);
        const std::int64_t end = p.causal ? i + p.keys - p.queries + 1 : p.keys;
        double max_s = -HUGE_VAL, max_t = -HUGE_VAL, z_s = 0, z_t = 0, exact = 0;
        for (std::int64_t j = 0; j < end; ++j) {
            if (!x.key_mask[b * p.keys + j]) {
                continue;
            }
            double s = 0, t = 0;
            for (std::int64_t d = 0; d < p.student_width; ++d) {
                s += to_double(x.q_s[row * p.student_width + d]) *
                     to_double(x.k_s[(group * p.keys + j) * p.student_width + d]);
            }
            for (std::int64_t d = 0; d < p.teacher_width; ++d) {
                t += to_double(x.q_t[row * p.teacher_width + d]) *
                     to_double(x.k_t[(group * p.keys + j) * p.teacher_width + d]);
            }
            const double added = c.biased ? to_double(x.bias[(h * p.queries + i) * p.keys + j]) : 0;
            u_s[j] = (s * x.scales[h] + added) / p.temperature;
            u_t[j] = t * x.scales[h] / p.temperature;
            max_s = std::fmax(max_s, u_s[j]);
            max_t = std::fmax(max_t, u_t[j]);
        }
        for (std::int64_t j = 0; j < p.keys; ++j) {
            z_s += std::exp(u_s[j] - max_s);
            z_t += std::exp(u_t[j] - max_t);
        }
        const bool valid = x.query_mask[b * p.queries + i];
        for (std::int64_t j = 0; j < p.keys && valid; ++j) {
            const double log_s = u_s[j] - max_s - std::log(z_s), log_t = u_t[j] - max_t - std::log(z_t);
            const double p_s = std::exp(log_s), p_t = std::exp(log_t);
            exact += p_t == 0 ? 0 : p_t * (log_t - log_s);
            const double h_ij = static_cast<double>(x.grad[row]) * (p_s - p_t) * x.scales[h] / p.temperature;
            for (std::int64_t d = 0; d < p.student_width; ++d) {
                want_q[row * p.student_width + d] +=
                    h_ij * to_double(x.k_s[(group * p.keys + j) * p.student_width + d]);
                want_k[(group * p.keys + j) * p.student_width + d] +=
                    h_ij * to_double(x.q_s[row * p.student_width + d]);
            }
        }
        expect(near(loss[row], exact, 1e3 * rounding<T>, 1e2 * rounding<T>), where + "loss " + std::to_string(row));
    }
    const double absolute = smallest<S> + 1e3 * rounding<T>;
    for (std::size_t i = 0; i < want_q.size() && p.for_q; ++i) {
        expect(near(to_double(grad_q[i]), want_q[i], 2 * rounding<S>, absolute), where + "dQ " + std::to_string(i));
    }
    for (std::size_t i = 0; i < want_k.size() && p.for_k; ++i) {
        expect(near(to_double(grad_k[i]), want_k[i], 2 * rounding<S>, absolute), where + "dK " + std::to_string(i));
    }
}

template <class S>
void shapes() {
    Random random(7);
    int turn = 0; // cycles through options and threads instead of a full product
    const auto compare_in_turn = [&](std::int64_t queries, std::int64_t keys, std::int64_t width) {
        const bool causal = turn % 3 == 2 && keys >= queries;
        compare<S>({{1 + turn % 2, 1 + turn % 3, queries, keys, width, width % 5 + 1, causal, dtype_of<S>,
                     turn % 2 ? 0.7 : 1.0, turn % 4 != 3, turn % 4 != 2},
                    turn % 5 > 2,
                    turn % 7 > 3,
                    thread_counts[turn % 4]},
                   random);
        ++turn;
    };
    for (std::int64_t keys = 1; keys <= 66; keys += shape_stride) {
        compare_in_turn(keys % 9 + 1, keys, keys % 19 + 1);
    }
    for (const std::int64_t queries : {63, 64, 65, 130}) { // around the blocks
        compare_in_turn(queries, 131, 17);
        compare_in_turn(queries, 40, 48);
        compare_in_turn(queries, 200, 3);
    }
    compare_in_turn(20, 6000, 2); // blocks of eight queries
    for (int i = 0; i < 4; ++i) { // rows read in place; one or two keys beyond whole vectors
        compare_in_turn(18 + i, 49 + i % 2, 16 + i / 2 * 16);
    }
}

void run() {
    shapes<float>();
    shapes<BFloat16>();
    if (every_dtype) {
        shapes<double>();
        shapes<Half>();
    }
}

const Check check{"attention_kl", run};

} // namespace
} // namespace fastkd::sanitize
