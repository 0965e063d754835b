// What CUTLASS's block-scaled pointer-array kernels read from device memory, for each expert e, rows [begin, end) =
// [expert_offsets[e], end_row(e)):
//   shape[e]   = (end - begin, n, k)
//   a[e]       = a + begin * k       b[e] = b + e * n * k      strides (k, 1), in values
//   out[e]     = out + begin * n     bias[e] = bias + e * n    alpha[e] = alpha + e * n
//   a_scale[e] = a_atoms, from atom row first_atom_row(begin, e) on; b_scale[e] = b_atoms, those of expert e
// with CuTe's layouts of the atoms. Scales come row-major and are packed into a_atoms and b_atoms (128 rows x 4 columns
// each, 512 bytes) in front of the kernel, unless the caller has packed those of b. All functions also run on the host.
#pragma once
#include <cute/tensor.hpp>
#include <cutlass/detail/sm100_blockscaled_layout.hpp>
#include <type_traits>

#include "common/scale_layouts.h"
#include "grouped_gemm/block_scaled.h"

namespace moe {
namespace {

// The atoms that a call packs its scales into, as arguments of pack_scale; `packed` is where they go.
inline ScaleArgs scale_atoms(const BlockScaledArgs& args, const BlockScaleView& view, int64_t rows, uint32_t* packed) {
  ScaleArgs atoms;
  atoms.layout = ScaleLayout::atom;
  atoms.scale = const_cast<uint8_t*>(view.data);  // ScaleArgs serve both directions
  atoms.rows = rows;
  atoms.columns = scale_columns(args.format, args.k);
  atoms.stride_row = view.stride_row;
  atoms.stride_column = view.stride_k;
  atoms.packed = packed;
  return atoms;
}

inline ScaleArgs a_scale_atoms(const BlockScaledArgs& args, uint32_t* packed) {
  ScaleArgs atoms = scale_atoms(args, args.a_block_scale, args.num_rows, packed);
  atoms.expert_offsets = args.expert_offsets;
  atoms.num_experts = args.num_experts;
  atoms.places = (args.num_rows + (kAtomRows - 1) * args.num_experts) / kAtomRows * kAtomRows;
  return atoms;
}

inline ScaleArgs b_scale_atoms(const BlockScaledArgs& args, uint32_t* packed) {
  ScaleArgs atoms = scale_atoms(args, args.b_block_scale, args.n, packed);
  atoms.matrices = args.num_experts;
  atoms.stride_matrix = args.b_block_scale.stride_group;
  atoms.places = round_up(args.n, kAtomRows);
  atoms.packed_matrix = atoms.places * atoms.words();
  return atoms;
}

// Device arrays, laid out one after another from `base`: one entry an expert, then what they point to.
template <Format kFormat>
struct BlockScaledGroups {
  static constexpr bool kHasAlpha = kFormat == Format::nvfp4;
  using ScaleConfig = cutlass::detail::Sm1xxBlockScaledConfig<block_k(kFormat)>;
  using AtomLayout = std::remove_cvref_t<decltype(ScaleConfig::deduce_layoutSFA())>;
  using Shape = cute::Shape<int, int, int>;
  using RowStride = cute::Stride<int64_t, cute::_1, cute::_0>;

  Shape* shape;
  const void **a, **b, **a_scale, **b_scale, **bias;
  const float** alpha;
  void** out;
  RowStride *ab_stride, *out_stride;
  AtomLayout *a_scale_layout, *b_scale_layout;
  uint32_t *a_atoms, *b_atoms;  // b_atoms: unless the caller has some
  float* alpha_values;
  size_t bytes = 0;  // a multiple of 256, so what follows is aligned for tensor maps

  BlockScaledGroups(void* base, const BlockScaledArgs& args) {
    const auto place = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(static_cast<char*>(base) + bytes);
      bytes += round_up(count * sizeof(*array), 256);
    };
    const auto each = [&](auto*&... arrays) { (place(arrays, args.num_experts), ...); };
    each(shape, a, b, a_scale, b_scale, bias, alpha, out, ab_stride, out_stride, a_scale_layout, b_scale_layout);
    const auto words = [](const ScaleArgs& atoms) { return atoms.matrices * atoms.places * atoms.words(); };
    place(a_atoms, words(a_scale_atoms(args, nullptr)));
    place(b_atoms, args.b_scale_atoms == nullptr ? words(b_scale_atoms(args, nullptr)) : 0);
    place(alpha_values, kHasAlpha ? int64_t{args.num_experts} * args.n : 0);
  }
};

template <Format kFormat>
__host__ __device__ void describe_expert(const BlockScaledArgs& args, const BlockScaledGroups<kFormat>& groups, int expert) {
  const int begin = args.expert_offsets[expert], end = args.end_row(expert);
  using Config = typename BlockScaledGroups<kFormat>::ScaleConfig;
  const auto values = [&](const void* data, int64_t row, Format format) {
    return static_cast<const char*>(data) + row * args.k / pack(format);
  };
  const int64_t words = (scale_columns(kFormat, args.k) + kWordColumns - 1) / kWordColumns;
  const int64_t first_column = int64_t{expert} * args.n;
  groups.shape[expert] = {end - begin, args.n, args.k};
  groups.a[expert] = values(args.a, begin, args.act_format);
  groups.b[expert] = values(args.b, first_column, kFormat);
  groups.a_scale[expert] = groups.a_atoms + first_atom_row(begin, expert) * words * kAtomRows;
  groups.b_scale[expert] = (args.b_scale_atoms == nullptr ? groups.b_atoms : args.b_scale_atoms) + expert * ceil_div(args.n, kAtomRows) * words * kAtomRows;
  groups.bias[expert] = static_cast<const char*>(args.bias) + first_column * 2;
  groups.alpha[expert] = groups.alpha_values + first_column;
  groups.out[expert] = args.out_row(begin);
  groups.ab_stride[expert] = cute::make_stride(int64_t{args.k}, cute::_1{}, cute::_0{});
  groups.out_stride[expert] = cute::make_stride(int64_t{args.n}, cute::_1{}, cute::_0{});
  const auto shape = cute::make_shape(end - begin, args.n, args.k, 1);
  groups.a_scale_layout[expert] = Config::tile_atom_to_shape_SFA(shape);
  groups.b_scale_layout[expert] = Config::tile_atom_to_shape_SFB(shape);
}

// The product of the global scales of an output column, rounded once.
__host__ __device__ inline float alpha_of(const BlockScaledArgs& args, int expert, int column) {
  const int part = column / (args.n / args.b_global_parts);
  const float a = args.a_global_scale ? args.a_global_scale[expert * args.a_global_stride] : 1.f;
  const float b = args.b_global_scale ? args.b_global_scale[expert * args.b_global_parts + part] : 1.f;
  return a * b;
}

}  // namespace
}  // namespace moe
