// packed <- scale: one-byte scales [rows, columns] or [E, rows, columns], any strides, in the layout a kernel reads.
// Padding is written too, as zeros.
#include <torch/csrc/stable/library.h>

#include "common/move_scales.cuh"
#include "pack_scale/pack_scale.h"

namespace moe {

cudaError_t pack_scale(const ScaleArgs& args, cudaStream_t stream) { return move_scales<true>(args, stream); }

namespace {

constexpr int64_t kAtomBytes = kAtomRows * kWordColumns;

bool is_one_byte(const Tensor& scale) {
  const ScalarType dtype = scale.scalar_type();
  return dtype == ScalarType::Float8_e4m3fn || dtype == ScalarType::Float8_e8m0fnu || dtype == ScalarType::Byte;
}

// Room for packed; fills in where its words go. Sizes and strides are those of empty_packed in scale_layouts.py.
Tensor empty_packed(ScaleArgs& args, const Tensor& scale) {
  std::vector<int64_t> sizes = packed_sizes(args), strides;
  const int64_t words = sizes[1], row = std::max<int64_t>(words, 1);
  int64_t matrix = 0;  // elements
  if (args.layout == ScaleLayout::atom) {
    strides = {kAtomBytes * row, kAtomBytes, 16, 4, 1};
    matrix = std::max<int64_t>(sizes[0], 1) * strides[0];
    args.packed_matrix = args.places * words;
  } else if (args.layout == ScaleLayout::words) {
    strides = {row, 1};
    args.packed_matrix = matrix = args.rows * row;
  } else {
    args.stride_word = round_up(args.rows, 4);  // 16 bytes, which TMA demands of strides
    strides = {1, args.stride_word};
    args.packed_matrix = matrix = args.stride_word * words;
  }
  if (scale.dim() == 3) {
    sizes.insert(sizes.begin(), args.matrices);
    strides.insert(strides.begin(), matrix);
  }
  const ScalarType dtype = args.layout == ScaleLayout::atom ? scale.scalar_type() : ScalarType::Int;
  Tensor packed = empty_strided(sizes, strides, dtype, scale);
  args.packed = pointer<uint32_t>(packed);
  return packed;
}

Tensor pack_scale_cuda(const Tensor& scale, const Text& layout, const std::optional<Tensor>& expert_offsets) {
  constexpr const char* kOp = "pack_scale";
  MOE_EXPECT(is_one_byte(scale) && (scale.dim() == 2 || scale.dim() == 3), kOp, "scale",
             "one byte a scale, [rows, columns] or [E, rows, columns]", describe(scale));
  ScaleArgs args = scale_args(kOp, scale, layout, expert_offsets);
  Tensor packed = empty_packed(args, scale);
  const CudaScope scope(scale);
  check_cuda(kOp, pack_scale(args, scope.stream));
  return packed;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) { m.impl("pack_scale.cuda", TORCH_BOX(&moe::pack_scale_cuda)); }
