// Main loop for packed weights (torch_moe_ops/packed_weights.py): they become wgmma's 64-row operand in registers, so that nothing but
// 4-bit or 8-bit values and their scales passes through memory and shared memory. Every product value * scale is exact in bfloat16: e2m1
// has 2 significant bits, e4m3 4 and e8m0 1.
#pragma once
#include "grouped_gemm/kernel_sm90.cuh"

namespace moe::sm90 {

// What the products below have to be multiplied by: 4-bit values come with 2^-126, 8-bit ones with 2^-120, nvfp4 scales with 2^107, the
// others with 2^63.
template <Packing kPacking>
constexpr float kUnpackedScale = kPacking == Packing::nvfp4 ? float(1 << 19) : kPacking == Packing::mxfp4 ? float(1ull << 63) : float(1ull << 57);

// Both halves of x, bfloat16, times one half of y.
__device__ __forceinline__ uint32_t times_lower(uint32_t x, uint32_t y) {
  uint32_t d;
  asm("{.reg .b16 l, h; .reg .b32 t; mov.b32 {l, h}, %2; mov.b32 t, {l, l}; mul.rn.bf16x2 %0, %1, t;}" : "=r"(d) : "r"(x), "r"(y));
  return d;
}
__device__ __forceinline__ uint32_t times_upper(uint32_t x, uint32_t y) {
  uint32_t d;
  asm("{.reg .b16 l, h; .reg .b32 t; mov.b32 {l, h}, %2; mov.b32 t, {h, h}; mul.rn.bf16x2 %0, %1, t;}" : "=r"(d) : "r"(x), "r"(y));
  return d;
}

// Values -> the operand of one step of 16 k; scales: of row r in the lower half, of row r + 8 in the upper. 4 bits: one word.
__device__ __forceinline__ void unpack_step(const uint32_t (&words)[1], uint32_t scales, uint32_t* a) {
  constexpr uint32_t kMagnitudes = 0x01C001C0, kSigns = 0x80008000;
  const uint32_t word = words[0];
  a[0] = times_lower(word & (kMagnitudes | kSigns), scales);
  a[1] = times_upper((word << 3) & (kMagnitudes | kSigns), scales);
  a[2] = times_lower((word << 6) & kMagnitudes, scales) ^ ((word << 1) & kSigns);
  a[3] = times_upper((word >> 3) & kMagnitudes, scales) ^ ((word << 2) & kSigns);
}

// 8 bits: two words.
__device__ __forceinline__ void unpack_step(const uint32_t (&words)[2], uint32_t scales, uint32_t* a) {
  constexpr uint32_t kMagnitudes = 0x07F007F0, kSigns = 0x80008000;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[2 * i] = times_lower(((words[i] >> 4) & kMagnitudes) | (words[i] & kSigns), scales);
    a[2 * i + 1] = times_upper(((words[i] << 4) & kMagnitudes) | ((words[i] << 8) & kSigns), scales);
  }
}

// This thread's part of half a block, of 32 k, as it is stored.
template <Packing kPacking>
struct PackedRegisters {
  static constexpr int kStepWords = packed_value_bytes(kPacking) / 2048;
  uint32_t values[2][kStepWords], scales;

