// How a relation is cut into blocks, shared out over threads, and laid out in its workspace.
#pragma once

#include "common/relation.h"

namespace fastkd::cpu {

constexpr std::int64_t streamed_block =
    96; // rows; a multiple of every instruction set's panel; two tiles fit a small L2
constexpr std::int64_t stored_chunk = 256; // columns that a stored relation packs at a time
constexpr std::int64_t gram_chunk = 256;   // rows that G takes at a time

// Rows come in blocks; pairs of blocks are the tiles of the relation matrix. A *problem* is one relation matrix: a
// sample's, or with `cross` the whole batch's. Threads take whole problems (`teams` of them at a time) or share one.
struct RelationPlan {
    bool stored;   // tiles live in `stored`; else each is made, used and forgotten
    bool backward; // else forward
    bool pairs;    // bfloat16 rows are multiplied as they are, in pairs
    std::int64_t problems, groups, block, group_blocks, blocks;
    std::int64_t teams;    // problems in the works at a time
    int team_threads;      // threads on each
    std::int64_t resident; // packed blocks held at a time: all, or two halves that meet
    std::int64_t student_width;

    // Bytes from the start of the workspace, of a team or of a thread.
    std::int64_t packs, accumulator, row_sums, matrix, team_bytes;
    std::int64_t tiles, panel, thread_bytes;
    std::int64_t bytes;   // of the workspace
    std::int64_t minimum; // what `limit` would have to be; more than `limit` if it is too small
};

// `limit` bounds the workspace, but for the student's gradient in fp32 (fp64) that a backward over tiles accumulates.
RelationPlan plan_relation(const relation::Options& options, std::int64_t student_width, std::int64_t teacher_width,
                           bool stored, bool backward, int threads, std::int64_t limit);

// mse from Gram matrices: rows are packed `chunk` at a time for G, `block` at a time for the rest.
struct GramPlan {
    bool backward;
    std::int64_t problems, samples; // samples of a problem
    std::int64_t teams;
    int team_threads;
    std::int64_t chunk, block, student_side, side; // G is side x side, its part for A student_side wide
    std::int64_t size;                             // of an element of G: 8 where the widths differ

    std::int64_t rows, scaled_rows, weighted, team_bytes; // of a team: packed chunk, times g, G weighted with g
    std::int64_t own, other, product, product2, result, thread_bytes; // of a thread: W in two parts, products, gradient
    std::int64_t bytes, minimum;
};

GramPlan plan_gram(const relation::Options& options, std::int64_t student_width, std::int64_t teacher_width,
                   bool backward, int threads, std::int64_t limit);

} // namespace fastkd::cpu
