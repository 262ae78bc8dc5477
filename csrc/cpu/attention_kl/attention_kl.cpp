// attention_kl on the CPU. The formulas are in common/attention_kl.h:
//
//     loss_i = KL(p^T_i || p^S_i),     H_ij = g_i (p^S_ij - p^T_ij) scale/tau,     dQ = H K,     dK = H^T Q
//
// The keys of a head are packed once. A block of queries is multiplied by all of them; its logits stay in the L2 cache
// until its losses, its rows of dQ and its part of dK are done. dK is summed over the blocks in order.
#include "cpu/attention_kl/row.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

using attention_kl::Array;
using attention_kl::Call;
using attention_kl::Network;

template <class S>
struct Attention {
    using T = Compute<S>;
    const Call& call;
    const AttentionPlan& plan;
    const attention_kl::Problem& problem = call.problem;

    // One head of one sample, and the part of the workspace for its keys.
    struct Head {
        std::int64_t b, h;
        char* team;
    };

    template <class P = T>
    FASTKD_INLINE P* at(const Head& head, std::int64_t offset) const {
        return reinterpret_cast<P*>(head.team + offset);
    }
    FASTKD_INLINE char* team(std::int64_t index) const {
        return static_cast<char*>(call.workspace) + index * plan.team_bytes;
    }
    FASTKD_INLINE T* scratch(std::int64_t slot, std::int64_t offset) const {
        return reinterpret_cast<T*>(static_cast<char*>(call.workspace) + plan.teams * plan.team_bytes +
                                    slot * plan.thread_bytes + offset);
    }
    FASTKD_INLINE static const S* rows_of(const Array& x, const Head& head, std::int64_t row) {
        return static_cast<const S*>(x.data) + head.b * x.batch + head.h * x.head + row * x.row;
    }
    FASTKD_INLINE std::int64_t count_of(std::int64_t block) const {
        const std::int64_t left = problem.queries - block * plan.block;
        return left < plan.block ? left : plan.block;
    }
    // Return the number of keys that a query attends to, before masks.
    FASTKD_INLINE std::int64_t keys_of(std::int64_t query) const {
        return problem.causal ? query + (problem.keys - problem.queries) + 1 : problem.keys;
    }
    // Return the number of keys that any query of a block attends to.
    FASTKD_INLINE std::int64_t block_keys(std::int64_t block) const {
        return keys_of(block * plan.block + count_of(block) - 1);
    }

    // ---- keys

    void pack_keys(const Head& head) const {
        const Array &s = call.student.k, &t = call.teacher.k;
        pack<S>(rows_of(s, head, 0), s.row, s.col, problem.keys, problem.student_width, nullptr, nullptr,
                at(head, plan.keys_s));
        pack<S>(rows_of(t, head, 0), t.row, t.col, problem.keys, problem.teacher_width, nullptr, nullptr,
                at(head, plan.keys_t));
        if (problem.for_q) {
            pack<S>(rows_of(s, head, 0), s.col, s.row, problem.student_width, problem.keys, nullptr, nullptr,
                    at(head, plan.key_rows));
        }
        if (problem.for_k) {
            clear(at(head, plan.grad_k), plan.keys * plan.width);
        }
        if (call.key_mask != nullptr) {
            T* mask = at(head, plan.key_mask);
            for (std::int64_t m = 0; m < plan.keys; ++m) {
                mask[m] = m < problem.keys && call.key_mask[head.b * problem.keys + m] ? T(1) : T(0);
            }
        }
    }
    void write_grad_k(const Head& head) const {
        write_gradient(call.grad_k, (head.b * problem.heads + head.h) * problem.keys, problem.keys,
                       at(head, plan.grad_k));
    }
    // Write rows of a gradient from a buffer whose rows are padded.
    FASTKD_INLINE void write_gradient(void* out, std::int64_t row, std::int64_t rows, const T* buffer) const {
        const std::int64_t width = problem.student_width;
        if (call.wide) {
            unpack<T>(buffer, plan.width, rows, width, static_cast<T*>(out) + row * width, width, 1);
        } else {
            unpack<S>(buffer, plan.width, rows, width, static_cast<S*>(out) + row * width, width, 1);
        }
    }

    // ---- queries

