// Launchers of the grouped GEMMs whose tensor cores read one-byte scales themselves (nvfp4, mxfp8, mxfp4), free of torch:
//   out[r, n] = alpha[e, n] * sum over blocks kb of a_scale[r, kb] * b_scale[e, n, kb] * sum_{k in kb} a[r, k] * b[e, n, k]
//               (+ bias[e, n]),   alpha[e, n] = a_global_scale[e] * b_global_scale[e, part of n], 1 for mxfp8 and mxfp4
// for rows r in [expert_offsets[e], end_row(e)). Everything is device memory; nothing is read on the host.
#pragma once
#include "common/formats.h"
#include "grouped_gemm/grouped_gemm.h"

namespace moe {

// One-byte scales (rows, k blocks), row-major or not, in bytes.
struct BlockScaleView {
  const uint8_t* data = nullptr;
  int64_t stride_group = 0;  // per expert (b only)
  int64_t stride_row = 0;
  int64_t stride_k = 0;
};

// `k` counts values; those of nvfp4 and mxfp4 are two a byte. ab_dtype and the float32 scales are not used.
struct BlockScaledArgs : GroupedGemmArgs {
  Format format = Format::nvfp4;          // of b
  Format act_format = Format::nvfp4;      // of a: the same, or mxfp8 with mxfp4 weights
  BlockScaleView a_block_scale;           // rows = num_rows
  BlockScaleView b_block_scale;           // rows = n
  const uint32_t* b_scale_atoms = nullptr;  // b_block_scale as pack_scale lays it out in atoms, instead of it; aligned to 16 bytes
  const float* a_global_scale = nullptr;  // null: 1
  int32_t a_global_stride = 0;            // 1: one an expert; 0: one for all
  const float* b_global_scale = nullptr;  // [num_experts, b_global_parts] or null: 1
  int32_t b_global_parts = 1;             // 1 or b_parts
};

struct BlockScaledLauncher {
  size_t (*workspace_bytes)(const BlockScaledArgs&);  // a pure function of the static fields
  cudaError_t (*run)(const BlockScaledArgs&, void* workspace, cudaStream_t stream);
};

// A kernel and a file each: compiling one takes long.
extern const BlockScaledLauncher grouped_gemm_nvfp4_sm100, grouped_gemm_mxfp8_sm100, grouped_gemm_mxfp4_sm100, grouped_gemm_mxfp8_mxfp4_sm100;
extern const BlockScaledLauncher grouped_gemm_nvfp4_sm120, grouped_gemm_mxfp8_sm120, grouped_gemm_mxfp4_sm120, grouped_gemm_mxfp8_mxfp4_sm120;

// 4-bit values that are multiplied by 8-bit ones are spread to a byte each by TMA, 128 at a time.
constexpr int kMixedAlignment = 128;

// What all of them ask of their arguments, as one sentence; nullptr when all holds.
inline const char* block_scaled_why_not(const BlockScaledArgs& args) {
  const auto aligned = [](const void* pointer, int bytes = 16) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; };
  if (args.out_dtype == DType::float16) return "this kernel writes bfloat16 or float32";
  if (args.bias && args.bias_dtype != DType::bfloat16) return "this kernel adds a bfloat16 bias";
  if (args.k == 0) return "K must be at least 1";
  if (args.k % (16 * pack(args.format)) != 0) return "k must be a multiple of 16 bytes";
  if (args.act_format != args.format && args.k % kMixedAlignment != 0) return "k must be a multiple of 128 where formats differ";
  if (args.act_format != args.format && !aligned(args.b, 32)) return "b must start at a multiple of 32 bytes where formats differ";
  if (args.n % 8 != 0) return "n must be a multiple of 8";
  if (!aligned(args.a) || !aligned(args.b) || !aligned(args.out)) return "a, b and out must start at multiples of 16 bytes";
  if (!aligned(args.b_scale_atoms)) return "the atoms of b_scale must start at a multiple of 16 bytes";
  return nullptr;
}

}  // namespace moe
