// Grouped GEMM in mxfp8 on the SM100 tensor cores (tcgen05), through CUTLASS; block_scaled.h has the equation.
// a, b float8_e4m3; scales UE8M0, one per 32 values.
// The tensor cores multiply values and scales and sum in tensor memory, in float32.
// Compiled and inspected, not executed: see docs/blackwell.md.
#include "grouped_gemm/block_scaled_cutlass.cuh"

namespace moe {
namespace {

using namespace cute;
using Element = cutlass::mx_float8_t<cutlass::float_e4m3_t>;
using ElementOut = cutlass::bfloat16_t;
using Tile = Shape<_128, _128, _128>;
using Cluster = Shape<_1, _1, _1>;
constexpr Format kFormat = Format::mxfp8;
constexpr int kAlignment = 16;  // values in 16 bytes

using Epilogue = cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm100, cutlass::arch::OpClassTensorOp, Tile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float,
    void, cutlass::layout::RowMajor*, 8, ElementOut, cutlass::layout::RowMajor*, 8,
    cutlass::epilogue::PtrArrayTmaWarpSpecialized1Sm, BlockScaledFusion<kFormat, Tile>>::CollectiveOp;

using Mainloop = cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm100, cutlass::arch::OpClassBlockScaledTensorOp,
    Element, cutlass::layout::RowMajor*, kAlignment, Element, cutlass::layout::ColumnMajor*, kAlignment,
    float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(Epilogue::SharedStorage))>,
    cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmMxf8f6f4Sm100>::CollectiveOp;

using Gemm = cutlass::gemm::device::GemmUniversalAdapter<
    cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<ProblemShape>, Mainloop, Epilogue>>;

}  // namespace

const BlockScaledLauncher grouped_gemm_mxfp8_sm100 = kBlockScaledLauncher<kFormat, Gemm>;

}  // namespace moe
