// Narrow epilogue of the SM90 grouped GEMM: wave w of a warpgroup is [64 weight rows, kTokens]. Stores go through shared
// memory, transposed, so that each token gets 128 contiguous bytes.
#pragma once
#include "common/quantize.cuh"
#include "grouped_gemm/mainloop_sm90.cuh"

namespace moe::sm90 {

// Named barriers.
constexpr int kWarpgroupBarrier = 1;  // to 4: one warpgroup each
constexpr int kActBarrier = 5;        // the threads that store act
constexpr int kPairBarrier = 6;       // to 9: two warps (half-wide tiles); paired: two of each pair of warpgroups
constexpr int kHeldBarrier = 10;      // all consumers
constexpr int kActThreads = 256;
__device__ __forceinline__ void sync_threads(int barrier, int count) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory"); }
__device__ __forceinline__ void arrive_threads(int barrier, int count) { asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(count) : "memory"); }

__device__ __forceinline__ float load_bias(const GemmParams& g, int64_t index) {
  switch (g.bias_dtype) {
    case DType::bfloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(g.bias)[index]);
    case DType::float16: return __half2float(static_cast<const __half*>(g.bias)[index]);
    default: return static_cast<const float*>(g.bias)[index];
  }
}

__device__ __forceinline__ uint32_t pack_16bit(DType dtype, float low, float high) {
  if (dtype == DType::bfloat16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  }
  const __half2 v = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}

// Stores 8x8 blocks of 16-bit values to shared memory; lane l gives the address of the 16 bytes of row l % 8 of block l / 8.
// Transposed: a row of memory is a column of the registers.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m0), "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}
__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m0), "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

// Staging is [tokens][8 chunks of 16 bytes], chunk c of token t at c ^ (t % 8): no bank conflicts on either side.
__device__ __forceinline__ uint32_t staged(int token, int chunk) { return token * 128 + (chunk ^ (token % 8)) * 16; }

// nvfp4: what products of one part of a GEMM's weights are multiplied by, which come as 1 / kUnpackedScale of what they are.
template <class C>
__device__ __forceinline__ float load_global_scale(const KernelParams& p, int gemm, int part, int expert) {
  const ScaleView& s = p.gemm[gemm].b_global_scale;
  const float weights = s.data != nullptr ? __ldg(s.data + expert * s.stride_group + part * s.stride_row) : 1.f;
  return kUnpackedScale<C::kPacking> * weights * p.act_global_scale(gemm, expert);
}

// Of all experts, by the consumers, while the first stages are on their way.
template <class C>
__device__ __forceinline__ void keep_global_scales(const KernelParams& p, const Smem<C>& smem) {
  for (int e = threadIdx.x; e < p.num_experts; e += C::kConsumers) {
    for (int part = 0; part < 2; ++part) smem.global_scales[part * kMaxExperts + e] = load_global_scale<C>(p, 0, part, e);
    smem.global_scales[2 * kMaxExperts + e] = load_global_scale<C>(p, 1, 0, e);
  }
  sync_threads(kActBarrier, C::kConsumers);
}

template <class C, int kTokens>
struct NarrowEpilogue {
  static constexpr int kWave = kTokens / 2;
  const KernelParams& p;
  const Smem<C>& smem;
  const Tile tile;
  const GemmParams& g;
  float (&total)[C::kWaves * kWave];
  static __device__ uint32_t this_thread() { return C::kPacked ? read_thread() : threadIdx.x; }
  const int warpgroup = this_thread() / 128, thread = this_thread() % 128, warp = thread / 32, lane = thread % 32;
  // Row of the warpgroup, and of the wave, that this thread's first accumulator belongs to; its second is eight below. Of act, its channel.
  const int own_row = warp * 16 + lane / 4, wave_row = warpgroup * 64 + own_row;

  __device__ __forceinline__ void origin(int wave, int32_t& part, int32_t& row) const {  // of this warpgroup's rows of a wave
    block_origin<C>(p, tile, wave * C::kWarpgroups + warpgroup, part, row);
  }

  static __device__ int token_of(int i, int lane) { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }  // of accumulator i

