// GroupedGemmArgs from tensors, checked: what grouped_gemm and fused_moe share on the torch side.
#pragma once
#include "common/tensor.h"
#include "grouped_gemm/grouped_gemm.h"

namespace moe {

inline DType element_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return DType::float16;
    case ScalarType::Float8_e4m3fn: return DType::float8_e4m3;
    case ScalarType::Char: return DType::int8;
    default: return DType::bfloat16;
  }
}

// Scales may have any strides: K-major and MN-major alike.
inline void expect_scale(const char* op, const std::string& argument, const std::optional<Tensor>& scale, std::initializer_list<Dim> dims,
                         const Tensor& like) {
  bool good = scale && has_dtype(*scale, ScalarType::Float) && scale->dim() == static_cast<int64_t>(dims.size()) && scale->is_cuda() &&
              scale->get_device_index() == like.get_device_index();
  for (size_t i = 0; good && i < dims.size(); ++i) good = scale->size(static_cast<int64_t>(i)) == dims.begin()[i].size;
  if (good) return;
  refuse(op, argument.c_str(), describe({ScalarType::Float}, dims, device_name(like)), scale ? describe(*scale) : "None");
}

inline void expect_parts(const char* op, const char* name, int64_t parts, int64_t n) {
  MOE_EXPECT(parts >= 1 && parts <= INT32_MAX, op, "b_parts", "1 to " << INT32_MAX, parts);
  MOE_EXPECT(n % parts == 0, op, name, "a multiple of " << parts << " rows per expert", n);
}

// b as pack_weight gives it: blocks that hold the scales, too.
inline Packing packing_of(const Tensor& b, Format format) {
  if (b.dim() != 4) return Packing::none;
  switch (format) {
    case Format::nvfp4: return Packing::nvfp4;
    case Format::mxfp4: return has_dtype(b, ScalarType::Int) ? Packing::mxfp4_e4m3 : Packing::mxfp4;
    case Format::mxfp8: return Packing::mxfp8;
    default: return Packing::none;
  }
}

// What multiplies b [E, n, k] in a format.
inline Format act_format_of(const Tensor& b, Format format) {
  switch (packing_of(b, format)) {
    case Packing::none: return format;
    case Packing::mxfp4_e4m3: return Format::fp8_block;
    default: return Format::bf16;
  }
}

// The activations that packed weights, which bf16 ones are meant for, are multiplied by as well in fused_moe, rounded to bf16.
inline std::vector<std::string> rounded_act_formats(Packing packing) {
  switch (packing) {
    case Packing::nvfp4: return {"nvfp4", "fp8_block", "fp8_block_e8m0"};
    case Packing::mxfp4: return {"mxfp4", "mxfp8", "fp8_block_e8m0"};
    case Packing::mxfp8: return {"mxfp8"};
    default: return {};
  }
}

// The weight side: b [E, n, k], or packed, its scales and bias. `name` is b's, "w13" say; num_rows, a and out are the caller's.
inline GroupedGemmArgs weight_args(const char* op, const std::string& name, const Tensor& b, const std::optional<Tensor>& scale,
                                   const std::optional<Tensor>& global_scale, const std::optional<Tensor>& bias, Format format,
                                   int64_t parts, const Tensor& like) {
  GroupedGemmArgs args;
  args.packing = packing_of(b, format);
  const bool packed = args.packing != Packing::none;
  const bool words = args.packing == Packing::mxfp4_e4m3;
  const ScalarType dtype = words ? ScalarType::Int : packed ? ScalarType::Byte : value_dtype(format);
  if (packed) expect_tensor(op, name.c_str(), b, {dtype}, {"E", "N/64", "K/64", packed_block_bytes(args.packing) / (words ? 4 : 1)}, like);
  else expect_tensor(op, name.c_str(), b, {dtype}, {"E", "N", "K"}, like);
  const int64_t num_experts = b.size(0), n = b.size(1) * (packed ? kPackedBlock : 1), k = b.size(2) * (packed ? kPackedBlock : 1);
  expect_parts(op, name.c_str(), parts, n);
  args.b = b.data_ptr();
  args.ab_dtype = words ? DType::float8_e4m3 : packed ? DType::bfloat16 : element_dtype(dtype);
  args.num_experts = static_cast<int32_t>(num_experts);
  args.n = static_cast<int32_t>(n);
  args.k = static_cast<int32_t>(k);
  args.b_parts = static_cast<int32_t>(parts);
  if (packed) {
    MOE_EXPECT(!scale, op, (name + "_scale").c_str(), "none beside packed weights, which hold it", describe(*scale));
  } else if (has_scale(format)) {
    const bool blocks = format == Format::fp8_block;
    const Dim rows = blocks ? parts * ((n / parts + 127) / 128) : n, columns = scale_columns(format, k);
    expect_scale(op, name + "_scale", scale, {num_experts, rows, columns}, like);
    args.b_scale = {pointer<const float>(*scale), scale->stride(0), scale->stride(1), scale->stride(2)};
  } else {
    MOE_EXPECT(!scale, op, (name + "_scale").c_str(), "none for this format", describe(*scale));
  }
  if (global_scale) {
    const std::string global_name = name + "_global_scale";
    MOE_EXPECT(args.packing == Packing::nvfp4, op, global_name.c_str(), "none for this format", describe(*global_scale));
    const bool per_part = global_scale->dim() == 2;
    if (per_part) expect_tensor(op, global_name.c_str(), *global_scale, {ScalarType::Float}, {num_experts, parts}, like);
    else expect_tensor(op, global_name.c_str(), *global_scale, {ScalarType::Float}, {num_experts}, like);
    args.b_global_scale = {pointer<const float>(*global_scale), per_part ? parts : 1, per_part ? 1 : 0, 0};
  }
  if (bias) {
    const std::string bias_name = name == "b" ? "bias" : name + "_bias";
    expect_tensor(op, bias_name.c_str(), *bias, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float}, {num_experts, n}, like);
    args.bias = bias->data_ptr();
    args.bias_dtype = float_dtype(*bias);
  }
  return args;
}

}  // namespace moe
