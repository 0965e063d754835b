// read_block_scaled: a call of a block-scaled grouped GEMM up to its kernel, on the CPU: scales packed as the threads of
// pack_scale do (those of b before the call, with given_atoms), groups written by describe_expert, then every scale read where CUTLASS reads it.
#include "host/device_shims.h"

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "grouped_gemm/block_scaled_groups.h"

namespace py = pybind11;

namespace {

using namespace moe;

template <typename T>
std::vector<T> from_bytes(const std::string& bytes) {
  std::vector<T> items(bytes.size() / sizeof(T));
  std::copy_n(bytes.data(), items.size() * sizeof(T), reinterpret_cast<char*>(items.data()));
  return items;
}

template <typename T>
py::bytes to_bytes(const std::vector<T>& items) {
  return {reinterpret_cast<const char*>(items.data()), items.size() * sizeof(T)};
}

void pack(const ScaleArgs& atoms) {
  for (int64_t line = 0; line < atoms.matrices * atoms.places; ++line) {
    for (int64_t word = 0; word < atoms.words(); ++word) move_word<ScaleLayout::atom, true>(atoms, line, word);
  }
}

// The scales [rows, k / block] that a layout finds at `data`, and whether all other bytes it may read are zero.
template <Format kFormat, class Layout>
bool read_atoms(const void* data, const Layout& layout, int rows, int k, std::vector<uint8_t>& scales) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  std::vector<uint8_t> rest(bytes, bytes + cute::cosize(layout));
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < scale_columns(kFormat, k); ++column) {
      const auto offset = layout(cute::make_coord(row, column * block_k(kFormat), 0));
      scales.push_back(bytes[offset]);
      rest[offset] = 0;
    }
  }
  return std::all_of(rest.begin(), rest.end(), [](uint8_t byte) { return byte == 0; });
}

template <Format kFormat>
py::dict read_groups(BlockScaledArgs args, bool given_atoms) {
  std::vector<uint32_t> prepacked;
  if (given_atoms) {
    const ScaleArgs atoms = b_scale_atoms(args, nullptr);
    prepacked.resize(static_cast<size_t>(atoms.matrices * atoms.places * atoms.words()));
    pack(b_scale_atoms(args, prepacked.data()));
    args.b_scale_atoms = prepacked.data();
  }
  std::vector<char> workspace(BlockScaledGroups<kFormat>(nullptr, args).bytes, '\xff');
  const BlockScaledGroups<kFormat> groups(workspace.data(), args);
  pack(a_scale_atoms(args, groups.a_atoms));
  if (!given_atoms) pack(b_scale_atoms(args, groups.b_atoms));
  const auto offset = [](const void* pointer, const void* base) {
    return static_cast<int64_t>(static_cast<const char*>(pointer) - static_cast<const char*>(base));
  };
  std::vector<int64_t> table;  // a row an expert
  std::vector<uint8_t> a_scales, b_scales;
  std::vector<float> alpha;
  bool padding_is_zero = true;
  for (int e = 0; e < args.num_experts; ++e) {
    describe_expert(args, groups, e);
    const auto [m, n, k] = groups.shape[e];
    for (int64_t entry : {int64_t{m}, int64_t{n}, int64_t{k}, offset(groups.a[e], args.a), offset(groups.b[e], args.b),
                          offset(groups.out[e], args.out), offset(groups.bias[e], args.bias),
                          offset(groups.alpha[e], groups.alpha_values), cute::get<0>(groups.ab_stride[e]),
                          cute::get<0>(groups.out_stride[e])}) {
      table.push_back(entry);
    }
    padding_is_zero &= read_atoms<kFormat>(groups.a_scale[e], groups.a_scale_layout[e], m, k, a_scales);
    padding_is_zero &= read_atoms<kFormat>(groups.b_scale[e], groups.b_scale_layout[e], n, k, b_scales);
    for (int column = 0; column < args.n; ++column) alpha.push_back(alpha_of(args, e, column));
  }
  py::dict read;
  read["table"] = to_bytes(table);
  read["a_scale"] = to_bytes(a_scales);
  read["b_scale"] = to_bytes(b_scales);
  read["alpha"] = to_bytes(alpha);
  read["padding_is_zero"] = padding_is_zero;
  return read;
}

py::dict read_block_scaled(const std::string& format, const std::string& act_format, const std::string& a_scale, const std::string& b_scale,
                           const std::string& expert_offsets, int rows, int n, int k, const std::string& a_global_scale,
                           const std::string& b_global_scale, const std::string& expert_rows, bool given_atoms, bool float32_out) {
  const auto a = from_bytes<uint8_t>(a_scale), b = from_bytes<uint8_t>(b_scale);
  const auto offsets = from_bytes<int32_t>(expert_offsets), used = from_bytes<int32_t>(expert_rows);
  const auto a_global = from_bytes<float>(a_global_scale), b_global = from_bytes<float>(b_global_scale);
  std::vector<char> somewhere(1);
  BlockScaledArgs args;
  args.a = args.b = args.bias = args.out = somewhere.data();
  if (float32_out) args.out_dtype = DType::float32;
  args.expert_offsets = offsets.data();
  if (!used.empty()) args.expert_rows = used.data();
  args.num_experts = static_cast<int32_t>(offsets.size()) - 1;
  args.num_rows = rows;
  args.n = n;
  args.k = k;
  const int64_t columns = static_cast<int64_t>(a.size()) / std::max(rows, 1);
  args.a_block_scale = {a.data(), 0, columns, 1};
  args.b_block_scale = {b.data(), n * columns, columns, 1};
  if (!a_global.empty()) args.a_global_scale = a_global.data();
  args.a_global_stride = a_global.size() > 1 ? 1 : 0;
  if (!b_global.empty()) args.b_global_scale = b_global.data();
  if (!b_global.empty()) args.b_global_parts = static_cast<int32_t>(b_global.size()) / args.num_experts;
  const auto parse = [](const std::string& name) {
    if (name == "nvfp4") return Format::nvfp4;
    if (name == "mxfp8") return Format::mxfp8;
    if (name == "mxfp4") return Format::mxfp4;
    throw py::value_error("read_block_scaled: format: expected nvfp4, mxfp8 or mxfp4, got " + name);
  };
  args.format = parse(format);
  args.act_format = parse(act_format);
  switch (args.format) {
    case Format::nvfp4: return read_groups<Format::nvfp4>(args, given_atoms);
    case Format::mxfp8: return read_groups<Format::mxfp8>(args, given_atoms);
    default: return read_groups<Format::mxfp4>(args, given_atoms);
  }
}

}  // namespace

void bind_block_scaled(py::module_& module) {
  using namespace py::literals;
  module.def("read_block_scaled", &read_block_scaled, "format"_a, "act_format"_a, "a_scale"_a, "b_scale"_a, "expert_offsets"_a, "rows"_a,
             "n"_a, "k"_a, "a_global_scale"_a = "", "b_global_scale"_a = "", "expert_rows"_a = "", "given_atoms"_a = false,
             "float32_out"_a = false);
}