  __device__ __forceinline__ void add_bias(int wave) {
    int32_t part, row;
    origin(wave, part, row);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t r = row + own_row + 8 * half;
      if (r >= g.part_rows) continue;
      const float bias = load_bias(g, (int64_t(tile.expert) * g.parts + part) * g.part_rows + r);
#pragma unroll
      for (int i = 0; i < kWave; ++i)
        if (i / 2 % 2 == half) total[wave * kWave + i] += bias;
    }
  }

  // f(address in out, i) for each accumulator i of a wave that exists, whose first column is `column`.
  template <class T, class F>
  __device__ __forceinline__ void for_each_value(int32_t column, int32_t columns, F&& f) {
    const int token = 2 * (lane % 4);
    T* const out = static_cast<T*>(g.out) + int64_t(tile.token + token) * g.out_stride + column + own_row;
#pragma unroll
    for (int i = 0; i < kWave; ++i) {
      const int more_tokens = 8 * (i / 4) + i % 2, more_rows = 8 * (i / 2 % 2);
      if (token + more_tokens < tile.valid_tokens && own_row + more_rows < columns) f(out + (more_tokens * g.out_stride + more_rows), i);
    }
  }

  // The same for out of packed weights, whose blocks of 64 rows exist or do not: both rows of a token from one address. Split tiles were 1 % slower so.
  template <class T, int kFirst>
  __device__ __forceinline__ void store_rows(int32_t column, int32_t columns) {
    if (columns <= 0) return;
    const int token = 2 * (lane % 4);
    T* const first = static_cast<T*>(g.out) + int64_t(tile.token + token) * g.out_stride + column + own_row;
#pragma unroll
    for (int i = 0; i < kWave; i += i % 2 == 0 ? 1 : 3) {  // both values of a token pair, first row
      const int more_tokens = 8 * (i / 4) + i % 2;
      if (token + more_tokens >= tile.valid_tokens) continue;
      T* const out = first + more_tokens * g.out_stride;
      out[0] = T(total[kFirst + i]);
      out[8] = T(total[kFirst + i + 2]);
    }
  }

  // out[token, column .. column + 64) = this warpgroup's rows of a wave; `columns` of them exist.
  template <int kFirst>
  __device__ __forceinline__ void store_16bit(int32_t column, int32_t columns) {
    if constexpr (kTokens <= 16) {  // so little that three barriers cost more than stores of 2 bytes
      const auto store = [&]<class T>() {
        if constexpr (C::kPacked && !C::kSplit) store_rows<T, kFirst>(column, columns);
        else for_each_value<T>(column, columns, [&](T* out, int i) { *out = T(total[kFirst + i]); });
      };
      return g.out_dtype == DType::bfloat16 ? store.template operator()<__nv_bfloat16>() : store.template operator()<__half>();
    }
    uint8_t* staging = smem.staging_ptr + warpgroup * C::kStoreTokens * 128;
    const uint32_t base = smem.staging + warpgroup * C::kStoreTokens * 128;
    auto packed = [&](int group, int half) {
      const int i = kFirst + 4 * group + 2 * half;
      return pack_16bit(g.out_dtype, total[i], total[i + 1]);
    };
    const int chunk_of_lane = 2 * warp + (lane / 8) % 2;
    sync_threads(kWarpgroupBarrier + warpgroup, 128);  // the previous contents have been read
#pragma unroll
    for (int group = 0; group < kTokens / 8; group += 2) {
      store_matrices_transposed(base + staged(8 * group + (lane / 16) * 8 + lane % 8, chunk_of_lane), packed(group, 0), packed(group, 1),
                                     packed(group + 1, 0), packed(group + 1, 1));
    }
    sync_threads(kWarpgroupBarrier + warpgroup, 128);
    auto out = static_cast<uint16_t*>(g.out);
#pragma unroll
    for (int t = thread / 8; t < kTokens; t += 16) {
      const int chunk = thread % 8;
      if (t < tile.valid_tokens && chunk * 8 < columns)
        *reinterpret_cast<uint4*>(out + int64_t(tile.token + t) * g.out_stride + column + chunk * 8) =
            *reinterpret_cast<const uint4*>(staging + staged(t, chunk));
    }
    sync_threads(kWarpgroupBarrier + warpgroup, 128);  // read, before a wide tile writes warp by warp
  }

  // The same for float32 out: eight lanes hold eight neighbouring columns, so registers go straight to memory.
  template <int kFirst>
  __device__ __forceinline__ void store_float32(int32_t column, int32_t columns) {
    for_each_value<float>(column, columns, [&](float* out, int i) { *out = total[kFirst + i]; });
  }

  // gate_up, which is read by whoever finds it: +0 means that it is not there yet (split_sm90.cuh).
  __device__ void store_gate_up(int32_t column, int32_t columns) {
    for_each_value<float>(column, columns, [&](float* out, int i) {
      asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(out), "f"(total[i] == 0.f ? -0.f : total[i]) : "memory");
    });
  }

  // act of 128 channels (wave 0), requantised: scale[token] = fp8_block_scale(amax over the channels).
  __device__ __forceinline__ void store_quantized() {
    uint8_t* staging = smem.staging_ptr;
    float* amax = reinterpret_cast<float*>(staging + 64 * 128);  // [8 warps][kTokens]
    float* inverse = amax + 8 * kTokens;                         // [kTokens]
    const int32_t channels = min(128, g.part_rows - tile.row);
    sync_threads(kActBarrier, kActThreads);  // the previous tile's staging has been read
#pragma unroll
    for (int i = 0; i < kWave; i += i % 2 == 0 ? 1 : 3) {  // both values of a token pair, first row
      float m = 0.f;  // fmaxf ignores NaN, as the contract says
      if (wave_row < channels) m = fmaxf(m, fabsf(total[i]));
      if (wave_row + 8 < channels) m = fmaxf(m, fabsf(total[i + 2]));
      for (int d = 4; d < 32; d *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, d));
      if (lane < 4) amax[this_thread() / 32 * kTokens + token_of(i, lane)] = m;
    }
    sync_threads(kActBarrier, kActThreads);
    for (int t = this_thread(); t < kTokens; t += kActThreads) {
      float m = amax[t];
      for (int w = 1; w < 8; ++w) m = fmaxf(m, amax[w * kTokens + t]);
      const float scale = fp8_block_scale(m);
      inverse[t] = __fdiv_rn(1.f, scale);
      if (t < tile.valid_tokens)
        p.act_scale[int64_t(tile.token + t) * p.act_scale_stride_row + (tile.row / 128) * p.act_scale_stride_k] = scale;
    }
    sync_threads(kActBarrier, kActThreads);
