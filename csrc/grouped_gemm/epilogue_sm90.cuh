// Epilogues of the SM90 grouped GEMM and the kernel itself. The totals of a warpgroup are [64 weight rows, tokens];
// stores go through shared memory, transposed, so that each token gets 128 contiguous bytes.
#pragma once
#include "grouped_gemm/kernel_sm90.cuh"

namespace moe::sm90 {

// Named barriers 1 and 2: one warpgroup each; 3: all consumers.
__device__ __forceinline__ void sync_threads(int barrier, int count) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory"); }

__device__ __forceinline__ float load_bias(const KernelParams& p, int64_t index) {
  switch (p.bias_dtype) {
    case DType::bfloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(p.bias)[index]);
    case DType::float16: return __half2float(static_cast<const __half*>(p.bias)[index]);
    default: return static_cast<const float*>(p.bias)[index];
  }
}

template <class C, int kTokens>
__device__ __forceinline__ void add_bias(const KernelParams& p, const Tile& tile, int wave, int thread_row, float (&total)[kTokens / 2]) {
  int32_t part, row;
  wave_origin<C>(p, tile, wave, part, row);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t r = row + thread_row + 8 * half;
    if (r >= p.part_rows) continue;
    const float bias = load_bias(p, (int64_t(tile.expert) * p.parts + part) * p.part_rows + r);
#pragma unroll
    for (int i = 2 * half; i < kTokens / 2; i += 4) {
      total[i] += bias;
      total[i + 1] += bias;
    }
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

// Stores four 8x8 blocks of 16-bit values, transposed: lane l gives the address of 16 bytes for row l % 8 of block l / 8.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m0), "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, uint32_t m0, uint32_t m1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(m0), "r"(m1) : "memory");
}

// out[token, column .. column + 64) = total of one warpgroup, 16-bit. Staging is [tokens][8 chunks of 16 bytes], chunk c of
// token t at c ^ (t % 8): no bank conflicts on either side.
template <class C, int kTokens>
__device__ __forceinline__ void store_16bit(const KernelParams& p, const Tile& tile, uint8_t* staging, int32_t column, int32_t columns,
                                            const float (&total)[kTokens / 2]) {
  constexpr int kStore = kTokens < C::kStoreTokens ? kTokens : C::kStoreTokens;
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  staging += warpgroup * C::kStoreTokens * 128;
  const uint32_t base = cute::cast_smem_ptr_to_uint(staging);
  auto out = static_cast<uint16_t*>(p.out);
  constexpr int kGroups = kStore / 8;
#pragma unroll
  for (int first = 0; first < kTokens; first += kStore) {
    if (first >= tile.valid_tokens) break;
    sync_threads(1 + warpgroup, 128);  // the previous contents have been read
    auto packed = [&](int group, int half) {
      const int i = 4 * (first / 8 + group) + 2 * half;
      return pack_16bit(p.out_dtype, total[i], total[i + 1]);
    };
#pragma unroll
    for (int g = 0; g < kGroups; g += 2) {
      const int token = 8 * g + (lane / 16) * 8 + lane % 8, chunk = 2 * warp + (lane / 8) % 2;
      const uint32_t address = base + token * 128 + ((chunk ^ (token % 8)) * 16);
      if constexpr (kGroups == 1) store_matrices_transposed(base + (lane % 8) * 128 + ((chunk ^ (lane % 8)) * 16), packed(g, 0), packed(g, 1));
      else store_matrices_transposed(address, packed(g, 0), packed(g, 1), packed(g + 1, 0), packed(g + 1, 1));
    }
    sync_threads(1 + warpgroup, 128);
#pragma unroll
    for (int t = thread / 8; t < kStore; t += 16) {
      const int chunk = thread % 8;
      if (first + t < tile.valid_tokens && chunk * 8 < columns) {
        const uint4 v = *reinterpret_cast<const uint4*>(staging + t * 128 + ((chunk ^ (t % 8)) * 16));
        *reinterpret_cast<uint4*>(out + (tile.token + first + t) * p.out_stride + column + chunk * 8) = v;
      }
    }
  }
}

