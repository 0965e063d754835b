// What the SM90 grouped GEMM is made from: the fused pair of GEMMs, and kernel parameters.
#pragma once
#include <cuda.h>

#include "common/activation.h"
#include "common/formats.h"
#include "grouped_gemm/grouped_gemm.h"
#include "grouped_gemm/tactics_sm90.h"

namespace moe {

// grouped_gemm_sm90 with the caller's tile counter, which must be 0; the launch leaves it used up. Null: every thread block takes each
// grid-th tile.
cudaError_t grouped_gemm_sm90_counted(const GroupedGemmArgs&, int32_t* tile_counter, cudaStream_t stream);

namespace sm90 {
// What is complete before the kernel before this one starts, so that this one finds its first tiles while that runs: beside the inputs nothing,
// or expert_offsets and the counters (`sync`), or the counters alone once that kernel lets this one start: then slots are counted anew.
enum class Known { inputs, offsets, counters };
}  // namespace sm90

// Both GEMMs of a gated layer in one launch:
//   act[r] = quantize(activation(a[r] @ w13[e])), out[r] = act[r] @ w2[e]   for rows r of expert e
// gemm1.out is act [num_rows, n / 2] = gemm2.a, and gemm2.a_scale.data is where its scales (float8) are written and read.
struct FusedGemms {
  GroupedGemmArgs gemm1, gemm2;
  sm90::Tactic tactic;       // a possible one: see fused_gemms_sm90_facts
  ActivationParams activation;
  int32_t gate_part = 0;     // which of the two parts of w13 is the gate (0: gate_up, 1: up_gate)
  int32_t* sync = nullptr;   // counters: must be 0; the launch leaves them used up
  sm90::Known known = sm90::Known::inputs;
  int32_t top_k = 0;
  Format act_format = Format::bf16;     // packed: what act, and split's tokens, are rounded to, if it is a rounded one
  // gathered128: row r of GEMM1 is row row_to_slot[r] / top_k of gemm1.a, whose scales are K-major.
  const int32_t* row_to_slot = nullptr;
  // split: GEMM1 quantises rows of hidden_states by itself, those of topk_ids as sort_slots sorts them. All of this must be complete before
  // the kernel before this one starts.
  const void* hidden_states = nullptr;  // [num_tokens, k of gemm1]
  DType hidden_dtype = DType::bfloat16;
  const int32_t* topk_ids = nullptr;    // [num_rows]
  const float* topk_weights = nullptr;  // [num_rows]: tokens are multiplied by them, top_k is 1; or null
  const int32_t* expert_map = nullptr;  // [num_global_experts] or null
  int32_t num_global_experts = 0;
  float* gate_up = nullptr;             // [num_rows, n of gemm1], must be 0

  double local_share() const {  // of the rows, expected here
    return expert_map == nullptr ? 1. : std::min(1., double(gemm1.num_experts) / std::max(1, num_global_experts));
  }
};
struct FusedGemmsSizes {
  int64_t sync = 0;     // int32 counters
  int64_t gate_up = 0;  // floats, of split alone
};
const char* fused_gemms_sm90_why_not(const GroupedGemmArgs& gemm1, const GroupedGemmArgs& gemm2);
sm90::LayerFacts fused_gemms_sm90_facts(const FusedGemms&, bool can_gather, bool can_split);  // what sm90::choose_tactic takes
FusedGemmsSizes fused_gemms_sm90_sizes(const FusedGemms&);  // a pure function of the sizes, dtypes and tactic in it
cudaError_t fused_gemms_sm90(const FusedGemms&, cudaStream_t stream);

namespace sm90 {

// Which tile configuration: weight rows x tokens, and how GEMM1's activation is done when both GEMMs are fused.
//   plain: one GEMM.   gated: gate and up of 128 channels are one tile; its epilogue is the activation (and requantisation).
//   split: few slots. Tiles of 32 to 256 weight rows, so that more SMs read weights, write float32 gate_up; GEMM2 does its activation when
//          it reads it (split_sm90.cuh).
enum class Mode { plain, gated, split };

struct GemmParams {
  // (k, part_rows, num_experts * parts), box 128 bytes x rows of a wave that are loaded. Packed: (8 bytes of a piece of a block, pieces along k,
  // blocks of 64 rows, num_experts * parts), box: the blocks of a stage and of up to 128 rows.
  CUtensorMap weights;
  CUtensorMap tokens[5];           // (k, num_rows), box 128 bytes x 8, 16, 32, 64, 128 tokens
  CUtensorMap out_tiles;           // if stores_tiles: (out_stride, num_rows), 16 bits, box 64 x 16: what a warp of a wide tile stores at once
  void* out;
  const void* bias;
  ScaleView a_scale, b_scale, a_global_scale, b_global_scale;
  int32_t parts, part_rows, out_stride;
  int32_t k_stages;                // what K fills, of Config::kStageBlocks K blocks each
  int32_t k_blocks;                // float8: 1 x 128 scales of a token
  int32_t tile_rows;               // of a tile: Config::kRows, or (split) fewer; float8: within one block of 128
  // Divisions that the kernel would make before it can load anything. GEMM1 of gated kernels: of both parts together.
  int32_t row_tiles, tiles_per_part;  // for each token tile
  int32_t most_per_draw;
  DType out_dtype, bias_dtype;
  bool stores_tiles;
};

struct KernelParams {
  GemmParams gemm[2];
  const int32_t* expert_offsets;
  const int32_t* expert_rows;      // plain: see GroupedGemmArgs; or null
  int32_t* tile_counter;           // 0 at the start: tiles drawn; or null, see grouped_gemm_sm90_counted
  int32_t num_gemms, num_experts;
  // The rest is for two fused GEMMs.
  const int32_t* row_to_slot;      // [num_rows]: GEMM1 gathers its tokens; or null: they are gemm[0]'s matrix
  const void* gathered;            // the matrix they are rows of, each row_chunks * 16 bytes
  int32_t row_chunks, top_k;
  const void* hidden_states;       // split: see FusedGemms
  const int32_t* topk_ids;
  const float* topk_weights;
  const int32_t* expert_map;
  int32_t hidden_size, num_slots, num_global_experts;
  DType hidden_dtype;
  int32_t gate_part;
  Format act_format;               // see FusedGemms
  Known known;                     // of two fused GEMMs
  int32_t* ready;                  // gated: [token tiles] 0 at the start: parts of act that are complete
  int32_t ready_count;             // what makes a token tile of act complete
  float* act_scale;                // gated, float8: 1 x 128 scales of act
  int64_t act_scale_stride_row, act_scale_stride_k;
  ActivationParams activation;

#ifdef __CUDACC__
  __device__ float act_global_scale(int which, int expert) const {
    const ScaleView& s = gemm[which].a_global_scale;
    return s.data == nullptr ? 1.f : __ldg(s.data + expert * s.stride_group);
  }
  __device__ int local_expert(int slot) const {  // -1: none
    if (slot >= num_slots) return -1;
    int expert = topk_ids[slot];
    if (expert_map != nullptr) expert = expert >= 0 && expert < num_global_experts ? expert_map[expert] : -1;
    return expert >= 0 && expert < num_experts ? expert : -1;
  }
#endif
};

}  // namespace sm90
}  // namespace moe
