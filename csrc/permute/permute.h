// out[slot_to_row[t, k]] = quantize(hidden_states[t] * (topk_weights[t, k] if given)). Free of torch.
#pragma once
#include "common/formats.h"

namespace moe {

struct PermuteArgs {
  const void* hidden_states = nullptr;  // [num_tokens, out.k] row-major, bfloat16 or float16
  DType dtype = DType::bfloat16;
  const int32_t* slot_to_row = nullptr;  // [num_tokens, top_k]; negative: no row
  const float* topk_weights = nullptr;   // [num_tokens, top_k] or null
  int64_t num_tokens = 0;
  int32_t top_k = 0;
  int64_t num_rows = 0;  // rows at or past it are never written
  Format format = Format::bf16;
  QuantizedMatrix out;       // [num_rows, out.k]
  GlobalScale global_scale;  // of nvfp4, and of as_nvfp4, which leaves it out of its numbers
};

cudaError_t permute(const PermuteArgs& args, cudaStream_t stream);

}  // namespace moe