// The same for float32 out: eight lanes hold eight neighbouring columns, so registers go straight to memory in 32-byte pieces.
template <class C, int kTokens>
__device__ __forceinline__ void store_float32(const KernelParams& p, const Tile& tile, int thread_row, int32_t column, int32_t columns,
                                              const float (&total)[kTokens / 2]) {
  auto out = static_cast<float*>(p.out);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int token = 8 * (i / 4) + 2 * (lane % 4) + i % 2, row = thread_row % 64 + 8 * (i / 2 % 2);
    if (token < tile.valid_tokens && row < columns) out[(tile.token + token) * p.out_stride + column + row] = total[i];
  }
}

// act of 128 channels, requantised: scale[token] = max(amax over the channels, 1e-10) / 448, value = e4m3(act / scale).
template <class C, int kTokens>
__device__ __forceinline__ void store_quantized(const KernelParams& p, const Tile& tile, uint8_t* staging, int thread_row,
                                                const float (&act)[kTokens / 2]) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  float* amax = reinterpret_cast<float*>(staging + kTokens * 128);  // [8 warps][kTokens]
  float* inverse = amax + 8 * kTokens;                              // [kTokens]
  const int32_t channels = min(128, p.part_rows - tile.row);
  sync_threads(3, C::kConsumers);  // the previous tile's staging has been read
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float m = 0.f;  // fmaxf ignores NaN, as the contract says
      if (thread_row < channels) m = fmaxf(m, fabsf(act[4 * j + c]));
      if (thread_row + 8 < channels) m = fmaxf(m, fabsf(act[4 * j + 2 + c]));
      for (int d = 4; d < 32; d *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, d));
      if (lane < 4) amax[warp * kTokens + 8 * j + 2 * lane + c] = m;
    }
  }
  sync_threads(3, C::kConsumers);
  for (int t = thread; t < kTokens; t += C::kConsumers) {
    float m = amax[t];
    for (int w = 1; w < 8; ++w) m = fmaxf(m, amax[w * kTokens + t]);
    const float scale = __fdiv_rn(fminf(fmaxf(m, 1e-10f), 3.402823466e+38f), 448.f);
    inverse[t] = __fdiv_rn(1.f, scale);
    if (t < tile.valid_tokens)
      p.gated.act_scale[(tile.token + t) * p.gated.scale_stride_row + (tile.row / 128) * p.gated.scale_stride_k] = scale;
  }
  sync_threads(3, C::kConsumers);
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int token = 8 * (i / 4) + 2 * (lane % 4) + i % 2, channel = thread_row + 8 * (i / 2 % 2);
    const __nv_fp8_e4m3 v(__fmul_rn(act[i], inverse[token]));
    staging[token * 128 + ((channel / 16) ^ (token % 8)) * 16 + channel % 16] = v.__x;
  }
  sync_threads(3, C::kConsumers);
  auto out = static_cast<uint8_t*>(p.out);
  for (int t = thread / 8; t < tile.valid_tokens; t += C::kConsumers / 8) {
    const int chunk = thread % 8;
    if (chunk * 16 >= channels) continue;
    const uint4 v = *reinterpret_cast<const uint4*>(staging + t * 128 + ((chunk ^ (t % 8)) * 16));
    *reinterpret_cast<uint4*>(out + (tile.token + t) * p.out_stride + tile.row + chunk * 16) = v;
  }
}

