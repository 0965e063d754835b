// Wide epilogue of the SM90 grouped GEMM. A token lies in four lanes of one warp, so that nothing here waits for another warp, unless the tile is
// half-wide: then the warpgroups have the same tokens.
//   wide:      wave w of a warpgroup is total[w * 64 ..] = [its 64 tokens, 128 weight rows]
//   half-wide: total[0 ..] = [64 tokens, 128 weight rows of the wave of the warpgroup's number]; of the act, each has half of the channels
#pragma once
#include "grouped_gemm/epilogue_sm90.cuh"

namespace moe::sm90 {

template <class C, bool kHalfWide>
struct WideEpilogue {
  static constexpr int kWave = kHalfWide ? 32 : 64;  // values a thread has of gate and of up, of two tokens
  const KernelParams& p;
  const Smem<C>& smem;
  const Tile& tile;
  const GemmParams& g;
  const int held;  // the stage that is staging, too, or -1
  float (&total)[C::kWaves * 64];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warpgroup = warp / 4;
  const int warp_token = (kHalfWide ? warp % 4 : warp) * 16;  // first of the 16 tokens of this warp
  const uint32_t staging = smem.staging + warp * 16 * 128;

  __device__ int token_of(int half) const { return warp_token + lane / 4 + 8 * half; }  // of accumulators with i / 2 % 2 == half
  __device__ int column_of(int i) const { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

  // To total[kFirst ..], of a wave.
  template <int kFirst>
  __device__ __forceinline__ void add_bias(int wave) {
    int32_t part, row;
    wave_origin<C>(p, tile, wave, part, row);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      if (i / 2 % 2 == 1) continue;
      const int32_t r = row + column_of(i);
      const float bias = r < g.part_rows ? load_bias(g, (int64_t(tile.expert) * g.parts + part) * g.part_rows + r) : 0.f;
      total[kFirst + i] += bias;
      total[kFirst + i + 2] += bias;
    }
  }

  // Where 64 columns of the 16 tokens of this warp are staged. Of the held stage, a warpgroup's own are the tokens in a wide tile, and its wave in
  // a half-wide one.
  __device__ __forceinline__ uint32_t staging_of(int chunk) const {
    if (!C::kHoldsStage || held < 0 || chunk == 0) return staging;
    const uint32_t tokens = smem.tokens + held * C::kTokenBytes, weights = smem.weights + held * C::kWeightBytes;
    if (kHalfWide) return weights + warpgroup * kWideBytes + warp % 4 * 16 * 128;
    return chunk == 1 ? tokens + warp * 16 * 128 : weights + (2 * warp + chunk - 2) * 16 * 128;
  }

  // Before chunk 1 is staged: the first chunk does not need the held stage, which others may still multiply.
  __device__ __forceinline__ void wait_for_held() const {
    if (!C::kHoldsStage || held < 0) return;
    if (kHalfWide) sync_threads(kWarpgroupBarrier + warpgroup, 128);
    else sync_threads(kHeldBarrier, C::kConsumers);
  }

  // 16 tokens x 128 bytes from staging to out, 16 bytes a lane; `bytes` of the 128 exist.
  __device__ __forceinline__ void copy_out(uint32_t staging, uint8_t* out, int64_t stride, int32_t bytes) {
    __syncwarp();
#pragma unroll
    for (int t = lane / 8; t < 16; t += 4) {
      const int chunk = lane % 8;
      if (warp_token + t < tile.valid_tokens && chunk * 16 < bytes)
        *reinterpret_cast<uint4*>(out + (tile.token + warp_token + t) * stride + chunk * 16) =
            *reinterpret_cast<const uint4*>(smem.staging_ptr + int32_t(staging - smem.staging) + staged(t, chunk));
    }
    __syncwarp();  // read before it is written again
  }

