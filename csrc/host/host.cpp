// torch_moe_ops._host, for tests without a GPU: CuTe's own layout of block scales, the kernels' device code compiled
// for the CPU, and the choice of SM90 tactics. Optional (it needs pybind11), free of torch.
//
//   cute_scale_offsets(block_k, rows, columns)   byte of each scale (m, k) in CUTLASS's layout, int32 [rows, columns]
//   cute_scale_cosize(block_k, rows, columns)    bytes that layout takes
//   pack_scale(layout, scale, rows, columns, expert_offsets)      what each thread of the CUDA kernels does, one by one;
//   unpack_scale(layout, packed, rows, columns, expert_offsets)   layout by its number, expert_offsets may be empty
//   quantize_block(format, x, global_scale)      common/quantize.cuh: float32 [n] -> (value bytes, stored scale)
//   round_block(format, x, global_scale)         common/quantize.cuh: float32 [n] -> float32 [n], what a rounded format stores
//   fp8_block_scales(amax)                       common/quantize.cuh: float32 [n] -> float32 [n]
//   unpack_words(words)                          grouped_gemm/packed_word.h: uint32 [n] -> uint32 [n, 4]
//   choose_tactic(facts), possible_tactics(facts)  grouped_gemm/tactics_sm90.h: facts as (elements by number, num_rows,
//                                                  num_experts, hidden_size, intermediate_size, num_sms, can_gather, can_split,
//                                                  local_share, rounds_acts)
//   split_rows(hit, part_rows, parts, num_sms, most, least, step)  grouped_gemm/tactics_sm90.h
//   choose_tile_rows(num_rows, num_experts, part_rows, parts, bytes_of_weight_row, num_sms)  grouped_gemm/tactics_sm90.h
//   token_tiles(rows, most, extra)                  grouped_gemm/token_tiles_sm90.h: where each begins, and the end
//   read_block_scaled(format, ...)               what a block-scaled grouped GEMM reads (block_scaled.cpp)
// Arrays come and go as bytes.
#include "host/device_shims.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <cutlass/detail/sm100_blockscaled_layout.hpp>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/quantize.cuh"
#include "common/scale_layouts.h"
#include "grouped_gemm/packed_word.h"
#include "grouped_gemm/tactics_sm90.h"
#include "grouped_gemm/token_tiles_sm90.h"

namespace py = pybind11;

void bind_block_scaled(py::module_& module);

namespace {

template <typename T>
py::bytes to_bytes(const std::vector<T>& items) {
  return {reinterpret_cast<const char*>(items.data()), items.size() * sizeof(T)};
}

template <typename Function>
py::bytes each_scale(int rows, int columns, Function&& offset_of) {
  std::vector<int32_t> offsets;
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column) offsets.push_back(static_cast<int32_t>(offset_of(row, column)));
  }
  return to_bytes(offsets);
}

// Coordinates of the layout count elements along k, not scales.
template <int kBlockK>
auto cute_layout(int rows, int columns) {
  using Config = cutlass::detail::Sm1xxBlockScaledConfig<kBlockK>;
  return Config::tile_atom_to_shape_SFA(cute::make_shape(rows, 0, columns * kBlockK, 1));
}

template <typename Function>
auto with_cute_layout(int block_k, int rows, int columns, Function&& function) {
  if (block_k != 16 && block_k != 32) throw py::value_error("cute_scale: block_k: expected 16 or 32");
  return block_k == 16 ? function(cute_layout<16>(rows, columns)) : function(cute_layout<32>(rows, columns));
}

py::bytes cute_scale_offsets(int block_k, int rows, int columns) {
  return with_cute_layout(block_k, rows, columns, [&](auto layout) {
    return each_scale(rows, columns,
                      [&](int row, int column) { return layout(cute::make_coord(row, column * block_k, 0)); });
  });
}

int64_t cute_scale_cosize(int block_k, int rows, int columns) {
  return with_cute_layout(block_k, rows, columns,
                          [](auto layout) { return static_cast<int64_t>(cute::cosize(layout)); });
}

