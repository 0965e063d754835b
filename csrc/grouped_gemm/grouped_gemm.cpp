// torch.ops.moe.grouped_gemm.cutlass_smNN: argument checks, scale views and launch; one overload per architecture family.
#include <torch/csrc/stable/library.h>

#include "common/stream.h"
#include "grouped_gemm/block_scaled.h"
#include "grouped_gemm/tensor_args.h"

namespace moe {
namespace {

constexpr const char* kOp = "grouped_gemm";

struct Launcher {
  const char* (*why_not)(const GroupedGemmArgs&);
  size_t (*workspace_bytes)(const GroupedGemmArgs&);
  cudaError_t (*run)(const GroupedGemmArgs&, void*, cudaStream_t);
};

void expect_out_dtype(ScalarType dtype) {
  MOE_EXPECT(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float, kOp, "out_dtype",
             "one of bfloat16, float16, float32", dtype_name(dtype));
}

Tensor grouped_gemm_with(const Launcher& launcher, const Tensor& a, const Tensor& b, const Tensor& expert_offsets,
                         const std::optional<Tensor>& a_scale, const std::optional<Tensor>& b_scale,
                         const std::optional<Tensor>& a_global_scale, const std::optional<Tensor>& b_global_scale,
                         const std::optional<Tensor>& bias, const std::optional<Tensor>& expert_rows, const std::string& format,
                         const std::string& act_format, int64_t b_parts, const std::optional<ScalarType>& out_dtype) {
  const Format parsed = parse_format(kOp, format), acts = act_format_of(b, parsed);
  const std::string expected_acts = acts == parsed ? format : acts == Format::fp8_block ? "fp8_block" : "bf16";
  MOE_EXPECT((act_format.empty() ? format : act_format) == expected_acts, kOp, "act_format", expected_acts << " for this backend", act_format);
  MOE_EXPECT(acts == Format::bf16 || acts == Format::fp16 || acts == Format::int8 || acts == Format::fp8_block, kOp, "format",
             "bf16, fp16, int8, fp8_block or packed nvfp4, mxfp4 or mxfp8 for this backend", format);
  MOE_EXPECT(!a_global_scale, kOp, "a_global_scale", "none for " << expected_acts, describe(*a_global_scale));
  const bool is_16bit = a.scalar_type() == ScalarType::BFloat16 || a.scalar_type() == ScalarType::Half;
  const ScalarType dtype = out_dtype.value_or(is_16bit ? a.scalar_type() : ScalarType::BFloat16);
  expect_out_dtype(dtype);
  expect_tensor(kOp, "expert_offsets", expert_offsets, {ScalarType::Int}, {b.size(0) + 1}, a);
  expect_tensor(kOp, "expert_rows", expert_rows, {ScalarType::Int}, {b.size(0)}, a);
  GroupedGemmArgs args = weight_args(kOp, "b", b, b_scale, b_global_scale, bias, parsed, b_parts, a);
  expect_tensor(kOp, "a", a, {value_dtype(acts)}, {"P", args.k}, a);
  if (has_scale(acts)) {
    expect_scale(kOp, "a_scale", a_scale, {a.size(0), scale_columns(acts, a.size(1))}, a);
    args.a_scale = {pointer<const float>(*a_scale), 0, a_scale->stride(0), a_scale->stride(1)};
  }
  args.a = a.data_ptr();
  args.num_rows = a.size(0);
  Tensor out = empty({a.size(0), args.n}, dtype, a);
  args.expert_offsets = pointer<const int32_t>(expert_offsets);
  args.expert_rows = pointer<const int32_t>(expert_rows);
  args.out = out.data_ptr();
  args.out_dtype = float_dtype(out);
  if (const char* reason = launcher.why_not(args)) refuse(kOp, "backend", "one that runs these arguments", reason);
  const CudaScope scope(a);
  const Tensor workspace = empty({static_cast<int64_t>(launcher.workspace_bytes(args))}, ScalarType::Byte, a);
  check_cuda(kOp, launcher.run(args, workspace.data_ptr(), scope.stream));
  return out;
}

// Two values a byte come under either name, and so do e8m0 scales.
void expect_values(const char* argument, const Tensor& values, Format format, std::initializer_list<Dim> dims,
                   const Tensor& like) {
  if (pack(format) == 2) {
    expect_tensor(kOp, argument, values, {ScalarType::Byte, ScalarType::Float4_e2m1fn_x2}, dims, like);
  } else {
    expect_tensor(kOp, argument, values, {value_dtype(format)}, dims, like);
  }
}

// Any strides, in bytes; `lead` dimensions stand in front of [rows, k blocks].
BlockScaleView block_scale(const char* argument, const std::optional<Tensor>& scale, Format format,
                           const std::vector<int64_t>& sizes, const Tensor& like) {
  const ScalarType dtype = scale_dtype(format);
  std::string expected = std::string(dtype_name(dtype)) + " [";
  for (size_t i = 0; i < sizes.size(); ++i) expected += (i ? ", " : "") + std::to_string(sizes[i]);
  expected += "] on " + device_name(like);
  if (!scale) refuse(kOp, argument, expected, "None");
  bool good = scale->scalar_type() == dtype || (has_e8m0_scale(format) && scale->scalar_type() == ScalarType::Byte);
  good = good && scale->dim() == static_cast<int64_t>(sizes.size()) && scale->is_cuda() &&
         scale->get_device_index() == like.get_device_index();
  for (int64_t i = 0; good && i < scale->dim(); ++i) good = scale->size(i) == sizes[static_cast<size_t>(i)];
  if (!good) refuse(kOp, argument, expected, describe(*scale));
  const int64_t dims = scale->dim();
  return {pointer<const uint8_t>(*scale), dims == 3 ? scale->stride(0) : 0, scale->stride(dims - 2), scale->stride(dims - 1)};
}

void expect_atoms(const char* argument, const Tensor& scale, Format format, std::initializer_list<Dim> dims, const Tensor& like) {
  if (scale.scalar_type() == ScalarType::Byte) expect_tensor(kOp, argument, scale, {ScalarType::Byte}, dims, like);
  else expect_tensor(kOp, argument, scale, {scale_dtype(format)}, dims, like);
}

void set_global_scales(BlockScaledArgs& args, const std::optional<Tensor>& a_global_scale,
                       const std::optional<Tensor>& b_global_scale, const Tensor& like) {
  const bool has_global = args.format == Format::nvfp4;
  MOE_EXPECT(has_global || !a_global_scale, kOp, "a_global_scale", "none for this format", describe(*a_global_scale));
  MOE_EXPECT(has_global || !b_global_scale, kOp, "b_global_scale", "none for this format", describe(*b_global_scale));
  if (a_global_scale) {
    const int64_t count = a_global_scale->numel();
    MOE_EXPECT(count == 1 || count == args.num_experts, kOp, "a_global_scale", "float32, one element or one an expert",
               describe(*a_global_scale));
    if (a_global_scale->dim() == 0) expect_tensor(kOp, "a_global_scale", *a_global_scale, {ScalarType::Float}, {}, like);
    else expect_tensor(kOp, "a_global_scale", *a_global_scale, {ScalarType::Float}, {count}, like);
    args.a_global_scale = pointer<const float>(*a_global_scale);
    args.a_global_stride = count == 1 ? 0 : 1;
  }
  if (b_global_scale) {
    if (b_global_scale->dim() == 2) {
      args.b_global_parts = args.b_parts;
      expect_tensor(kOp, "b_global_scale", *b_global_scale, {ScalarType::Float}, {args.num_experts, args.b_parts}, like);
    } else {
      expect_tensor(kOp, "b_global_scale", *b_global_scale, {ScalarType::Float}, {args.num_experts}, like);
    }
    args.b_global_scale = pointer<const float>(*b_global_scale);
  }
}

// The formats whose one-byte scales the tensor cores read.
Tensor block_scaled_with(const BlockScaledLauncher& launcher, const Tensor& a, const Tensor& b, const Tensor& expert_offsets,
                         const std::optional<Tensor>& a_scale, const std::optional<Tensor>& b_scale,
                         const std::optional<Tensor>& a_global_scale, const std::optional<Tensor>& b_global_scale,
                         const std::optional<Tensor>& bias, const std::optional<Tensor>& expert_rows, Format format,
                         Format act_format, int64_t b_parts, ScalarType dtype) {
  expect_values("b", b, format, {"E", "N", "K"}, a);
  const int64_t num_experts = b.size(0), n = b.size(1), k = b.size(2) * pack(format), columns = scale_columns(format, k);
  expect_values("a", a, act_format, {"P", k / pack(act_format)}, a);
  expect_out_dtype(dtype);
  expect_parts(kOp, "b", b_parts, n);
  expect_tensor(kOp, "expert_offsets", expert_offsets, {ScalarType::Int}, {num_experts + 1}, a);
  expect_tensor(kOp, "expert_rows", expert_rows, {ScalarType::Int}, {num_experts}, a);
  expect_tensor(kOp, "bias", bias, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float}, {num_experts, n}, a);
  BlockScaledArgs args;
  args.format = format;
  args.act_format = act_format;
  args.num_experts = static_cast<int32_t>(num_experts);
  args.n = static_cast<int32_t>(n);
  args.k = static_cast<int32_t>(k);
  args.b_parts = static_cast<int32_t>(b_parts);
  args.num_rows = a.size(0);
  args.a_block_scale = block_scale("a_scale", a_scale, act_format, {args.num_rows, columns}, a);
  if (b_scale && b_scale->dim() == 6) {  // packed by pack_scale
    expect_atoms("b_scale", *b_scale, format, {num_experts, (n + 127) / 128, (columns + 3) / 4, 32, 4, 4}, a);
    args.b_scale_atoms = pointer<const uint32_t>(*b_scale);
  } else {
    args.b_block_scale = block_scale("b_scale", b_scale, format, {num_experts, n, columns}, a);
  }
  set_global_scales(args, a_global_scale, b_global_scale, a);
  Tensor out = empty({args.num_rows, n}, dtype, a);
  args.a = a.data_ptr();
  args.b = b.data_ptr();
  args.out = out.data_ptr();
  args.out_dtype = float_dtype(out);
  args.expert_offsets = pointer<const int32_t>(expert_offsets);
  args.expert_rows = pointer<const int32_t>(expert_rows);
  if (bias) {
    args.bias = bias->data_ptr();
    args.bias_dtype = float_dtype(*bias);
  }
  if (const char* reason = block_scaled_why_not(args)) refuse(kOp, "backend", "one that runs these arguments", reason);
  const CudaScope scope(a);
  const Tensor workspace = empty({static_cast<int64_t>(launcher.workspace_bytes(args))}, ScalarType::Byte, a);
  check_cuda(kOp, launcher.run(args, workspace.data_ptr(), scope.stream));
  return out;
}

// The launcher of formats of weights and activations on a family; null where there is none.
using BlockScaledFamily = const BlockScaledLauncher* (*)(Format, Format);

template <auto kWhyNot, auto kWorkspaceBytes, auto kRun, BlockScaledFamily kBlockScaled>
Tensor grouped_gemm_op(const Tensor& a, const Tensor& b, const Tensor& expert_offsets, const std::optional<Tensor>& a_scale,
                       const std::optional<Tensor>& b_scale, const std::optional<Tensor>& a_global_scale,
                       const std::optional<Tensor>& b_global_scale, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& expert_rows, const Text& format, const Text& act_format,
                       int64_t b_parts, const std::optional<ScalarType>& out_dtype) {
  const Format parsed = parse_format(kOp, format);
  const Format parsed_act = act_format.empty() ? parsed : parse_format(kOp, act_format);
  if (const BlockScaledLauncher* launcher = kBlockScaled(parsed, parsed_act)) {
    return block_scaled_with(*launcher, a, b, expert_offsets, a_scale, b_scale, a_global_scale, b_global_scale, bias, expert_rows,
                             parsed, parsed_act, b_parts, out_dtype.value_or(ScalarType::BFloat16));
  }
  return grouped_gemm_with({kWhyNot, kWorkspaceBytes, kRun}, a, b, expert_offsets, a_scale, b_scale, a_global_scale, b_global_scale, bias,
                           expert_rows, format, act_format, b_parts, out_dtype);
}

[[maybe_unused]] const BlockScaledLauncher* no_block_scaled(Format, Format) { return nullptr; }

[[maybe_unused]] const BlockScaledLauncher* choose(Format format, Format act_format, const BlockScaledLauncher& nvfp4,
                                                   const BlockScaledLauncher& mxfp8, const BlockScaledLauncher& mxfp4,
                                                   const BlockScaledLauncher& mxfp8_mxfp4) {
  if (format == Format::mxfp4 && act_format == Format::mxfp8) return &mxfp8_mxfp4;
  if (act_format != format) return nullptr;
  switch (format) {
    case Format::nvfp4: return &nvfp4;
    case Format::mxfp8: return &mxfp8;
    case Format::mxfp4: return &mxfp4;
    default: return nullptr;
  }
}

#ifdef TORCH_MOE_SM100
const BlockScaledLauncher* block_scaled_sm100(Format format, Format act_format) {
  return choose(format, act_format, grouped_gemm_nvfp4_sm100, grouped_gemm_mxfp8_sm100, grouped_gemm_mxfp4_sm100,
                grouped_gemm_mxfp8_mxfp4_sm100);
}
#endif

#ifdef TORCH_MOE_SM120
const BlockScaledLauncher* block_scaled_sm120(Format format, Format act_format) {
  return choose(format, act_format, grouped_gemm_nvfp4_sm120, grouped_gemm_mxfp8_sm120, grouped_gemm_mxfp4_sm120,
                grouped_gemm_mxfp8_mxfp4_sm120);
}
#endif

}  // namespace
}  // namespace moe

#define MOE_GROUPED_GEMM(family, block_scaled)                                                                      \
  m.impl("grouped_gemm.cutlass_" #family,                                                                           \
         TORCH_BOX((&moe::grouped_gemm_op<moe::grouped_gemm_##family##_why_not,                                     \
                                          moe::grouped_gemm_##family##_workspace_bytes, moe::grouped_gemm_##family, \
                                          moe::block_scaled>)))

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) {
#ifdef TORCH_MOE_SM80
  MOE_GROUPED_GEMM(sm80, no_block_scaled);
#endif
#ifdef TORCH_MOE_SM90
  MOE_GROUPED_GEMM(sm90, no_block_scaled);
#endif
#ifdef TORCH_MOE_SM100
  MOE_GROUPED_GEMM(sm100, block_scaled_sm100);
#endif
#ifdef TORCH_MOE_SM120
  MOE_GROUPED_GEMM(sm120, block_scaled_sm120);
#endif
}
