// packed <- scale: one-byte scales [rows, columns] or [E, rows, columns], any strides, in the layout that a kernel reads.
// Padding is written too, as zeros.
#include <torch/csrc/stable/library.h>

#include "common/move_scales.cuh"

namespace moe {
namespace {

bool is_one_byte(const Tensor& scale) {
  const ScalarType dtype = scale.scalar_type();
  return dtype == ScalarType::Float8_e4m3fn || dtype == ScalarType::Float8_e8m0fnu || dtype == ScalarType::Byte;
}

Tensor pack_scale_cuda(const Tensor& scale, const std::string& layout, const std::optional<Tensor>& expert_offsets) {
  constexpr const char* kOp = "pack_scale";
  MOE_EXPECT(is_one_byte(scale) && (scale.dim() == 2 || scale.dim() == 3), kOp, "scale",
             "one byte a scale, [rows, columns] or [E, rows, columns]", describe(scale));
  ScaleArgs args = scale_args(kOp, scale, layout, expert_offsets);
  std::vector<int64_t> sizes = packed_sizes(args);
  std::vector<int64_t> strides = {std::max<int64_t>(sizes[1], 1), 1};
  args.packed_matrix = sizes[0] * strides[0];
  if (args.layout == ScaleLayout::atom) {
    args.packed_matrix = args.places * sizes[1];
    strides = {512 * std::max<int64_t>(sizes[1], 1), 512, 16, 4, 1};
  } else if (args.layout != ScaleLayout::words) {
    args.stride_word = round_up(args.rows, 4);  // 16 bytes, which TMA demands of strides
    args.packed_matrix = args.stride_word * sizes[1];
    strides = {1, args.stride_word};
  }
  if (scale.dim() == 3) {
    sizes.insert(sizes.begin(), args.matrices);
    const int64_t elements = args.layout == ScaleLayout::atom ? std::max<int64_t>(sizes[1], 1) * strides[0]
                                                              : args.packed_matrix;
    strides.insert(strides.begin(), elements);
  }
  const ScalarType dtype = args.layout == ScaleLayout::atom ? scale.scalar_type() : ScalarType::Int;
  Tensor packed = empty_strided(sizes, strides, dtype, scale);
  args.packed = pointer<uint32_t>(packed);
  const CudaScope scope(scale);
  check_cuda(kOp, move_scales<true>(args, scope.stream));
  return packed;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) { m.impl("pack_scale.cuda", TORCH_BOX(&moe::pack_scale_cuda)); }
