// Grouped GEMM through CUTLASS's block-scaled pointer-array kernels: scales packed, groups described, kernel launched.
// Each including file names the format, the mainloop and the tile; see block_scaled.h for the equation.
#pragma once
#include "grouped_gemm/block_scaled_groups.h"
#include "grouped_gemm/cutlass_group_setup.cuh"
#include "pack_scale/pack_scale.h"

namespace moe {
namespace {

template <Format kFormat>
__global__ void write_block_scaled_groups(const __grid_constant__ BlockScaledArgs args,
                                          const __grid_constant__ BlockScaledGroups<kFormat> groups) {
  pdl_wait();  // expert_offsets, expert_rows and global scales may be the predecessor's output, and the groups its input
  const int expert = blockIdx.x, column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column == 0) describe_expert(args, groups, expert);
  if constexpr (BlockScaledGroups<kFormat>::kHasAlpha) {
    if (column < args.n) groups.alpha_values[int64_t{expert} * args.n + column] = alpha_of(args, expert, column);
  }
}

// out = float32 sum * alpha[e, n] (+ bias[e, n]), one fused multiply-add, rounded once.
template <class ElementOut, class CtaTile>
using ScaleAndAddBias = cutlass::epilogue::fusion::Sm90EVT<
    cutlass::epilogue::fusion::Sm90Compute<cutlass::homogeneous_multiply_add, ElementOut, float,
                                           cutlass::FloatRoundStyle::round_to_nearest>,
    cutlass::epilogue::fusion::Sm90RowBroadcast<0, CtaTile, float*, float>, cutlass::epilogue::fusion::Sm90AccFetch,
    cutlass::epilogue::fusion::Sm90RowBroadcast<0, CtaTile, Bias*, float>>;

template <Format kFormat, class ElementOut, class CtaTile>
using BlockScaledFusion =
    cute::conditional_t<BlockScaledGroups<kFormat>::kHasAlpha, ScaleAndAddBias<ElementOut, CtaTile>, AddBias<ElementOut, CtaTile>>;

template <Format kFormat, class Gemm>
typename Gemm::Arguments block_scaled_arguments(const BlockScaledArgs& args, const BlockScaledGroups<kFormat>& groups,
                                                int num_sms) {
  using Kernel = typename Gemm::GemmKernel;
  using Mainloop = typename Kernel::CollectiveMainloop;
  using Groups = BlockScaledGroups<kFormat>;
  using ElementOut = typename Kernel::ElementD;
  static_assert(cute::is_same_v<typename Kernel::InternalStrideA, typename Groups::RowStride>);
  static_assert(cute::is_same_v<typename Kernel::InternalStrideB, typename Groups::RowStride>);
  static_assert(cute::is_same_v<typename Kernel::InternalStrideD, typename Groups::RowStride>);
  static_assert(cute::is_same_v<typename Mainloop::InternalLayoutSFA, typename Groups::AtomLayout>);
  static_assert(cute::is_same_v<typename Mainloop::InternalLayoutSFB, typename Groups::AtomLayout>);

  typename Gemm::Arguments arguments{};
  const auto point = [](auto& to, const void** from) { to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(from); };
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
  arguments.problem_shape = {args.num_experts, groups.shape, nullptr};  // nullptr: no copy of the shapes on the host
  point(arguments.mainloop.ptr_A, groups.a);
  point(arguments.mainloop.ptr_B, groups.b);
  point(arguments.mainloop.ptr_SFA, groups.a_scale);
  point(arguments.mainloop.ptr_SFB, groups.b_scale);
  arguments.mainloop.dA = arguments.mainloop.dB = groups.ab_stride;
  arguments.mainloop.layout_SFA = groups.a_scale_layout;
  arguments.mainloop.layout_SFB = groups.b_scale_layout;
  const auto bias = args.bias ? reinterpret_cast<const Bias* const*>(groups.bias) : nullptr;
  if constexpr (Groups::kHasAlpha) {
    arguments.epilogue.thread = {{groups.alpha}, {}, {bias}, {}};
  } else {
    arguments.epilogue.thread = {{bias}, {}, {}};
  }
  arguments.epilogue.ptr_D = reinterpret_cast<ElementOut**>(groups.out);
  arguments.epilogue.dD = groups.out_stride;
  arguments.hw_info.sm_count = num_sms;
  return arguments;
}

template <Format kFormat, template <class> class Kernel>
size_t block_scaled_workspace_bytes(const BlockScaledArgs& args) {
  const BlockScaledGroups<kFormat> groups(nullptr, args);
  return groups.bytes + with_out_element(args, [&]<class ElementOut>() {
    using Gemm = typename Kernel<ElementOut>::Gemm;
    return Gemm::get_workspace_size(block_scaled_arguments<kFormat, Gemm>(args, groups, kMaxSms));
  });
}

template <Format kFormat, Format kActFormat, template <class> class Kernel>
cudaError_t run_block_scaled(const BlockScaledArgs& args, void* workspace, cudaStream_t stream) {
  if (args.format != kFormat || args.act_format != kActFormat || block_scaled_why_not(args)) return cudaErrorInvalidValue;
  if (args.num_rows == 0 || args.num_experts == 0 || args.n == 0) return cudaSuccess;
  const BlockScaledGroups<kFormat> groups(workspace, args);
  if (auto error = pack_scale(a_scale_atoms(args, groups.a_atoms), stream)) return error;
  if (args.b_scale_atoms == nullptr)
    if (auto error = pack_scale(b_scale_atoms(args, groups.b_atoms), stream)) return error;
  constexpr int kThreads = 256;
  const dim3 grid(args.num_experts, groups.kHasAlpha ? (args.n + kThreads - 1) / kThreads : 1);
  if (auto error = launch(write_block_scaled_groups<kFormat>, grid, kThreads, 0, stream, args, groups)) return error;
  int num_sms = 0;
  if (auto error = count_sms(num_sms)) return error;
  return with_out_element(args, [&]<class ElementOut>() {
    using Gemm = typename Kernel<ElementOut>::Gemm;
    const auto arguments = block_scaled_arguments<kFormat, Gemm>(args, groups, num_sms);
    return run_gemm<Gemm>(arguments, static_cast<char*>(workspace) + groups.bytes, stream);
  });
}

// The kernels of one format on one family, for bfloat16 and float32 out, no clusters. `Operand`: CUTLASS's pair of a value and a scale
// type, of a and b or, where b has an `Operand` of its own, of a in kActFormat.
template <Format kFormat, class Operand, class Tile, class Arch, class EpilogueSchedule, class MainloopSchedule,
          Format kActFormat = kFormat, class WeightOperand = Operand>
struct BlockScaledKernel {
  static constexpr int kActAlignment = 16 * pack(kActFormat);  // values in 16 bytes
  static constexpr int kWeightAlignment = kActFormat == kFormat ? kActAlignment : kMixedAlignment;

  template <class ElementOut>
  struct Kernel {
    using Epilogue = GroupedEpilogue<Arch, Tile, EpilogueSchedule, ElementOut, BlockScaledFusion<kFormat, ElementOut, Tile>>;

    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        Arch, cutlass::arch::OpClassBlockScaledTensorOp,
        Operand, cutlass::layout::RowMajor*, kActAlignment, WeightOperand, cutlass::layout::ColumnMajor*, kWeightAlignment,
        float, Tile, Cluster,
        StagesBeside<Epilogue>,
        MainloopSchedule>::CollectiveOp;

    using Gemm = GroupedGemm<Mainloop, Epilogue>;
  };

  static constexpr BlockScaledLauncher kLauncher = {block_scaled_workspace_bytes<kFormat, Kernel>,
                                                    run_block_scaled<kFormat, kActFormat, Kernel>};
};

}  // namespace
}  // namespace moe
