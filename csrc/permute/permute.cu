// permuted[r], permuted_scale[r] = quantize(hidden_states[t] * (topk_weights[t, k] if given)), r = slot_to_row[t, k] >=
// 0.
//
// Token-major: a token is read once and, unless its slots need different numbers (weights, or a global scale for each
// expert), quantised once, then written to all its rows. Few tokens still use many SMs: the columns are spread over
// thread blocks too, since every scale block stands alone. int8 (one scale a row) takes one thread block a token.
#include <torch/csrc/stable/library.h>

#include "common/launch.h"
#include "common/quantize.cuh"
#include "common/stream.h"
#include "common/tensor.h"
#include "common/tiling.h"
#include "permute/permute.h"

namespace moe {
namespace {

// With many tokens: 16-byte loads in flight, and elements that a thread quantises and stores at once. 16 of 8 bits fill a
// 16-byte store; 8 of them would need twice the instructions, for stores, scales and divisions.
constexpr int kChunksPerThread = 4;
template <Format kFormat>
constexpr int kManySize = has_scale(kFormat) ? 2 * kChunk : kChunk;

// The slots of one token, held one a lane, 32 at a time: two coalesced loads instead of 2 * top_k dependent ones.
class Slots {
 public:
  __device__ __forceinline__ Slots(const PermuteArgs& args, int64_t token) : args_(args), first_(token * args.top_k) {
    load(0);
  }

  // Whether no slot has a row; false where only more loads could tell. The same for all lanes of a warp, as below.
  __device__ __forceinline__ bool none() const { return args_.top_k <= kLanes && lanes_with_row() == 0; }

  // visit(row, weight) for every slot that has a row, in order.
  template <typename Visit>
  __device__ __forceinline__ void for_each_row(Visit&& visit) {
    for (int base = 0; base < args_.top_k; base += kLanes) {
      if (base > 0) load(base);
      unsigned left = lanes_with_row();
      for (int lane = 0; left != 0; ++lane, left >>= 1) {
        if (left % 2 == 0) continue;
        const float weight = __shfl_sync(kAllLanes, weight_, lane);
        visit(static_cast<int64_t>(__shfl_sync(kAllLanes, row_, lane)), weight);
      }
    }
  }

 private:
  // Waits for the load: not part of it, so that other loads can be issued in between.
  __device__ __forceinline__ unsigned lanes_with_row() const {
    return __ballot_sync(kAllLanes, row_ >= 0 && row_ < args_.num_rows);
  }

  __device__ __forceinline__ void load(int base) {
    const int slot = base + threadIdx.x % kLanes;
    const bool exists = slot < args_.top_k;
    row_ = exists ? args_.slot_to_row[first_ + slot] : -1;
    weight_ = exists && args_.topk_weights ? args_.topk_weights[first_ + slot] : 1.f;
  }

  const PermuteArgs& args_;
  int64_t first_;
  int row_;
  float weight_;
};

// A chunk as it goes to a row when every row of the token gets the same. bf16 and fp16 are copies.
template <Format kFormat, typename T, int kSize>
__device__ __forceinline__ QuantizedChunk<kFormat, kSize> shared_chunk(const Chunk<T, kSize>& chunk,
                                                                       const GlobalScale& global_scale) {
  if constexpr (!has_scale(kFormat) && !is_rounded(kFormat)) {
    const uint4 words = *reinterpret_cast<const uint4*>(&chunk);
    return {{words.x, words.y, words.z, words.w}};
  } else {
    float x[kSize];
    to_floats(chunk, x);
    return quantize_chunk<kFormat>(x, global_scale.data ? *global_scale.data : 1.f);
  }
}

template <typename T, Format kFormat, bool kPerSlot, int kSize, int kChunks>
__global__ void __launch_bounds__(kMaxThreads) permute_kernel(PermuteArgs args, bool vectorized) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t first = first_chunk<kChunks>();
  pdl_wait();
  pdl_launch_next();
  if (token >= args.num_tokens) return;
  vectorized = vectorized || kChunks > 1;  // known at compile time there
  Slots slots(args, token);
  // A third of the tokens with 8-way expert parallelism. With few tokens one latency after the other would cost more.
  if (kChunks > 1 && slots.none()) return;
  const T* hidden = static_cast<const T*>(args.hidden_states) + token * args.out.k;
  Chunk<T, kSize> chunks[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) chunks[i] = load_chunk<kSize>(hidden, first + i * kLanes, args.out.k, vectorized);
  if constexpr (kPerSlot) {
    slots.for_each_row([&](int64_t row, float weight) {
      const float global_scale = global_scale_of_row(args.global_scale, row);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        float x[kSize];
        to_floats(chunks[i], x);
#pragma unroll
        for (int j = 0; j < kSize; ++j) x[j] = __fmul_rn(x[j], weight);
        store_chunk<kFormat>(args.out, row, first + i * kLanes, quantize_chunk<kFormat>(x, global_scale), vectorized);
      }
    });
  } else {
    QuantizedChunk<kFormat, kSize> quantized[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) quantized[i] = shared_chunk<kFormat>(chunks[i], args.global_scale);
    slots.for_each_row([&](int64_t row, float) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        store_chunk<kFormat>(args.out, row, first + i * kLanes, quantized[i], vectorized);
      }
    });
  }
}