    // out[r][m] = q_r . k_m for a block's queries and the first `keys` keys, rounded up to a whole panel.
    FASTKD_INLINE void multiply(const Network& network, const Head& head, std::int64_t block, std::int64_t keys,
                                std::int64_t width, const T* packed, T* queries, T* out) const {
        const Array& q = network.q;
        copy_rows<S>(rows_of(q, head, block * plan.block), q.row, q.col, count_of(block), width, queries);
        const Panels<T> panels(problem.keys);
        for (std::int64_t p = 0; p < panels.size && panels.begin(p) < keys; ++p) {
            panel_product<T>(panels.width(p), queries, width, 1, count_of(block), packed + panels.begin(p) * width,
                             width, out + panels.begin(p), plan.ld, false);
        }
    }
    // Return the logits' maximum of one query.
    FASTKD_INLINE T logits(const Network& network, const Head& head, std::int64_t query, T* row, std::int64_t cols,
                           T* bias) const {
        const std::int64_t valid = keys_of(query);
        const double inverse = 1 / problem.temperature;
        const attention_kl::Bias& given = network.bias;
        if (given.data != nullptr) {
            load_bias(given, head.b * given.batch + head.h * given.head + query * given.row, valid, bias);
        }
        return logits_row<T>(row, valid, cols, static_cast<T>(network.scales[head.h] * inverse),
                             static_cast<T>(inverse), given.data == nullptr ? nullptr : bias,
                             call.key_mask == nullptr ? nullptr : at(head, plan.key_mask));
    }
    FASTKD_INLINE double row_gradient(const Head& head, std::int64_t query) const {
        return call.grad_loss == nullptr
                   ? 1
                   : static_cast<double>(static_cast<const T*>(
                         call.grad_loss)[head.b * call.grad_batch_stride + head.h * call.grad_head_stride +
                                         query * call.grad_row_stride]);
    }

    // Compute the losses of a block, its rows of dQ, and its rows of H for dK, in the scratch memory of `slot`.
    void process_block(const Head& head, std::int64_t block, std::int64_t slot) const {
        T *s = scratch(slot, plan.logits_s), *t = scratch(slot, plan.logits_t);
        const std::int64_t first = block * plan.block, rows = count_of(block), keys = block_keys(block);
        multiply(call.student, head, block, keys, problem.student_width, at(head, plan.keys_s),
                 scratch(slot, plan.queries_s), s);
        multiply(call.teacher, head, block, keys, problem.teacher_width, at(head, plan.keys_t),
                 scratch(slot, plan.queries_t), t);
        const bool gradients = problem.for_q || problem.for_k;
        const std::int64_t cols = round_up(keys, lanes<T>);
        for (std::int64_t r = 0; r < rows; ++r) {
            const std::int64_t query = first + r;
            T *row_s = s + r * plan.ld, *row_t = t + r * plan.ld;
            T* loss = static_cast<T*>(call.loss);
            loss = loss == nullptr ? nullptr : loss + (head.b * problem.heads + head.h) * problem.queries + query;
            if (call.query_mask != nullptr && !call.query_mask[head.b * problem.queries + query]) {
                if (loss != nullptr) {
                    *loss = 0;
                }
                clear(row_s, cols);
                continue;
            }
            T* bias = scratch(slot, plan.bias);
            const T max_s = logits(call.student, head, query, row_s, cols, bias);
            const T max_t = logits(call.teacher, head, query, row_t, cols, bias);
            const AttentionSums sums = gradients ? exp_rows<T, true>(row_s, row_t, cols, max_s, max_t)
                                                 : exp_rows<T, false>(row_s, row_t, cols, max_s, max_t);
            if (loss != nullptr) {
                *loss = static_cast<T>(sums.loss());
            }
            if (gradients) {
                const double factor = row_gradient(head, query) * call.student.scales[head.h] / problem.temperature;
                gradient_row(row_s, row_t, cols, sums, static_cast<T>(factor));
            }
        }
        if (problem.for_q) {
            T* out = scratch(slot, plan.grad_q);
            const Panels<T> panels(problem.student_width);
            for (std::int64_t p = 0; p < panels.size; ++p) {
                panel_product<T>(panels.width(p), s, plan.ld, 1, rows,
                                 at(head, plan.key_rows) + panels.begin(p) * problem.keys, keys, out + panels.begin(p),
                                 plan.width, false);
            }
            write_gradient(call.grad_q, (head.b * problem.heads + head.h) * problem.queries + first, rows, out);
        }
        if (problem.for_k) {
            const Array& q = call.student.q;
            pack<S>(rows_of(q, head, first), q.col, q.row, problem.student_width, rows, nullptr, nullptr,
                    scratch(slot, plan.query_rows));
        }
    }
    // Add a processed block's part of dK, for the keys [from, to).
    void add_grad_k(const Head& head, std::int64_t block, std::int64_t slot, std::int64_t from, std::int64_t to) const {
        const std::int64_t keys = block_keys(block), rows = count_of(block);
        to = to < keys ? to : keys;
        if (from >= to) {
            return;
        }
        const Panels<T> panels(problem.student_width);
        for (std::int64_t p = 0; p < panels.size; ++p) {
            panel_product<T>(panels.width(p), scratch(slot, plan.logits_s) + from, 1, plan.ld, to - from,
                             scratch(slot, plan.query_rows) + panels.begin(p) * rows, rows,
                             at(head, plan.grad_k) + from * plan.width + panels.begin(p), plan.width, true);
        }
    }

