// act[r], act_scale[r] = quantize(activation(gate[r], up[r])) in float32, for rows r < expert_offsets[E].
//
// gate_up [P, 2I] by layout (gate over up halves, up over gate halves, or interleaved), or [P, I] without a gate. The
// number of rows in use is on the device only, so a grid of resident thread blocks walks them: unused rows cost nothing.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <utility>

#include "act_mul/act_mul.h"
#include "common/arguments.h"
#include "common/launch.h"
#include "common/quantize.cuh"
#include "common/stream.h"
#include "common/tensor.h"

namespace moe {
namespace {

constexpr int kThreads = 256;
// Resident threads of an SM, with 64 registers each. The grid has no more, so that no last wave fills only some of the SMs.
constexpr int kThreadsPerSm = 1024;
// With more chunks than the GPU has threads: elements that a thread quantises and stores at once (16 of 8 bits fill a
// 16-byte store), and bytes of its next ones that it loads meanwhile. DeepSeek-V3 TP8, 8192 tokens, fp8: 23.8 us; with 8
// elements 27.4, with 128 bytes, which spill, 34.7.
template <typename T, Format kFormat>
constexpr int kManySize = has_scale(kFormat) && sizeof(T) == 2 ? 2 * kChunk : kChunk;
constexpr int kBytesAhead = 64;

// The inputs of kSize outputs, as loaded: gates and ups, or both interleaved; `second` is zero without a gate.
template <typename T, int kSize>
struct ChunkPair {
  Chunk<T, kSize> first, second;
};

__device__ __forceinline__ bool is_interleaved(const ActMulArgs& args) {
  return is_gated(args.activation.kind) && args.layout == GateUpLayout::interleaved;
}

// Zeros unless `inside`. Two loads on every path, with no branch around them, so that all loads of a thread are in flight
// together.
template <typename T, int kSize>
__device__ __forceinline__ ChunkPair<T, kSize> load_pair(const ActMulArgs& args, int64_t row, int64_t chunk, bool inside, bool vectorized) {
  const bool gated = is_gated(args.activation.kind), interleaved = is_interleaved(args);
  const int64_t k = interleaved ? 2 * args.out.k : args.out.k;  // of the row that each load is from
  const T* first = static_cast<const T*>(args.gate_up) + row * (gated ? 2 * args.out.k : args.out.k);
  const T* second = interleaved ? first : first + k;
  if (gated && args.layout == GateUpLayout::up_gate) std::swap(first, second);
  return {load_chunk<kSize>(first, interleaved ? 2 * chunk : chunk, inside ? k : 0, vectorized),
          load_chunk<kSize>(second, interleaved ? 2 * chunk + 1 : chunk, inside && gated ? k : 0, vectorized)};
}

template <typename T, int kSize>
__device__ __forceinline__ void deinterleave(ChunkPair<T, kSize>& pair) {
  constexpr int kWords = sizeof(pair.first) / sizeof(uint32_t);
  const ChunkPair<T, kSize> mixed = pair;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const uint32_t* words = i < kWords / 2 ? mixed.first.words : mixed.second.words;
    const uint32_t even = words[2 * i % kWords], odd = words[2 * i % kWords + 1];
    pair.first.words[i] = sizeof(T) == 2 ? __byte_perm(even, odd, 0x5410) : even;
    pair.second.words[i] = sizeof(T) == 2 ? __byte_perm(even, odd, 0x7632) : odd;
  }
}

template <typename T, int kSize>
__device__ __forceinline__ void activate_pair(const ActMulArgs& args, ChunkPair<T, kSize> pair, float (&y)[kSize]) {
  if (is_interleaved(args)) deinterleave(pair);
  float gate[kSize], up[kSize];
  to_floats(pair.first, gate);
  to_floats(pair.second, up);
  const ActivationParams& params = args.activation;
  auto activate_all = [&](auto activate) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) y[i] = activate(gate[i], up[i]);
  };
  switch (params.kind) {
    case Activation::relu2_no_mul: return activate_all(ActivationFunction<Activation::relu2_no_mul>{params});
    case Activation::gelu_no_mul: return activate_all(ActivationFunction<Activation::gelu_no_mul>{params});
    case Activation::silu_no_mul: return activate_all(ActivationFunction<Activation::silu_no_mul>{params});
    default: return with_gated_activation(params, activate_all);
  }
}

