// Shared by relation's forward and backward launchers: sides and launches from a call's arguments.
#pragma once

#include <initializer_list>

#include "cuda/relation/rows.cuh"

namespace fastkd::cuda::relation {

// Return Operand::alignment: the largest power of two, up to 16 bytes, that divides the address, the strides and the
// contiguous mode's `length`.
inline int alignment_of(const void* data, std::int64_t a, std::int64_t b, std::int64_t length, std::int64_t size) {
    std::int64_t alignment = 16 / size;
    while (alignment > 1 && (reinterpret_cast<std::uintptr_t>(data) % (alignment * size) != 0 || a % alignment != 0 ||
                             b % alignment != 0 || length % alignment != 0)) {
        alignment /= 2;
    }
    return static_cast<int>(alignment);
}

inline Side side_of(const relation::Rows& rows, const relation::Options& options) {
    Side side{};
    const std::int64_t size = element_size(options.dtype);
    side.rows.data = rows.data;
    side.rows.mn_stride = rows.row_stride;
    side.rows.k_stride = rows.col_stride;
    side.rows.mn_major = rows.row_stride == 1 && rows.col_stride != 1;
    const std::int64_t stride = side.rows.mn_major ? rows.col_stride : rows.row_stride;
    const std::int64_t length = side.rows.mn_major ? options.rows : rows.width;
    const bool contiguous = side.rows.mn_major || rows.col_stride == 1;
    side.rows.alignment =
        contiguous ? alignment_of(rows.data, rows.batch_stride, stride, rows.padded ? 0 : length, size) : 1;
    side.width = rows.width;
    side.batch_stride = rows.batch_stride;
    side.factor = options.similarity == relation::Similarity::mean ? 1.0f / static_cast<float>(rows.width) : 1.0f;
    return side;
}

// Return whether asynchronous copies, of 4 bytes or more, can read the rows; if not, pass a padded copy.
inline bool readable(const Side& side, DType dtype) {
    return side.rows.alignment * element_size(dtype) >= 4;
}

constexpr std::int64_t most_blocks = 0x7fffffff; // of a launch

// Return an error if rows are not readable, or if sizes exceed the kernels' indices.
inline cudaError_t check_call(const relation::Options& options, const relation::Rows& student,
                              const relation::Rows& teacher, const RelationPlan& plan) {
    if (!readable(side_of(student, options), options.dtype) || !readable(side_of(teacher, options), options.dtype)) {
        return cudaErrorInvalidValue;
    }
    for (const std::int64_t size : {options.batch, options.rows, student.width, teacher.width}) {
        if (size < 1 || size >= most_blocks) {
            return cudaErrorInvalidValue;
        }
    }
    const std::int64_t all_rows = options.batch * options.rows;
    const std::int64_t most = plan.together * plan.blocks * (plan.width_blocks + 1) * (plan.splits + 1);
    return options.dtype == DType::Float64 || all_rows > most_blocks ||
                   plan.together * plan.tiles(0, plan.band) > most_blocks || most > most_blocks
               ? cudaErrorInvalidValue
               : cudaSuccess;
}

// Call visit(range) for each launch until one fails.
template <class Visit>
cudaError_t for_each_launch(const relation::Options& options, const RelationPlan& plan, const Visit& visit) {
    LaunchRange range{};
    range.rows = options.rows;
    range.all_rows = options.batch * options.rows;
    range.samples = plan.samples;
    range.row_blocks = plan.row_blocks;
    range.blocks = plan.blocks;
    for (range.first_problem = 0; range.first_problem < plan.problems; range.first_problem += plan.together) {
        const std::int64_t left = plan.problems - range.first_problem;
        range.problems = plan.together < left ? plan.together : left;
        for (range.first = 0; range.first < plan.blocks; range.first += plan.band) {
            range.last = range.first + plan.band < plan.blocks ? range.first + plan.band : plan.blocks;
            range.tiles = plan.tiles(range.first, range.last);
            const cudaError_t error = visit(range);
            if (error != cudaSuccess) {
                return error;
            }
        }
    }
    return cudaSuccess;
}

// Call visit(element of the dtype, std::integral_constant of the tile size).
template <class Visit>
cudaError_t with_tile(DType dtype, std::int64_t tile_size, const Visit& visit) {
    using Large = std::integral_constant<int, 128>;
    using Small = std::integral_constant<int, 64>;
    switch (dtype) {
    case DType::Float32:
        return visit(float{}, Small{});
    case DType::Float16:
        return tile_size == 128 ? visit(Half{}, Large{}) : visit(Half{}, Small{});
    case DType::BFloat16:
        return tile_size == 128 ? visit(BFloat16{}, Large{}) : visit(BFloat16{}, Small{});
    default:
        return cudaErrorInvalidValue;
    }
}

} // namespace fastkd::cuda::relation
