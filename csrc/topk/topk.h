// topk_weights, topk_ids [T, K] = the top_k largest choices of the router, grouped or not (docs/ops.md). Free of torch.
#pragma once
#include "grouped_gemm/grouped_gemm.h"  // DType

namespace moe {

constexpr int kTopkMaxExperts = 1024;
constexpr int kTopkMaxTopk = 32;
constexpr int kTopkMaxGroups = 32;

struct TopkArgs {
  const void* router_logits = nullptr;  // [num_tokens, num_experts] row-major
  DType dtype = DType::float32;
  const float* correction_bias = nullptr;  // [num_experts] or null
  int64_t num_tokens = 0;
  int32_t num_experts = 0;  // at most kTopkMaxExperts
  int32_t top_k = 0;        // at most kTopkMaxTopk
  bool sigmoid = false;     // else softmax
  int32_t num_groups = 1;   // at most kTopkMaxGroups, a divisor of num_experts
  int32_t topk_groups = 1;
  bool renormalize = true;
  float routed_scaling_factor = 1.f;
  float* topk_weights = nullptr;  // [num_tokens, top_k]
  int32_t* topk_ids = nullptr;    // [num_tokens, top_k]
};

cudaError_t topk(const TopkArgs& args, cudaStream_t stream);

}  // namespace moe
