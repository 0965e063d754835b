// scale <- packed: the inverse of pack_scale, [rows, columns] or [E, rows, columns], contiguous. No byte changes.
#include <torch/csrc/stable/library.h>

#include "common/move_scales.cuh"

namespace moe {
namespace {

// As meta_kernels/pack_scale.py checks it.
bool fits(const Tensor& packed, const ScaleArgs& args, int64_t lead) {
  const bool is_atom = args.layout == ScaleLayout::atom;
  if (packed.element_size() != (is_atom ? 1 : sizeof(uint32_t)) || (is_atom && !packed.is_contiguous())) return false;
  const std::vector<int64_t> sizes = packed_sizes(args);
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (packed.size(lead + static_cast<int64_t>(i)) != sizes[i]) return false;
  }
  if (is_atom || packed.numel() == 0) return true;
  if (args.layout == ScaleLayout::words) return packed.is_contiguous();
  return (sizes[0] <= 1 || packed.stride(lead) == 1) && (sizes[1] <= 1 || packed.stride(lead + 1) >= sizes[0]);  // MN-major
}

Tensor unpack_scale_cuda(const Tensor& packed, const Text& layout, int64_t rows, int64_t columns,
                         ScalarType dtype, const std::optional<Tensor>& expert_offsets) {
  constexpr const char* kOp = "unpack_scale";
  MOE_EXPECT(packed.is_cuda(), kOp, "packed", "a tensor on a GPU", describe(packed));
  const bool is_atom = parse_scale_layout(kOp, layout) == ScaleLayout::atom;
  const int64_t lead = packed.dim() - (is_atom ? 5 : 2);
  MOE_EXPECT(lead == 0 || lead == 1, kOp, "packed", "what pack_scale returns for this layout", describe(packed));
  MOE_EXPECT(dtype == ScalarType::Byte || dtype == ScalarType::Float8_e4m3fn || dtype == ScalarType::Float8_e8m0fnu, kOp, "dtype",
             "one of float8_e4m3fn, float8_e8m0fnu, uint8", dtype_name(dtype));
  std::vector<int64_t> sizes = {rows, columns};
  if (lead == 1) sizes.insert(sizes.begin(), packed.size(0));
  Tensor scale = empty(sizes, dtype, packed);
  ScaleArgs args = scale_args(kOp, scale, layout, expert_offsets);
  MOE_EXPECT(fits(packed, args, lead), kOp, "packed",
             "what pack_scale returns for " << rows << " rows and " << columns << " columns", describe(packed));
  MOE_EXPECT(reinterpret_cast<uintptr_t>(packed.data_ptr()) % sizeof(uint32_t) == 0, kOp, "packed", "a start at a multiple of 4 bytes",
             describe(packed));
  args.packed = pointer<uint32_t>(packed);
  args.stride_word = is_atom ? 0 : packed.stride(lead + 1);
  if (lead == 1) args.packed_matrix = packed.stride(0) / (is_atom ? kWordColumns : 1);
  const CudaScope scope(packed);
  check_cuda(kOp, move_scales<false>(args, scope.stream));
  return scale;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) { m.impl("unpack_scale.cuda", TORCH_BOX(&moe::unpack_scale_cuda)); }
