#include "cpu/relation/plan.h"

#include "common/arena.h"
#include "cpu/isa.h"

namespace fastkd::cpu {
namespace {

// Return the plan with the most threads, at least one, whose workspace fits `limit`.
template <class Plan>
auto with_most_threads(int threads, std::int64_t limit, const Plan& plan_for) {
    auto plan = plan_for(threads);
    while (plan.minimum > limit && threads > 1) {
        plan = plan_for(--threads);
    }
    return plan;
}

RelationPlan plan_relation_for(const relation::Options& options, std::int64_t student_width, std::int64_t teacher_width,
                               bool stored, bool backward, int threads, std::int64_t limit) {
    const std::int64_t size = options.dtype == DType::Float64 ? 8 : 4;
    RelationPlan plan{};
    plan.stored = stored;
    plan.backward = backward;
    plan.pairs = options.dtype == DType::BFloat16 && bf16_products();
    plan.amx = plan.pairs && amx_products();
    plan.packed_widths[0] = plan.amx ? round_up(student_width, 2) : student_width; // both packs hold whole pairs
    plan.packed_widths[1] = plan.amx ? round_up(teacher_width, 2) : teacher_width;
    plan.problems = options.cross ? 1 : options.batch;
    plan.groups = options.others();
    plan.block = stored ? relation::stored_block : streamed_block;
    plan.group_blocks = ceil_div(options.rows, plan.block);
    plan.blocks = plan.groups * plan.group_blocks;
    plan.student_width = round_up(student_width, 16); // whole vectors of every instruction set
    const std::int64_t rows = plan.blocks * plan.block;

    Arena<64> thread;
    plan.tiles = thread.take_bytes(4 * plan.block * plan.block * size);
    if (backward) {
        plan.panel = thread.take_bytes(stored ? 2 * rows * 48 * size : plan.block * plan.student_width * size);
    }
    plan.thread_bytes = thread.bytes();

    const std::int64_t packed_block =
        stored
            ? (backward ? 0 : plan.block * stored_chunk * size)
            : plan.block * (plan.packed_widths[0] + plan.packed_widths[1] + (backward ? plan.student_width : 0)) * size;
    const std::int64_t matrix = stored && backward ? rows * rows * size : 0;
    const std::int64_t accumulator = !stored && backward ? rows * plan.student_width * size : 0;
    const std::int64_t row_sums = backward ? rows * 8 : 0;
    const auto team_limited = [&](std::int64_t resident) {
        return round_up(resident * packed_block, 64) + round_up(matrix, 64) + round_up(row_sums, 64);
    };
    const std::int64_t all = plan.blocks;
    plan.teams = plan.problems < threads ? plan.problems : threads;
    // One problem per thread if there are enough problems and all fit; otherwise all threads share one problem.
    if (plan.problems < threads || threads * (plan.thread_bytes + team_limited(all)) > limit) {
        plan.teams = 1;
    }
    plan.team_threads = plan.teams > 1 ? 1 : threads;
    const std::int64_t scratch = threads * plan.thread_bytes;
    plan.resident = all;
    plan.minimum = scratch + plan.teams * team_limited(stored || all < 2 ? all : 2);
    if (!stored && plan.teams == 1) {
        while (plan.resident > 2 && scratch + team_limited(plan.resident) > limit) {
            const std::int64_t fits = packed_block == 0 ? 2 : (limit - scratch - team_limited(0)) / packed_block;
            plan.resident = fits < plan.resident ? (fits < 2 ? 2 : fits / 2 * 2) : plan.resident - 1;
        }
    }
    Arena<64> team;
    plan.packs = team.take_bytes(plan.resident * packed_block);
    plan.accumulator = team.take_bytes(accumulator);
    plan.row_sums = team.take_bytes(row_sums);
    plan.matrix = team.take_bytes(matrix);
    plan.team_bytes = team.bytes();
    plan.bytes = plan.teams * plan.team_bytes + scratch;
    return plan;
}

GramPlan plan_gram_for(const relation::Options& options, std::int64_t student_width, std::int64_t teacher_width,
                       bool backward, int threads, std::int64_t limit) {
    GramPlan plan{};
    plan.backward = backward;
    plan.problems = options.cross ? 1 : options.batch;
    plan.samples = options.cross ? options.batch : 1;
    plan.chunk = gram_chunk;
    plan.block = streamed_block;
    plan.student_side = relation::gram_padded(student_width);
    plan.side = relation::gram_side(student_width, teacher_width);
    plan.size = relation::gram_double(options.dtype, student_width, teacher_width) ? 8 : 4;

    Arena<64> thread;
    const std::int64_t part = plan.block * plan.student_side * plan.size;
    plan.own = thread.take_bytes(part);
    plan.other = thread.take_bytes(plan.block * (plan.side - plan.student_side) * plan.size);
    plan.product = thread.take_bytes(backward ? part : plan.block * plan.side * plan.size);
    if (backward) {
        plan.product2 = thread.take_bytes(part);
        plan.result = thread.take_bytes(part);
    }
    plan.thread_bytes = thread.bytes();
    Arena<64> team;
    plan.rows = team.take_bytes(plan.chunk * plan.side * plan.size);
    if (backward) {
        plan.scaled_rows = team.take_bytes(plan.chunk * plan.student_side * plan.size);
        plan.weighted = team.take_bytes(plan.student_side * plan.side * plan.size);
    }
    plan.team_bytes = team.bytes();
    plan.teams = plan.problems < threads ? 1 : threads;
    if (plan.teams * plan.team_bytes + threads * plan.thread_bytes > limit) {
        plan.teams = 1;
    }
    plan.team_threads = plan.teams > 1 ? 1 : threads;
    plan.bytes = plan.teams * plan.team_bytes + threads * plan.thread_bytes;
    plan.minimum = plan.bytes;
    return plan;
}

} // namespace

RelationPlan plan_relation(const relation::Options& options, std::int64_t student_width, std::int64_t teacher_width,
                           bool stored, bool backward, int threads, std::int64_t limit) {
    return with_most_threads(threads, limit, [&](int some) {
        return plan_relation_for(options, student_width, teacher_width, stored, backward, some, limit);
    });
}

GramPlan plan_gram(const relation::Options& options, std::int64_t student_width, std::int64_t teacher_width,
                   bool backward, int threads, std::int64_t limit) {
    return with_most_threads(threads, limit, [&](int some) {
        return plan_gram_for(options, student_width, teacher_width, backward, some, limit);
    });
}

} // namespace fastkd::cpu
