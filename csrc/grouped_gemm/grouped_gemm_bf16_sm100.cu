// Grouped GEMM in bfloat16 on the SM100 tensor cores (tcgen05), through CUTLASS:
//   out[r, n] = sum_k a[r, k] * b[e, n, k] (+ bias[e, n])
// for rows r in [expert_offsets[e], end_row(e)), any offsets; float32 sums in tensor memory.
// Compiled and inspected, not executed: see docs/blackwell.md.
#include "grouped_gemm/cutlass_group_setup.cuh"
#include "grouped_gemm/grouped_gemm_sm100.h"

namespace moe {
namespace {

using namespace cute;
using Element = cutlass::bfloat16_t;
using Tile = Shape<_128, _256, _64>;  // two tiles of float32 sums fill the 512 columns of tensor memory

template <class ElementOut>
struct Kernel {
  using Epilogue = GroupedEpilogue<cutlass::arch::Sm100, Tile, cutlass::epilogue::PtrArrayTmaWarpSpecialized1Sm, ElementOut, AddBias<ElementOut, Tile>>;

  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassTensorOp,
      Element, cutlass::layout::RowMajor*, 8, Element, cutlass::layout::ColumnMajor*, 8, float, Tile, Cluster,
      StagesBeside<Epilogue>,
      cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmSm100>::CollectiveOp;

  using Gemm = GroupedGemm<Mainloop, Epilogue>;
};

}  // namespace

size_t grouped_gemm_bf16_sm100_workspace_bytes(const GroupedGemmArgs& args) {
  return cutlass_workspace_bytes<Kernel>(args);
}

cudaError_t grouped_gemm_bf16_sm100(const GroupedGemmArgs& args, void* workspace, cudaStream_t stream) {
  return run_cutlass<Kernel>(args, workspace, stream);
}

}  // namespace moe
