// act[r], act_scale[r] = quantize(activation(gate[r], up[r])) in float32, for rows r < expert_offsets[E].
//
// gate_up [P, 2I] by layout (gate over up halves, up over gate halves, or interleaved), or [P, I] without a gate. The
// number of rows in use is on the device only, so a fixed grid walks them: unused rows cost nothing.
#include <torch/csrc/stable/library.h>

#include "act_mul/act_mul.h"
#include "common/arguments.h"
#include "common/launch.h"
#include "common/quantize.cuh"
#include "common/stream.h"
#include "common/tensor.h"
#include "common/tiling.h"

namespace moe {
namespace {

constexpr int kChunksPerThread = 2;  // pairs of 16-byte loads in flight
// Thread blocks of the fixed grid: 8 resident ones for each of up to 160 SMs.
constexpr int64_t kMaxBlocks = 8 * 160;

// The inputs of 8 outputs, as loaded; `second` is zero without a gate.
template <typename T>
struct ChunkPair {
  Chunk<T> first, second;
};

// Two loads on every path, with no branch around them, so that the pairs of a thread are all in flight together.
template <typename T>
__device__ __forceinline__ ChunkPair<T> load_pair(const ActMulArgs& args, int64_t row, int64_t chunk, bool vectorized) {
  const bool gated = is_gated(args.activation.kind), interleaved = gated && args.layout == GateUpLayout::interleaved;
  const int64_t k = interleaved ? 2 * args.out.k : args.out.k;  // of the row that each load is from
  const T* first = static_cast<const T*>(args.gate_up) + row * (gated ? 2 * args.out.k : args.out.k);
  const T* second = interleaved ? first : first + k;
  return {load_chunk(first, interleaved ? 2 * chunk : chunk, k, vectorized),
          load_chunk(second, interleaved ? 2 * chunk + 1 : chunk, gated ? k : 0, vectorized)};
}

// Undoes the layout: 8 gates and 8 ups.
template <typename T>
__device__ __forceinline__ void split(const ActMulArgs& args, const ChunkPair<T>& pair, float (&gate)[kChunk],
                                      float (&up)[kChunk]) {
  float first[kChunk], second[kChunk];
  to_floats(pair.first, first);
  to_floats(pair.second, second);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (args.layout == GateUpLayout::interleaved) {
      gate[i] = i < kChunk / 2 ? first[2 * i % kChunk] : second[2 * i % kChunk];
      up[i] = i < kChunk / 2 ? first[(2 * i + 1) % kChunk] : second[(2 * i + 1) % kChunk];
    } else {
      gate[i] = args.layout == GateUpLayout::gate_up ? first[i] : second[i];
      up[i] = args.layout == GateUpLayout::gate_up ? second[i] : first[i];
    }
  }
}

template <typename T>
__device__ __forceinline__ void activate_pair(const ActMulArgs& args, const ChunkPair<T>& pair, float (&y)[kChunk]) {
  const ActivationParams& params = args.activation;
  float gate[kChunk], up[kChunk] = {};
  auto activate_all = [&]<Activation kKind>(ActivationConstant<kKind>) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) y[i] = activate<kKind>(params, gate[i], up[i]);
  };
  if (is_gated(params.kind)) {
    split(args, pair, gate, up);
    return with_gated_activation(params.kind, activate_all);
  }
  to_floats(pair.first, gate);
  switch (params.kind) {
    case Activation::relu2_no_mul: return activate_all(ActivationConstant<Activation::relu2_no_mul>{});
    case Activation::gelu_no_mul: return activate_all(ActivationConstant<Activation::gelu_no_mul>{});
    default: return activate_all(ActivationConstant<Activation::silu_no_mul>{});
  }
}

__device__ __forceinline__ int64_t rows_in_use(const ActMulArgs& args) {
  return min(static_cast<int64_t>(args.expert_offsets[args.num_experts]), args.num_rows);
}

