// packed <- scale or scale <- packed, word by word: the kernel and the checks that pack_scale and unpack_scale share.
//
// A thread moves one word. Eight neighbouring threads take neighbouring words of a row, which are 32 bytes of the
// row-major side, and the places of a block are neighbours on the packed side.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "common/launch.h"
#include "common/scale_layouts.h"
#include "common/stream.h"
#include "common/tensor.h"

namespace moe {

constexpr int kWordsOfBlock = 8, kPlacesOfBlock = 32;

template <ScaleLayout kLayout, bool kPack>
__global__ void __launch_bounds__(kWordsOfBlock* kPlacesOfBlock) move_scales_kernel(ScaleArgs args) {
  const int64_t word = static_cast<int64_t>(blockIdx.y) * kWordsOfBlock + threadIdx.x;
  const int64_t line = static_cast<int64_t>(blockIdx.x) * kPlacesOfBlock + threadIdx.y;
  pdl_wait();
  pdl_launch_next();
  move_word<kLayout, kPack>(args, line, word);
}

template <bool kPack>
cudaError_t move_scales(const ScaleArgs& args, cudaStream_t stream) {
  const int64_t words = args.words(), lines = args.matrices * args.places;
  if (words == 0 || lines == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(lines, kPlacesOfBlock)),
                  static_cast<unsigned>(ceil_div(words, kWordsOfBlock)));
  auto* kernel = args.layout == ScaleLayout::words      ? move_scales_kernel<ScaleLayout::words, kPack>
                 : args.layout == ScaleLayout::words_mn ? move_scales_kernel<ScaleLayout::words_mn, kPack>
                 : args.layout == ScaleLayout::utccp    ? move_scales_kernel<ScaleLayout::utccp, kPack>
                                                        : move_scales_kernel<ScaleLayout::atom, kPack>;
  return launch(kernel, grid, dim3(kWordsOfBlock, kPlacesOfBlock), 0, stream, args);
}

inline ScaleLayout parse_scale_layout(const char* op, const std::string& name) {
  if (name == "words") return ScaleLayout::words;
  if (name == "words_mn") return ScaleLayout::words_mn;
  if (name == "utccp") return ScaleLayout::utccp;
  MOE_EXPECT(name == "atom", op, "layout", "one of words, words_mn, utccp, atom", name);
  return ScaleLayout::atom;
}

// Sizes and strides of the row-major side, and what both directions demand.
inline ScaleArgs scale_args(const char* op, const Tensor& scale, const std::string& layout,
                            const std::optional<Tensor>& expert_offsets) {
  ScaleArgs args;
  args.layout = parse_scale_layout(op, layout);
  const int64_t dims = scale.dim();
  args.scale = pointer<uint8_t>(scale);
  args.rows = scale.size(dims - 2);
  args.columns = scale.size(dims - 1);
  args.stride_row = scale.stride(dims - 2);
  args.stride_column = scale.stride(dims - 1);
  if (dims == 3) {
    args.matrices = scale.size(0);
    args.stride_matrix = scale.stride(0);
  }
  MOE_EXPECT(args.layout != ScaleLayout::utccp || args.rows % kAtomRows == 0, op, "rows", "a multiple of 128 for utccp",
             args.rows);
  args.places = args.layout == ScaleLayout::atom ? round_up(args.rows, kAtomRows) : args.rows;
  if (expert_offsets) {
    MOE_EXPECT(args.layout == ScaleLayout::atom && dims == 2, op, "expert_offsets",
               "none but for one matrix in the layout atom", describe(*expert_offsets));
    expect_offsets(op, *expert_offsets, scale);
    args.expert_offsets = pointer<const int32_t>(*expert_offsets);
    args.num_experts = static_cast<int32_t>(expert_offsets->numel()) - 1;
    args.places = (args.rows + (kAtomRows - 1) * args.num_experts) / kAtomRows * kAtomRows;
  }
  return args;
}

// The sizes of packed, without the leading dimension of a batch.
inline std::vector<int64_t> packed_sizes(const ScaleArgs& args) {
  if (args.layout == ScaleLayout::atom) return {args.places / kAtomRows, args.words(), 32, 4, kWordColumns};
  return {args.rows, args.words()};
}

}  // namespace moe
