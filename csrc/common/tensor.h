// Tensors in, tensors out: allocation through the stable ABI, and the bridge from torch's dtypes and format names to
// ours.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "common/check.h"
#include "common/formats.h"
#include "common/text.h"

namespace moe {

inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype,
                            const Tensor& like) {
  const int32_t dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype_code, aoti_torch_device_type_cuda(), like.get_device_index(),
                                                  &handle));
  return Tensor(handle);
}

// Contiguous, uninitialised, on the device of `like`.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return empty_strided(sizes, strides, dtype, like);
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Null: there is no tensor. One without elements, whose own address is null, has one that nobody reads.
template <typename T>
T* pointer(const std::optional<Tensor>& tensor) {
  static std::remove_const_t<T> nothing;
  if (!tensor) return nullptr;
  return tensor->numel() > 0 ? static_cast<T*>(tensor->data_ptr()) : &nothing;
}

inline DType float_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: return DType::float32;
  }
}

inline Format parse_format(const char* op, const std::string& name, const char* argument = "format") {
  static constexpr const char* kNames[] = {"bf16",           "fp16",  "int8",  "fp8_block",
                                           "fp8_block_e8m0", "mxfp8", "mxfp4", "nvfp4"};
  for (int i = 0; i < 8; ++i) {
    if (name == kNames[i]) return static_cast<Format>(i);
  }
  refuse(op, argument, "one of bf16, fp16, int8, fp8_block, fp8_block_e8m0, mxfp8, mxfp4, nvfp4", name);
}

inline ScalarType value_dtype(Format format) {
  switch (format) {
    case Format::bf16: return ScalarType::BFloat16;
    case Format::fp16: return ScalarType::Half;
    case Format::int8: return ScalarType::Char;
    case Format::fp8_block:
    case Format::fp8_block_e8m0:
    case Format::mxfp8: return ScalarType::Float8_e4m3fn;
    default: return ScalarType::Byte;
  }
}

inline ScalarType scale_dtype(Format format) {
  if (has_e8m0_scale(format)) return ScalarType::Float8_e8m0fnu;
  return format == Format::nvfp4 ? ScalarType::Float8_e4m3fn : ScalarType::Float;
}

// (values, scale) of activations [rows, k] as permute and act_mul write them: the scale of fp8_block is MN-major, each
// column starting on 16 bytes; all others are row-major.
struct QuantizedTensors {
  Tensor values, scale;
  QuantizedMatrix view;
};

inline QuantizedTensors empty_quantized(Format format, int64_t rows, int64_t k, const Tensor& like) {
  const int64_t columns = scale_columns(format, k);
  const bool mn_major = format == Format::fp8_block;
  const int64_t stride_row = mn_major ? 1 : std::max<int64_t>(columns, 1);
  const int64_t stride_k = mn_major ? round_up(rows, 4) : 1;
  QuantizedTensors out{empty({rows, k / pack(format)}, value_dtype(format), like),
                       empty_strided({rows, columns}, {stride_row, stride_k}, scale_dtype(format), like),
                       {}};
  out.view = {out.values.data_ptr(), out.scale.data_ptr(), k, stride_row, stride_k};
  return out;
}

inline void expect_offsets(const char* op, const Tensor& expert_offsets, const Tensor& like) {
  expect_tensor(op, "expert_offsets", expert_offsets, {ScalarType::Int}, {"E + 1"}, like);
  MOE_EXPECT(expert_offsets.numel() >= 2, op, "expert_offsets", "int32 [E + 1] of at least one expert", describe(expert_offsets));
}

// The checks that permute, act_mul and quantize share: global_scale belongs to nvfp4, one element or one an expert.
inline GlobalScale parse_global_scale(const char* op, Format format, const std::optional<Tensor>& global_scale,
                                      const std::optional<Tensor>& expert_offsets, const Tensor& like) {
  if (!global_scale) return {};
  MOE_EXPECT(format == Format::nvfp4, op, "global_scale", "none for this format", describe(*global_scale));
  const int64_t count = global_scale->numel();
  const bool per_expert = count != 1 && expert_offsets && expert_offsets->numel() == count + 1;
  MOE_EXPECT(count == 1 || per_expert, op, "global_scale",
             "float32, one element or one for each expert of expert_offsets", describe(*global_scale));
  if (global_scale->dim() == 0) {
    expect_tensor(op, "global_scale", *global_scale, {ScalarType::Float}, {}, like);
    return {pointer<const float>(*global_scale), 1, nullptr};
  }
  expect_tensor(op, "global_scale", *global_scale, {ScalarType::Float}, {count}, like);
  return {pointer<const float>(*global_scale), static_cast<int32_t>(count), pointer<const int32_t>(expert_offsets)};
}

}  // namespace moe
