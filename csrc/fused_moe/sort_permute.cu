// Few slots: the row of a slot is the number of slots of smaller experts and of slots of its expert before it; no sort is needed.
//   slot_to_row[s] = #{s' : expert(s') < expert(s), or expert(s') = expert(s) and s' < s},  expert_offsets[e] = #{s' : expert(s') < e}
//   permuted[slot_to_row[s]] = quantize(hidden_states[s / top_k])
//
// A thread block takes 256 chunks of one token: it reads all slots, a warp ranks a slot, and then each thread stores its
// chunk to the token's rows. One launch instead of two, and short: decode is bound by latencies.
#include <algorithm>

#include "common/launch.h"
#include "common/quantize.cuh"
#include "fused_moe/sort_permute.h"

namespace moe {
namespace {

constexpr int kThreads = 256, kLanes = 32, kWarps = kThreads / kLanes;

// Slots s' whose (expert, s') comes before (expert, slot). All lanes of a warp call it.
__device__ __forceinline__ int rank_of(const int16_t* experts, int num_slots, int expert, int slot) {
  int before = 0;
  for (int other = threadIdx.x % kLanes; other < num_slots; other += kLanes) {
    const int e = experts[other];
    before += e >= 0 && (e < expert || (e == expert && other < slot));
  }
  return __reduce_add_sync(kAllLanes, before);
}

template <typename T, Format kFormat>
__device__ __forceinline__ QuantizedChunk<kFormat> quantize_input(const Chunk<T>& chunk, const float* weight, float global_scale) {
  if (!has_scale(kFormat) && !is_rounded(kFormat) && weight == nullptr) {
    QuantizedChunk<kFormat> copy;
    memcpy(copy.words, &chunk, sizeof(copy.words));
    return copy;
  }
  float x[kChunk];
  to_floats(chunk, x);
  if (weight != nullptr)
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = __fmul_rn(x[i], *weight);
  return quantize_chunk<kFormat>(x, global_scale);
}

template <typename T, Format kFormat>
__global__ void __launch_bounds__(kThreads) sort_permute_kernel(SortSlotsArgs sort, PermuteArgs args, bool vectorized) {
  __shared__ int16_t experts[kSortPermuteMaxSlots];
  __shared__ int32_t rows[kSortPermuteMaxSlots];  // of this token's slots
  const int token = blockIdx.x, warp = threadIdx.x / kLanes, num_slots = static_cast<int>(sort.num_slots), first_slot = token * args.top_k;
  const int64_t chunk = int64_t(blockIdx.y) * kThreads + threadIdx.x;
  pdl_wait();
  if (blockIdx.x == 0 && blockIdx.y == 0) {  // before the next kernel starts, which does not wait for this one before it draws tiles
    for (int64_t i = threadIdx.x; i < sort.num_cleared; i += kThreads) sort.cleared[i] = 0;
    __threadfence();
    __syncthreads();
  }
  pdl_launch_next();
  const Chunk<T> loaded = load_chunk(static_cast<const T*>(args.hidden_states) + token * args.out.k, chunk, args.out.k, vectorized);
  for (int slot = threadIdx.x; slot < num_slots; slot += kThreads) experts[slot] = static_cast<int16_t>(expert_of(sort, slot));
  __syncthreads();  // experts is complete
  for (int k = warp; k < args.top_k; k += kWarps) {
    const int expert = experts[first_slot + k];
    const int row = expert >= 0 ? rank_of(experts, num_slots, expert, first_slot + k) : expert;
    if (threadIdx.x % kLanes == 0) {
      rows[k] = row;
      if (blockIdx.y == 0) sort.slot_to_row[first_slot + k] = row;
    }
  }
  // One expert a warp, over all warps of the grid.
  for (int e = (blockIdx.y * gridDim.x + blockIdx.x) * kWarps + warp; e <= sort.num_experts; e += gridDim.x * gridDim.y * kWarps) {
    const int offset = rank_of(experts, num_slots, e, 0);
    if (threadIdx.x % kLanes == 0) sort.expert_offsets[e] = offset;
  }
  const float* weight = args.topk_weights == nullptr ? nullptr : args.topk_weights + token;  // top_k is 1
  const float global_scale = args.global_scale.data == nullptr ? 1.f : *args.global_scale.data;
  const QuantizedChunk<kFormat> quantized = quantize_input<T, kFormat>(loaded, weight, global_scale);
  __syncthreads();  // rows is complete
  for (int k = 0; k < args.top_k; ++k)
    if (rows[k] >= 0) store_chunk<kFormat>(args.out, rows[k], chunk, quantized, vectorized);
}

constexpr int kVectorsPerThread = 4;  // of 16 bytes, to clear

__global__ void __launch_bounds__(kThreads) sort_clear_kernel(SortSlotsArgs sort) {
  __shared__ int16_t experts[kSortPermuteMaxSlots];
  const int num_slots = static_cast<int>(sort.num_slots), thread = blockIdx.x * kThreads + threadIdx.x, threads = gridDim.x * kThreads;
  pdl_wait();
  pdl_launch_next();
  for (int64_t i = thread; i < sort.num_cleared / 4; i += threads) reinterpret_cast<int4*>(sort.cleared)[i] = {};
  for (int slot = threadIdx.x; slot < num_slots; slot += kThreads) experts[slot] = static_cast<int16_t>(expert_of(sort, slot));
  __syncthreads();  // experts is complete
  for (int slot = thread / kLanes; slot < num_slots; slot += threads / kLanes) {
    const int expert = experts[slot], row = expert >= 0 ? rank_of(experts, num_slots, expert, slot) : expert;
    if (threadIdx.x % kLanes == 0) sort.slot_to_row[slot] = row;
  }
}

}  // namespace

cudaError_t sort_clear(const SortSlotsArgs& sort, cudaStream_t stream) {
  if (sort.num_slots > kSortPermuteMaxSlots || sort.alignment != 1) return cudaErrorInvalidValue;
  constexpr int64_t kMostBlocks = 128;
  const int64_t blocks = std::max(ceil_div(sort.num_cleared / 4, kVectorsPerThread * kThreads), ceil_div(sort.num_slots, 4 * kWarps));
  return launch(sort_clear_kernel, dim3(static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, kMostBlocks))), dim3(kThreads), 0, stream, sort);
}