template <typename T, Format kFormat, int kChunks>
__global__ void __launch_bounds__(kMaxThreads) act_mul_kernel(ActMulArgs args, bool vectorized) {
  const int64_t first = first_chunk<kChunks>();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  pdl_wait();
  pdl_launch_next();
  vectorized = vectorized || kChunks > 1;  // known at compile time there
  const int64_t rows = rows_in_use(args);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < rows; row += stride) {
    ChunkPair<T> pairs[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) pairs[i] = load_pair<T>(args, row, first + i * kLanes, vectorized);
    const float global_scale = global_scale_of_row(args.global_scale, row);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      float y[kChunk];
      activate_pair(args, pairs[i], y);
      store_chunk<kFormat>(args.out, row, first + i * kLanes, quantize_chunk<kFormat>(y, global_scale), vectorized);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) act_mul_int8_kernel(ActMulArgs args, bool vectorized) {
  pdl_wait();
  pdl_launch_next();
  const int64_t rows = rows_in_use(args);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    quantize_row(args.out, row, vectorized, [&](int64_t chunk, float (&y)[kChunk]) {
      activate_pair(args, load_pair<T>(args, row, chunk, vectorized), y);
    });
  }
}

// bf16 and fp16 hold their own dtype, and what is still float32.
template <typename T, Format kFormat>
constexpr bool kCanHold = kFormat == Format::bf16   ? !std::is_same_v<T, __half>
                          : kFormat == Format::fp16 ? !std::is_same_v<T, __nv_bfloat16>
                                                    : true;

template <typename T, Format kFormat>
cudaError_t launch_act_mul(const ActMulArgs& args, bool vectorized, cudaStream_t stream) {
  const int64_t chunks = ceil_div(args.out.k, kChunk);
  if constexpr (kFormat == Format::int8) {
    Tiling tiling = tile_whole_rows(args.num_rows, chunks);
    tiling.grid.x = static_cast<unsigned>(std::min<int64_t>(tiling.grid.x, kMaxBlocks));
    return launch(act_mul_int8_kernel<T>, tiling.grid, tiling.block, 0, stream, args, vectorized);
  } else {
    Tiling tiling = tile_rows(args.num_rows, chunks, vectorized ? kChunksPerThread : 1);
    tiling.grid.x = static_cast<unsigned>(std::min<int64_t>(tiling.grid.x, ceil_div(kMaxBlocks, tiling.grid.y)));
    auto* kernel =
        tiling.chunks_per_thread == 1 ? act_mul_kernel<T, kFormat, 1> : act_mul_kernel<T, kFormat, kChunksPerThread>;
    return launch(kernel, tiling.grid, tiling.block, 0, stream, args, vectorized);
  }
}

}  // namespace

cudaError_t act_mul(const ActMulArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0 || args.out.k == 0) return cudaSuccess;
  const bool vectorized = args.out.k % kChunk == 0 && aligned_16(args.gate_up) && aligned_16(args.out.values);
  return dispatch_dtype(args.dtype, [&]<typename T>() {
    return dispatch_format(args.format, [&]<Format kFormat>() {
      if constexpr (kCanHold<T, kFormat>) return launch_act_mul<T, kFormat>(args, vectorized, stream);
      return cudaErrorInvalidValue;
    });
  });
}

namespace {

constexpr const char* kOp = "act_mul";

std::tuple<Tensor, Tensor> act_mul_cuda(const Tensor& gate_up, const Tensor& expert_offsets,
                                        const std::string& activation, double alpha, double beta,
                                        const std::optional<double>& limit, const std::string& layout,
                                        const std::string& format_name, const std::optional<Tensor>& global_scale) {
  ActMulArgs args;
  args.format = parse_format(kOp, format_name);
  args.activation = parse_activation(kOp, activation, alpha, beta, limit);
  args.layout = parse_layout(kOp, "layout", layout);
  expect_tensor(kOp, "gate_up", gate_up, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float}, {"P", "columns"},
                gate_up);
  expect_tensor(kOp, "expert_offsets", expert_offsets, {ScalarType::Int}, {"E + 1"}, gate_up);
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
