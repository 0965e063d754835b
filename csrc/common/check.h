// How arguments are refused: one line, `op: argument: expected ..., got ...`, the texts of meta_kernels/_check.py.
// (The exception is thrown here and not by STD_TORCH_CHECK, which would put a file name in front of that line.)
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace moe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What is wrong with arguments; thrown before anything is launched. Whatever else is thrown is an error of CUDA or torch.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename Expected, typename Got>
[[noreturn]] void refuse(const char* op, const char* argument, const Expected& expected, const Got& got) {
  std::ostringstream line;
  line << op << ": " << argument << ": expected " << expected << ", got " << got;
  throw Refusal(line.str());
}

// Arguments are streamed only when the condition fails.
#define MOE_EXPECT(condition, op, argument, expected, got)  \
  do {                                                      \
    if (!(condition)) {                                     \
      std::ostringstream moe_expected;                      \
      moe_expected << expected;                             \
      ::moe::refuse(op, argument, moe_expected.str(), got); \
    }                                                       \
  } while (0)

// An error that is thrown is forgotten by CUDA, so that the next call doesn't find it.
inline void check_cuda(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
}

// One comparison, where scalar_type() compares with one dtype after another.
inline bool has_dtype(const Tensor& tensor, ScalarType dtype) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code == torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e8m0fnu: return "float8_e8m0fnu";
    case ScalarType::Float4_e2m1fn_x2: return "float4_e2m1fn_x2";
    default: return toString(dtype);
  }
}

// One dimension of an expected shape: a size, or a name for "any size".
struct Dim {
  int64_t size = -1;
  const char* name = nullptr;
  Dim(int64_t size) : size(size) {}
  Dim(const char* name) : name(name) {}
};

inline std::string device_name(const Tensor& tensor) {
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "cpu";
}

// `bfloat16 [64, 7168] on cuda:0`
inline std::string describe(const Tensor& tensor) {
  std::string text = std::string(dtype_name(tensor.scalar_type())) + " [";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "] on " + device_name(tensor);
}

inline std::string describe(std::initializer_list<ScalarType> dtypes, std::initializer_list<Dim> dims,
                            const std::string& device) {
  std::string text;
  for (ScalarType dtype : dtypes) text += (text.empty() ? "" : " or ") + std::string(dtype_name(dtype));
  text += " [";
  const char* separator = "";
  for (const Dim& dim : dims) {
    text += separator + (dim.name ? dim.name : std::to_string(dim.size));
    separator = ", ";
  }
  return text + "] on " + device;
}

// One of `dtypes`, contiguous, of this shape, on the device of `like`.
inline void expect_tensor(const char* op, const char* argument, const Tensor& tensor,
                          std::initializer_list<ScalarType> dtypes, std::initializer_list<Dim> dims,
                          const Tensor& like) {
  bool good = tensor.dim() == static_cast<int64_t>(dims.size()) && tensor.is_cuda() && tensor.is_contiguous() &&
              tensor.get_device_index() == like.get_device_index();
  for (int64_t i = 0; good && i < tensor.dim(); ++i) {
    const Dim& dim = dims.begin()[i];
    good = dim.name != nullptr || tensor.size(i) == dim.size;
  }
  bool known = false;
  for (ScalarType dtype : dtypes) known = known || has_dtype(tensor, dtype);
  if (good && known) return;
  std::string expected = describe(dtypes, dims, device_name(like)), got = describe(tensor);
  if (!tensor.is_contiguous()) {
    expected = "contiguous " + expected;
    got += " with strides [";
    for (int64_t d = 0; d < tensor.dim(); ++d) got += (d ? ", " : "") + std::to_string(tensor.stride(d));
    got += "]";
  }
  refuse(op, argument, expected, got);
}

inline void expect_tensor(const char* op, const char* argument, const std::optional<Tensor>& tensor,
                          std::initializer_list<ScalarType> dtypes, std::initializer_list<Dim> dims,
                          const Tensor& like) {
  if (tensor) expect_tensor(op, argument, *tensor, dtypes, dims, like);
}

}  // namespace moe
