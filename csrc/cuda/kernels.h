// Every CUDA launcher: enqueues on a stream of the current device, waits for nothing, returns CUDA's error code.
#pragma once

#include <cuda_runtime_api.h>

#include "common/relation.h"
#include "common/softmax_kl.h"
#include "cuda/relation_plan.h"

namespace fastkd::cuda {

cudaError_t softmax_kl_forward(const softmax_kl::Forward& args, cudaStream_t stream);
cudaError_t softmax_kl_backward(const softmax_kl::Backward& args, cudaStream_t stream);

cudaError_t relation_forward(const relation::Forward& args, const RelationPlan& plan, cudaStream_t stream);
cudaError_t relation_backward(const relation::Backward& args, const RelationPlan& plan, cudaStream_t stream);

} // namespace fastkd::cuda
