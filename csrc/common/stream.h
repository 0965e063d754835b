// The current CUDA device and stream of torch, without linking any CUDA library of torch: the same library then loads
// under a CPU-only torch, where the CUDA kernels simply cannot be reached.
#pragma once
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

namespace moe {

inline cudaStream_t current_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  if (get_stream == nullptr || get_stream(device, &stream) != 0)
    throw std::runtime_error("moe: no CUDA stream of torch");
  return static_cast<cudaStream_t>(stream);
}

// Makes the tensor's device current for a scope, and holds that device's current stream.
class CudaScope {
 public:
  explicit CudaScope(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  const cudaStream_t stream;
};

}  // namespace moe
