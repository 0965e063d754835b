// Grouped GEMM of mxfp8 activations and mxfp4 weights on the SM100 tensor cores (tcgen05), through CUTLASS; block_scaled.h
// has the equation. a float8_e4m3, b E2M1, two a byte in memory and one in shared memory; scales UE8M0, one per 32 values.
// The tensor cores multiply values and scales and sum in tensor memory, in float32.
// Compiled and inspected, not executed: see docs/blackwell.md.
#include "grouped_gemm/block_scaled_cutlass.cuh"

namespace moe {

const BlockScaledLauncher grouped_gemm_mxfp8_mxfp4_sm100 =
    BlockScaledKernel<Format::mxfp4, cutlass::mx_float8_t<cutlass::float_e4m3_t>, cute::Shape<cute::_128, cute::_128, cute::_128>,
                      cutlass::arch::Sm100, cutlass::epilogue::PtrArrayTmaWarpSpecialized1Sm,
                      cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmMxf8f6f4Sm100, Format::mxfp8,
                      cutlass::mx_float4_t<cutlass::float_e2m1_t>>::kLauncher;

}  // namespace moe
