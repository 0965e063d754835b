// The fp16 tile configurations of the SM90 grouped GEMM.
#include "grouped_gemm/launch_sm90.cuh"

namespace moe::sm90 {

template <>
cudaError_t launch_element<__half>(int32_t rows, const GroupedGemmArgs& args, const GatedEpilogue* gated, int32_t* tile_counter, int num_sms,
                                  cudaStream_t stream) {
  return launch_element_impl<__half>(rows, args, gated, tile_counter, num_sms, stream);
}

}  // namespace moe::sm90