#pragma unroll
    for (int i = 0; i < kWave; ++i) {
      const int token = token_of(i, lane), channel = wave_row + 8 * (i / 2 % 2);
      const __nv_fp8_e4m3 v(__fmul_rn(total[i], inverse[token]));
      staging[staged(token, channel / 16) + channel % 16] = v.__x;
    }
    sync_threads(kActBarrier, kActThreads);
    auto out = static_cast<uint8_t*>(g.out);
    for (int t = this_thread() / 8; t < min(kTokens, tile.valid_tokens); t += kActThreads / 8) {
      const int chunk = thread % 8;
      if (chunk * 16 < channels)
        *reinterpret_cast<uint4*>(out + int64_t(tile.token + t) * g.out_stride + tile.row + chunk * 16) =
            *reinterpret_cast<const uint4*>(staging + staged(t, chunk));
    }
    sync_threads(kActBarrier, kActThreads);  // read, before a wide tile writes warp by warp
  }

  // act of 128 channels (wave 0) -> what it stands for once it is quantised. A warp has 16 channels of all tokens.
  template <Format kFormat>
  __device__ void round_act() {
    constexpr int kWarps = block_k(kFormat) / 16;  // that share a scale
    const float global_scale = p.act_global_scale(1, tile.expert);
    const int first_warp = this_thread() / 32 / kWarps * kWarps, channels = g.part_rows - tile.row;
    float* amax = reinterpret_cast<float*>(smem.staging_ptr);  // [8 warps][kTokens]
    sync_threads(kActBarrier, kActThreads);  // the previous tile's staging has been read
#pragma unroll
    for (int i = 0; i < kWave; i += i % 2 == 0 ? 1 : 3) {  // both values of a token pair, first row
      float m = 0.f;  // fmaxf ignores NaN, as the contract says
      if (wave_row < channels) m = fmaxf(fmaxf(m, fabsf(total[i])), fabsf(total[i + 2]));
      for (int d = 4; d < 32; d *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, d));
      if (lane < 4) amax[this_thread() / 32 * kTokens + token_of(i, lane)] = m;
    }
    sync_threads(kActBarrier, kActThreads);
