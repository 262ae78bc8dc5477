// The plan of an attention_kl call: blocks of queries, their distribution over threads, and the workspace.
#pragma once

#include "common/attention_kl.h"

namespace fastkd::cpu {

constexpr std::int64_t attention_padding = 16; // a multiple of every instruction set's vector
constexpr std::int64_t attention_max_block = 64;

// Heads of samples are separate problems. Threads process whole heads, `teams` at a time, or share one: its blocks
// of queries are then distributed, and for dK its keys.
struct AttentionPlan {
    bool pairs;         // Q K^T by AVX512-BF16
    std::int64_t block; // queries per block: both networks' logits fit half of a small L2
    std::int64_t blocks;
    std::int64_t teams; // heads processed concurrently
    int team_threads;
    std::int64_t ld;          // row stride of the logits: not a multiple of 4096 bytes
    std::int64_t keys, width; // M and the student's width, padded to whole vectors

    // Offsets in bytes, relative to the team's part of the workspace, then relative to the thread's.
    std::int64_t keys_s, keys_t, rest_s, rest_t, key_rows, key_mask, grad_k, team_bytes;
    std::int64_t queries_s, queries_t, query_rows, logits_s, logits_t, bias, grad_q, thread_bytes;
    std::int64_t bytes;
    std::int64_t minimum; // smallest possible `limit`
};

// `limit` bounds the workspace, except for the accumulators of dK.
AttentionPlan plan_attention(const attention_kl::Problem& problem, int threads, std::int64_t limit);

} // namespace fastkd::cpu