// One thread block a token. Without weights the rows get the same bits; they are computed again for each, from L1.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) permute_int8_kernel(PermuteArgs args, bool vectorized) {
  const int64_t token = blockIdx.x;
  pdl_wait();
  pdl_launch_next();
  const T* hidden = static_cast<const T*>(args.hidden_states) + token * args.out.k;
  Slots(args, token).for_each_row([&](int64_t row, float weight) {
    quantize_row(args.out, row, vectorized, [&](int64_t chunk, float (&x)[kChunk]) {
      to_floats(load_chunk(hidden, chunk, args.out.k, vectorized), x);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) x[j] = __fmul_rn(x[j], weight);
    });
  });
}

template <typename T, Format kFormat>
cudaError_t launch_permute(const PermuteArgs& args, bool vectorized, cudaStream_t stream) {
  const int64_t chunks = ceil_div(args.out.k, kChunk);
  if constexpr (kFormat == Format::int8) {
    const Tiling tiling = tile_whole_rows(args.num_tokens, chunks);
    return launch(permute_int8_kernel<T>, tiling.grid, tiling.block, 0, stream, args, vectorized);
  } else {
    const bool per_slot = args.topk_weights != nullptr || args.global_scale.per_expert();
    constexpr int kSize = kManySize<kFormat>;
    const bool several = !per_slot && vectorized && args.out.k % kSize == 0;
    const Tiling tiling = tile_rows(args.num_tokens, chunks, several ? kChunksPerThread : 1);
    auto* kernel = per_slot                        ? permute_kernel<T, kFormat, true, kChunk, 1>
                   : tiling.chunks_per_thread == 1 ? permute_kernel<T, kFormat, false, kChunk, 1>
                                                   : permute_kernel<T, kFormat, false, kSize, kChunksPerThread * kChunk / kSize>;
    return launch(kernel, tiling.grid, tiling.block, 0, stream, args, vectorized);
  }
}

// bf16 and fp16 hold their own dtype only.
template <typename T, Format kFormat>
constexpr bool kCanHold = kFormat == Format::bf16   ? std::is_same_v<T, __nv_bfloat16>
                          : kFormat == Format::fp16 ? std::is_same_v<T, __half>
                                                    : !std::is_same_v<T, float>;

}  // namespace

cudaError_t permute(const PermuteArgs& args, cudaStream_t stream) {
  if (args.num_tokens == 0 || args.top_k == 0 || (args.out.k == 0 && args.format != Format::int8)) return cudaSuccess;
  const bool vectorized = args.out.k % kChunk == 0 && aligned_16(args.hidden_states) && aligned_16(args.out.values);
  return dispatch_dtype(args.dtype, [&]<typename T>() {
    return dispatch_act_format(args.format, [&]<Format kFormat>() {
      if constexpr (kCanHold<T, kFormat>) return launch_permute<T, kFormat>(args, vectorized, stream);
      return cudaErrorInvalidValue;
    });
  });
}

namespace {

std::tuple<Tensor, Tensor> permute_cuda(const Tensor& hidden_states, const Tensor& slot_to_row, int64_t num_rows,
                                        const Text& format_name, const std::optional<Tensor>& global_scale,
                                        const std::optional<Tensor>& expert_offsets,
                                        const std::optional<Tensor>& topk_weights) {
  constexpr const char* kOp = "permute";
  const Format format = parse_format(kOp, format_name);
  expect_tensor(kOp, "hidden_states", hidden_states, {ScalarType::BFloat16, ScalarType::Half}, {"T", "H"},
                hidden_states);
  const int64_t num_tokens = hidden_states.size(0), k = hidden_states.size(1);
  MOE_EXPECT(has_scale(format) || value_dtype(format) == hidden_states.scalar_type(), kOp, "format",
             "the format of hidden_states or a quantised one", format_name);
  MOE_EXPECT(k % pack(format) == 0, kOp, "hidden_states", "an even last dimension for this format",
             describe(hidden_states));
  expect_tensor(kOp, "slot_to_row", slot_to_row, {ScalarType::Int}, {num_tokens, "K"}, hidden_states);
  const int64_t top_k = slot_to_row.size(1);
  MOE_EXPECT(num_rows >= 0, kOp, "num_rows", "at least 0", num_rows);
  expect_tensor(kOp, "expert_offsets", expert_offsets, {ScalarType::Int}, {"E + 1"}, hidden_states);
  expect_tensor(kOp, "topk_weights", topk_weights, {ScalarType::Float}, {num_tokens, top_k}, hidden_states);
  const GlobalScale global = parse_global_scale(kOp, format, global_scale, expert_offsets, hidden_states);
  QuantizedTensors out = empty_quantized(format, num_rows, k, hidden_states);
  PermuteArgs args;
  args.hidden_states = hidden_states.data_ptr();
  args.dtype = float_dtype(hidden_states);
  args.slot_to_row = pointer<const int32_t>(slot_to_row);
  args.topk_weights = pointer<const float>(topk_weights);
  args.num_tokens = num_tokens;
  args.top_k = static_cast<int32_t>(top_k);
  args.num_rows = num_rows;
  args.format = format;
  args.out = out.view;
  args.global_scale = global;
  const CudaScope scope(hidden_states);
  check_cuda(kOp, permute(args, scope.stream));
  return {out.values, out.scale};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) { m.impl("permute.cuda", TORCH_BOX(&moe::permute_cuda)); }
