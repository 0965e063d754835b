// out[t] = routed_scaling_factor * sum_k topk_weights[t, k] * expert_out[slot_to_row[t, k]]. Free of torch.
#pragma once
#include "common/formats.h"

namespace moe {

struct FinalizeArgs {
  const void* expert_out = nullptr;      // [num_rows, hidden_size] row-major
  DType dtype = DType::bfloat16;         // of expert_out; out has the same, bfloat16 if this is float32
  const int32_t* slot_to_row = nullptr;  // [num_tokens, top_k]; -1: skipped, any other row outside [0, num_rows): NaN
  const float* topk_weights = nullptr;   // [num_tokens, top_k], or null: 1
  int64_t num_tokens = 0;
  int64_t num_rows = 0;
  int64_t hidden_size = 0;
  int32_t top_k = 0;
  float routed_scaling_factor = 1.f;
  bool slots_complete = false;  // slot_to_row and topk_weights are, before the kernel before this one starts
  void* out = nullptr;  // [num_tokens, hidden_size]
};

cudaError_t finalize(const FinalizeArgs& args, cudaStream_t stream);

}  // namespace moe
