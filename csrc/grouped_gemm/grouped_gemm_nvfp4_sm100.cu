// Grouped GEMM in nvfp4 on the SM100 tensor cores (tcgen05), through CUTLASS; block_scaled.h has the equation.
// a, b E2M1, two a byte; scales UE4M3, one per 16 values; global scales float32.
// The tensor cores multiply values and scales and sum in tensor memory, in float32.
// Compiled and inspected, not executed: see docs/blackwell.md.
#include "grouped_gemm/block_scaled_cutlass.cuh"

namespace moe {

const BlockScaledLauncher grouped_gemm_nvfp4_sm100 =
    BlockScaledKernel<Format::nvfp4, cutlass::nv_float4_t<cutlass::float_e2m1_t>, cute::Shape<cute::_128, cute::_128, cute::_256>,
                      cutlass::arch::Sm100, cutlass::epilogue::PtrArrayTmaWarpSpecialized1Sm,
                      cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmNvf4Sm100>::kLauncher;

}  // namespace moe
