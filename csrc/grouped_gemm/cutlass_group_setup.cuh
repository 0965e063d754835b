// Grouped GEMM through CUTLASS's pointer-array kernels: out[r, n] = sum_k a[r, k] * b[e, n, k] (+ bias[e, n]), bfloat16 or float32.
//
// CUTLASS wants, in device memory and for each expert, a problem shape, pointers, strides and scale layouts. A small
// kernel writes them from expert_offsets, so nothing is read on the host:
//   shape[e]  = (end_row(e) - expert_offsets[e], n, k)
//   a[e]      = a + expert_offsets[e] * k          stride (k, 1)
//   b[e]      = b + e * n * k                      stride (k, 1)
//   out[e]    = out + expert_offsets[e] * n        stride (n, 1)
//   a_scale[e], b_scale[e]                         layouts with both strides free, so K-major and MN-major both fit
//   bias[e]   = bias + e * n
// Rows of a and of out start at multiples of 16 bytes because k and n do, whatever the offsets.
//
// All of this has internal linkage: each including file is built for its own architectures, and a kernel that the
// linker merges across files would keep the machine code of only one of them.
#pragma once
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/numeric_types.h>

#include "common/launch.h"
#include "grouped_gemm/grouped_gemm.h"

namespace moe {
namespace {

using ProblemShape = cute::Shape<int, int, int>;
using RowStride = cute::Stride<int64_t, cute::_1, cute::_0>;
template <int kRows>
using ScaleLayout = cute::Layout<cute::Shape<cute::Shape<cute::Int<kRows>, int>, cute::Shape<cute::_128, int>, int>,
                                 cute::Stride<cute::Stride<cute::_0, int>, cute::Stride<cute::_0, int>, int>>;
using AScaleLayout = ScaleLayout<1>;
using BScaleLayout = ScaleLayout<128>;

constexpr int kMaxSms = 256;  // more than any GPU these files are built for; bounds CUTLASS's workspace

__host__ __device__ constexpr int blocks_of_128(int size) { return (size + 127) / 128; }

// Device arrays with one entry an expert, laid out one after another from `base`.
struct GroupTable {
  ProblemShape* shape;
  const void **a, **b, **bias;
  void** out;
  const float **a_scale, **b_scale;
  RowStride *ab_stride, *out_stride;
  AScaleLayout* a_scale_layout;
  BScaleLayout* b_scale_layout;
  size_t bytes = 0;  // a multiple of 256, so what follows is aligned for tensor maps