  // The same of 16 bits by TMA, where all tokens and columns exist; wait_stores() before staging is used again.
  __device__ __forceinline__ void store_tile(uint32_t staging, int32_t column) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (lane > 0) return;
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&g.out_tiles), "r"(staging), "r"(column),
                 "r"(tile.token + warp_token) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  }

  // out[token, column .. column + kColumns) = total[kFirst ..]; `columns` of them exist.
  template <int kFirst, int kColumns>
  __device__ __forceinline__ void store_16bit(int32_t column, int32_t columns) {
#pragma unroll
    for (int first = 0; first < kColumns; first += 64) {
      if (first >= columns) break;
      const int chunk = kFirst / 32 + first / 64;
      if (chunk > 0 && !C::kHoldsStage) wait_stores<C>();
      if (chunk == 1) wait_for_held();
      const uint32_t staging = staging_of(chunk);
      auto packed = [&](int group, int half) {
        const int i = kFirst + 4 * (first / 8 + group) + 2 * half;
        return pack_16bit(g.out_dtype, total[i], total[i + 1]);
      };
#pragma unroll
      for (int group = 0; group < 8; group += 2)
        store_matrices(staging + staged((lane / 8) % 2 * 8 + lane % 8, group + lane / 16), packed(group, 0), packed(group, 1),
                       packed(group + 1, 0), packed(group + 1, 1));
      if (C::kStoresTiles && g.stores_tiles && warp_token + 16 <= tile.valid_tokens && columns - first >= 64) store_tile(staging, column + first);
      else copy_out(staging, static_cast<uint8_t*>(g.out) + 2 * (column + first), 2 * int64_t(g.out_stride), 2 * (columns - first));
    }
  }

  template <int kFirst>
  __device__ __forceinline__ void store_float32(int32_t column, int32_t columns) {
    auto out = static_cast<float*>(g.out);
#pragma unroll
    for (int i = 0; i < 64; i += 2) {
      const int token = token_of(i / 2 % 2), c = column_of(i);
      if (token < tile.valid_tokens && c < columns)
        *reinterpret_cast<float2*>(out + int64_t(tile.token + token) * g.out_stride + column + c) = make_float2(total[kFirst + i], total[kFirst + i + 1]);
    }
  }

  // total[kFirst ..] is a wave of out.
  template <int kFirst>
  __device__ __forceinline__ void store_wave(int wave) {
    int32_t part, row;
    wave_origin<C>(p, tile, wave, part, row);
    const int32_t column = part * g.part_rows + row, columns = g.part_rows - row;
    if (g.out_dtype == DType::float32) store_float32<kFirst>(column, columns);
    else store_16bit<kFirst, 128>(column, columns);
  }

  // act, total[0 ..], of this warpgroup's channels from `channel` on, requantised; the 128 of the tile share a scale.
  __device__ __forceinline__ void store_quantized(int32_t channel) {
    float amax[2] = {0.f, 0.f}, inverse[2];  // fmaxf ignores NaN, as the contract says; past the last channel all is 0
#pragma unroll
    for (int i = 0; i < kWave; ++i) amax[i / 2 % 2] = fmaxf(amax[i / 2 % 2], fabsf(total[i]));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      amax[half] = fmaxf(amax[half], __shfl_xor_sync(~0u, amax[half], 1));
      amax[half] = fmaxf(amax[half], __shfl_xor_sync(~0u, amax[half], 2));
    }
    if constexpr (kHalfWide) {
      float others[2] = {amax[0], amax[1]};
      exchange(others);
      for (int half = 0; half < 2; ++half) amax[half] = fmaxf(amax[half], others[half]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = fp8_block_scale(amax[half]);
      inverse[half] = __fdiv_rn(1.f, scale);
      if (lane % 4 == 0 && channel == tile.row && token_of(half) < tile.valid_tokens)
        p.act_scale[int64_t(tile.token + token_of(half)) * p.act_scale_stride_row + (tile.row / 128) * p.act_scale_stride_k] = scale;
    }
#pragma unroll
    for (int i = 0; i < kWave; i += 2) {
      const int half = i / 2 % 2, column = column_of(i);
      const float2 v = make_float2(__fmul_rn(total[i], inverse[half]), __fmul_rn(total[i + 1], inverse[half]));
      const uint16_t pair = __nv_cvt_float2_to_fp8x2(v, __NV_SATFINITE, __NV_E4M3);
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(staging + staged(lane / 4 + 8 * half, column / 16) + column % 16), "h"(pair) : "memory");
    }
    copy_out(staging, static_cast<uint8_t*>(g.out) + channel, g.out_stride, min(2 * kWave, g.part_rows - channel));
  }

  // Half-wide: values[i] becomes that of the same lane of the other warpgroup's warp with the same tokens. Through both warps' staging.
  template <int kCount>
  __device__ __forceinline__ void exchange(float (&values)[kCount]) {
    const auto at = [&](int of_warp, int i) { return smem.staging + of_warp * 16 * 128 + (i * 32 + lane) * 4; };
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("st.shared.f32 [%0], %1;" ::"r"(at(warp, i)), "f"(values[i]) : "memory");
    sync_threads(kPairBarrier + warp % 4, 64);
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("ld.shared.f32 %0, [%1];" : "=f"(values[i]) : "r"(at(warp ^ 4, i)) : "memory");
    sync_threads(kPairBarrier + warp % 4, 64);  // read, before it is written again
  }

  // Half-wide: gate and up of 64 channels of its tokens, instead of one of them of 128; total[0 ..] and total[32 ..].
  __device__ __forceinline__ void exchange_gate_and_up() {
#pragma unroll
    for (int first = 0; first < 32; first += 16) {  // as many as staging holds
      float values[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) values[i] = warpgroup == 0 ? total[32 + first + i] : total[first + i];
      exchange(values);
#pragma unroll
      for (int i = 0; i < 16; ++i) (warpgroup == 0 ? total[32 + first + i] : total[first + i]) = values[i];
    }
  }

  __device__ __forceinline__ void run() {
    if constexpr (!C::kHoldsStage) wait_stores<C>();
    if (g.bias != nullptr) {
      if constexpr (kHalfWide) add_bias<0>(warpgroup);
      else unrolled<C::kWaves>([&](auto w) { add_bias<w * 64>(w); });
    }
    if constexpr (C::kGated) {
      if (tile.gemm == 0) return store_activated();
    }
    if constexpr (kHalfWide) store_wave<0>(warpgroup);
    else unrolled<C::kWaves>([&](auto w) { store_wave<w * 64>(w); });
  }

  __device__ __forceinline__ void store_activated() {
    if constexpr (kHalfWide) exchange_gate_and_up();
    with_gated_activation(p.activation, [&](auto activate) {
#pragma unroll
      for (int i = 0; i < kWave; ++i) total[i] = activate(total[i], total[kWave + i]);
    });
    const int32_t channel = tile.row + (kHalfWide ? warpgroup * 64 : 0);
    if constexpr (C::kFloat8) store_quantized(channel);
    else store_16bit<0, 2 * kWave>(channel, g.part_rows - channel);
  }
};

}  // namespace moe::sm90
