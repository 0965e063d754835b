// Wide epilogue of the SM90 grouped GEMM: wave w of a warpgroup is [64 tokens, 128 weight rows]. A token lies in four lanes
// of one warp, so nothing here waits for another warp.
#pragma once
#include "grouped_gemm/epilogue_sm90.cuh"

namespace moe::sm90 {

template <class C>
struct WideEpilogue {
  const KernelParams& p;
  const Smem<C>& smem;
  const Tile tile;
  const GemmParams& g;
  float (&total)[C::kWaves * 64];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_token = warp * 16;                  // first of the 16 tokens of this warp
  const uint32_t staging = smem.staging + warp * 16 * 128;
  const uint8_t* staging_ptr = smem.staging_ptr + warp * 16 * 128;

  __device__ int token_of(int half) const { return warp_token + lane / 4 + 8 * half; }  // of accumulators with i / 2 % 2 == half
  __device__ int column_of(int i) const { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

  __device__ void add_bias(int wave) {
    int32_t part, row;
    wave_origin<C>(p, tile, wave, part, row);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      if (i / 2 % 2 == 1) continue;
      const int32_t r = row + column_of(i);
      const float bias = r < g.part_rows ? load_bias(g, (int64_t(tile.expert) * g.parts + part) * g.part_rows + r) : 0.f;
      total[wave * 64 + i] += bias;
      total[wave * 64 + i + 2] += bias;
    }
  }

  // 16 tokens x 128 bytes from staging to out, 16 bytes a lane; `bytes` of the 128 exist.
  __device__ void copy_out(uint8_t* out, int64_t stride, int32_t bytes) {
    __syncwarp();
#pragma unroll
    for (int t = lane / 8; t < 16; t += 4) {
      const int chunk = lane % 8;
      if (warp_token + t < tile.valid_tokens && chunk * 16 < bytes)
        *reinterpret_cast<uint4*>(out + (tile.token + warp_token + t) * stride + chunk * 16) =
            *reinterpret_cast<const uint4*>(staging_ptr + staged(t, chunk));
    }
    __syncwarp();  // read before it is written again
  }

  // out[token, column .. column + 128) = a wave; `columns` of them exist.
  template <int kFirst>
  __device__ void store_16bit(int32_t column, int32_t columns) {
#pragma unroll
    for (int first = 0; first < 128; first += 64) {
      if (first >= columns) break;
      auto packed = [&](int group, int half) {
        const int i = kFirst + 4 * (first / 8 + group) + 2 * half;
        return pack_16bit(g.out_dtype, total[i], total[i + 1]);
      };
#pragma unroll
      for (int group = 0; group < 8; group += 2)
        store_matrices(staging + staged((lane / 8) % 2 * 8 + lane % 8, group + lane / 16), packed(group, 0), packed(group, 1),
                       packed(group + 1, 0), packed(group + 1, 1));
      copy_out(static_cast<uint8_t*>(g.out) + 2 * (column + first), 2 * int64_t(g.out_stride), 2 * (columns - first));
    }
  }

  template <int kFirst>
  __device__ void store_float32(int32_t column, int32_t columns) {
    auto out = static_cast<float*>(g.out);
#pragma unroll
    for (int i = 0; i < 64; i += 2) {
      const int token = token_of(i / 2 % 2), c = column_of(i);
      if (token < tile.valid_tokens && c < columns)
        *reinterpret_cast<float2*>(out + int64_t(tile.token + token) * g.out_stride + column + c) = make_float2(total[kFirst + i], total[kFirst + i + 1]);
    }
  }

  // act of 128 channels (wave 0), requantised.
  __device__ void store_quantized() {
    const int32_t channels = min(128, g.part_rows - tile.row);
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float m = 0.f;  // fmaxf ignores NaN, as the contract says
#pragma unroll
      for (int i = 0; i < 64; ++i)
        if (i / 2 % 2 == half && 8 * (i / 4) < channels) m = fmaxf(m, fabsf(total[i]));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      const float scale = fp8_block_scale(m);
      inverse[half] = __fdiv_rn(1.f, scale);
      if (lane % 4 == 0 && token_of(half) < tile.valid_tokens)
        p.act_scale[int64_t(tile.token + token_of(half)) * p.act_scale_stride_row + (tile.row / 128) * p.act_scale_stride_k] = scale;
    }
#pragma unroll
    for (int i = 0; i < 64; i += 2) {
      const int half = i / 2 % 2, column = column_of(i);
      const float2 v = make_float2(__fmul_rn(total[i], inverse[half]), __fmul_rn(total[i + 1], inverse[half]));
      const uint16_t pair = __nv_cvt_float2_to_fp8x2(v, __NV_SATFINITE, __NV_E4M3);
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(staging + staged(lane / 4 + 8 * half, column / 16) + column % 16), "h"(pair) : "memory");
    }
    copy_out(static_cast<uint8_t*>(g.out) + tile.row, g.out_stride, channels);
  }

  __device__ void run() {
    if (g.bias != nullptr) unrolled<C::kWaves>([&](auto w) { add_bias(w); });
    if constexpr (C::kGated) {
      if (tile.gemm == 0) return store_activated();
    }
    unrolled<C::kWaves>([&](auto w) {
      int32_t part, row;
      wave_origin<C>(p, tile, w, part, row);
      const int32_t column = part * g.part_rows + row, columns = g.part_rows - row;
      if (g.out_dtype == DType::float32) store_float32<w * 64>(column, columns);
      else store_16bit<w * 64>(column, columns);
    });
  }

  __device__ void store_activated() {
    with_gated_activation(p.activation.kind, [&](auto kind) {
#pragma unroll
      for (int i = 0; i < 64; ++i) total[i] = activate<decltype(kind)::value>(p.activation, total[i], total[64 + i]);
    });
    if constexpr (C::kFloat8) store_quantized();
    else store_16bit<0>(tile.row, g.part_rows - tile.row);
  }
};

}  // namespace moe::sm90
