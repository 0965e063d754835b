// Main loop for packed mxfp4 weights and float8 tokens (torch_moe_ops/packed_weights.py): the weights become the 64-row operand in registers,
// as float8. An e2m1 number times 2^6 is an e4m3 number whose exponent can be lowered by up to 11 without leaving the normal ones. So a table
// of the eight magnitudes, in two registers, less 8 * the difference of exponents in every byte but that of zero, is all that it takes to
// unpack a row's 32 k: a byte permutation for each four of them. What is left, 2^(largest exponent of the row - 6), multiplies the sum.
#pragma once
#include "grouped_gemm/kernel_sm90.cuh"

namespace moe::sm90 {

// Four codes -> four e4m3 numbers. Of `codes`: magnitudes in the low three bits of the lower four nibbles. signs: bit 7 of each byte.
__device__ __forceinline__ uint32_t unpack_e4m3(uint32_t low, uint32_t high, uint32_t codes, uint32_t signs) {
  return __byte_perm(low, high, codes & 0x7777) | (signs & 0x80808080);
}

template <class C, int kTokens>
struct PackedFloat8 {
  static constexpr int kWave = kTokens / 2, kQuads = kTokens < 16 ? 1 : kTokens / 16;
  static constexpr int kScales = packed_value_bytes(C::kPacking), kExponents = kScales + packed_scale_bytes(C::kPacking);  // in a block
  static constexpr int kSteps = 4;  // of 32 k in a stage
  using Sum = float[kWave];
  using Operand = uint32_t[4 * kSteps];
  const Smem<C>& smem;
  const int warpgroup, thread = threadIdx.x % 128;

  __device__ uint32_t block_of(int stage, int w) const {  // of the first 64 k
    return smem.weights + stage * C::kWeightBytes + (w * C::kWarpgroups + warpgroup) * C::kBlockBytes;
  }

  __device__ __forceinline__ void unpack(int stage, int w, Operand& a) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t block = block_of(stage, w) + step / 2 * C::kBlockWeightBytes;
      uint32_t codes[2], differences;
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(codes[0]), "=r"(codes[1]) : "r"(block + (step % 2 * 128 + thread) * 8));
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(differences) : "r"(block + kScales + thread / 4 * 4));
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const uint32_t difference = __byte_perm(differences, 0, 0x4440 + 2 * row + step % 2);
        const uint32_t low = 0x6C686000 - difference * 0x01010100, high = 0x7C787470 - difference * 0x01010101;
        a[4 * step + row] = unpack_e4m3(low, high, codes[row], codes[row]);
        a[4 * step + 2 + row] = unpack_e4m3(low, high, codes[row] >> 16, codes[row] << 4);
      }
    }
#pragma unroll
    for (uint32_t& x : a) cute::warpgroup_fence_operand(x);
  }

  // partial = a * the tokens of a stage, as a wgmma group.
  __device__ __forceinline__ void issue(int stage, const Operand& a, Sum& partial) const {
    const uint32_t tokens = descriptor_low(smem.tokens) + stage * (C::kTokenBytes >> 4);
    fence_registers(partial);
    cute::warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) RegisterMma<typename C::Element, kTokens>::run(a + 4 * step, tokens + 2 * step, partial, step > 0);
    cute::warpgroup_commit_batch();
  }

  // total += scale * partial, of wave w of a stage; kAhead groups were issued after it.
  template <int kAhead, int w>
  __device__ __forceinline__ void promote(int stage, Sum& partial, float (&total)[C::kWaves * kWave]) const {
    const uint32_t scales = smem.scales + stage * C::kScaleBytes + w * (4 * C::kWaveScales) + (threadIdx.x & 3) * 16;
    float scale[kQuads][4];  // loaded while wgmma runs
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(scale[q][0]), "=f"(scale[q][1]), "=f"(scale[q][2]), "=f"(scale[q][3])
                   : "r"(scales + q * 64));
    cute::warpgroup_wait<kAhead>();
    fence_registers(partial);
