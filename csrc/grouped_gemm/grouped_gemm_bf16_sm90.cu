// The bf16 tile configurations of the SM90 grouped GEMM.
#include "grouped_gemm/launch_sm90.cuh"

namespace moe::sm90 {

template <>
cudaError_t launch_element<__nv_bfloat16>(int32_t rows, const GroupedGemmArgs& args, int32_t* tile_counter, int num_sms, cudaStream_t stream) {
  return launch_element_impl<__nv_bfloat16>(rows, args, tile_counter, num_sms, stream);
}

template <>
cudaError_t launch_fused_element<__nv_bfloat16>(const FusedGemms& f, int num_sms, cudaStream_t stream) {
  return launch_fused_element_impl<__nv_bfloat16>(f, num_sms, stream);
}

}  // namespace moe::sm90