// One matrix, packed or unpacked, over memory full of ones: what is not written shows.
template <bool kPack>
py::bytes move_scales(int layout, const std::string& from, int rows, int columns, const std::string& expert_offsets) {
  using namespace moe;
  std::vector<int32_t> offsets(expert_offsets.size() / sizeof(int32_t));
  std::copy_n(expert_offsets.data(), expert_offsets.size(), reinterpret_cast<char*>(offsets.data()));
  ScaleArgs args;
  args.layout = static_cast<ScaleLayout>(layout);
  args.rows = args.places = rows;
  args.columns = args.stride_row = columns;
  args.stride_column = 1;
  args.stride_word = round_up(rows, 4);
  if (args.layout == ScaleLayout::atom) args.places = round_up(rows, kAtomRows);
  if (!offsets.empty()) {
    args.expert_offsets = offsets.data();
    args.num_experts = static_cast<int32_t>(offsets.size()) - 1;
    args.places = (rows + (kAtomRows - 1) * args.num_experts) / kAtomRows * kAtomRows;
  }
  std::vector<uint8_t> scale(static_cast<size_t>(rows) * columns, 0xff);
  std::vector<uint32_t> packed(static_cast<size_t>(round_up(args.places, 4) * args.words()), 0xffffffffu);
  if constexpr (kPack) {
    std::copy_n(from.data(), scale.size(), reinterpret_cast<char*>(scale.data()));
  } else {
    std::copy_n(from.data(), std::min(from.size(), packed.size() * 4), reinterpret_cast<char*>(packed.data()));
  }
  args.scale = scale.data();
  args.packed = packed.data();
  for (int64_t line = 0; line < args.places + 3; ++line) {  // past the ends, as the last threads of a grid are
    for (int64_t word = 0; word < args.words() + 3; ++word) {
      switch (args.layout) {
        case ScaleLayout::words: move_word<ScaleLayout::words, kPack>(args, line, word); break;
        case ScaleLayout::words_mn: move_word<ScaleLayout::words_mn, kPack>(args, line, word); break;
        case ScaleLayout::utccp: move_word<ScaleLayout::utccp, kPack>(args, line, word); break;
        case ScaleLayout::atom: move_word<ScaleLayout::atom, kPack>(args, line, word); break;
      }
    }
  }
  if constexpr (kPack) return to_bytes(packed);
  return to_bytes(scale);
}

std::vector<float> floats_of(const std::string& bytes) {
  std::vector<float> floats(bytes.size() / sizeof(float));
  std::copy_n(bytes.data(), floats.size() * sizeof(float), reinterpret_cast<char*>(floats.data()));
  return floats;
}

// One block as the lanes of a warp quantise it together: the amax of their chunks, one scale, each chunk's values.
template <moe::Format kFormat>
std::pair<py::bytes, uint32_t> quantize_chunks(const std::vector<float>& x, float global_scale) {
  using namespace moe;
  std::vector<uint32_t> words;
  float amax = 0.f, chunk[kChunk];
  const auto load = [&](size_t first) {
    for (int i = 0; i < kChunk; ++i) chunk[i] = first + i < x.size() ? x[first + i] : 0.f;
  };
  for (size_t first = 0; first < x.size(); first += kChunk) {
    load(first);
    amax = fmaxf(amax, chunk_amax(chunk));
  }
  const Scale scale = make_scale<kFormat>(amax, global_scale);
  for (size_t first = 0; first < x.size(); first += kChunk) {
    load(first);
    for (float& element : chunk) element = __fmul_rn(element, scale.inverse);
    uint32_t encoded[chunk_bytes(kFormat) / 4];
    encode_chunk<kFormat>(chunk, encoded);
    words.insert(words.end(), std::begin(encoded), std::end(encoded));
  }
  return {to_bytes(words), scale.stored};
}

std::pair<py::bytes, uint32_t> quantize_block(const std::string& format, const std::string& x, float global_scale) {
  using moe::Format;
  const std::vector<float> floats = floats_of(x);
  if (format == "int8") return quantize_chunks<Format::int8>(floats, global_scale);
  if (format == "fp8_block") return quantize_chunks<Format::fp8_block>(floats, global_scale);
  if (format == "fp8_block_e8m0") return quantize_chunks<Format::fp8_block_e8m0>(floats, global_scale);
  if (format == "mxfp8") return quantize_chunks<Format::mxfp8>(floats, global_scale);
  if (format == "mxfp4") return quantize_chunks<Format::mxfp4>(floats, global_scale);
  if (format == "nvfp4") return quantize_chunks<Format::nvfp4>(floats, global_scale);
  throw py::value_error("quantize_block: format: expected a quantised format, got " + format);
}

template <moe::Format kFormat>
py::bytes round_floats(std::vector<float> x, float global_scale) {
  float amax = 0.f;
  for (float element : x) amax = fmaxf(amax, fabsf(element));
  const moe::Rounding<kFormat> rounding(amax, global_scale);
  for (float& element : x) element = rounding(element);
  return to_bytes(x);
}

