// The plan of a relation: its blocks, their distribution over threads, and the layout of the workspace.
#pragma once

#include "common/relation.h"

namespace fastkd::cpu {

// Rows per block: a multiple of every instruction set's panel, and two tiles fit a small L2.
constexpr std::int64_t streamed_block = 96;
constexpr std::int64_t stored_chunk = 256; // columns that the form "stored" packs at a time
constexpr std::int64_t gram_chunk = 256;   // rows packed at a time for G

// Rows are divided into blocks; pairs of blocks are the tiles of the relation matrix. A problem is one relation matrix:
// of a sample, or with `cross` of the whole batch. Threads process whole problems, `teams` at a time, or share one.
struct RelationPlan {
    bool stored; // the form "stored": tiles are kept in `stored`; else they are recomputed
    bool backward;
    bool pairs; // bfloat16 rows are multiplied in pairs, without widening
    bool amx;   // ... and by AMX, for which blocks are packed twice (cpu/gemm/amx.h)
    std::int64_t problems, groups, block, group_blocks, blocks;
    std::int64_t teams;    // problems processed concurrently
    int team_threads;      // threads per problem
    std::int64_t resident; // packed blocks in memory at a time: all, or two groups of equal size
    std::int64_t student_width;
    std::int64_t packed_widths[2]; // of a packed block of the student's and the teacher's rows, form "streamed"

    // Offsets in bytes, relative to the team's part of the workspace, then relative to the thread's.
    std::int64_t packs, accumulator, row_sums, matrix, team_bytes;
    std::int64_t tiles, panel, thread_bytes;
    std::int64_t bytes;   // of the workspace
    std::int64_t minimum; // smallest possible `limit`; above `limit` if that is too small
};

// `limit` bounds the workspace, except for the gradient accumulator (fp32 or fp64) of a streamed backward.
RelationPlan plan_relation(const relation::Options& options, std::int64_t student_width, std::int64_t teacher_width,
                           bool stored, bool backward, int threads, std::int64_t limit);

// The form "gram": rows are packed `chunk` at a time for G and `block` at a time for the remaining products.
struct GramPlan {
    bool backward;
    std::int64_t problems, samples; // samples per problem
    std::int64_t teams;
    int team_threads;
    std::int64_t chunk, block, student_side, side; // G is side x side, its part for A student_side wide
    std::int64_t size;                             // bytes of an element of G: see gram_double

    std::int64_t rows, scaled_rows, weighted, team_bytes; // per team: packed chunk, chunk times g, G weighted by g
    std::int64_t own, other, product, product2, result, thread_bytes; // per thread: two parts of W, products, gradient
    std::int64_t bytes, minimum;
};

GramPlan plan_gram(const relation::Options& options, std::int64_t student_width, std::int64_t teacher_width,
                   bool backward, int threads, std::int64_t limit);

} // namespace fastkd::cpu