cudaError_t sort_permute(const SortSlotsArgs& sort, const PermuteArgs& args, cudaStream_t stream) {
  const int64_t chunks = ceil_div(args.out.k, kChunk);
  if (sort.num_slots > kSortPermuteMaxSlots || sort.alignment != 1) return cudaErrorInvalidValue;
  if ((args.topk_weights != nullptr && args.top_k != 1) || args.global_scale.per_expert()) return cudaErrorInvalidValue;
  const bool vectorized = args.out.k % kChunk == 0 && aligned_16(args.hidden_states) && aligned_16(args.out.values);
  // Enough thread blocks for the chunks, and a warp for each expert.
  const int64_t columns = std::max(ceil_div(chunks, kThreads), ceil_div(sort.num_experts + 1, kWarps * args.num_tokens));
  const dim3 grid(static_cast<unsigned>(args.num_tokens), static_cast<unsigned>(columns));
  auto run = [&]<typename T, Format kFormat>() {
    return launch(sort_permute_kernel<T, kFormat>, grid, dim3(kThreads), 0, stream, sort, args, vectorized);
  };
  const bool is_bf16 = args.dtype == DType::bfloat16;
  if (is_rounded(args.format))
    return dispatch_rounded(args.format, [&]<Format kFormat>() {
      return is_bf16 ? run.template operator()<__nv_bfloat16, kFormat>() : run.template operator()<__half, kFormat>();
    });
  switch (args.format) {
    case Format::bf16: return is_bf16 ? run.template operator()<__nv_bfloat16, Format::bf16>() : cudaErrorInvalidValue;
    case Format::fp16: return is_bf16 ? cudaErrorInvalidValue : run.template operator()<__half, Format::fp16>();
    case Format::fp8_block:
      return is_bf16 ? run.template operator()<__nv_bfloat16, Format::fp8_block>() : run.template operator()<__half, Format::fp8_block>();
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace moe