template <class C, int kTokens>
__device__ __forceinline__ void epilogue(const KernelParams& p, const Smem<C>& smem, const Tile& tile,
                                         float (&total)[C::kWaves][kTokens / 2]) {
  // Row of the wave that this thread's first accumulator belongs to; its second is eight below.
  const int thread_row = (threadIdx.x / 128) * 64 + (threadIdx.x % 128 / 32) * 16 + (threadIdx.x % 32) / 4;
  const int warpgroup_row = threadIdx.x / 128 * 64;
#pragma unroll
  for (int w = 0; w < C::kWaves; ++w)
    if (p.bias != nullptr) add_bias<C, kTokens>(p, tile, w, thread_row, total[w]);
  if constexpr (C::kGated) {
    with_gated_activation(p.gated.activation.kind, [&](auto kind) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) total[0][i] = activate<decltype(kind)::value>(p.gated.activation, total[0][i], total[1][i]);
    });
    if constexpr (C::kFloat8) store_quantized<C, kTokens>(p, tile, smem.staging_ptr, thread_row, total[0]);
    else store_16bit<C, kTokens>(p, tile, smem.staging_ptr, tile.row + warpgroup_row, p.part_rows - tile.row - warpgroup_row, total[0]);
  } else {
#pragma unroll
    for (int w = 0; w < C::kWaves; ++w) {
      int32_t part, row;
      wave_origin<C>(p, tile, w, part, row);
      row += warpgroup_row;
      const int32_t column = part * p.part_rows + row, columns = p.part_rows - row;
      if (p.out_dtype == DType::float32) store_float32<C, kTokens>(p, tile, thread_row, column, columns, total[w]);
      else store_16bit<C, kTokens>(p, tile, smem.staging_ptr, column, columns, total[w]);
    }
  }
}

template <class C, int kTokens>
__device__ __forceinline__ void consume_tile(const KernelParams& p, const Smem<C>& smem, const Tile& tile, PipelineState<C::kStages>& pipe,
                                             int warpgroup) {
  float total[C::kWaves][kTokens / 2];
  if constexpr (C::kFloat8) multiply_float8<C, kTokens>(smem, pipe, p.k_blocks, warpgroup, total);
  else multiply_16bit<C, kTokens>(smem, pipe, p.k_blocks, warpgroup, total);
  epilogue<C, kTokens>(p, smem, tile, total);
}

template <class C>
__device__ void consume(const KernelParams& p, const Smem<C>& smem) {
  TileWalk<C> walk(p, smem);
  PipelineState<C::kStages> pipe;
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // uniform: descriptors stay in uniform registers
  for (Tile tile; walk.next(tile);) {
    auto run = [&]<int kTokens>() {
      if constexpr (kTokens <= C::kMaxTokens) consume_tile<C, kTokens>(p, smem, tile, pipe, warpgroup);
    };
    switch (tile.size) {
      case 3: run.template operator()<8>(); break;
      case 4: run.template operator()<16>(); break;
      case 5: run.template operator()<32>(); break;
      case 6: run.template operator()<64>(); break;
      default: run.template operator()<128>(); break;
    }
  }
}

// Registers a thread, moved from producers to consumers. The three warpgroups start with 168 each and share exactly that:
// asking for more waits for ever.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168);

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) grouped_gemm_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ uint8_t raw[];
  const Smem<C> smem(raw);
  if (threadIdx.x == 0) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&p.weights) : "memory");
    for (int s = 0; s < C::kStages; ++s) {
      smem.full[s].init(C::kFloat8 ? 2 : 1);  // the TMA thread, and the scale warp
      smem.empty[s].init(C::kConsumers / 32);
    }
    cutlass::arch::fence_barrier_init();
  }
  pdl_wait();
  count_tiles<C>(p, smem);  // its barriers also publish the mbarriers
  pdl_launch_next();
  if (threadIdx.x >= C::kConsumers) {
    if constexpr (C::kRebalanceRegisters) cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    const int warp = (threadIdx.x - C::kConsumers) / 32;
    if (warp == 0) load_tiles<C>(p, smem);
    if constexpr (C::kFloat8)
      if (warp != 0) load_scales<C>(p, smem, warp - 1);
  } else {
    if constexpr (C::kRebalanceRegisters) cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    consume<C>(p, smem);
  }
}

}  // namespace moe::sm90
