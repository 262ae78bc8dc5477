// What relation's forward and backward launchers share: a call's networks and launches from its arguments.
#pragma once

#include <initializer_list>

#include "cuda/relation/rows.cuh"

namespace fastkd::cuda::relation {

// As many elements as can be copied at once: the largest power of two up to 16 bytes of which address, strides and
// `length`, that of the contiguous dimension, are multiples.
inline int unit_of(const void* data, std::int64_t a, std::int64_t b, std::int64_t length, std::int64_t size) {
    std::int64_t unit = 16 / size;
    while (unit > 1 && (reinterpret_cast<std::uintptr_t>(data) % (unit * size) != 0 || a % unit != 0 || b % unit != 0 ||
                        length % unit != 0)) {
        unit /= 2;
    }
    return static_cast<int>(unit);
}

inline Network network_of(const relation::Rows& rows, const relation::Options& options) {
    Network network{};
    const std::int64_t size = element_size(options.dtype);
    network.rows.data = rows.data;
    network.rows.index_stride = rows.row_stride;
    network.rows.k_stride = rows.col_stride;
    network.rows.k_major = rows.row_stride == 1 && rows.col_stride != 1;
    if (network.rows.k_major) {
        network.rows.unit = unit_of(rows.data, rows.batch_stride, rows.col_stride, options.rows, size);
    } else if (rows.col_stride == 1) {
        network.rows.unit = unit_of(rows.data, rows.batch_stride, rows.row_stride, rows.width, size);
    } else {
        network.rows.unit = 1;
    }
    network.width = rows.width;
    network.batch_stride = rows.batch_stride;
    network.factor = options.similarity == relation::Similarity::mean ? 1.0f / static_cast<float>(rows.width) : 1.0f;
    return network;
}

constexpr std::int64_t most_blocks = 0x7fffffff; // of a launch

inline cudaError_t check_call(const relation::Options& options, const relation::Rows& student,
                              const relation::Rows& teacher, const RelationPlan& plan) {
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

// visit(cut) for each launch, until one fails.
template <class Visit>
cudaError_t for_each_launch(const relation::Options& options, const RelationPlan& plan, const Visit& visit) {
    Cut cut{};
    cut.rows = options.rows;
    cut.all_rows = options.batch * options.rows;
    cut.samples = plan.samples;
    cut.row_blocks = plan.row_blocks;
    cut.blocks = plan.blocks;
    for (cut.first_problem = 0; cut.first_problem < plan.problems; cut.first_problem += plan.together) {
        const std::int64_t left = plan.problems - cut.first_problem;
        cut.problems = plan.together < left ? plan.together : left;
        for (cut.first = 0; cut.first < plan.blocks; cut.first += plan.band) {
            cut.last = cut.first + plan.band < plan.blocks ? cut.first + plan.band : plan.blocks;
            cut.tiles = plan.tiles(cut.first, cut.last);
            const cudaError_t error = visit(cut);
            if (error != cudaSuccess) {
                return error;
            }
        }
    }
    return cudaSuccess;
}

// visit(element of the dtype, number of rows of a tile as a type).
template <class Visit>
cudaError_t with_tile(DType dtype, std::int64_t side, const Visit& visit) {
    using Large = std::integral_constant<int, 128>;
    using Small = std::integral_constant<int, 64>;
    switch (dtype) {
    case DType::Float32:
        return visit(float{}, Small{});
    case DType::Float16:
        return side == 128 ? visit(Half{}, Large{}) : visit(Half{}, Small{});
    case DType::BFloat16:
        return side == 128 ? visit(BFloat16{}, Large{}) : visit(BFloat16{}, Small{});
    default:
        return cudaErrorInvalidValue;
    }
}

} // namespace fastkd::cuda::relation