__device__ __forceinline__ uint32_t rows_in_use(const ActMulArgs& args) {
  return static_cast<uint32_t>(min(static_cast<int64_t>(args.expert_offsets[args.num_experts]), args.num_rows));
}

// Chunk `chunk` of row `row`, and a distance between two such.
struct Place {
  uint32_t row, chunk;

  __device__ __forceinline__ Place(uint32_t index, uint32_t row_chunks) : row(index / row_chunks), chunk(index % row_chunks) {}

  __device__ __forceinline__ void advance(const Place& distance, uint32_t row_chunks) {
    row += distance.row;
    chunk += distance.chunk;
    if (chunk < row_chunks) return;
    chunk -= row_chunks;
    ++row;
  }
};

// The chunks of all rows, one row after the other, go to the threads in turn: no lane idles because a row is short. A row
// has row_chunks of them, a multiple of those of a scale block, which keeps a block in neighbouring lanes.
template <typename T, Format kFormat, bool kMany>
__global__ void __launch_bounds__(kThreads, kThreadsPerSm / kThreads)
    act_mul_kernel(ActMulArgs args, uint32_t row_chunks, bool vectorized) {
  constexpr int kSize = kMany ? kManySize<T, kFormat> : kChunk;
  constexpr int kPairs = kMany ? kBytesAhead / sizeof(ChunkPair<T, kSize>) : 1;
  vectorized = kMany || vectorized;  // known at compile time there
  const Place stride(gridDim.x * kThreads, row_chunks);
  Place place(blockIdx.x * kThreads + threadIdx.x, row_chunks), ahead = place;
  pdl_wait();
  pdl_launch_next();
  const uint32_t rows = rows_in_use(args);
  ChunkPair<T, kSize> next[kPairs];
  auto load_next = [&] {
#pragma unroll
    for (int i = 0; i < kPairs; ++i, ahead.advance(stride, row_chunks)) {
      next[i] = load_pair<T, kSize>(args, ahead.row, ahead.chunk, ahead.row < rows, vectorized);
    }
  };
  load_next();
  while (__any_sync(kAllLanes, place.row < rows)) {
    ChunkPair<T, kSize> pairs[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) pairs[i] = next[i];
    load_next();
#pragma unroll
    for (int i = 0; i < kPairs; ++i, place.advance(stride, row_chunks)) {
      float y[kSize];
      activate_pair(args, pairs[i], y);
      const float global_scale = rounded_to(kFormat) == Format::nvfp4 ? global_scale_of_row(args.global_scale, place.row) : 1.f;
      const QuantizedChunk<kFormat, kSize> quantized = quantize_chunk<kFormat>(y, global_scale);
      if (place.row < rows) store_chunk<kFormat>(args.out, place.row, place.chunk, quantized, vectorized);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kThreadsPerSm / kThreads) act_mul_int8_kernel(ActMulArgs args, bool vectorized) {
  pdl_wait();
  pdl_launch_next();
  const uint32_t rows = rows_in_use(args);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    quantize_row(args.out, row, vectorized, [&](int64_t chunk, float (&y)[kChunk]) {
      activate_pair(args, load_pair<T, kChunk>(args, row, chunk, true, vectorized), y);
    });
  }
}

// bf16 and fp16 hold their own dtype, and what is still float32; what is rounded comes from a GEMM, in float32.
template <typename T, Format kFormat>
constexpr bool kCanHold = kFormat == Format::bf16   ? !std::is_same_v<T, __half>
                          : kFormat == Format::fp16 ? !std::is_same_v<T, __nv_bfloat16>
                          : is_rounded(kFormat)     ? std::is_same_v<T, float>
                                                    : true;

template <typename T, Format kFormat>
cudaError_t launch_act_mul(const ActMulArgs& args, bool vectorized, cudaStream_t stream) {
  int device = 0, num_sms = 0;
  if (auto error = cudaGetDevice(&device)) return error;
  if (auto error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device)) return error;
  const int64_t max_threads = int64_t(kThreadsPerSm) * num_sms, chunks = ceil_div(args.out.k, kChunk);
  auto grid = [&](int64_t blocks, int64_t threads) { return dim3(static_cast<unsigned>(std::min(blocks, max_threads / threads))); };
  if constexpr (kFormat == Format::int8) {
    const int64_t threads = std::clamp<int64_t>(round_up(chunks, 32), 32, kThreads);
    return launch(act_mul_int8_kernel<T>, grid(args.num_rows, threads), dim3(static_cast<unsigned>(threads)), 0, stream, args, vectorized);
  } else {
    constexpr int kSize = kManySize<T, kFormat>;
    const bool many = vectorized && args.out.k % kSize == 0 && args.num_rows * chunks > max_threads;
    const int size = many ? kSize : kChunk;
    const int64_t row_chunks = round_up(args.out.k, std::max(size, block_k(kFormat))) / size;
    auto* kernel = many ? act_mul_kernel<T, kFormat, true> : act_mul_kernel<T, kFormat, false>;
    return launch(kernel, grid(ceil_div(args.num_rows * row_chunks, kThreads), kThreads), dim3(kThreads), 0, stream, args,
                  static_cast<uint32_t>(row_chunks), vectorized);
  }
}

}  // namespace

