// Kernel launches with programmatic dependent launch (PDL): on SM90 and later a kernel may start while its predecessor
// in the stream drains; it must call pdl_wait() before it touches anything the predecessor wrote or reads.
// Every kernel of this library calls pdl_wait() in every thread block, so completion is transitive along the stream, and none calls
// pdl_launch_next() before it: what the kernels before the predecessor wrote, the next one may read at once.
#pragma once
#include <cuda_runtime.h>
#include <cstddef>

namespace moe {

__device__ __forceinline__ void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start its prologue; its pdl_wait() still waits for this whole grid.
__device__ __forceinline__ void pdl_launch_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether this build has code for the current device's own family. Else it runs from PTX of an older one, in which pdl_wait() does not wait.
inline bool device_has_pdl() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
  bool built = false;
#ifdef TORCH_MOE_SM90
  built |= major == 9;
#endif
#ifdef TORCH_MOE_SM100
  built |= major == 10;
#endif
#ifdef TORCH_MOE_SM120
  built |= major == 12;
#endif
  return built;
}

// Launches `kernel<<<grid, block, smem, stream>>>(args...)`; `overlap`: with PDL.
template <typename... Params, typename... Args>
cudaError_t launch_with(bool overlap, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream, Args&&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = overlap;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// With PDL where there is.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream, Args&&... args) {
  return launch_with(device_has_pdl(), kernel, grid, block, smem, stream, static_cast<Args&&>(args)...);
}

}  // namespace moe
