// out[r] = quantize(activation(gate[r], up[r])) for rows r < expert_offsets[num_experts]. Free of torch.
#pragma once
#include "common/activation.h"
#include "common/formats.h"

namespace moe {

enum class GateUpLayout : int { gate_up, up_gate, interleaved };

struct ActMulArgs {
  const void* gate_up = nullptr;  // [num_rows, 2 * out.k], or [num_rows, out.k] for activations without a gate
  DType dtype = DType::bfloat16;
  const int32_t* expert_offsets = nullptr;  // [num_experts + 1]
  int32_t num_experts = 0;
  int64_t num_rows = 0;  // rows allocated
  ActivationParams activation;
  GateUpLayout layout = GateUpLayout::gate_up;
  Format format = Format::bf16;
  QuantizedMatrix out;       // [num_rows, out.k]
  GlobalScale global_scale;  // of nvfp4, and of as_nvfp4, which leaves it out of its numbers
};

cudaError_t act_mul(const ActMulArgs& args, cudaStream_t stream);

}  // namespace moe