#pragma unroll
    for (int i = 0; i < kWave; ++i)
      total[w * kWave + i] = fmaf(scale[i / 8][i % 8 / 4 * 2 + i % 2], partial[i], total[w * kWave + i]);
  }

  // 2^(largest exponent - 127 - 6) of this thread's two rows of a wave.
  __device__ float2 row_factors(int stage, int w) const {
    uint16_t exponents;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(exponents) : "r"(block_of(stage, w) + kExponents + thread / 4 * 2));
    return {scalbnf(1.f, (exponents & 0xFF) - 133), scalbnf(1.f, (exponents >> 8) - 133)};
  }

  __device__ int next_stage(PipelineState<C::kStages>& pipe) const {
    pipe.advance();
    wait_full<C>(smem, pipe);
    return pipe.stage;
  }

  // One wave: while a stage multiplies, the one before it is promoted. The last stage is not released.
  __device__ __forceinline__ void multiply_one_wave(PipelineState<C::kStages>& pipe, int left, float (&total)[C::kWaves * kWave]) const {
    Operand a[2];
    Sum even, odd;
    int stage = pipe.stage;
    auto start = [&](int stage, Operand& a, Sum& partial) {
      unpack(stage, 0, a);
      issue(stage, a, partial);
    };
    start(stage, a[0], even);
#pragma unroll 1
    while (true) {
      if (--left == 0) return promote<0, 0>(stage, even, total);
      int previous = stage;
      start(stage = next_stage(pipe), a[1], odd);
      promote<1, 0>(previous, even, total);
      release<C>(smem, previous);
      if (--left == 0) return promote<0, 0>(stage, odd, total);
      previous = stage;
      start(stage = next_stage(pipe), a[0], even);
      promote<1, 0>(previous, odd, total);
      release<C>(smem, previous);
    }
  }

  // Two: both of a stage multiply together, while the other warpgroup unpacks and promotes. (Each wave unpacked while the other multiplies, and
  // the next stage while the last wave does, was 8 to 20 % slower: gpt-oss, 8 tokens, 122 -> 144 us, 8192 tokens 3180 -> 3430. In turns as
  // above, ptxas lets every wgmma wait for the one before: C7514.)
  __device__ __forceinline__ void multiply_two_waves(PipelineState<C::kStages>& pipe, int left, float (&total)[C::kWaves * kWave]) const {
    Operand a[2];
    Sum partial[2];
#pragma unroll 1
    while (true) {
      const int stage = pipe.stage;
#pragma unroll
      for (int w = 0; w < 2; ++w) unpack(stage, w, a[w]);
#pragma unroll
      for (int w = 0; w < 2; ++w) issue(stage, a[w], partial[w]);
      promote<1, 0>(stage, partial[0], total);
      promote<0, 1>(stage, partial[1], total);
      if (--left == 0) return;
      release<C>(smem, stage);
      next_stage(pipe);
    }
  }
};

template <class C, int kTokens>
__device__ __forceinline__ void multiply_packed_float8(const Smem<C>& smem, PipelineState<C::kStages>& pipe, int k_stages, int warpgroup,
                                                       float (&total)[C::kWaves * kTokens / 2]) {
  const PackedFloat8<C, kTokens> loop{smem, warpgroup};
  float2 factors[C::kWaves];
  clear(total);
  wait_full<C>(smem, pipe);
#pragma unroll
  for (int w = 0; w < C::kWaves; ++w) factors[w] = loop.row_factors(pipe.stage, w);
  if constexpr (C::kWaves == 1) loop.multiply_one_wave(pipe, k_stages, total);
  else loop.multiply_two_waves(pipe, k_stages, total);
  release<C>(smem, pipe.stage);
  pipe.advance();
#pragma unroll
  for (int w = 0; w < C::kWaves; ++w)
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) total[w * (kTokens / 2) + i] *= i / 2 % 2 == 0 ? factors[w].x : factors[w].y;
}

}  // namespace moe::sm90
