// What the SM90 grouped GEMM is made from: tile configurations, kernel parameters, and the tactic (a pure function).
#pragma once
#include <cuda.h>

#include "common/activation.h"
#include "grouped_gemm/grouped_gemm.h"

namespace moe {

// GEMM1 with the activation (and requantisation) in its epilogue. b holds gate and up (b_parts = 2); out is act [num_rows, n / 2].
struct GatedEpilogue {
  ActivationParams activation;
  int32_t gate_part = 0;           // which of the two parts of b is the gate (0: gate_up, 1: up_gate)
  float* act_scale = nullptr;      // float8 only: 1 x 128 scales of act
  int64_t scale_stride_row = 0, scale_stride_k = 0;
};

const char* grouped_gemm_gated_sm90_why_not(const GroupedGemmArgs&);
bool grouped_gemm_gated_sm90_pays(const GroupedGemmArgs&);  // enough tiles to keep every SM busy
// `tile_counter` (here and, as workspace, in grouped_gemm_sm90_counted) must be 0; the launch leaves it used up.
cudaError_t grouped_gemm_gated_sm90(const GroupedGemmArgs&, const GatedEpilogue&, int32_t* tile_counter, cudaStream_t stream);
cudaError_t grouped_gemm_sm90_counted(const GroupedGemmArgs&, int32_t* tile_counter, cudaStream_t stream);

namespace sm90 {

// Weight rows of a tile: 64, 128 or 256. Its tokens (8, 16, .. 128) follow each expert's count, on the device.
int32_t choose_tile_rows(int64_t num_rows, int32_t num_experts, int32_t part_rows, int32_t parts, int32_t num_sms);

// No more token tiles can exist: every expert hit starts one, and `tile_tokens` further rows start another.
constexpr int64_t max_token_tiles(int64_t num_rows, int32_t num_experts, int32_t tile_tokens = 128) {
  const int64_t hit = num_rows < num_experts ? num_rows : num_experts;
  return hit + (num_rows - hit) / tile_tokens;
}

struct KernelParams {
  CUtensorMap weights;             // (k, part_rows, num_experts * parts), box 128 bytes x rows of a wave
  CUtensorMap tokens[5];           // (k, num_rows), box 128 bytes x 8, 16, 32, 64, 128 tokens
  const int32_t* expert_offsets;
  int32_t* tile_counter;           // 0 at the start: tiles drawn beyond the first of each thread block
  void* out;
  const void* bias;
  ScaleView a_scale, b_scale;
  int64_t num_rows;
  int32_t num_experts, parts, part_rows, out_stride, k_blocks;
  DType out_dtype, bias_dtype;
  GatedEpilogue gated;
};

}  // namespace sm90
}  // namespace moe
