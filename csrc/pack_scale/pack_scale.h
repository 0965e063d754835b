// packed <- scale, for launchers that need scales in another layout than their caller has them. Free of torch.
#pragma once
#include "common/scale_layouts.h"

namespace moe {

cudaError_t pack_scale(const ScaleArgs& args, cudaStream_t stream);

}  // namespace moe