cudaError_t act_mul(const ActMulArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0 || (args.out.k == 0 && args.format != Format::int8)) return cudaSuccess;
  const bool vectorized = args.out.k % kChunk == 0 && aligned_16(args.gate_up) && aligned_16(args.out.values);
  return dispatch_dtype(args.dtype, [&]<typename T>() {
    return dispatch_act_format(args.format, [&]<Format kFormat>() {
      if constexpr (kCanHold<T, kFormat>) return launch_act_mul<T, kFormat>(args, vectorized, stream);
      return cudaErrorInvalidValue;
    });
  });
}

namespace {

constexpr const char* kOp = "act_mul";

std::tuple<Tensor, Tensor> act_mul_cuda(const Tensor& gate_up, const Tensor& expert_offsets,
                                        const Text& activation, double alpha, double beta,
                                        const std::optional<double>& limit, const Text& layout,
                                        const Text& format_name, const std::optional<Tensor>& global_scale) {
  ActMulArgs args;
  args.format = parse_format(kOp, format_name);
  args.activation = parse_activation(kOp, activation, alpha, beta, limit);
  args.layout = parse_layout(kOp, "layout", layout, args.activation, activation);
  expect_tensor(kOp, "gate_up", gate_up, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float}, {"P", "columns"},
                gate_up);
  expect_offsets(kOp, expert_offsets, gate_up);
  const ScalarType dtype = gate_up.scalar_type();
  MOE_EXPECT(has_scale(args.format) || dtype == ScalarType::Float || value_dtype(args.format) == dtype, kOp, "format",
             "the format of gate_up or a quantised one", format_name);
  const int64_t divisor = (is_gated(args.activation.kind) ? 2 : 1) * pack(args.format);
  MOE_EXPECT(gate_up.size(1) % divisor == 0, kOp, "gate_up", "columns divisible by " << divisor, describe(gate_up));
  args.num_rows = gate_up.size(0);
  const int64_t k = is_gated(args.activation.kind) ? gate_up.size(1) / 2 : gate_up.size(1);
  args.global_scale = parse_global_scale(kOp, args.format, global_scale, expert_offsets, gate_up);
  QuantizedTensors out = empty_quantized(args.format, args.num_rows, k, gate_up);
  args.gate_up = gate_up.data_ptr();
  args.dtype = float_dtype(gate_up);
  args.expert_offsets = pointer<const int32_t>(expert_offsets);
  args.num_experts = static_cast<int32_t>(expert_offsets.size(0)) - 1;
  args.out = out.view;
  const CudaScope scope(gate_up);
  check_cuda(kOp, act_mul(args, scope.stream));
  return {out.values, out.scale};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) { m.impl("act_mul.cuda", TORCH_BOX(&moe::act_mul_cuda)); }
