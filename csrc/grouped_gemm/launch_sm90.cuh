// Host side of the SM90 grouped GEMM: tensor maps and the launch of one tile configuration.
#pragma once
#include "common/launch.h"
#include "grouped_gemm/persistent_sm90.cuh"

namespace moe::sm90 {

using EncodeTensorMap = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                     const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                     CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

EncodeTensorMap encode_tensor_map();  // the driver's cuTensorMapEncodeTiled, or null

// Rows of 128 bytes, 128-byte swizzle, zeros outside: dims (k, rows, groups), box (128 bytes, box_rows, 1).
template <class Element>
cudaError_t make_tensor_map(CUtensorMap* map, const void* data, int64_t k, int64_t rows, int64_t groups, uint32_t box_rows) {
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
                                 CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class C>
cudaError_t launch_tiles(const GroupedGemmArgs& args, const GatedEpilogue* gated, int32_t* tile_counter, int num_sms, cudaStream_t stream) {
  using Element = typename C::Element;
  KernelParams p{};
  p.parts = args.b_parts;
  p.part_rows = args.n / args.b_parts;
  if (auto e = make_tensor_map<Element>(&p.weights, args.b, args.k, p.part_rows, int64_t(args.num_experts) * p.parts, C::kWaveRows)) return e;
  for (int size = 0; 8 << size <= C::kMaxTokens; ++size)
    if (auto e = make_tensor_map<Element>(&p.tokens[size], args.a, args.k, args.num_rows, 0, 8 << size)) return e;
  p.expert_offsets = args.expert_offsets;
  p.tile_counter = tile_counter;
  p.out = args.out;
  p.bias = args.bias;
  p.a_scale = args.a_scale;
  p.b_scale = args.b_scale;
  p.num_rows = args.num_rows;
  p.num_experts = args.num_experts;
  p.out_stride = C::kGated ? p.part_rows : args.n;
  p.k_blocks = (args.k * int(sizeof(Element)) + 127) / 128;
  p.out_dtype = args.out_dtype;
  p.bias_dtype = args.bias_dtype;
  if (gated != nullptr) p.gated = *gated;
  const int64_t row_tiles = C::kGated ? (p.part_rows + C::kWaveRows - 1) / C::kWaveRows : (p.part_rows + C::kRows - 1) / C::kRows * p.parts;
  const int64_t tiles = max_token_tiles(args.num_rows, args.num_experts, C::kMaxTokens) * row_tiles;
  if (auto e = cudaFuncSetAttribute(grouped_gemm_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSmemBytes)) return e;
  return launch(grouped_gemm_kernel<C>, dim3(unsigned(tiles < num_sms ? tiles : num_sms)), dim3(C::kThreads), C::kSmemBytes, stream, p);
}

// One translation unit per element type defines this. rows: choose_tile_rows(), not used when gated.
template <class Element>
cudaError_t launch_element(int32_t rows, const GroupedGemmArgs&, const GatedEpilogue*, int32_t* tile_counter, int num_sms, cudaStream_t);

template <class Element>
cudaError_t launch_element_impl(int32_t rows, const GroupedGemmArgs& args, const GatedEpilogue* gated, int32_t* tile_counter, int num_sms, cudaStream_t stream) {
  // num_rows / num_experts is the mean number of tokens per expert (under expert parallelism more than that). Up to 48,
  // hardly any expert has more than 64.
  const bool few = args.num_rows <= 48 * int64_t(args.num_experts);
  if (gated != nullptr)
    return few ? launch_tiles<Config<Element, 64, 2, 2, true>>(args, gated, tile_counter, num_sms, stream)
               : launch_tiles<Config<Element, 128, 2, 2, true>>(args, gated, tile_counter, num_sms, stream);
  switch (rows) {
    case 64: return launch_tiles<Config<Element, 64, 1, 1, false>>(args, nullptr, tile_counter, num_sms, stream);
    case 128: return launch_tiles<Config<Element, 128, 2, 1, false>>(args, nullptr, tile_counter, num_sms, stream);
    default:
      return few ? launch_tiles<Config<Element, 64, 2, 2, false>>(args, nullptr, tile_counter, num_sms, stream)
                 : launch_tiles<Config<Element, 128, 2, 2, false>>(args, nullptr, tile_counter, num_sms, stream);
  }
}

}  // namespace moe::sm90
