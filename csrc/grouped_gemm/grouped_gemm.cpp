// torch.ops.moe.grouped_gemm.cutlass_smNN: argument checks, scale views and launch; one overload per architecture family.
#include <torch/csrc/stable/library.h>

#include "common/stream.h"
#include "grouped_gemm/tensor_args.h"

namespace moe {
namespace {

constexpr const char* kOp = "grouped_gemm";

struct Launcher {
  const char* (*why_not)(const GroupedGemmArgs&);
  size_t (*workspace_bytes)(const GroupedGemmArgs&);
  cudaError_t (*run)(const GroupedGemmArgs&, void*, cudaStream_t);
};

Tensor grouped_gemm_with(const Launcher& launcher, const Tensor& a, const Tensor& b, const Tensor& expert_offsets,
                         const std::optional<Tensor>& a_scale, const std::optional<Tensor>& b_scale,
                         const std::optional<Tensor>& a_global_scale, const std::optional<Tensor>& b_global_scale,
                         const std::optional<Tensor>& bias, const std::string& format, const std::string& act_format,
                         int64_t b_parts, const std::optional<ScalarType>& out_dtype) {
  MOE_EXPECT(act_format.empty() || act_format == format, kOp, "act_format", format << " for this backend", act_format);
  MOE_EXPECT(!a_global_scale, kOp, "a_global_scale", "none for " << format, describe(*a_global_scale));
  MOE_EXPECT(!b_global_scale, kOp, "b_global_scale", "none for " << format, describe(*b_global_scale));
  const bool is_16bit = a.scalar_type() == ScalarType::BFloat16 || a.scalar_type() == ScalarType::Half;
  const ScalarType dtype = out_dtype.value_or(is_16bit ? a.scalar_type() : ScalarType::BFloat16);
  MOE_EXPECT(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float, kOp, "out_dtype",
             "one of bfloat16, float16, float32", dtype_name(dtype));
  expect_tensor(kOp, "expert_offsets", expert_offsets, {ScalarType::Int}, {b.size(0) + 1}, a);
  const Format parsed = parse_format(kOp, format);
  GroupedGemmArgs args = weight_args(kOp, "b", b, b_scale, bias, parsed, b_parts, a);
  expect_tensor(kOp, "a", a, {value_dtype(parsed)}, {"P", b.size(2)}, a);
  if (has_scale(parsed)) {
    expect_scale(kOp, "a_scale", a_scale, {a.size(0), scale_columns(parsed, a.size(1))}, a);
    args.a_scale = {pointer<const float>(*a_scale), 0, a_scale->stride(0), a_scale->stride(1)};
  }
  args.a = a.data_ptr();
  args.num_rows = a.size(0);
  Tensor out = empty({a.size(0), b.size(1)}, dtype, a);
  args.expert_offsets = pointer<const int32_t>(expert_offsets);
  args.out = out.data_ptr();
  args.out_dtype = float_dtype(out);
  if (const char* reason = launcher.why_not(args)) refuse(kOp, "backend", "one that runs these arguments", reason);
  const CudaScope scope(a);
  const Tensor workspace = empty({static_cast<int64_t>(launcher.workspace_bytes(args))}, ScalarType::Byte, a);
  check_cuda(kOp, launcher.run(args, workspace.data_ptr(), scope.stream));
  return out;
}

template <auto kWhyNot, auto kWorkspaceBytes, auto kRun>
Tensor grouped_gemm_op(const Tensor& a, const Tensor& b, const Tensor& expert_offsets, const std::optional<Tensor>& a_scale,
                       const std::optional<Tensor>& b_scale, const std::optional<Tensor>& a_global_scale,
                       const std::optional<Tensor>& b_global_scale, const std::optional<Tensor>& bias, const std::string& format,
                       const std::string& act_format, int64_t b_parts, const std::optional<ScalarType>& out_dtype) {
  return grouped_gemm_with({kWhyNot, kWorkspaceBytes, kRun}, a, b, expert_offsets, a_scale, b_scale, a_global_scale, b_global_scale, bias,
                           format, act_format, b_parts, out_dtype);
}

}  // namespace
}  // namespace moe

#define MOE_GROUPED_GEMM(family)                                                                                          \
  m.impl("grouped_gemm.cutlass_" #family, TORCH_BOX((&moe::grouped_gemm_op<moe::grouped_gemm_##family##_why_not,          \
                                                                           moe::grouped_gemm_##family##_workspace_bytes, \
                                                                           moe::grouped_gemm_##family>)))

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) {
#ifdef TORCH_MOE_SM80
  MOE_GROUPED_GEMM(sm80);
#endif
#ifdef TORCH_MOE_SM90
  MOE_GROUPED_GEMM(sm90);
#endif
#ifdef TORCH_MOE_SM100
  MOE_GROUPED_GEMM(sm100);
#endif
#ifdef TORCH_MOE_SM120
  MOE_GROUPED_GEMM(sm120);
#endif
}
