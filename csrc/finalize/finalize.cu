// out[t] = routed_scaling_factor * sum over k, in order, of topk_weights[t, k] * expert_out[slot_to_row[t, k]],
// float32.
//
// expert_out [P, H], out [T, H]. A thread owns 8 columns of a token, or with many tokens 4 x 8, and then visits only slots that have a
// row. The order of the sum is fixed and nothing is atomic: deterministic and batch-invariant.
#include <torch/csrc/stable/library.h>

#include "common/launch.h"
#include "common/quantize.cuh"
#include "common/stream.h"
#include "common/tensor.h"
#include "common/tiling.h"
#include "finalize/finalize.h"

namespace moe {
namespace {

// With many tokens: chunks of a thread, and how many loads of a chunk it has in flight. 8 take 64 registers; 4, with 48, were slower
// (DeepSeek-V3, 2048 tokens: EP8 18.2 us instead of 17.3, TP8 67.5 instead of 62.7).
constexpr int kChunksPerThread = 4, kLoads = 8;

// Slots base, base + 1, .. of a token, one a lane.
struct Slots {
  int row;  // -1: adds nothing
  float weight;
  bool invalid;  // whether any lane's row was neither -1 nor one of expert_out

  __device__ __forceinline__ Slots(const FinalizeArgs& args, int64_t token, int base) {
    const int slot = base + threadIdx.x % kLanes;
    const int64_t index = token * args.top_k + slot;
    const bool exists = slot < args.top_k && token < args.num_tokens;
    row = exists ? args.slot_to_row[index] : -1;
    weight = exists && args.topk_weights ? args.topk_weights[index] : 1.f;
    const bool inside = row >= 0 && row < args.num_rows;
    invalid = __any_sync(kAllLanes, !inside && row != -1);
    row = inside ? row : -1;
  }

  // Moves the slots that have a row to the first lanes, in order; their number.
  __device__ __forceinline__ int compact() {
    const unsigned present = __ballot_sync(kAllLanes, row >= 0);
    const int lane = static_cast<int>(__fns(present, 0, threadIdx.x % kLanes + 1));  // of the slot to move here; -1: none
    const int moved = __shfl_sync(kAllLanes, row, lane);
    row = lane >= 0 ? moved : -1;
    weight = __shfl_sync(kAllLanes, weight, lane);
    return __popc(present);
  }
};

// kChunks chunks, kLanes apart, of the rows of kRows slots, all in flight together.
template <typename T, int kRows, int kChunks, bool kVectorized>
struct Loads {
  Chunk<T> chunks[kRows][kChunks];
  float weight[kRows];
  bool present[kRows];

  // Of the slots that lanes first, first + 1, .. hold.
  __device__ __forceinline__ Loads(const FinalizeArgs& args, const Slots& slots, int first, int64_t chunk) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = __shfl_sync(kAllLanes, slots.row, first + i);
      present[i] = row >= 0;
      const T* source = static_cast<const T*>(args.expert_out) + row * args.hidden_size;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        chunks[i][c] = load_chunk(source, chunk + c * kLanes, present[i] ? args.hidden_size : 0, kVectorized);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) weight[i] = __shfl_sync(kAllLanes, slots.weight, first + i);
  }

  // x += weight * chunk c, slot by slot.
  __device__ __forceinline__ void add_to(float (&x)[kChunk], int c) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (!present[i]) continue;  // a branch: without it, the compiler adds a row before it loads the next
      float y[kChunk];
      to_floats(chunks[i][c], y);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) x[j] = __fadd_rn(x[j], __fmul_rn(weight[i], y[j]));
    }
  }
};

template <typename T, bool kVectorized>
__device__ __forceinline__ void store_sum(const FinalizeArgs& args, int64_t token, int64_t chunk, float (&x)[kChunk], bool invalid) {
  constexpr Format kOut = std::is_same_v<T, __half> ? Format::fp16 : Format::bf16;
  const float factor = invalid ? __int_as_float(0x7fffffff) : args.routed_scaling_factor;  // NaN times anything is this NaN
#pragma unroll
  for (int j = 0; j < kChunk; ++j) x[j] = __fmul_rn(factor, x[j]);
  store_chunk<kOut>({args.out, nullptr, args.hidden_size, 0, 0}, token, chunk, quantize_chunk<kOut>(x, 1.f), kVectorized);
}

