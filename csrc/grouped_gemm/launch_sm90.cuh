// Host side of the SM90 grouped GEMM: tensor maps and the launch of one tile configuration.
#pragma once
#include <algorithm>
#include <atomic>

#include "common/dtypes.h"
#include "common/launch.h"
#include "grouped_gemm/persistent_sm90.cuh"

namespace moe::sm90 {

using EncodeTensorMap = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                     const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                     CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

EncodeTensorMap encode_tensor_map();  // the driver's cuTensorMapEncodeTiled, or null

// Rows of 128 bytes, 128-byte swizzle, zeros outside: dims (k, rows, groups), box (128 bytes, box_rows, 1). fetch: what a miss in L2 loads.
template <class Element>
cudaError_t make_tensor_map(CUtensorMap* map, const void* data, int64_t k, int64_t rows, int64_t groups, uint32_t box_rows,
                            CUtensorMapL2promotion fetch = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  const EncodeTensorMap encode = encode_tensor_map();
  if (encode == nullptr) return cudaErrorNotSupported;
  constexpr CUtensorMapDataType kType = sizeof(Element) == 1                        ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                        : std::is_same_v<Element, __nv_bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint32_t rank = groups > 0 ? 3 : 2;
  const cuuint64_t size[3] = {cuuint64_t(k), cuuint64_t(rows), cuuint64_t(groups)};
  const cuuint64_t stride[2] = {cuuint64_t(k) * sizeof(Element), cuuint64_t(k) * rows * sizeof(Element)};
  const cuuint32_t box[3] = {128 / sizeof(Element), box_rows, 1}, step[3] = {1, 1, 1};
  const CUresult status = encode(map, kType, rank, const_cast<void*>(data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 CU_TENSOR_MAP_SWIZZLE_128B, fetch, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// GemmParams::weights of packed ones, [groups, blocks, k_blocks, block bytes].
template <class C>
cudaError_t make_packed_map(CUtensorMap* map, const void* data, int64_t k_blocks, int64_t blocks, int64_t groups, int32_t box_rows) {
  const EncodeTensorMap encode = encode_tensor_map();
  if (encode == nullptr) return cudaErrorNotSupported;
  constexpr int kPieces = kPackedPieces<C::kPacking>, kPieceBytes = C::kBlockBytes / kPieces;
  static_assert(kPieceBytes % 16 == 0 && kPieceBytes / 8 <= 256);
  const cuuint64_t size[4] = {kPieceBytes / 8, cuuint64_t(k_blocks * kPieces), cuuint64_t(blocks), cuuint64_t(groups)};
  const cuuint64_t stride[3] = {kPieceBytes, cuuint64_t(k_blocks * C::kBlockBytes), cuuint64_t(blocks * k_blocks * C::kBlockBytes)};
  const cuuint32_t box[4] = {kPieceBytes / 8, C::kStageWeightBlocks * kPieces, cuuint32_t(box_rows / kPackedBlock), 1}, step[4] = {1, 1, 1, 1};
  const CUresult status = encode(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT64, 4, const_cast<void*>(data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// GemmParams::out_tiles, if there are. 16 bits: where K is long there is little to gain (ep8's w13 0.6 %), and tp8's w13 was 4 % slower (history, 38).
constexpr int64_t kMostKOfStoredTiles = 4096;
template <class C>
cudaError_t fill_out_tiles(GemmParams& g, const GroupedGemmArgs& args) {
  g.stores_tiles = C::kStoresTiles && args.out_dtype != DType::float32 && (C::kFloat8 || args.k <= kMostKOfStoredTiles);
  if (!g.stores_tiles) return cudaSuccess;
  if (args.out_dtype == DType::float16) return make_tensor_map<__half>(&g.out_tiles, args.out, args.n, args.num_rows, 0, 16);
  return make_tensor_map<__nv_bfloat16>(&g.out_tiles, args.out, args.n, args.num_rows, 0, 16);
}

// tile_rows: C::kRows, or (split) fewer. tokens_by_tma: else they need no tensor maps.
template <class C>
cudaError_t fill_gemm(GemmParams& g, const GroupedGemmArgs& args, int32_t tile_rows = C::kRows, bool tokens_by_tma = true) {
  using Element = typename C::Element;
  g.parts = args.b_parts;
  g.part_rows = args.n / args.b_parts;
  g.out = args.out;
  g.bias = args.bias;
  g.a_scale = args.a_scale;
  g.b_scale = args.b_scale;
  g.out_stride = args.n;
  g.k_stages = (args.k * int(sizeof(Element)) + 128 * C::kStageBlocks - 1) / (128 * C::kStageBlocks);
  g.k_blocks = (args.k + 127) / 128;
  g.tile_rows = tile_rows;
  g.out_dtype = args.out_dtype;
  g.bias_dtype = args.bias_dtype;
  g.a_global_scale = args.a_global_scale;
  g.b_global_scale = args.b_global_scale;
  for (int size = 0; tokens_by_tma && 8 << size <= C::kMaxTokens; ++size) {  // each costs the host time
    if (auto e = make_tensor_map<Element>(&g.tokens[size], args.a, args.k, args.num_rows, 0, 8 << size)) return e;
    if (8 << size >= args.num_rows) break;  // no tile has more
  }
  const int64_t groups = int64_t(args.num_experts) * g.parts;
  const int32_t box_rows = std::min(tile_rows, C::kCopyRows);
  if constexpr (C::kPacked) return make_packed_map<C>(&g.weights, args.b, args.k / kPackedBlock, g.part_rows / kPackedBlock, groups, box_rows);
  const auto fetch = fetches_few_bytes(args.num_rows, args.num_experts) ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B : CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  return make_tensor_map<Element>(&g.weights, args.b, args.k, g.part_rows, groups, box_rows, fetch);
}

// Once for each device, where the driver keeps it.
template <class C>
cudaError_t allow_shared_memory() {
  static std::atomic<uint64_t> allowed{0};  // a bit for each device
  int device = 0;
  if (auto e = cudaGetDevice(&device)) return e;
  const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
  if (allowed.load() & bit) return cudaSuccess;
  if (auto e = cudaFuncSetAttribute(grouped_gemm_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSmemBytes)) return e;
  allowed.fetch_or(bit);
  return cudaSuccess;
}

template <class C>
cudaError_t launch_kernel(const KernelParams& p, int64_t tiles, int num_sms, cudaStream_t stream) {
  if (auto e = allow_shared_memory<C>()) return e;
  return launch(grouped_gemm_kernel<C>, dim3(unsigned(std::min<int64_t>(tiles, num_sms * C::kBlocksPerSm))), dim3(C::kThreads), C::kSmemBytes, stream, p);
}

// both_parts: of each tile. Returns GemmParams::row_tiles.
template <class C>
int64_t set_tiles(GemmParams& g, bool drawn, bool both_parts = false) {
  g.tiles_per_part = int32_t(tiles_of(g.part_rows, both_parts ? C::kRows / 2 : g.tile_rows));
  g.row_tiles = g.tiles_per_part * (both_parts ? 1 : g.parts);
  const bool several = C::kDrawsSeveral && drawn && 0 < g.k_stages && g.k_stages <= kDrawStages / 2;
  g.most_per_draw = several ? std::min(kTileSlots / 2, kDrawStages / g.k_stages) : 1;
  return g.row_tiles;
}

template <class C>
cudaError_t launch_plain(const GroupedGemmArgs& args, int32_t* tile_counter, int num_sms, cudaStream_t stream) {
  KernelParams p{};
  if (auto e = fill_gemm<C>(p.gemm[0], args)) return e;
  if (auto e = fill_out_tiles<C>(p.gemm[0], args)) return e;
  p.expert_offsets = args.expert_offsets;
  p.expert_rows = args.expert_rows;
  p.tile_counter = tile_counter;
  p.num_gemms = 1;
  p.num_experts = args.num_experts;
  const int64_t row_tiles = set_tiles<C>(p.gemm[0], tile_counter != nullptr);
  return launch_kernel<C>(p, max_token_tiles(args.num_rows, args.num_experts, C::kMaxTokens) * row_tiles, num_sms, stream);
}

// Weight rows of the tiles of both GEMMs: at most those of the tactic, or GEMM2's kRows. Halves of GEMM1's are another tactic (of 16 bits: 32 are).
template <class C>
std::pair<int32_t, int32_t> fused_rows(const FusedGemms& f, int num_sms) {
  if constexpr (!C::kSplit) return {C::kRows, C::kRows};
  const double rows = double(f.gemm1.num_rows) * f.local_share();
  const bool one_token = f.gemm1.num_rows == f.top_k && f.expert_map == nullptr;  // whose experts differ
  const double hit = one_token ? rows : expected_hit(rows, f.gemm1.num_experts);
  const auto rows_of = [&](const GroupedGemmArgs& g, int32_t most, int32_t least) {
    constexpr bool kBlocks = C::kPacked || C::kFloat8;
    return split_rows(hit, g.n / g.b_parts, g.b_parts, num_sms, most, kBlocks ? least : 40, kBlocks ? 0 : 8);
  };
  const int32_t rows1 = 32 << int(f.tactic.tiles);  // split32, split64, ..
  return {rows_of(f.gemm1, rows1, rows1), rows_of(f.gemm2, C::kRows, 64)};
}

// FusedGemms::sync: the tile counter, that of a GEMM2 alone, and `ready` of each token tile (gated), each from a cache line of its own, so
// that those who wait do not slow down those who draw.
constexpr int64_t kCounterLine = 128 / sizeof(int32_t);

template <class C>
FusedGemmsSizes fused_sizes(const FusedGemms& f) {
  const int64_t token_tiles = max_token_tiles(f.gemm1.num_rows, f.gemm1.num_experts, C::kMaxTokens);
  if (C::kSplit) return {kCounterLine, f.gemm1.num_rows * f.gemm1.n};
  return {2 * kCounterLine + token_tiles, 0};
}

template <class C>
cudaError_t launch_fused(const FusedGemms& f, int num_sms, cudaStream_t stream) {
  KernelParams p{};
  const auto [rows1, rows2] = fused_rows<C>(f, num_sms);
  if (auto e = fill_gemm<C>(p.gemm[0], f.gemm1, rows1, !C::kSplit && f.row_to_slot == nullptr)) return e;
  if (auto e = fill_gemm<C>(p.gemm[1], f.gemm2, rows2, !C::kSplit)) return e;
  if (auto e = fill_out_tiles<C>(p.gemm[1], f.gemm2)) return e;
  const int64_t token_tiles = max_token_tiles(f.gemm1.num_rows, f.gemm1.num_experts, C::kMaxTokens);
  const int32_t groups = (f.gemm2.k + 127) / 128;
  p.expert_offsets = f.gemm1.expert_offsets;
  p.num_gemms = 2;
  p.num_experts = f.gemm1.num_experts;
  p.gate_part = f.gate_part;
  p.act_format = f.act_format;
  p.known = f.known;
  p.topk_ids = f.topk_ids;
  p.expert_map = f.expert_map;
  p.num_slots = int32_t(f.gemm1.num_rows);
  p.hidden_states = f.hidden_states;
  p.hidden_dtype = f.hidden_dtype;
  p.hidden_size = f.gemm1.k;
  p.topk_weights = f.topk_weights;
  p.num_global_experts = f.num_global_experts;
  p.activation = f.activation;
  p.tile_counter = f.sync;
  p.ready = f.sync + 2 * kCounterLine;
  p.ready_count = groups;
  p.act_scale = const_cast<float*>(f.gemm2.a_scale.data);
  p.act_scale_stride_row = f.gemm2.a_scale.stride_row;
  p.act_scale_stride_k = f.gemm2.a_scale.stride_k;
  p.row_to_slot = f.row_to_slot;
  p.gathered = f.gemm1.a;
  p.row_chunks = int32_t(f.gemm1.k * sizeof(typename C::Element) / 16);
  p.top_k = f.top_k;
  if (C::kSplit) {
    p.gemm[0].out = f.gate_up;
    p.gemm[0].out_dtype = DType::float32;
  } else {
    p.gemm[0].out_stride = p.gemm[0].part_rows;
  }
  const int64_t tiles1 = token_tiles * set_tiles<C>(p.gemm[0], true, C::kGated);
  const int64_t tiles2 = token_tiles * set_tiles<C>(p.gemm[1], true);
  if (f.tactic.gemm2_alone) {
    p.num_gemms = 1;
    if (auto e = launch_kernel<C>(p, tiles1, num_sms, stream)) return e;
    return grouped_gemm_sm90_counted(f.gemm2, f.sync + kCounterLine, stream);
  }
  return launch_kernel<C>(p, tiles1 + tiles2, num_sms, stream);
}

// Of a tile. mxfp4_e4m3: sums, partial sums and an operand of 64 fill the registers (HISTORY.md has what else was tried).
template <Packing kPacking>
constexpr int kMostTokens = kPacking == Packing::mxfp4_e4m3 ? 64 : 128;

// Of 256 weight rows, one thread block an SM. Four warpgroups hide each other's latencies (history, 34).
template <Packing kPacking, int kTokens>
constexpr int kWarpgroupsOf256 = is_4bit(kPacking) && kTokens == 64 ? 4 : 2;
template <class Element, int kTokens, Mode kMode, Packing kPacking>
using Config256 = Config<Element, kTokens, kWarpgroupsOf256<kPacking, kTokens>, 4 / kWarpgroupsOf256<kPacking, kTokens>, kMode, kPacking>;

// Calls f.operator()<Config>() with the configuration of two fused GEMMs; `tiles` are possible ones (is_possible).
template <class Element, Packing kPacking, class F>
auto with_fused_config(Tiles tiles, F&& f) {
  switch (tiles) {
    case Tiles::split256:
      if constexpr (kPacking != Packing::none && kPacking != Packing::mxfp4_e4m3)
        return f.template operator()<Config<Element, 32, 4, 1, Mode::split, kPacking>>();
      [[fallthrough]];
    case Tiles::split32:
    case Tiles::split64:
      if constexpr (kPacking == Packing::none) return f.template operator()<Config<Element, 32, 1, 1, Mode::split, kPacking>>();
      [[fallthrough]];
    case Tiles::split128: return f.template operator()<Config<Element, 32, 2, 1, Mode::split, kPacking>>();
    case Tiles::gated32:
      if constexpr (kPacking != Packing::none && kPacking != Packing::mxfp4_e4m3)
        return f.template operator()<Config<Element, 32, 2, 2, Mode::gated, kPacking, 2>>();
      [[fallthrough]];
    case Tiles::gated64: return f.template operator()<Config256<Element, 64, Mode::gated, kPacking>>();
    default: return f.template operator()<Config256<Element, kMostTokens<kPacking>, Mode::gated, kPacking>>();  // gated128, gathered128
  }
}

// One translation unit per element type and packing defines these. rows: choose_tile_rows().
template <class Element, Packing kPacking>
cudaError_t launch_element(int32_t rows, const GroupedGemmArgs&, int32_t* tile_counter, int num_sms, cudaStream_t);
template <class Element, Packing kPacking>
cudaError_t launch_fused_element(const FusedGemms&, int num_sms, cudaStream_t);

template <class Element, Packing kPacking>
cudaError_t launch_element_impl(int32_t rows, const GroupedGemmArgs& args, int32_t* tile_counter, int num_sms, cudaStream_t stream) {
  if constexpr (kPacking != Packing::none && kPacking != Packing::mxfp4_e4m3)
    if (very_few_tokens(args.num_rows, args.num_experts))
      return rows == 64 ? launch_plain<Config<Element, 32, 1, 1, Mode::plain, kPacking, 2>>(args, tile_counter, num_sms, stream)
                        : launch_plain<Config<Element, 32, 2, 1, Mode::plain, kPacking, 2>>(args, tile_counter, num_sms, stream);
  switch (rows) {
    case 64: return launch_plain<Config<Element, 64, 1, 1, Mode::plain, kPacking>>(args, tile_counter, num_sms, stream);
    case 128: return launch_plain<Config<Element, kMostTokens<kPacking>, 2, 1, Mode::plain, kPacking>>(args, tile_counter, num_sms, stream);
    default:
      return few_tokens(args.num_rows, args.num_experts)
                 ? launch_plain<Config256<Element, 64, Mode::plain, kPacking>>(args, tile_counter, num_sms, stream)
                 : launch_plain<Config256<Element, kMostTokens<kPacking>, Mode::plain, kPacking>>(args, tile_counter, num_sms, stream);
  }
}

template <class Element, Packing kPacking>
cudaError_t launch_fused_element_impl(const FusedGemms& f, int num_sms, cudaStream_t stream) {
  return with_fused_config<Element, kPacking>(f.tactic.tiles, [&]<class C>() { return launch_fused<C>(f, num_sms, stream); });
}

}  // namespace moe::sm90

// The whole of such a translation unit.
#define MOE_SM90_LAUNCHERS(ELEMENT, PACKING)                                                                                          \
  namespace moe::sm90 {                                                                                                               \
  template <>                                                                                                                         \
  cudaError_t launch_element<ELEMENT, PACKING>(int32_t rows, const GroupedGemmArgs& args, int32_t* tile_counter, int num_sms,         \
                                               cudaStream_t stream) {                                                                 \
    return launch_element_impl<ELEMENT, PACKING>(rows, args, tile_counter, num_sms, stream);                                          \
  }                                                                                                                                   \
  template <>                                                                                                                         \
  cudaError_t launch_fused_element<ELEMENT, PACKING>(const FusedGemms& f, int num_sms, cudaStream_t stream) {                         \
    return launch_fused_element_impl<ELEMENT, PACKING>(f, num_sms, stream);                                                           \
  }                                                                                                                                   \
  }
