// Grouped GEMM launchers, free of torch: out[r, n] = sum_k a[r, k] * b[e, n, k] (+ bias[e, n])
// for rows r in [expert_offsets[e], end_row(e)), end_row(e) = expert_offsets[e+1] unless there are expert_rows. Everything is device
// memory; nothing is read on the host.
#pragma once
#include <cuda_runtime.h>
#include <cstddef>
#include <cstdint>

namespace moe {

enum class DType : int { bfloat16 = 0, float16 = 1, float32 = 2, float8_e4m3 = 3, int8 = 4 };

// A float32 scale matrix (rows, k blocks) with free strides, in elements: K-major is (k_blocks, 1), MN-major is (1, rows).
struct ScaleView {
  const float* data = nullptr;
  int64_t stride_group = 0;  // per expert (b_scale only)
  int64_t stride_row = 0;
  int64_t stride_k = 0;
};

// How b is stored: rows of ab_dtype, or 64 x 64 blocks of values and their scales (torch_moe_ops/packed_weights.py), which are multiplied
// as numbers of ab_dtype: bfloat16, mxfp4_e4m3 float8_e4m3.
enum class Packing : int { none = 0, nvfp4 = 1, mxfp4 = 2, mxfp8 = 3, mxfp4_e4m3 = 4 };

constexpr int kPackedBlock = 64;  // rows, and k
constexpr bool is_4bit(Packing packing) { return packing != Packing::none && packing != Packing::mxfp8; }
constexpr int packed_value_bytes(Packing packing) { return 64 * 64 / (packing == Packing::mxfp8 ? 1 : 2); }
constexpr int packed_scale_bytes(Packing packing) { return 64 * 64 / (packing == Packing::nvfp4 ? 16 : 32); }
constexpr int packed_block_bytes(Packing packing) { return packed_value_bytes(packing) + packed_scale_bytes(packing); }

// What an expert of `size` rows uses of them.
__host__ __device__ constexpr int32_t rows_in_use(int32_t expert_rows, int32_t size) {
  return expert_rows < 0 ? 0 : expert_rows < size ? expert_rows : size;
}

struct GroupedGemmArgs {
  const void* a = nullptr;                 // [num_rows, k] row-major
  const void* b = nullptr;                 // [num_experts, n, k] row-major, or packed
  void* out = nullptr;                     // [num_rows, n] row-major
  const int32_t* expert_offsets = nullptr; // [num_experts + 1]
  const int32_t* expert_rows = nullptr;    // [num_experts], how many of its rows each expert uses, the first ones; or null: all
  const void* bias = nullptr;              // [num_experts, n] or null
  DType ab_dtype = DType::bfloat16;        // of a and b: bfloat16, float16, or float8_e4m3 (the 1x128 x 128x128 block-scaled format)
  DType out_dtype = DType::bfloat16;       // bfloat16, float16 or float32
  DType bias_dtype = DType::bfloat16;
  Packing packing = Packing::none;
  ScaleView a_scale;                       // float8 only: rows = num_rows
  ScaleView b_scale;                       // float8 only: rows = 128-blocks of n, counted within each of the b_parts
  ScaleView b_global_scale;                // packed only: [num_experts, b_parts] (stride_row: of the parts), or no data for 1
  ScaleView a_global_scale;                // packed only: of a row, [num_experts] (stride_group 0: of all), or no data for 1
  int32_t num_experts = 0, n = 0, k = 0;
  int32_t b_parts = 1;                     // b[e] is this many equally tall matrices on top of each other (2: gate over up)
  int64_t num_rows = 0;                    // rows allocated; rows in use are among the first expert_offsets[num_experts]

  // The row after the last one that an expert uses. Nobody has looked at expert_rows: a value outside the expert's range is clamped.
  __host__ __device__ int32_t end_row(int32_t expert) const {
    const int32_t begin = expert_offsets[expert], end = expert_offsets[expert + 1];
    return expert_rows == nullptr ? end : begin + rows_in_use(expert_rows[expert], end - begin);
  }

  __host__ __device__ void* out_row(int64_t row) const { return static_cast<char*>(out) + row * n * (out_dtype == DType::float32 ? 4 : 2); }
};

// One trio per architecture family. `why_not` returns nullptr when the kernel can run these arguments, else one sentence.
// `workspace_bytes` is a pure function of the static fields (no pointers). Launches are asynchronous on `stream`.
const char* grouped_gemm_sm80_why_not(const GroupedGemmArgs&);
size_t grouped_gemm_sm80_workspace_bytes(const GroupedGemmArgs&);
cudaError_t grouped_gemm_sm80(const GroupedGemmArgs&, void* workspace, cudaStream_t stream);

const char* grouped_gemm_sm90_why_not(const GroupedGemmArgs&);
size_t grouped_gemm_sm90_workspace_bytes(const GroupedGemmArgs&);
cudaError_t grouped_gemm_sm90(const GroupedGemmArgs&, void* workspace, cudaStream_t stream);

const char* grouped_gemm_sm100_why_not(const GroupedGemmArgs&);
size_t grouped_gemm_sm100_workspace_bytes(const GroupedGemmArgs&);
cudaError_t grouped_gemm_sm100(const GroupedGemmArgs&, void* workspace, cudaStream_t stream);

const char* grouped_gemm_sm120_why_not(const GroupedGemmArgs&);
size_t grouped_gemm_sm120_workspace_bytes(const GroupedGemmArgs&);
cudaError_t grouped_gemm_sm120(const GroupedGemmArgs&, void* workspace, cudaStream_t stream);

}  // namespace moe
