#include "cuda/relation/plan.h"

#include <initializer_list>

namespace fastkd::cuda {
namespace {

std::int64_t tile_of(const relation::Options& options) {
    const std::int64_t blocks = ceil_div(options.rows, 128) * options.others();
    const std::int64_t tiles = (options.cross ? 1 : options.batch) * (blocks * (blocks + 1) / 2);
    const bool wide = options.dtype != DType::Float32 && method_of(options) != Method::kl_maxima;
    return wide && options.rows > 64 && tiles >= enough_tiles ? 128 : 64;
}

// Return the plan with `together` problems, or a band of `band` row blocks, per launch. Set `counted` to the bytes that
// the limit applies to.
RelationPlan lay_out(RelationPlan plan, const relation::Options& options, bool backward, std::int64_t limit,
                     std::int64_t together, std::int64_t band, std::int64_t* counted) {
    plan.together = together;
    plan.band = band;
    const std::int64_t slots = together * band * (2 * plan.blocks - band) * plan.tile * 4;
    Arena<256> arena;
    if (!backward) {
        plan.sums = arena.take_bytes(slots * planes_of(plan.method));
        plan.bytes = *counted = arena.bytes();
        return plan;
    }
    plan.row_sums = arena.take_bytes(options.batch * options.rows * 4);
    const std::int64_t size = options.dtype == DType::BFloat16 ? 2 : 4; // fp16: two bfloat16
    plan.h = arena.take_bytes(together * plan.tiles(0, band) * plan.tile * plan.tile * size);
    plan.sums = arena.take_bytes(slots);
    const std::int64_t products = together * band * plan.width_blocks;
    const std::int64_t longest = ceil_div(plan.blocks * plan.tile, 256); // each split sums at least 256 columns
    plan.splits = ceil_div(enough_products, products);
    const std::int64_t block = plan.tile * product_columns(element_size(options.dtype)) * 4;
    const std::int64_t affordable = limit / 4 / (products * block); // the parts may take a quarter of the limit
    for (const std::int64_t most : {longest, affordable > 1 ? affordable : 1}) {
        plan.splits = plan.splits > most ? most : plan.splits;
    }
    plan.partials = arena.take_bytes(plan.splits > 1 || !plan.whole() ? products * plan.splits * block : 0);
    *counted = arena.bytes();
    plan.totals = arena.take_bytes(plan.whole() ? 0 : plan.blocks * plan.width_blocks * block);
    plan.bytes = arena.bytes();
    return plan;
}

} // namespace

Method method_of(const relation::Options& options) {
    switch (options.distance) {
    case relation::Distance::mse:
        return Method::mse;
    case relation::Distance::row_cosine:
        return Method::row_cosine;
    default:
        return options.similarity == relation::Similarity::cosine && options.temperature >= fixed_shift_temperature
                   ? Method::kl
                   : Method::kl_maxima;
    }
}

RelationPlan plan_relation(const relation::Options& options, std::int64_t student_width, bool backward,
                           std::int64_t limit) {
    RelationPlan plan{};
    plan.method = method_of(options);
    plan.tile = tile_of(options);
    plan.problems = options.cross ? 1 : options.batch;
    plan.samples = options.others();
    plan.row_blocks = ceil_div(options.rows, plan.tile);
    plan.blocks = plan.samples * plan.row_blocks;
    plan.width_blocks = ceil_div(student_width, product_columns(element_size(options.dtype)));

    std::int64_t minimum = 0, counted = 0;
    lay_out(plan, options, backward, 0, 1, 1, &minimum);
    plan.minimum = minimum;
    RelationPlan found = lay_out(plan, options, backward, limit, 1, plan.blocks, &counted);
    if (counted <= limit) { // as many whole problems as fit
        // Without partial sums, which many problems need not, and without row_sums, which are of all problems.
        std::int64_t alone = 0;
        lay_out(plan, options, backward, 0, 1, plan.blocks, &alone);
        const std::int64_t shared = backward ? options.batch * options.rows * 4 : 0;
        const std::int64_t each = alone - shared > 1024 ? alone - shared - 512 : 512; // less the rounding of offsets
        const std::int64_t most = limit / each < plan.problems ? limit / each : plan.problems;
        for (std::int64_t together = most; together > 1; --together) {
            const RelationPlan more = lay_out(plan, options, backward, limit, together, plan.blocks, &counted);
            if (counted <= limit) {
                return more;
            }
        }
        return found;
    }
    std::int64_t low = 1, high = plan.blocks; // `low` fits if any band does, `high` does not fit
    while (high - low > 1) {
        const std::int64_t middle = low + (high - low) / 2;
        lay_out(plan, options, backward, limit, 1, middle, &counted);
        (counted <= limit ? low : high) = middle;
    }
    return lay_out(plan, options, backward, limit, 1, low, &counted);
}

std::int64_t stored_elements(const relation::Options& options) {
    const std::int64_t tile = tile_of(options), blocks = ceil_div(options.rows, tile);
    return options.batch * blocks * (blocks + 1) * tile * tile;
}

} // namespace fastkd::cuda