#pragma unroll
    for (int i = 0; i < kWave; i += i % 2 == 0 ? 1 : 3) {
      if (8 * (i / 4) >= tile.valid_tokens) break;
      float m = 0.f;
      for (int w = 0; w < kWarps; ++w) m = fmaxf(m, amax[(first_warp + w) * kTokens + token_of(i, lane)]);
      const Rounding<kFormat> rounding(m, global_scale);
      total[i] = rounding(total[i]);
      total[i + 2] = rounding(total[i + 2]);
    }
    sync_threads(kActBarrier, kActThreads);  // read, before staging is written
  }

  // Packed weights are multiplied without their global scale, and smaller by a power of two; tokens without theirs.
  __device__ __forceinline__ void apply_global_scales() {
    unrolled<C::kWaves>([&](auto w) {
      float scale = kUnpackedScale<C::kPacking>;
      if constexpr (C::kPacking == Packing::nvfp4) {
        int32_t part, row;
        origin(w, part, row);
        scale = C::kKeepsGlobalScales ? smem.global_scales[(tile.gemm == 0 ? part : 2) * kMaxExperts + tile.expert]
                                      : load_global_scale<C>(p, tile.gemm, part, tile.expert);
      }
#pragma unroll
      for (int i = 0; i < kWave; ++i) total[w * kWave + i] *= scale;
    });
  }

  __device__ __forceinline__ void run() {
    if constexpr (!C::kHoldsStage) wait_stores<C>();
    if constexpr (C::kPacked) apply_global_scales();
    if (g.bias != nullptr) unrolled<C::kWaves>([&](auto w) { add_bias(w); });
    if constexpr (C::kGated) {
      if (tile.gemm == 0) return store_activated();
    }
    unrolled<C::kWaves>([&](auto w) {
      int32_t part, row;
      origin(w, part, row);
      const int32_t column = part * g.part_rows + row, of_part = g.part_rows - row;
      const int32_t columns = C::kSplit ? min(of_part, g.tile_rows - warpgroup * 64) : of_part;
      if constexpr (C::kSplit)
        if (tile.gemm == 0) return store_gate_up(column, columns);
      if (g.out_dtype == DType::float32) store_float32<w * kWave>(column, columns);
      else store_16bit<w * kWave>(column, columns);
    });
  }

  // Paired: warpgroups 2 and 3 hand over their values, up, to 0 and 1, whose threads have the same tokens and channels, through the staging of
  // both, and go on to the next tile when act is computed. Where value i is:
  __device__ __forceinline__ uint32_t handed_over(int i) const {
    return smem.staging + (warpgroup % 2 + 2 * (i / 16)) * C::kStoreTokens * 128 + (i % 16 * 128 + thread) * 4;
  }

  __device__ __forceinline__ void store_activated() {
    const int written = kPairBarrier + 2 * (warpgroup % 2), read = written + 1;
    if constexpr (C::kPaired) {
      sync_threads(written, 256);  // what was there has been read
      if (warpgroup >= 2) {
#pragma unroll
        for (int i = 0; i < kWave; ++i) asm volatile("st.shared.f32 [%0], %1;" ::"r"(handed_over(i)), "f"(total[i]) : "memory");
        arrive_threads(written, 256);
        return sync_threads(read, 256);
      }
      sync_threads(written, 256);
    }
    const auto up = [&](int i) {
      if constexpr (C::kPaired) {
        float value;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(handed_over(i)) : "memory");
        return value;
      } else {
        return total[kWave + i];
      }
    };
    with_gated_activation(p.activation, [&](auto activate) {
#pragma unroll
      for (int i = 0; i < kWave; ++i) total[i] = activate(total[i], up(i));
    });
    if constexpr (C::kPaired) arrive_threads(read, 256);
    with_rounding<C>(p.act_format, [&]<Format kFormat>() { round_act<kFormat>(); });
    const int32_t row = tile.row + warpgroup * 64;
    if constexpr (C::kFloat8) store_quantized();
    else store_16bit<0>(row, g.part_rows - row);
  }
};

}  // namespace moe::sm90
