// values, scale = quantize(input [rows, k]) with activation blocks (1, block_k) of docs/ops.md. Free of torch.
#pragma once
#include "common/formats.h"

namespace moe {

struct QuantizeArgs {
  const void* input = nullptr;  // [rows, k] row-major
  DType dtype = DType::bfloat16;
  int64_t rows = 0;
  Format format = Format::bf16;
  QuantizedMatrix out;
  const float* global_scale = nullptr;  // one element or null; nvfp4 only
};

cudaError_t quantize(const QuantizeArgs& args, cudaStream_t stream);

}  // namespace moe
