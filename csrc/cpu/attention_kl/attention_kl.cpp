// attention_kl on the CPU. The formulas are in common/attention_kl.h:
//
//     loss_i = KL(p^T_i || p^S_i),     H_ij = g_i (p^S_ij - p^T_ij) scale/tau,     dQ = H K,     dK = H^T Q
//
// The keys of a head are packed once, for Q K^T. A block of queries is multiplied by all of them; its logits stay in
// the L2 cache until its losses, its rows of dQ and its part of dK are done. dK is summed over the blocks in order.
// Rows of float or double whose columns are contiguous are multiplied where they are: Q in all products, K in H K. If
// they fill whole vectors, dQ and dK are computed in the results themselves. bfloat16 is multiplied in pairs in Q K^T.
// H K and H^T Q widen it: rounding H would lose the digits in which the rows of H cancel.
//
// Windows (49 keys of 32 columns, say) are too short to amortise anything. Their maxima, sums and logarithms are
// computed for groups of rows (row.h), one or two keys beyond whole vectors separately from the others, and while the
// products of one window run, the next one is prefetched.
#include "cpu/attention_kl/product.h"
#include "cpu/attention_kl/row.h"
#include "cpu/kernels.h"
#include "cpu/pages.h"
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
    const std::int64_t rest = problem.causal ? 0 : rest_of<T>(problem.keys);
    const bool windows = problem.queries + problem.keys <= 512; // too short for the hardware to recognise streams
    const bool pairs = plan.pairs && rest == 0;                 // multiplies Q K^T as bfloat16
    const bool streams = windows && streams_gradients();        // stores gradients past the caches

    // One head of one sample, and the part of the workspace for its keys.
    struct Head {
        std::int64_t b, h;
        char* team;
    };

    FASTKD_INLINE Head head_at(std::int64_t index, std::int64_t index_of_team) const {
        return {index / problem.heads, index % problem.heads, team(index_of_team)};
    }
    // The rows of the next head, to prefetch during the products of this one.
    struct Upcoming {
        Prefetch q_s, k_s, q_t, k_t, grad_q, grad_k;
    };
    FASTKD_INLINE Upcoming upcoming_of(const Head& head) const {
        const auto all = [&](const Array& x, std::int64_t rows, std::int64_t width) __attribute__((always_inline)) {
            // Of strided columns, only the first.
            constexpr std::int64_t size = sizeof(S);
            const char* begin = reinterpret_cast<const char*>(rows_of(x, head, 0));
            return x.col == 1 && x.row == width ? Prefetch{begin, 1, 0, rows * width * size}
                                                : Prefetch{begin, rows, x.row * size, width * size};
        };
        const std::int64_t size = call.wide ? sizeof(T) : sizeof(S);
        const auto gradient = [&](void* to, bool needed, std::int64_t rows) __attribute__((always_inline)) {
            const std::int64_t bytes = rows * problem.student_width * size;
            return needed && !streams
                       ? Prefetch{static_cast<const char*>(to) + (head.b * problem.heads + head.h) * bytes, 1, 0, bytes}
                       : Prefetch{};
        };
        return {all(call.student.q, problem.queries, problem.student_width),
                all(call.student.k, problem.keys, problem.student_width),
                all(call.teacher.q, problem.queries, problem.teacher_width),
                all(call.teacher.k, problem.keys, problem.teacher_width),
                gradient(call.grad_q, problem.for_q, problem.queries),
                gradient(call.grad_k, problem.for_k, problem.keys)};
    }

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

    FASTKD_INLINE void pack_keys_of(const Array& k, const Head& head, std::int64_t width, T* packed, T* last) const {
        const std::int64_t count = problem.keys - rest;
        if constexpr (is_bf16<S>) {
            if (pairs) {
                pack_pairs(rows_of(k, head, 0), k.row, k.col, count, width, reinterpret_cast<PairWord*>(packed));
                return;
            }
        }
        pack<S>(rows_of(k, head, 0), k.row, k.col, count, width, nullptr, nullptr, packed);
        copy_rows<S>(rows_of(k, head, count), k.row, k.col, rest, width, last);
    }
    void pack_keys(const Head& head) const {
        const Array &s = call.student.k, &t = call.teacher.k;
        pack_keys_of(s, head, problem.student_width, at(head, plan.keys_s), at(head, plan.rest_s));
        pack_keys_of(t, head, problem.teacher_width, at(head, plan.keys_t), at(head, plan.rest_t));
        if (problem.for_q && !columns_in_place(s)) {
            pack<S>(rows_of(s, head, 0), s.col, s.row, problem.student_width, problem.keys, nullptr, nullptr,
                    at(head, plan.key_rows));
        }
        if (call.key_mask != nullptr) {
            T* mask = at(head, plan.key_mask);
            for (std::int64_t m = 0; m < plan.keys; ++m) {
                mask[m] = m < problem.keys && call.key_mask[head.b * problem.keys + m] ? T(1) : T(0);
            }
        }
    }
    // Return whether a product can read the rows of x as its left operand, or its columns as its right one.
    FASTKD_INLINE static bool rows_in_place(const Array& x) { return sizeof(S) == sizeof(T) && x.col == 1; }
    FASTKD_INLINE bool columns_in_place(const Array& x) const {
        return rows_in_place(x) && problem.student_width == plan.width;
    }
    // Return whether products can be written to the gradients.
    FASTKD_INLINE bool gradients_in_place() const {
        return (call.wide || sizeof(S) == sizeof(T)) && problem.student_width == plan.width;
    }
    FASTKD_INLINE T* grad_k(const Head& head) const {
        return gradients_in_place() ? static_cast<T*>(call.grad_k) +
                                          (head.b * problem.heads + head.h) * problem.keys * problem.student_width
                                    : at(head, plan.grad_k);
    }
    void write_grad_k(const Head& head) const {
        if (!gradients_in_place()) {
            write_gradient(call.grad_k, (head.b * problem.heads + head.h) * problem.keys, problem.keys,
                           at(head, plan.grad_k));
        }
    }
    // Gradients of many windows leave the caches before they are read; a usual store would also read them first.
    bool streams_gradients() const {
        const std::int64_t rows = (problem.for_q ? problem.queries : 0) + (problem.for_k ? problem.keys : 0);
        const auto aligned = [](const void* to) { return reinterpret_cast<std::uintptr_t>(to) % 64 == 0; };
        return plan.team_threads == 1 && gradients_in_place() && aligned(call.grad_q) && aligned(call.grad_k) &&
               problem.batch * problem.heads * rows * plan.width * std::int64_t{sizeof(T)} >= stream_bytes;
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

    // out[r][m] = q_r . k_m for a block's queries and the first `keys` keys, rounded up to a whole panel. Return the
    // queries, unless they are multiplied as pairs.
    FASTKD_INLINE Rows<T> multiply(const Network& network, const Head& head, std::int64_t block, std::int64_t keys,
                                   std::int64_t width, const T* packed, T* queries, T* out, Prefetch fetch) const {
        const Array& q = network.q;
        const S* rows = rows_of(q, head, block * plan.block);
        const std::int64_t count = count_of(block);
        const Panels<T> panels(problem.keys - rest);
        if constexpr (is_bf16<S>) {
            if (pairs) {
                const std::int64_t inner = pairs_of(width);
                auto* left = reinterpret_cast<PairWord*>(queries);
                copy_pairs(rows, q.row, q.col, count, width, left);
                fetch.spread(panels.size);
                for (std::int64_t p = 0; p < panels.size && panels.begin(p) < keys; ++p) {
                    fetch.step();
                    panel_product_pairs(panels.width(p), left, inner, 1, count,
                                        reinterpret_cast<const PairWord*>(packed) + panels.begin(p) * inner, inner,
                                        out + panels.begin(p), plan.ld, false);
                }
                return {};
            }
        }
        Rows<T> left{queries, width, 1};
        if (rows_in_place(q)) {
            left = {reinterpret_cast<const T*>(rows), q.row, 1};
        } else {
            copy_rows<S>(rows, q.row, q.col, count, width, queries);
        }
        product<T>(left, count, {packed, true}, panels, keys - rest, width, out, plan.ld, Store::set, fetch);
        return left;
    }
    // Turn the products of a group's rows into logits, if a scale is not enough; return the scale that remains.
    FASTKD_INLINE T logits(const Network& network, const Head& head, std::int64_t first, std::int64_t rows,
                           std::int64_t cols, T* products, GroupNetwork<T>& group, T* bias) const {
        const double scale = network.scales[head.h] / problem.temperature;
        const attention_kl::Bias& given = network.bias;
        if (given.data == nullptr && call.key_mask == nullptr && keys_of(first) == cols + rest) {
            return static_cast<T>(scale);
        }
        for (std::int64_t r = 0; r < rows; ++r) {
            const std::int64_t query = first + r, valid = keys_of(query);
            if (given.data != nullptr) {
                load_bias(given, head.b * given.batch + head.h * given.head + query * given.row, valid, bias);
            }
            logits_row<T>(products + r * plan.ld, group, r, cols, rest, valid, static_cast<T>(scale),
                          static_cast<T>(1 / problem.temperature), given.data == nullptr ? nullptr : bias,
                          call.key_mask == nullptr ? nullptr : at(head, plan.key_mask));
        }
        return T(1);
    }
    FASTKD_INLINE double row_gradient(const Head& head, std::int64_t query) const {
        return call.grad_loss == nullptr
                   ? 1
                   : static_cast<double>(static_cast<const T*>(
                         call.grad_loss)[head.b * call.grad_batch_stride + head.h * call.grad_head_stride +
                                         query * call.grad_row_stride]);
    }

    static constexpr std::int64_t steps_per_group = 3;
    FASTKD_INLINE static void step(Prefetch (&fetch)[2]) {
        fetch[0].step();
        fetch[1].step();
    }
    // Compute the sums and rows of H of up to row_group rows of a block from the products in s and t. `first` is the
    // block's first row, `at` the group's first row in it.
    void process_rows(const Head& head, std::int64_t first, std::int64_t at, std::int64_t rows, std::int64_t keys, T* s,
                      T* t, RowGroup<T>& group, BlockSums& sums, T* bias, Prefetch (&fetch)[2]) const {
        const bool gradients = problem.for_q || problem.for_k;
        const std::int64_t cols = round_up(keys - rest, lanes<T>);
        const T scale_s = logits(call.student, head, first + at, rows, cols, s, group.s, bias);
        const T scale_t = logits(call.teacher, head, first + at, rows, cols, t, group.t, bias);
        max_rows(s, plan.ld, rows, cols, rest, scale_s, group.s);
        max_rows(t, plan.ld, rows, cols, rest, scale_t, group.t);
        const double factor = call.student.scales[head.h] / problem.temperature;
        for (std::int64_t r = 0; r < rows; ++r) {
            group.factor[r] = static_cast<T>(row_gradient(head, first + at + r) * factor);
        }
        const auto rest_of_pass = [&](auto count) __attribute__((always_inline)) {
            constexpr int vectors = decltype(count)::value;
            step(fetch);
            exp_rows<T, vectors>(s, t, plan.ld, rows, cols, scale_s, scale_t, group);
            step(fetch);
            finish_rows(group, rest, rows, gradients ? s + cols : nullptr, plan.ld, sums, at);
            step(fetch);
            if (gradients) {
                gradient_rows<T, vectors>(s, t, plan.ld, rows, cols, group);
            }
        };
        switch (cols / lanes<T>) {
        case 3:
            rest_of_pass(std::integral_constant<int, 3>{});
            break;
        case 4:
            rest_of_pass(std::integral_constant<int, 4>{});
            break;
        default:
            rest_of_pass(std::integral_constant<int, 0>{});
        }
        const unsigned char* mask = queries_mask(head, first + at);
        for (std::int64_t r = 0; r < rows && gradients && mask != nullptr; ++r) {
            if (mask[r] == 0) {
                clear(s + r * plan.ld, round_up(keys, lanes<T>));
            }
        }
    }
    // Return the mask from a query on, or null.
    FASTKD_INLINE const unsigned char* queries_mask(const Head& head, std::int64_t query) const {
        return call.query_mask == nullptr ? nullptr : call.query_mask + head.b * problem.queries + query;
    }

    // Compute the losses of a block, its rows of dQ, and its rows of H for dK, in the scratch memory of `slot`.
    void process_block(const Head& head, std::int64_t block, std::int64_t slot, const Upcoming& upcoming) const {
        T *s = scratch(slot, plan.logits_s), *t = scratch(slot, plan.logits_t);
        const std::int64_t first = block * plan.block, rows = count_of(block), keys = block_keys(block);
        const Rows<T> q_s = multiply(call.student, head, block, keys, problem.student_width, at(head, plan.keys_s),
                                     scratch(slot, plan.queries_s), s, upcoming.k_s);
        const Rows<T> q_t = multiply(call.teacher, head, block, keys, problem.teacher_width, at(head, plan.keys_t),
                                     scratch(slot, plan.queries_t), t, upcoming.k_t);
        RowGroup<T> group;
        BlockSums sums;
        Prefetch queries[] = {upcoming.q_s, upcoming.q_t};
        for (Prefetch& fetch : queries) {
            fetch.spread(steps_per_group * ceil_div(rows, row_group));
        }
        for (std::int64_t r = 0; r < rows; r += row_group) {
            const std::int64_t some = rows - r < row_group ? rows - r : row_group;
            for (std::int64_t j = 0; j < rest; ++j) {
                column_product(q_s.data + r * q_s.row, q_s.row, some, at(head, plan.rest_s) + j * problem.student_width,
                               problem.student_width, group.s.rest[j]);
                column_product(q_t.data + r * q_t.row, q_t.row, some, at(head, plan.rest_t) + j * problem.teacher_width,
                               problem.teacher_width, group.t.rest[j]);
            }
            process_rows(head, first, r, some, keys, s + r * plan.ld, t + r * plan.ld, group, sums,
                         scratch(slot, plan.bias), queries);
        }
        if (call.loss != nullptr) {
            const std::int64_t row = (head.b * problem.heads + head.h) * problem.queries + first;
            block_losses(sums, rows, queries_mask(head, first), static_cast<T*>(call.loss) + row);
        }
        const Array &q = call.student.q, &k = call.student.k;
        const Panels<T> panels(problem.student_width);
        if (problem.for_q) {
            const std::int64_t row = (head.b * problem.heads + head.h) * problem.queries + first;
            T* out =
                gradients_in_place() ? static_cast<T*>(call.grad_q) + row * plan.width : scratch(slot, plan.grad_q);
            const Columns<T> right = columns_in_place(k)
                                         ? Columns<T>{reinterpret_cast<const T*>(rows_of(k, head, 0)), false, k.row}
                                         : Columns<T>{at(head, plan.key_rows), true};
            product<T>({s, plan.ld, 1}, rows, right, panels, plan.width, keys, out, plan.width,
                       streams ? Store::stream : Store::set, upcoming.grad_q);
            if (!gradients_in_place()) {
                write_gradient(call.grad_q, row, rows, out);
            }
        }
        if (problem.for_k && !columns_in_place(q)) {
            pack<S>(rows_of(q, head, first), q.col, q.row, problem.student_width, rows, nullptr, nullptr,
                    scratch(slot, plan.query_rows));
        }
    }
    // Add a processed block's part of dK, for the keys [from, to). The first block that contains a key sets it.
    void add_grad_k(const Head& head, std::int64_t block, std::int64_t slot, std::int64_t from, std::int64_t to,
                    const Prefetch& fetch) const {
        const Array& q = call.student.q;
        const Columns<T> right =
            columns_in_place(q)
                ? Columns<T>{reinterpret_cast<const T*>(rows_of(q, head, block * plan.block)), false, q.row}
                : Columns<T>{scratch(slot, plan.query_rows), true};
        const std::int64_t earlier = block == 0 ? 0 : block_keys(block - 1), all = block_keys(block);
        const auto part = [&](std::int64_t begin, std::int64_t end, Store mode) __attribute__((always_inline)) {
            if (begin < end) {
                product<T>({scratch(slot, plan.logits_s) + begin, 1, plan.ld}, end - begin, right,
                           Panels<T>(problem.student_width), plan.width, count_of(block),
                           grad_k(head) + begin * plan.width, plan.width, mode, fetch);
            }
        };
        part(from, to < earlier ? to : earlier, Store::add);
        part(from > earlier ? from : earlier, to < all ? to : all,
             streams && plan.blocks == 1 ? Store::stream : Store::set);
    }

    // ---- heads

    // `next` is the head that this thread will probably process next, or past the end.
    void one_thread(std::int64_t index, std::int64_t next, std::int64_t slot) const {
        const Head head = head_at(index, slot);
        Upcoming upcoming;
        if (windows && next < problem.batch * problem.heads) {
            upcoming = upcoming_of(head_at(next, slot));
        }
        pack_keys(head);
        for (std::int64_t block = 0; block < plan.blocks; ++block) {
            process_block(head, block, slot, upcoming);
            if (problem.for_k) {
                add_grad_k(head, block, slot, 0, problem.keys, upcoming.grad_k);
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
            parallel_for(threads, some, [&](std::int64_t i, int) { process_block(head, begin + i, i, {}); });
            if (problem.for_k) {
                parallel_for(threads, threads, [&](std::int64_t share, int) {
                    for (std::int64_t i = 0; i < some; ++i) {
                        add_grad_k(head, begin + i, i, share * part, (share + 1) * part, {});
                    }
                });
            }
        }
        if (problem.for_k) {
            write_grad_k(head);
        }
    }
    // If malloc takes the gradients of windows fresh from the system, page faults take up to half of the call.
    void request_pages(void* gradient, std::int64_t rows) const {
        const std::int64_t size = call.wide ? sizeof(T) : sizeof(S);
        advise_huge_pages(gradient, rows * problem.student_width * size, stream_bytes);
    }
    void run() const {
        const std::int64_t heads = problem.batch * problem.heads;
        request_pages(call.grad_q, problem.for_q ? heads * problem.queries : 0);
        request_pages(call.grad_k, problem.for_k ? heads * problem.keys : 0);
        if (plan.team_threads == 1) {
            // Consecutive windows, so that a thread knows its next one, but enough tasks to balance the threads.
            const std::int64_t fair = heads / (8 * plan.teams);
            const std::int64_t some = windows && fair > 1 ? smaller(fair, 16) : 1;
            parallel_for(static_cast<int>(plan.teams), ceil_div(heads, some), [&](std::int64_t task, int thread) {
                const std::int64_t end = smaller((task + 1) * some, heads);
                for (std::int64_t index = task * some; index < end; ++index) {
                    one_thread(index, index + 1 < end ? index + 1 : end + (plan.teams - 1) * some, thread);
                }
                if (streams) {
                    stream_fence();
                }
            });
            return;
        }
        for (std::int64_t index = 0; index < heads; ++index) {
            all_threads(head_at(index, 0));
        }
    }
};

} // namespace

void attention_kl_run(const Call& call, const AttentionPlan& plan) {
    with_storage(call.problem.dtype, [&](auto storage) { Attention<decltype(storage)>{call, plan}.run(); });
}

} // namespace fastkd::cpu::FASTKD_ISA
