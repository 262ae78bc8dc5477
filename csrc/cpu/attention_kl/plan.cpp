#include "cpu/attention_kl/plan.h"

#include "common/arena.h"
#include "cpu/isa.h"

namespace fastkd::cpu {
namespace {

constexpr std::int64_t logits_bytes = 512 * 1024; // of a block, both networks

AttentionPlan plan_for(const attention_kl::Problem& problem, int threads, bool share_heads) {
    const std::int64_t size = problem.dtype == DType::Float64 ? 8 : 4;
    AttentionPlan plan{};
    plan.pairs = problem.dtype == DType::BFloat16 && bf16_products();
    plan.keys = round_up(problem.keys, attention_padding);
    plan.width = round_up(problem.student_width, attention_padding);
    plan.ld = plan.keys + attention_padding;
    const std::int64_t fits = logits_bytes / (2 * plan.ld * size) / 8 * 8;
    plan.block = fits < 8 ? 8 : (fits < attention_max_block ? fits : attention_max_block);
    const std::int64_t all = round_up(problem.queries, 8);
    plan.block = plan.block < all ? plan.block : all;
    plan.blocks = ceil_div(problem.queries, plan.block);

    Arena<64> team;
    plan.keys_s = team.take_bytes(plan.keys * problem.student_width * size);
    plan.keys_t = team.take_bytes(plan.keys * problem.teacher_width * size);
    plan.rest_s = team.take_bytes(2 * problem.student_width * size);
    plan.rest_t = team.take_bytes(2 * problem.teacher_width * size);
    if (problem.for_q) {
        plan.key_rows = team.take_bytes(problem.keys * plan.width * size);
    }
    plan.key_mask = team.take_bytes(plan.keys * size);
    const std::int64_t limited = team.bytes();
    if (problem.for_k) {
        plan.grad_k = team.take_bytes(plan.keys * plan.width * size);
    }
    plan.team_bytes = team.bytes();

    Arena<64> thread;
    plan.queries_s = thread.take_bytes(plan.block * problem.student_width * size);
    plan.queries_t = thread.take_bytes(plan.block * problem.teacher_width * size);
    if (problem.for_k) {
        plan.query_rows = thread.take_bytes(plan.block * plan.width * size);
    }
    plan.logits_s = thread.take_bytes(plan.block * plan.ld * size);
    plan.logits_t = thread.take_bytes(plan.block * plan.ld * size);
    plan.bias = thread.take_bytes(plan.keys * size);
    if (problem.for_q) {
        plan.grad_q = thread.take_bytes(plan.block * plan.width * size);
    }
    plan.thread_bytes = thread.bytes();

    plan.teams = share_heads ? 1 : threads;
    plan.team_threads = share_heads ? threads : 1;
    plan.bytes = plan.teams * plan.team_bytes + threads * plan.thread_bytes;
    plan.minimum = plan.teams * limited + threads * plan.thread_bytes;
    return plan;
}

} // namespace

AttentionPlan plan_attention(const attention_kl::Problem& problem, int threads, std::int64_t limit) {
    const std::int64_t heads = problem.batch * problem.heads;
    if (heads % threads == 0 || heads >= 4 * threads) { // else some threads would wait for the last heads
        const AttentionPlan plan = plan_for(problem, threads, false);
        if (plan.minimum <= limit) {
            return plan;
        }
    }
    AttentionPlan plan = plan_for(problem, threads, true);
    while (plan.minimum > limit && threads > 1) {
        plan = plan_for(problem, --threads, true);
    }
    return plan;
}

} // namespace fastkd::cpu
