// Main loop for packed mxfp4 weights and float8 tokens (torch_moe_ops/packed_weights.py): the weights become the 64-row operand in registers,
// as float8. An e2m1 number times 2^6 is an e4m3 number whose exponent can be lowered by up to 11 without leaving the normal ones. So a table
// of the eight magnitudes, in two registers, less 8 * the difference of exponents in every byte but that of zero, is all that it takes to
// unpack a row's 32 k: a byte permutation for each four of them. What is left, 2^(largest exponent of the row - 6), multiplies the sum.
#pragma once
#include "grouped_gemm/kernel_sm90.cuh"

namespace moe::sm90 {

// Four codes -> four e4m3 numbers. magnitudes: the lower four nibbles, all that a byte permutation looks at, below 8. signs: bit 7 of each byte.
__device__ __forceinline__ uint32_t unpack_e4m3(uint32_t low, uint32_t high, uint32_t magnitudes, uint32_t signs) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "r"(magnitudes));  // __byte_perm() masks once more
  return d | (signs & 0x80808080);
}

// 2^(e - 133) for e from 0 to 255, exactly.
__device__ __forceinline__ float power_of_two(int e) { return __int_as_float(e > 6 ? (e - 6) << 23 : 1 << (e + 16)); }

template <class C, int kTokens>
struct PackedFloat8 {
  static_assert(C::kWaves == 1);
  static constexpr int kWave = kTokens / 2, kQuads = kTokens < 16 ? 1 : kTokens / 16;
  static constexpr int kScales = packed_value_bytes(C::kPacking);  // in a block: of two rows and halves of 32 k, half a byte of difference, half of exponent
  static constexpr int kSteps = 4;  // of 32 k in a stage
  using Sum = float[kWave];
  using Operand = uint32_t[4 * kSteps];
  const Smem<C>& smem;
  const int warpgroup, thread = read_thread() % 128;

  __device__ uint32_t block_of(int stage) const {  // of the first 64 k
    return smem.weights + stage * C::kWeightBytes + warpgroup * C::kRowBlockBytes;
  }

  __device__ __forceinline__ void unpack(int stage, Operand& a) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t block = block_of(stage) + step / 2 * C::kBlockBytes;
      uint32_t codes[2], differences;
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(codes[0]), "=r"(codes[1]) : "r"(block + (step % 2 * 128 + thread) * 8));
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(differences) : "r"(block + kScales + thread / 4 * 4));
      differences &= 0x0F0F0F0F;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const uint32_t difference = __byte_perm(differences, 0, 0x4440 + 2 * row + step % 2);
        const uint32_t low = 0x6C686000 - difference * 0x08080800, high = 0x7C787470 - difference * 0x08080808;
        const uint32_t magnitudes = codes[row] & 0x77777777;
        a[4 * step + row] = unpack_e4m3(low, high, magnitudes, codes[row]);
        a[4 * step + 2 + row] = unpack_e4m3(low, high, magnitudes >> 16, codes[row] << 4);
      }
    }
#pragma unroll
    for (uint32_t& x : a) cute::warpgroup_fence_operand(x);
  }

  // partial = the weights, unpacked into a, * the tokens of a stage, as a wgmma group.
  __device__ __forceinline__ void start(int stage, Operand& a, Sum& partial) const {
    unpack(stage, a);
    const uint32_t tokens = descriptor_low(smem.tokens) + stage * (C::kTokenBytes >> 4);
    fence_registers(partial);
    cute::warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) RegisterMma<typename C::Element, kTokens>::run(a + 4 * step, tokens + 2 * step, partial, step > 0);
    cute::warpgroup_commit_batch();
  }

  // total += scale * partial, of a stage; kAhead groups were issued after it.
  template <int kAhead>
  __device__ __forceinline__ void promote(int stage, Sum& partial, Sum& total) const {
    constexpr bool kScalesFirst = C::kWarpgroups < 4;  // while wgmma runs; four warpgroups have no registers for all of them
    const uint32_t scales = smem.scales + stage * C::kScaleBytes + (thread & 3) * 16;
    float scale[kQuads][4];
    auto load = [&](int q) {
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(scale[q][0]), "=f"(scale[q][1]), "=f"(scale[q][2]), "=f"(scale[q][3])
                   : "r"(scales + q * 64));
    };
#pragma unroll
    for (int q = 0; q < kQuads && kScalesFirst; ++q) load(q);
    cute::warpgroup_wait<kAhead>();
    fence_registers(partial);
#pragma unroll
    for (int i = 0; i < kWave; ++i) {
      if (i % 8 == 0 && !kScalesFirst) load(i / 8);
      total[i] = fmaf(scale[i / 8][i % 8 / 4 * 2 + i % 2], partial[i], total[i]);
    }
  }

  // 2^(largest exponent - 127 - 6) of this thread's two rows.
  __device__ float2 row_factors(int stage) const {
    uint32_t scales;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(scales) : "r"(block_of(stage) + kScales + thread / 4 * 4));
    const uint32_t exponents = (scales >> 4 & 0x000F000F) | (scales >> 8 & 0x00F000F0);
    return {power_of_two(exponents & 0xFF), power_of_two(exponents >> 16)};
  }

  __device__ int next_stage(PipelineState<C::kStages>& pipe) const {
    pipe.advance();
    wait_full<C>(smem, pipe);
    return pipe.stage;
  }

  // Up to two warpgroups: while a stage multiplies, the one before it is promoted. The last stage is not released.
  __device__ __forceinline__ void multiply_overlapped(PipelineState<C::kStages>& pipe, int left, Sum& total) const {
    Operand a[2];
    Sum even, odd;
    int stage = pipe.stage;
    start(stage, a[0], even);
#pragma unroll 1
    while (true) {
      if (--left == 0) return promote<0>(stage, even, total);
      int previous = stage;
      start(stage = next_stage(pipe), a[1], odd);
      promote<1>(previous, even, total);
      release<C>(smem, previous);
      if (--left == 0) return promote<0>(stage, odd, total);
      previous = stage;
      start(stage = next_stage(pipe), a[0], even);
      promote<1>(previous, odd, total);
      release<C>(smem, previous);
    }
  }

  // Four: a warpgroup does one thing after the other, while the others do. The last stage is not released.
  __device__ __forceinline__ void multiply_in_turn(PipelineState<C::kStages>& pipe, int left, Sum& total) const {
    Operand a;
    Sum partial;
#pragma unroll 1
    while (true) {
      start(pipe.stage, a, partial);
      promote<0>(pipe.stage, partial, total);
      if (--left == 0) return;
      release<C>(smem, pipe.stage);
      next_stage(pipe);
    }
  }
};

template <class C, int kTokens>
__device__ __forceinline__ void multiply_packed_float8(const Smem<C>& smem, PipelineState<C::kStages>& pipe, int k_stages, int warpgroup,
                                                       float (&total)[kTokens / 2]) {
  const PackedFloat8<C, kTokens> loop{smem, warpgroup};
  clear(total);
  wait_full<C>(smem, pipe);
  const float2 factors = loop.row_factors(pipe.stage);
  if constexpr (C::kWarpgroups == 4) loop.multiply_in_turn(pipe, k_stages, total);
  else loop.multiply_overlapped(pipe, k_stages, total);
  release<C>(smem, pipe.stage);
  pipe.advance();
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) total[i] *= i / 2 % 2 == 0 ? factors.x : factors.y;
}

}  // namespace moe::sm90