// Few tokens: kRows slots in one round of latency. Any top_k; kRows 1: any hidden_size and alignment.
template <typename T, int kRows>
__global__ void __launch_bounds__(kMaxThreads) finalize_kernel(FinalizeArgs args) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y, chunk = first_chunk<1>();
  if (!args.slots_complete) pdl_wait();
  Slots slots(args, token, 0);
  pdl_wait();
  pdl_launch_next();
  if (token >= args.num_tokens) return;
  float x[kChunk] = {};
  bool invalid = false;
  for (int base = 0; base < args.top_k; base += kLanes) {
    if (base > 0) slots = Slots(args, token, base);
    invalid |= slots.invalid;
    const int count = min(kLanes, args.top_k - base);
#pragma unroll 1
    for (int first = 0; first < count; first += kRows) Loads<T, kRows, 1, (kRows > 1)>(args, slots, first, chunk).add_to(x, 0);
  }
  store_sum<T, (kRows > 1)>(args, token, chunk, x, invalid);
}

// At most one slot has a row: all chunks of a thread in flight, and no sums to keep.
template <typename T>
__device__ __forceinline__ void finalize_one_row(const FinalizeArgs& args, int64_t token, const Slots& slots) {
  const int64_t chunk = first_chunk<kChunksPerThread>();
  const Loads<T, 1, kChunksPerThread, true> loads(args, slots, 0, chunk);
#pragma unroll
  for (int c = 0; c < kChunksPerThread; ++c) {
    float x[kChunk] = {};
    loads.add_to(x, c);
    store_sum<T, true>(args, token, chunk + c * kLanes, x, slots.invalid);
  }
}

// kRows rows in flight, of as many chunks at a time as that leaves loads for.
template <typename T, int kRows>
__device__ __forceinline__ void finalize_rows(const FinalizeArgs& args, int64_t token, const Slots& slots, int count) {
  constexpr int kChunks = kLoads / kRows;
#pragma unroll 1
  for (int c = 0; c < kChunksPerThread; c += kChunks) {
    const int64_t chunk = first_chunk<kChunksPerThread>() + c * kLanes;
    float x[kChunks][kChunk] = {};
#pragma unroll 1
    for (int first = 0; first < count; first += kRows) {
      const Loads<T, kRows, kChunks, true> loads(args, slots, first, chunk);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) loads.add_to(x[i], i);
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) store_sum<T, true>(args, token, chunk + i * kLanes, x[i], slots.invalid);
  }
}

// Many tokens, top_k <= 32. With expert parallelism most slots have no row: the fewer have one, the more chunks of it are in flight.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) finalize_many_kernel(FinalizeArgs args) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (!args.slots_complete) pdl_wait();
  Slots slots(args, token, 0);
  pdl_wait();
  pdl_launch_next();
  if (token >= args.num_tokens) return;
  const int count = slots.compact();
  if (count <= 1) finalize_one_row<T>(args, token, slots);
  else if (count == 2) finalize_rows<T, 2>(args, token, slots, count);
  else finalize_rows<T, 4>(args, token, slots, count);
}

}  // namespace

cudaError_t finalize(const FinalizeArgs& args, cudaStream_t stream) {
  const int64_t chunks = ceil_div(args.hidden_size, kChunk);
  if (args.num_tokens == 0 || chunks == 0) return cudaSuccess;
  const bool vectorized = args.hidden_size % kChunk == 0 && aligned_16(args.expert_out) && aligned_16(args.out);
  const Tiling tiling = tile_rows(args.num_tokens, chunks, vectorized && args.top_k <= kLanes ? kChunksPerThread : 1);
  return dispatch_dtype(args.dtype, [&]<typename T>() {
    auto* kernel = tiling.chunks_per_thread > 1 ? finalize_many_kernel<T>
                   : !vectorized                ? finalize_kernel<T, 1>
                   : args.top_k > 8             ? finalize_kernel<T, 16>
                                                : finalize_kernel<T, 8>;
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