  GroupTable(void* base, int num_experts) {
    const auto place = [&](auto*& array) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(static_cast<char*>(base) + bytes);
      bytes += (num_experts * sizeof(*array) + 255) / 256 * 256;
    };
    place(shape), place(a), place(b), place(bias), place(out), place(a_scale), place(b_scale);
    place(ab_stride), place(out_stride), place(a_scale_layout), place(b_scale_layout);
  }
};

template <int kRows>
__host__ __device__ ScaleLayout<kRows> scale_layout(const ScaleView& view, int rows, int k) {
  using namespace cute;
  return make_layout(
      make_shape(make_shape(Int<kRows>{}, (rows + kRows - 1) / kRows), make_shape(_128{}, blocks_of_128(k)), 1),
      make_stride(make_stride(_0{}, int(view.stride_row)), make_stride(_0{}, int(view.stride_k)), 0));
}

// Calls f.operator()<ElementOut>() with the type of out: a kernel each.
template <class F>
auto with_out_element(const GroupedGemmArgs& args, F&& f) {
  if (args.out_dtype == DType::float32) return f.template operator()<float>();
  return f.template operator()<cutlass::bfloat16_t>();
}

// Fills entry `expert`. Elements of a and b have `ab_bytes` bytes, of bias 2.
__host__ __device__ void describe_expert(const GroupedGemmArgs& args, const GroupTable& table, int expert) {
  const int begin = args.expert_offsets[expert], end = args.end_row(expert);
  const auto at = [](const void* data, int64_t byte) { return static_cast<const char*>(data) + byte; };
  const int64_t ab_bytes = args.ab_dtype == DType::float8_e4m3 ? 1 : 2;
  table.shape[expert] = {end - begin, args.n, args.k};
  table.a[expert] = at(args.a, int64_t{begin} * args.k * ab_bytes);
  table.b[expert] = at(args.b, int64_t{expert} * args.n * args.k * ab_bytes);
  table.bias[expert] = at(args.bias, int64_t{expert} * args.n * 2);
  table.out[expert] = args.out_row(begin);
  table.ab_stride[expert] = cute::make_stride(int64_t{args.k}, cute::_1{}, cute::_0{});
  table.out_stride[expert] = cute::make_stride(int64_t{args.n}, cute::_1{}, cute::_0{});
  table.a_scale[expert] = args.a_scale.data + begin * args.a_scale.stride_row;
  table.b_scale[expert] = args.b_scale.data + expert * args.b_scale.stride_group;
  table.a_scale_layout[expert] = scale_layout<1>(args.a_scale, end - begin, args.k);
  table.b_scale_layout[expert] = scale_layout<128>(args.b_scale, args.n, args.k);
}

__global__ void write_group_table(const __grid_constant__ GroupedGemmArgs args,
                                  const __grid_constant__ GroupTable table) {
  pdl_wait();  // expert_offsets and expert_rows may be the predecessor's output, and the table its input
  const int expert = blockIdx.x * blockDim.x + threadIdx.x;
  if (expert < args.num_experts) describe_expert(args, table, expert);
}

using Bias = cutlass::bfloat16_t;
template <class ElementOut>
constexpr int kOutAlignment = 16 / sizeof(ElementOut);

// out = float32 sum (+ bias[e], none when the array of pointers is null), rounded once.
template <class ElementOut, class CtaTile>
using AddBias = cutlass::epilogue::fusion::Sm90EVT<
    cutlass::epilogue::fusion::Sm90Compute<cutlass::plus, ElementOut, float, cutlass::FloatRoundStyle::round_to_nearest>,
    cutlass::epilogue::fusion::Sm90RowBroadcast<0, CtaTile, Bias*, float>,
    cutlass::epilogue::fusion::Sm90AccFetch>;

// What the kernels of all files have in common: no clusters (SM120 has no multicast), float32 sums, row-major out, experts as groups.
using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;

template <class Arch, class Tile, class Schedule, class ElementOut, class Fusion>
using GroupedEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    Arch, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float,
    void, cutlass::layout::RowMajor*, 8, ElementOut, cutlass::layout::RowMajor*, kOutAlignment<ElementOut>, Schedule, Fusion>::CollectiveOp;

template <class Epilogue>
using StagesBeside = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>;

template <class Mainloop, class Epilogue>
using GroupedGemm = cutlass::gemm::device::GemmUniversalAdapter<
    cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<ProblemShape>, Mainloop, Epilogue>>;

template <class Gemm>
typename Gemm::Arguments cutlass_arguments(const GroupedGemmArgs& args, const GroupTable& table, int num_sms) {
  using Kernel = typename Gemm::GemmKernel;
  using ElementA = typename Kernel::ElementA;
  using ElementOut = typename Kernel::ElementD;
  static_assert(cute::is_same_v<typename Kernel::InternalStrideA, RowStride>);
  static_assert(cute::is_same_v<typename Kernel::InternalStrideB, RowStride>);
  static_assert(cute::is_same_v<typename Kernel::InternalStrideD, RowStride>);

  typename Gemm::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
  arguments.problem_shape = {args.num_experts, table.shape, nullptr};  // nullptr: no copy of the shapes on the host
  arguments.mainloop.ptr_A = reinterpret_cast<const ElementA**>(table.a);
  arguments.mainloop.ptr_B = reinterpret_cast<const ElementA**>(table.b);
  arguments.mainloop.dA = arguments.mainloop.dB = table.ab_stride;
  if constexpr (requires { arguments.mainloop.ptr_SFA; }) {
    arguments.mainloop.ptr_SFA = table.a_scale;
    arguments.mainloop.ptr_SFB = table.b_scale;
    arguments.mainloop.layout_SFA = table.a_scale_layout;
    arguments.mainloop.layout_SFB = table.b_scale_layout;
  }
  const auto bias = args.bias ? reinterpret_cast<const Bias* const*>(table.bias) : nullptr;
  arguments.epilogue.thread = {{bias}, {}, {}};
  arguments.epilogue.ptr_D = reinterpret_cast<ElementOut**>(table.out);
  arguments.epilogue.dD = table.out_stride;
  arguments.hw_info.sm_count = num_sms;
  return arguments;
}

// Kernel<ElementOut>::Gemm is CUTLASS's kernel.
template <template <class> class Kernel>
size_t cutlass_workspace_bytes(const GroupedGemmArgs& args) {
  const GroupTable table(nullptr, args.num_experts);
  return table.bytes + with_out_element(args, [&]<class ElementOut>() {
    using Gemm = typename Kernel<ElementOut>::Gemm;
    return Gemm::get_workspace_size(cutlass_arguments<Gemm>(args, table, kMaxSms));
  });
}

// At most kMaxSms.
cudaError_t count_sms(int& num_sms) {
  int device = 0;
  if (auto error = cudaGetDevice(&device)) return error;
  if (auto error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device)) return error;
  if (num_sms > kMaxSms) num_sms = kMaxSms;
  return cudaSuccess;
}

