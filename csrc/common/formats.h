// Formats of activations, x ~= values * scale * global_scale (docs/ops.md), as plain data for launchers. Free of torch.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "grouped_gemm/grouped_gemm.h"  // DType

namespace moe {

// The last five are for packed weights, which are multiplied as bfloat16: value * scale of the format behind `as_`, stored as bfloat16, which
// holds all but as_fp8_block's exactly (6 significant bits); nvfp4 without its global scale.
enum class Format : int {
  bf16, fp16, int8, fp8_block, fp8_block_e8m0, mxfp8, mxfp4, nvfp4,
  as_fp8_block, as_fp8_block_e8m0, as_mxfp8, as_mxfp4, as_nvfp4
};

constexpr int kRounded = int(Format::as_nvfp4) - int(Format::nvfp4);  // the two orders are the same

constexpr bool is_rounded(Format format) { return format >= Format::as_fp8_block; }

// Of a rounded format, the one that its numbers are rounded to; others stay.
constexpr Format rounded_to(Format format) { return is_rounded(format) ? Format(int(format) - kRounded) : format; }

// The inverse; formats that have no rounded one stay.
constexpr Format rounded(Format format) {
  return format >= Format::fp8_block && !is_rounded(format) ? Format(int(format) + kRounded) : format;
}

// Whether a scale is stored beside the values.
constexpr bool has_scale(Format format) { return format != Format::bf16 && format != Format::fp16 && !is_rounded(format); }

// Whether a scale is a power of two in one byte.
constexpr bool has_e8m0_scale(Format format) {
  return format == Format::fp8_block_e8m0 || format == Format::mxfp8 || format == Format::mxfp4;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Values per stored element.
constexpr int pack(Format format) { return format == Format::mxfp4 || format == Format::nvfp4 ? 2 : 1; }

// Bytes that `size` values take, a multiple of 8.
constexpr int chunk_bytes(Format format, int size = 8) { return has_scale(format) ? size / pack(format) : 2 * size; }

// Consecutive k that share a scale; 0: the whole row (int8) or no scale at all.
constexpr int block_k(Format format) {
  switch (rounded_to(format)) {
    case Format::fp8_block:
    case Format::fp8_block_e8m0: return 128;
    case Format::mxfp8:
    case Format::mxfp4: return 32;
    case Format::nvfp4: return 16;
    default: return 0;
  }
}

constexpr int64_t scale_columns(Format format, int64_t k) {
  if (format == Format::int8) return 1;
  return has_scale(format) ? (k + block_k(format) - 1) / block_k(format) : 0;
}

// Where quantised rows go: values [rows, k / pack] row-major, scale (row, k block) with free strides, in elements.
struct QuantizedMatrix {
  void* values = nullptr;
  void* scale = nullptr;
  int64_t k = 0;
  int64_t scale_stride_row = 0;
  int64_t scale_stride_k = 0;
};

// 1 when data is null, data[0] when count is 1, else data[expert of the row].
struct GlobalScale {
  const float* data = nullptr;
  int32_t count = 0;
  const int32_t* expert_offsets = nullptr;  // [count + 1], needed when count > 1

  __host__ __device__ bool per_expert() const { return data != nullptr && count > 1; }
};

// from a run-time value to a template argument: dispatch_format(format, [&]<Format kFormat>() { ... })

template <typename Function>
cudaError_t dispatch_format(Format format, Function&& function) {
  switch (format) {
    case Format::bf16: return function.template operator()<Format::bf16>();
    case Format::fp16: return function.template operator()<Format::fp16>();
    case Format::int8: return function.template operator()<Format::int8>();
    case Format::fp8_block: return function.template operator()<Format::fp8_block>();
    case Format::fp8_block_e8m0: return function.template operator()<Format::fp8_block_e8m0>();
    case Format::mxfp8: return function.template operator()<Format::mxfp8>();
    case Format::mxfp4: return function.template operator()<Format::mxfp4>();
    case Format::nvfp4: return function.template operator()<Format::nvfp4>();
    default: return cudaErrorInvalidValue;
  }
}

// For a rounded one, else an error.
template <typename Function>
cudaError_t dispatch_rounded(Format format, Function&& function) {
  if (!is_rounded(format)) return cudaErrorInvalidValue;
  return dispatch_format(rounded_to(format), [&]<Format kFormat>() {
    if constexpr (is_rounded(rounded(kFormat))) return function.template operator()<rounded(kFormat)>();
    return cudaErrorInvalidValue;
  });
}

// For either kind.
template <typename Function>
cudaError_t dispatch_act_format(Format format, Function&& function) {
  return is_rounded(format) ? dispatch_rounded(format, function) : dispatch_format(format, function);
}

}  // namespace moe
