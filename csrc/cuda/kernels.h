// The CUDA launchers. Each enqueues on a stream of the current device without waiting and returns CUDA's error code.
#pragma once

#include <cuda_runtime_api.h>

#include "common/pixel_word.h"
#include "common/relation.h"
#include "common/softmax_kl.h"
#include "cuda/relation/plan.h"

namespace fastkd::cuda {

cudaError_t softmax_kl_forward(const softmax_kl::Forward& args, cudaStream_t stream);
cudaError_t softmax_kl_backward(const softmax_kl::Backward& args, cudaStream_t stream);

// Return whether the kernels support a problem (number of words, index ranges), and the bytes of its workspace. A
// forward from features requires an array for the logits (kept.logits).
bool pixel_word_fits(const pixel_word::Problem& problem);
std::int64_t pixel_word_workspace(const pixel_word::Problem& problem, bool backward);
cudaError_t pixel_word_forward(const pixel_word::Forward& args, cudaStream_t stream);
cudaError_t pixel_word_backward(const pixel_word::Backward& args, cudaStream_t stream);
cudaError_t relation_forward(const relation::Forward& args, const RelationPlan& plan, cudaStream_t stream);
cudaError_t relation_backward(const relation::Backward& args, const RelationPlan& plan, cudaStream_t stream);

} // namespace fastkd::cuda