py::bytes round_block(const std::string& format, const std::string& x, float global_scale) {
  using moe::Format;
  if (format == "fp8_block") return round_floats<Format::as_fp8_block>(floats_of(x), global_scale);
  if (format == "fp8_block_e8m0") return round_floats<Format::as_fp8_block_e8m0>(floats_of(x), global_scale);
  if (format == "mxfp8") return round_floats<Format::as_mxfp8>(floats_of(x), global_scale);
  if (format == "mxfp4") return round_floats<Format::as_mxfp4>(floats_of(x), global_scale);
  if (format == "nvfp4") return round_floats<Format::as_nvfp4>(floats_of(x), global_scale);
  throw py::value_error("round_block: format: expected fp8_block, fp8_block_e8m0, mxfp8, mxfp4 or nvfp4, got " + format);
}

py::bytes fp8_block_scales(const std::string& amax) {
  std::vector<float> scales = floats_of(amax);
  for (float& x : scales) x = moe::fp8_block_scale(x);
  return to_bytes(scales);
}

py::bytes unpack_words(const std::string& words) {
  std::vector<uint32_t> in(words.size() / 4), out;
  std::memcpy(in.data(), words.data(), 4 * in.size());
  for (const uint32_t word : in) {
    uint32_t registers[4];
    moe::unpack_word(word, registers);
    out.insert(out.end(), registers, registers + 4);
  }
  return to_bytes(out);
}

using Facts = std::tuple<int, int64_t, int32_t, int64_t, int64_t, int32_t, bool, bool, double, bool>;

moe::sm90::LayerFacts layer_facts(const Facts& facts) {
  return std::apply([](int elements, auto... rest) { return moe::sm90::LayerFacts{moe::sm90::Elements(elements), rest...}; }, facts);
}

std::string choose_tactic(const Facts& facts) {
  return moe::sm90::tactic_name(moe::sm90::choose_tactic(layer_facts(facts)));
}

int32_t choose_tile_rows(int64_t num_rows, int32_t num_experts, int32_t part_rows, int32_t parts, int64_t bytes_of_weight_row, int32_t num_sms) {
  return moe::sm90::choose_tile_rows({num_rows, num_experts, part_rows, parts, bytes_of_weight_row, num_sms});
}

std::vector<int32_t> token_tiles(int32_t rows, int32_t most, int32_t extra) {
  const moe::sm90::TokenTiles tiles(rows, most, extra);
  std::vector<int32_t> begins;
  for (int32_t tile = 0; tile <= tiles.count; ++tile) begins.push_back(tiles.begin(tile));
  return begins;
}

std::vector<std::string> possible_tactics(const Facts& facts) {
  std::vector<std::string> names;
  for (const auto& tactic : moe::sm90::possible_tactics(layer_facts(facts))) names.push_back(moe::sm90::tactic_name(tactic));
  return names;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  using namespace py::literals;
  module.doc() = "CuTe's layout of block scales, device code of the kernels, and the choice of tactics, on the CPU (for tests).";
  module.def("cute_scale_offsets", &cute_scale_offsets, "block_k"_a, "rows"_a, "columns"_a);
  module.def("cute_scale_cosize", &cute_scale_cosize, "block_k"_a, "rows"_a, "columns"_a);
  module.def("pack_scale", &move_scales<true>, "layout"_a, "scale"_a, "rows"_a, "columns"_a, "expert_offsets"_a);
  module.def("unpack_scale", &move_scales<false>, "layout"_a, "packed"_a, "rows"_a, "columns"_a, "expert_offsets"_a);
  module.def("quantize_block", &quantize_block, "format"_a, "x"_a, "global_scale"_a = 1.f);
  module.def("round_block", &round_block, "format"_a, "x"_a, "global_scale"_a = 1.f);
  module.def("fp8_block_scales", &fp8_block_scales, "amax"_a);
  module.def("unpack_words", &unpack_words, "words"_a);
  module.def("choose_tactic", &choose_tactic, "facts"_a);
  module.def("possible_tactics", &possible_tactics, "facts"_a);
  module.def("token_tiles", &token_tiles, "rows"_a, "most"_a, "extra"_a);
  module.def("split_rows", &moe::sm90::split_rows, "hit"_a, "part_rows"_a, "parts"_a, "num_sms"_a, "most"_a, "least"_a, "step"_a);
  module.def("choose_tile_rows", &choose_tile_rows, "num_rows"_a, "num_experts"_a, "part_rows"_a, "parts"_a, "bytes_of_weight_row"_a, "num_sms"_a);
  bind_block_scaled(module);
}