  __device__ __forceinline__ void load(uint32_t block, int half) {
    const int thread = threadIdx.x % 128;
    const uint32_t source = block + (half * 128 + thread) * sizeof(values);
    if constexpr (kStepWords == 1)
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(values[0][0]), "=r"(values[1][0]) : "r"(source));
    else
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(values[0][0]), "=r"(values[0][1]), "=r"(values[1][0]), "=r"(values[1][1])
                   : "r"(source));
    const uint32_t address = block + packed_value_bytes(kPacking) + (kPacking == Packing::nvfp4 ? thread / 4 * 8 + half * 4 : thread / 4 * 4);
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(scales) : "r"(address));
    if (kPacking != Packing::nvfp4) scales >>= 8 * half;
  }

  // The operand of two steps of 16 k. nvfp4 scales are stored with 5 bits of exponent, to which 224 is added, and 3 of mantissa.
  __device__ __forceinline__ void unpack(uint32_t* a) const {
    if constexpr (kPacking == Packing::nvfp4) {
      unpack_step(values[0], (scales & 0x00FF00FF) * 16 + 0x70007000, a);
      unpack_step(values[1], __byte_perm(scales, 0, 0x4341) * 16 + 0x70007000, a + 4);
    } else {
      const uint32_t both = (scales & 0x00FF00FF) * 128;
      unpack_step(values[0], both, a);
      unpack_step(values[1], both, a + 4);
    }
  }
};

// A wgmma group is one wave's 64 or 32 k, as registers permit. One is in flight while the operand of the next is unpacked into other
// registers. Two groups a pass, of both waves or, in turn, of the only one: with more, ptxas lets each wgmma wait for the one before
// (C7513).
template <class C, int kTokens>
__device__ __forceinline__ void multiply_packed(const Smem<C>& smem, PipelineState<C::kStages>& pipe, int k_stages, int warpgroup,
                                                float (&total)[C::kWaves * kTokens / 2]) {
  constexpr int kHalves = C::kWaves == 2 ? (C::kMaxTokens == 64 ? 2 : 1) : C::kStageBlocks;  // of K blocks, in a group
  constexpr int kHalvesOfPass = C::kWaves == 2 ? kHalves : 2 * kHalves, kPasses = 2 * C::kStageBlocks / kHalvesOfPass;  // over a stage
  uint32_t a[2][8 * kHalves];
  PackedRegisters<C::kPacking> packed[2][kHalves];
  auto half_of = [](int pass, int g, int h) { return pass * kHalvesOfPass + (C::kWaves == 2 ? h : g * kHalves + h); };
  int previous = -1;  // a stage that wgmma may still read
  clear(total);
  fence_registers(total);
#pragma unroll 1
  for (int i = 0; i < k_stages * kPasses; ++i) {
    const int pass = i % kPasses;
    if (pass == 0) smem.full[pipe.stage].wait(pipe.phase);
    const uint32_t weights = smem.weights + pipe.stage * C::kWeightBytes + warpgroup * C::kBlockBytes;
    const uint32_t tokens = descriptor_low(smem.tokens) + pipe.stage * (C::kTokenBytes >> 4);
#pragma unroll
    for (int g = 0; g < 2; ++g)
      for (int h = 0; h < kHalves; ++h) {
        const int half = half_of(pass, g, h);
        packed[g][h].load(weights + half / 2 * C::kBlockWeightBytes + (C::kWaves == 2 ? g * C::kWarpgroups * C::kBlockBytes : 0), half % 2);
      }
    unrolled<2>([&](auto g) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) packed[g][h].unpack(a[g] + 8 * h);
#pragma unroll
      for (uint32_t& x : a[g]) cute::warpgroup_fence_operand(x);
      cute::warpgroup_arrive();
#pragma unroll
      for (int step = 0; step < 2 * kHalves; ++step) {
        const int half = half_of(pass, g, step / 2);
        RegisterMma<typename C::Element, kTokens, (C::kWaves == 2 ? g * (kTokens / 2) : 0)>::run(
            a[g] + 4 * step, tokens + half / 2 * (C::kBlockTokenBytes >> 4) + 4 * (half % 2) + 2 * (step % 2), total);
      }
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<1>();  // for the group before this one
      if (g == 0 && pass == 0 && previous >= 0) release<C>(smem, previous);
    });
    if (pass == kPasses - 1) {
      previous = pipe.stage;
      pipe.advance();
    }
  }
  cute::warpgroup_wait<0>();
  fence_registers(total);
  release<C>(smem, previous);
}

}  // namespace moe::sm90
