// values[r, k], scale[r, k / block_k] = quantize(input[r, k]): bf16, fp16 or float32 [rows, k] -> any activation
// format.
//
// A thread quantises 8-element chunks (common/quantize.cuh); the grid is common/tiling.h's. int8 takes a block a row.
#include <torch/csrc/stable/library.h>

#include "common/launch.h"
#include "common/quantize.cuh"
#include "common/stream.h"
#include "common/tensor.h"
#include "common/tiling.h"
#include "quantize/quantize.h"

namespace moe {
namespace {

constexpr int kChunksPerThread = 4;  // 16-byte loads in flight

template <typename T, Format kFormat, int kChunks>
__global__ void __launch_bounds__(kMaxThreads) quantize_kernel(QuantizeArgs args, bool vectorized) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t first = first_chunk<kChunks>();
  pdl_wait();
  pdl_launch_next();
  if (row >= args.rows) return;
  vectorized = vectorized || kChunks > 1;  // known at compile time there
  const T* input = static_cast<const T*>(args.input) + row * args.out.k;
  Chunk<T> chunks[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) chunks[i] = load_chunk(input, first + i * kLanes, args.out.k, vectorized);
  const float global_scale = args.global_scale ? *args.global_scale : 1.f;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    float x[kChunk];
    to_floats(chunks[i], x);
    store_chunk<kFormat>(args.out, row, first + i * kLanes, quantize_chunk<kFormat>(x, global_scale), vectorized);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) quantize_int8_kernel(QuantizeArgs args, bool vectorized) {
  const int64_t row = blockIdx.x;
  pdl_wait();
  pdl_launch_next();
  const T* input = static_cast<const T*>(args.input) + row * args.out.k;
  quantize_row(args.out, row, vectorized, [&](int64_t chunk, float (&x)[kChunk]) {
    to_floats(load_chunk(input, chunk, args.out.k, vectorized), x);
  });
}

}  // namespace

cudaError_t quantize(const QuantizeArgs& args, cudaStream_t stream) {
  const int64_t chunks = ceil_div(args.out.k, kChunk);
  if (args.rows == 0 || (chunks == 0 && args.format != Format::int8)) return cudaSuccess;
  const bool vectorized = args.out.k % kChunk == 0 && aligned_16(args.input) && aligned_16(args.out.values);
  return dispatch_dtype(args.dtype, [&]<typename T>() {
    return dispatch_format(args.format, [&]<Format kFormat>() {
      if constexpr (kFormat == Format::int8) {
        const Tiling tiling = tile_whole_rows(args.rows, chunks);
        return launch(quantize_int8_kernel<T>, tiling.grid, tiling.block, 0, stream, args, vectorized);
      } else {
        const Tiling tiling = tile_rows(args.rows, chunks, vectorized ? kChunksPerThread : 1);
        auto* kernel = tiling.chunks_per_thread == 1 ? quantize_kernel<T, kFormat, 1>
                                                     : quantize_kernel<T, kFormat, kChunksPerThread>;
        return launch(kernel, tiling.grid, tiling.block, 0, stream, args, vectorized);
      }
    });
  });
}

namespace {

std::tuple<Tensor, Tensor> quantize_cuda(const Tensor& input, const Text& format_name,
                                         const std::optional<Tensor>& global_scale) {
  constexpr const char* kOp = "quantize";
  const Format format = parse_format(kOp, format_name);
  expect_tensor(kOp, "input", input, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float}, {"rows", "K"}, input);
  const int64_t rows = input.size(0), k = input.size(1);
  MOE_EXPECT(k % pack(format) == 0, kOp, "input", "an even last dimension for this format", describe(input));
  const GlobalScale global = parse_global_scale(kOp, format, global_scale, std::nullopt, input);
  Tensor values = empty({rows, k / pack(format)}, value_dtype(format), input);
  Tensor scale = empty({rows, scale_columns(format, k)}, scale_dtype(format), input);
  QuantizeArgs args{input.data_ptr(), float_dtype(input), rows, format, {}, global.data};
  args.out = {values.data_ptr(), scale.data_ptr(), k, scale_columns(format, k), 1};
  const CudaScope scope(input);
  check_cuda(kOp, quantize(args, scope.stream));
  return {values, scale};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) { m.impl("quantize.cuda", TORCH_BOX(&moe::quantize_cuda)); }
