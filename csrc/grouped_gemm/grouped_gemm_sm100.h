// The SM100 kernels, each in a file of its own because compiling one takes half a minute and 3.5 GB.
#pragma once
#include "grouped_gemm/grouped_gemm.h"

namespace moe {

size_t grouped_gemm_bf16_sm100_workspace_bytes(const GroupedGemmArgs&);
cudaError_t grouped_gemm_bf16_sm100(const GroupedGemmArgs&, void* workspace, cudaStream_t stream);

}  // namespace moe
