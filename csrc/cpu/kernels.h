// The table of CPU kernels, one per instruction set. A new kernel needs a line in Kernels, one in the macro below it
// and one in the table of kernels.cpp.
#pragma once

#include "common/attention_kl.h"
#include "common/dtype.h"
#include "common/pixel_word.h"
#include "common/relation.h"
#include "common/softmax_kl.h"
#include "cpu/attention_kl/plan.h"
#include "cpu/isa.h"
#include "cpu/relation/plan.h"

// cmake/Exact.cmake undoes fast-math flags from the environment; a build without it fails here.
#if defined(__FAST_MATH__) || __FINITE_MATH_ONLY__ || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    defined(__NO_SIGNED_ZEROS__)
#error "fastkd needs exact arithmetic: remove -ffast-math, -Ofast and similar flags, or append -fno-fast-math \
-fno-unsafe-math-optimizations -fno-finite-math-only -fno-associative-math -fno-reciprocal-math -fsigned-zeros"
#endif

namespace fastkd::cpu {

// Operations whose peak rate can be measured; without bf16 instructions bf16 products are widened to float.
enum class Peak { float_product, double_product, bf16_product, exp };

// Kernels distribute rows or chunks of pixels over `threads` OpenMP threads. Each is summed by one thread in a fixed
// order, so results do not depend on the number of threads.
struct Kernels {
    void (*softmax_kl_forward)(const softmax_kl::Forward& args, int threads);
    void (*softmax_kl_backward)(const softmax_kl::Backward& args, int threads);
    void (*relation_streamed_forward)(const relation::Forward& args, const RelationPlan& plan, int threads);
    void (*relation_streamed_backward)(const relation::Backward& args, const RelationPlan& plan);
    void (*relation_stored_forward)(const relation::Forward& args, const RelationPlan& plan, int threads);
    void (*relation_stored_backward)(const relation::Backward& args, const RelationPlan& plan);
    void (*relation_gram_forward)(const relation::Forward& args, const GramPlan& plan, int threads);
    void (*relation_gram_backward)(const relation::Backward& args, const GramPlan& plan);
    // Return the workspace of a forward or backward of this problem with this number of threads.
    pixel_word::Workspace (*pixel_word_workspace)(const pixel_word::Problem& problem, bool backward, int threads);
    void (*pixel_word_forward)(const pixel_word::Forward& args, int threads);
    void (*pixel_word_backward)(const pixel_word::Backward& args, int threads);
    // Losses and gradients in one pass over blocks of queries.
    void (*attention_kl_run)(const attention_kl::Call& call, const AttentionPlan& plan);
    // Write e^x, x <= 0, of `count` contiguous elements of Float32 or Float64, as computed in the kernels. For tests.
    void (*exp)(const void* input, void* output, std::int64_t count, DType dtype);
    // Run a loop of `operation` at its peak rate; return the number of FLOP or exponentials. For benchmarks.
    double (*peak)(Peak operation, std::int64_t repeats);
};

#define FASTKD_DECLARE_KERNELS(isa)                                                                                    \
    namespace isa {                                                                                                    \
    void softmax_kl_forward(const softmax_kl::Forward& args, int threads);                                             \
    void softmax_kl_backward(const softmax_kl::Backward& args, int threads);                                           \
    void relation_streamed_forward(const relation::Forward& args, const RelationPlan& plan, int threads);              \
    void relation_streamed_backward(const relation::Backward& args, const RelationPlan& plan);                         \
    void relation_stored_forward(const relation::Forward& args, const RelationPlan& plan, int threads);                \
    void relation_stored_backward(const relation::Backward& args, const RelationPlan& plan);                           \
    void relation_gram_forward(const relation::Forward& args, const GramPlan& plan, int threads);                      \
    void relation_gram_backward(const relation::Backward& args, const GramPlan& plan);                                 \
    pixel_word::Workspace pixel_word_workspace(const pixel_word::Problem& problem, bool backward, int threads);        \
    void pixel_word_forward(const pixel_word::Forward& args, int threads);                                             \
    void pixel_word_backward(const pixel_word::Backward& args, int threads);                                           \
    void attention_kl_run(const attention_kl::Call& call, const AttentionPlan& plan);                                  \
    void exp(const void* input, void* output, std::int64_t count, DType dtype);                                        \
    double peak(Peak operation, std::int64_t repeats);                                                                 \
    }
FASTKD_FOR_EACH_ISA(FASTKD_DECLARE_KERNELS)
#undef FASTKD_DECLARE_KERNELS

// Return the kernels of isa().
const Kernels& kernels();

} // namespace fastkd::cpu
