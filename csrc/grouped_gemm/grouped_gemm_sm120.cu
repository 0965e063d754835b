// Grouped GEMM in FP8 on the SM120 tensor cores (mma.sync fed by TMA), through CUTLASS:
//   out[r, n] = sum over 128-blocks kb of a_scale[r, kb] * b_scale[e, n/128, kb] * sum_{k in kb} a[r, k] * b[e, n, k]
// in bfloat16 or float32, for rows r in [expert_offsets[e], end_row(e)), any offsets. a, b float8_e4m3, scales float32.
// Each 128-block is summed in float32, scaled, and added to a float32 total, in k order. Scales are read one float32 at
// a time, so neither the offsets nor the scale strides need any alignment.
// For bfloat16 and float16 there is the SM80 kernel, whose PTX runs on SM120 too.
// Compiled and inspected, not executed: see docs/blackwell.md.
#include "grouped_gemm/cutlass_group_setup.cuh"

namespace moe {
namespace {

using namespace cute;
using Element = cutlass::float_e4m3_t;
using Tile = Shape<_128, _128, _128>;  // one scale block of b, one 128-block of k

template <class ElementOut>
struct Kernel {
  using Epilogue = GroupedEpilogue<cutlass::arch::Sm120, Tile, cutlass::epilogue::collective::EpilogueScheduleAuto, ElementOut,
                                   AddBias<ElementOut, Tile>>;

  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm120, cutlass::arch::OpClassTensorOp,
      Element, cute::tuple<cutlass::layout::RowMajor*, AScaleLayout*>, 16,
      Element, cute::tuple<cutlass::layout::ColumnMajor*, BScaleLayout*>, 16, float, Tile, Cluster,
      StagesBeside<Epilogue>,
      cutlass::gemm::KernelScheduleSm120Blockwise>::CollectiveOp;

  using Gemm = GroupedGemm<Mainloop, Epilogue>;
};

}  // namespace

const char* grouped_gemm_sm120_why_not(const GroupedGemmArgs& args) {
  if (args.packing != Packing::none) return "weights must be as they are stored, not packed";
  if (args.ab_dtype != DType::float8_e4m3) return "the SM120 kernel multiplies float8_e4m3";
  return why_not_cutlass(args);
}

size_t grouped_gemm_sm120_workspace_bytes(const GroupedGemmArgs& args) { return cutlass_workspace_bytes<Kernel>(args); }

cudaError_t grouped_gemm_sm120(const GroupedGemmArgs& args, void* workspace, cudaStream_t stream) {
  if (grouped_gemm_sm120_why_not(args)) return cudaErrorInvalidValue;
  return run_cutlass<Kernel>(args, workspace, stream);
}

}  // namespace moe
