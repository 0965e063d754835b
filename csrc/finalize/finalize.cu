// out[t] = routed_scaling_factor * sum over k, in order, of topk_weights[t, k] * expert_out[slot_to_row[t, k]],
// float32.
//
// expert_out [P, H], out [T, H]. A thread owns 8 columns of a token, or with many tokens 2 x 8, and has 8 or 16 independent
// 16-byte loads in flight. The order of the sum is fixed and nothing is atomic: deterministic and batch-invariant.
#include <torch/csrc/stable/library.h>

#include "common/launch.h"
#include "common/quantize.cuh"
#include "common/stream.h"
#include "common/tensor.h"
#include "common/tiling.h"
#include "finalize/finalize.h"

namespace moe {
namespace {

constexpr int kLanes = 32;

// The sums of kChunks chunks of a token, `step` apart, with kLoads loads in flight.
template <typename T, int kChunks, int kLoads>
struct Sum {
  static constexpr bool kVectorized = kLoads > 1;
  static constexpr int kRowsInFlight = kLoads / kChunks;
  float x[kChunks][kChunk] = {};
  bool invalid = false;

  // Adds weight * row for kRowsInFlight slots, which lanes slot, slot + 1, .. of the warp hold; row -1 adds nothing.
  __device__ __forceinline__ void add(const FinalizeArgs& args, int lane_row, float lane_weight, int slot, int64_t chunk, int step) {
    Chunk<T> chunks[kRowsInFlight][kChunks];
    bool present[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int row = __shfl_sync(kAllLanes, lane_row, slot + i);
      present[i] = row >= 0 && row < args.num_rows;
      invalid |= !present[i] && row != -1;
      const T* source = static_cast<const T*>(args.expert_out) + row * args.hidden_size;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        chunks[i][c] = load_chunk(source, chunk + c * step, present[i] ? args.hidden_size : 0, kVectorized);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const float weight = __shfl_sync(kAllLanes, lane_weight, slot + i);
      if (!present[i]) continue;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int j = 0; j < kChunk; ++j) x[c][j] = __fadd_rn(x[c][j], __fmul_rn(weight, to_float(chunks[i][c].x[j])));
    }
  }
};

template <typename T, int kChunks, int kLoads>
__global__ void __launch_bounds__(kMaxThreads) finalize_kernel(FinalizeArgs args) {
  constexpr bool kVectorized = kLoads > 1;
  constexpr Format kOut = std::is_same_v<T, __half> ? Format::fp16 : Format::bf16;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t chunk = static_cast<int64_t>(blockIdx.y) * blockDim.x * kChunks + threadIdx.x;
  const int lane = threadIdx.x % kLanes, step = blockDim.x;
  pdl_wait();
  pdl_launch_next();
  if (token >= args.num_tokens) return;
  Sum<T, kChunks, kLoads> sum;
  for (int base = 0; base < args.top_k; base += kLanes) {
    const int64_t slot = token * args.top_k + base + lane;
    const bool exists = base + lane < args.top_k;
    const int row = exists ? args.slot_to_row[slot] : -1;
    const float weight = exists && args.topk_weights ? args.topk_weights[slot] : 1.f;
    const int count = min(kLanes, args.top_k - base);
#pragma unroll 1
    for (int i = 0; i < count; i += sum.kRowsInFlight) sum.add(args, row, weight, i, chunk, step);
  }
  const QuantizedMatrix out{args.out, nullptr, args.hidden_size, 0, 0};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      sum.x[c][j] = sum.invalid ? __int_as_float(0x7fffffff) : __fmul_rn(args.routed_scaling_factor, sum.x[c][j]);
    }
    store_chunk<kOut>(out, token, chunk + c * step, quantize_chunk<kOut>(sum.x[c], 1.f), kVectorized);
  }
}

}  // namespace

cudaError_t finalize(const FinalizeArgs& args, cudaStream_t stream) {
  const int64_t chunks = ceil_div(args.hidden_size, kChunk);
  if (args.num_tokens == 0 || chunks == 0) return cudaSuccess;
  const bool vectorized = args.hidden_size % kChunk == 0 && aligned_16(args.expert_out) && aligned_16(args.out);
  const Tiling tiling = tile_rows(args.num_tokens, chunks, vectorized ? 2 : 1);
  return dispatch_dtype(args.dtype, [&]<typename T>() {
    auto* kernel = !vectorized                   ? finalize_kernel<T, 1, 1>
                   : tiling.chunks_per_thread == 2 ? finalize_kernel<T, 2, 8>
                   : args.top_k > 8                ? finalize_kernel<T, 1, 16>  // few tokens: one round of latency for all slots
                                                   : finalize_kernel<T, 1, 8>;
    return launch(kernel, tiling.grid, tiling.block, 0, stream, args);
  });
}

namespace {

Tensor finalize_cuda(const Tensor& expert_out, const Tensor& slot_to_row, const std::optional<Tensor>& topk_weights,
                     double routed_scaling_factor) {
  constexpr const char* kOp = "finalize";
  expect_tensor(kOp, "expert_out", expert_out, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float}, {"P", "H"},
                expert_out);
  expect_tensor(kOp, "slot_to_row", slot_to_row, {ScalarType::Int}, {"T", "K"}, expert_out);
  const int64_t num_tokens = slot_to_row.size(0), top_k = slot_to_row.size(1), hidden_size = expert_out.size(1);
  expect_tensor(kOp, "topk_weights", topk_weights, {ScalarType::Float}, {num_tokens, top_k}, expert_out);
  const bool is_half = expert_out.scalar_type() == ScalarType::Half;
  Tensor out = empty({num_tokens, hidden_size}, is_half ? ScalarType::Half : ScalarType::BFloat16, expert_out);
  FinalizeArgs args;
  args.expert_out = expert_out.data_ptr();
  args.dtype = float_dtype(expert_out);
  args.slot_to_row = pointer<const int32_t>(slot_to_row);
  args.topk_weights = pointer<const float>(topk_weights);
  args.num_tokens = num_tokens;
  args.num_rows = expert_out.size(0);
  args.hidden_size = hidden_size;
  args.top_k = static_cast<int32_t>(top_k);
  args.routed_scaling_factor = static_cast<float>(routed_scaling_factor);
  args.out = out.data_ptr();
  const CudaScope scope(expert_out);
  check_cuda(kOp, finalize(args, scope.stream));
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) { m.impl("finalize.cuda", TORCH_BOX(&moe::finalize_cuda)); }
