// scale <- packed: the inverse of pack_scale, [rows, columns] or [E, rows, columns] contiguous. Bytes move, none changes.
#include <torch/csrc/stable/library.h>

#include "common/move_scales.cuh"

namespace moe {
namespace {

Tensor unpack_scale_cuda(const Tensor& packed, const std::string& layout, int64_t rows, int64_t columns,
                         ScalarType dtype, const std::optional<Tensor>& expert_offsets) {
  constexpr const char* kOp = "unpack_scale";
  MOE_EXPECT(dtype == ScalarType::Float8_e4m3fn || dtype == ScalarType::Float8_e8m0fnu || dtype == ScalarType::Byte, kOp,
             "dtype", "one of float8_e4m3fn, float8_e8m0fnu, uint8", dtype_name(dtype));
  const bool is_atom = parse_scale_layout(kOp, layout) == ScaleLayout::atom;
  const int64_t dims = is_atom ? 5 : 2;
  const bool is_batch = packed.dim() == dims + 1;
  MOE_EXPECT(is_batch || packed.dim() == dims, kOp, "packed", dims << " dimensions, or one more", describe(packed));
  Tensor scale = empty(is_batch ? std::vector<int64_t>{packed.size(0), rows, columns} : std::vector<int64_t>{rows, columns},
                       dtype, packed);
  ScaleArgs args = scale_args(kOp, scale, layout, expert_offsets);
  const std::vector<int64_t> sizes = packed_sizes(args);
  bool fits = is_atom ? packed.is_contiguous() && packed.element_size() == 1 : packed.scalar_type() == ScalarType::Int;
  for (int64_t i = 0; i < dims; ++i) fits = fits && packed.size(is_batch + i) == sizes[i];
  MOE_EXPECT(fits, kOp, "packed", "what pack_scale returns for this layout, " << rows << " rows and " << columns << " columns",
             describe(packed));
  args.packed = pointer<uint32_t>(packed);
  args.stride_word = is_atom ? 0 : packed.stride(is_batch + 1);
  if (is_batch) args.packed_matrix = is_atom ? packed.stride(0) / kWordColumns : packed.stride(0);
  const CudaScope scope(packed);
  check_cuda(kOp, move_scales<false>(args, scope.stream));
  return scale;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) { m.impl("unpack_scale.cuda", TORCH_BOX(&moe::unpack_scale_cuda)); }