template <class Gemm>
cudaError_t run_gemm(const typename Gemm::Arguments& arguments, void* workspace, cudaStream_t stream) {
  Gemm gemm;
  if (gemm.initialize(arguments, workspace, stream) != cutlass::Status::kSuccess) return cudaErrorInvalidValue;
  // An ordinary launch: it starts when the table is written, and CUTLASS's own overlap would not wait for that.
  if (gemm.run(stream) != cutlass::Status::kSuccess) return cudaErrorLaunchFailure;
  return cudaSuccess;
}

template <template <class> class Kernel>
cudaError_t run_cutlass(const GroupedGemmArgs& args, void* workspace, cudaStream_t stream) {
  if (args.num_rows == 0 || args.num_experts == 0 || args.n == 0) return cudaSuccess;
  int num_sms = 0;
  if (auto error = count_sms(num_sms)) return error;
  const GroupTable table(workspace, args.num_experts);
  constexpr int kThreads = 128;
  const int blocks = (args.num_experts + kThreads - 1) / kThreads;
  if (auto error = launch(write_group_table, blocks, kThreads, 0, stream, args, table)) return error;
  return with_out_element(args, [&]<class ElementOut>() {
    using Gemm = typename Kernel<ElementOut>::Gemm;
    return run_gemm<Gemm>(cutlass_arguments<Gemm>(args, table, num_sms), static_cast<char*>(workspace) + table.bytes, stream);
  });
}

// What the kernels here ask of their arguments beyond the operand type, as one sentence; nullptr when all holds.
const char* why_not_cutlass(const GroupedGemmArgs& args) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const bool is_fp8 = args.ab_dtype == DType::float8_e4m3;
  if (args.out_dtype == DType::float16) return "this kernel writes bfloat16 or float32";
  if (args.bias && args.bias_dtype != DType::bfloat16) return "this kernel adds a bfloat16 bias";
  if (args.k == 0) return "K must be at least 1";
  if (args.k % (is_fp8 ? 16 : 8) != 0) return "k must be a multiple of 16 bytes";
  if (args.n % 8 != 0) return "n must be a multiple of 8";
  if (is_fp8 && args.b_parts > 1 && args.n % (int64_t{128} * args.b_parts) != 0) {
    return "each of the b_parts must be a multiple of 128 rows, so that no scale block straddles two of them";
  }
  if (!aligned(args.a) || !aligned(args.b) || !aligned(args.out)) {
    return "a, b and out must start at multiples of 16 bytes";
  }
  return nullptr;
}

}  // namespace
}  // namespace moe
