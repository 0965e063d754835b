// Grouped GEMM on the SM100 tensor cores (tcgen05), through CUTLASS: the choice between the kernels, and the FP8 one,
//   out[r, n] = sum over 128-blocks kb of a_scale[r, kb] * b_scale[e, n/128, kb] * sum_{k in kb} a[r, k] * b[e, n, k]
// in bfloat16 or float32, for rows r in [expert_offsets[e], end_row(e)), any offsets. a, b float8_e4m3, scales float32.
// Each 128-block is summed in tensor memory, then scaled and added to a float32 total in registers, in k order.
// Scales are read one float32 at a time, so neither the offsets nor the scale strides need any alignment.
// Compiled and inspected, not executed: see docs/blackwell.md.
#include "grouped_gemm/cutlass_group_setup.cuh"
#include "grouped_gemm/grouped_gemm_sm100.h"

namespace moe {
namespace {

using namespace cute;
using Element = cutlass::float_e4m3_t;
using Tile = Shape<_128, _128, _128>;  // one scale block of b, one 128-block of k

template <class ElementOut>
struct Kernel {
  using Epilogue = GroupedEpilogue<cutlass::arch::Sm100, Tile, cutlass::epilogue::PtrArrayTmaWarpSpecialized1Sm, ElementOut, AddBias<ElementOut, Tile>>;

  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassTensorOp,
      Element, cute::tuple<cutlass::layout::RowMajor*, AScaleLayout*>, 16,
      Element, cute::tuple<cutlass::layout::ColumnMajor*, BScaleLayout*>, 16, float, Tile, Cluster,
      StagesBeside<Epilogue>,
      cutlass::gemm::KernelPtrArrayTmaWarpSpecializedBlockwise1SmSm100>::CollectiveOp;

  using Gemm = GroupedGemm<Mainloop, Epilogue>;
};

bool is_fp8(const GroupedGemmArgs& args) { return args.ab_dtype == DType::float8_e4m3; }

}  // namespace

const char* grouped_gemm_sm100_why_not(const GroupedGemmArgs& args) {
  if (args.packing != Packing::none) return "weights must be as they are stored, not packed";
  if (!is_fp8(args) && args.ab_dtype != DType::bfloat16) return "the SM100 kernels multiply bfloat16 and float8_e4m3";
  return why_not_cutlass(args);
}

size_t grouped_gemm_sm100_workspace_bytes(const GroupedGemmArgs& args) {
  return is_fp8(args) ? cutlass_workspace_bytes<Kernel>(args) : grouped_gemm_bf16_sm100_workspace_bytes(args);
}

cudaError_t grouped_gemm_sm100(const GroupedGemmArgs& args, void* workspace, cudaStream_t stream) {
  if (grouped_gemm_sm100_why_not(args)) return cudaErrorInvalidValue;
  return is_fp8(args) ? run_cutlass<Kernel>(args, workspace, stream) : grouped_gemm_bf16_sm100(args, workspace, stream);
}

}  // namespace moe