    // ---- heads

    // Request the rows of a head that this thread will probably process next: windows are too short for the hardware to
    // recognise their streams.
    FASTKD_INLINE void prefetch(const Head& head) const {
        const auto all = [&](const Array& x, std::int64_t rows, std::int64_t width) __attribute__((always_inline)) {
            for (std::int64_t r = 0; r < rows; ++r) {
                const char* row = reinterpret_cast<const char*>(rows_of(x, head, r)); // strided columns: only the first
                for (std::int64_t byte = 0; byte < width * static_cast<std::int64_t>(sizeof(S)); byte += 64) {
                    __builtin_prefetch(row + byte, 0, 2);
                }
            }
        };
        all(call.student.q, problem.queries, problem.student_width);
        all(call.student.k, problem.keys, problem.student_width);
        all(call.teacher.q, problem.queries, problem.teacher_width);
        all(call.teacher.k, problem.keys, problem.teacher_width);
    }
    void one_thread(const Head& head, std::int64_t slot) const {
        pack_keys(head);
        const std::int64_t next = head.b * problem.heads + head.h + plan.teams;
        if (problem.queries + problem.keys <= 512 && next < problem.batch * problem.heads) {
            prefetch({next / problem.heads, next % problem.heads, nullptr});
        }
        for (std::int64_t block = 0; block < plan.blocks; ++block) {
            process_block(head, block, slot);
            if (problem.for_k) {
                add_grad_k(head, block, slot, 0, problem.keys);
            }
        }
        if (problem.for_k) {
            write_grad_k(head);
        }
    }
    // As many blocks as there are threads are processed, then added to dK, each thread some of the keys.
    void all_threads(const Head& head) const {
        const int threads = plan.team_threads;
        const std::int64_t part = round_up(ceil_div(problem.keys, std::int64_t{threads}), attention_padding);
        pack_keys(head);
        for (std::int64_t begin = 0; begin < plan.blocks; begin += threads) {
            const std::int64_t some = plan.blocks - begin < threads ? plan.blocks - begin : threads;
            parallel_for(threads, some, [&](std::int64_t i, int) { process_block(head, begin + i, i); });
            if (problem.for_k) {
                parallel_for(threads, threads, [&](std::int64_t share, int) {
                    for (std::int64_t i = 0; i < some; ++i) {
                        add_grad_k(head, begin + i, i, share * part, (share + 1) * part);
                    }
                });
            }
        }
        if (problem.for_k) {
            write_grad_k(head);
        }
    }
    void run() const {
        const std::int64_t heads = problem.batch * problem.heads;
        if (plan.team_threads == 1) {
            parallel_for(static_cast<int>(plan.teams), heads, [&](std::int64_t index, int thread) {
                one_thread({index / problem.heads, index % problem.heads, team(thread)}, thread);
            });
            return;
        }
        for (std::int64_t index = 0; index < heads; ++index) {
            all_threads({index / problem.heads, index % problem.heads, team(0)});
        }
    }
};

} // namespace

void attention_kl_run(const Call& call, const AttentionPlan& plan) {
    with_storage(call.problem.dtype, [&](auto storage) { Attention<decltype(storage)>{call, plan}.run(); });
}

} // namespace fastkd::cpu::FASTKD_ISA
