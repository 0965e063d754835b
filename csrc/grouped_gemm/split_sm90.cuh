// The activation of Mode::split: act[r, 128 g ..] = quantize(activation(gate_up[r, ..])) for one 128-channel group g of a token
// tile, by the thread block that stored the group's last tile of gate_up. The same bits as the gated epilogues and act_mul.
#pragma once
#include "grouped_gemm/epilogue_sm90.cuh"

namespace moe::sm90 {

// Tiles of gate_up that hold a group's gates and ups.
template <class C>
__device__ __forceinline__ int32_t tiles_of_group(const GemmParams& g, int32_t group) {
  return g.parts * ((min(128, g.part_rows - 128 * group) + C::kRows - 1) / C::kRows);
}

// Four channels of a token a lane, a token a warp.
template <class C>
__device__ void activate_group(const KernelParams& p, const Tile& tile, int32_t group) {
  const GemmParams& g = p.gemm[0];
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, channel = 128 * group + 4 * lane;
  const bool exists = channel < g.part_rows;
  for (int t = warp; t < tile.valid_tokens; t += C::kConsumers / 32) {
    const int64_t row = tile.token + t;
    float4 first = {}, second = {};
    if (exists) {
      const float* gate_up = static_cast<const float*>(g.out) + row * g.out_stride + channel;
      first = __ldcg(reinterpret_cast<const float4*>(gate_up));
      second = __ldcg(reinterpret_cast<const float4*>(gate_up + g.part_rows));
    }
    const float4 gate = p.gate_part == 0 ? first : second, up = p.gate_part == 0 ? second : first;
    float y[4];
    with_gated_activation(p.activation.kind, [&](auto kind) {
      y[0] = activate<decltype(kind)::value>(p.activation, gate.x, up.x);
      y[1] = activate<decltype(kind)::value>(p.activation, gate.y, up.y);
      y[2] = activate<decltype(kind)::value>(p.activation, gate.z, up.z);
      y[3] = activate<decltype(kind)::value>(p.activation, gate.w, up.w);
    });
    if constexpr (C::kFloat8) {
      float amax = 0.f;  // fmaxf ignores NaN, as the contract says
      if (exists) amax = fmaxf(fmaxf(fabsf(y[0]), fabsf(y[1])), fmaxf(fabsf(y[2]), fabsf(y[3])));
      for (int d = 1; d < 32; d *= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
      const float scale = quantisation_scale(amax), inverse = __fdiv_rn(1.f, scale);
      if (lane == 0) p.act_scale[row * p.act_scale_stride_row + group * p.act_scale_stride_k] = scale;
      auto pair = [&](float a, float b) {
        return uint32_t(__nv_cvt_float2_to_fp8x2(make_float2(__fmul_rn(a, inverse), __fmul_rn(b, inverse)), __NV_SATFINITE, __NV_E4M3));
      };
      if (exists) *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(p.act) + row * g.part_rows + channel) = pair(y[0], y[1]) | pair(y[2], y[3]) << 16;
    } else {
      constexpr DType kOut = std::is_same_v<typename C::Element, __half> ? DType::float16 : DType::bfloat16;
      const uint2 packed = {pack_16bit(kOut, y[0], y[1]), pack_16bit(kOut, y[2], y[3])};
      if (exists) *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.act) + row * g.part_rows + channel) = packed;
    }
  }
}

// Called by all consumers when their tile of gate_up is stored. True if this thread block completed a group of act.
template <class C>
__device__ bool complete_group(const KernelParams& p, const Smem<C>& smem, const Tile& tile) {
  const GemmParams& g = p.gemm[0];
  const int32_t groups = (g.part_rows + 127) / 128, group = tile.row / 128;
  // Read after the second barrier, written again only after the first one of the next tile.
  sync_threads(3, C::kConsumers);  // gate_up of all threads is stored
  if (threadIdx.x == 0) {
    fence_gpu();
    *smem.flag = atomicAdd(p.arrived + int64_t(tile.token_tile) * groups + group, 1) == tiles_of_group<C>(g, group) - 1;
    fence_gpu();
  }
  sync_threads(3, C::kConsumers);
  if (*smem.flag == 0) return false;
  activate_group<C>(p, tile, group);
  sync_threads(3, C::kConsumers);  // act of all threads is stored
  return true;
}

}  // namespace moe::sm90
