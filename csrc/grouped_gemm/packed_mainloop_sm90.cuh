// Main loops for packed weights (torch_moe_ops/packed_weights.py): they become the 64-row operand in registers, so that nothing but 4-bit or
// 8-bit values and their scales passes through memory and shared memory. Every product value * scale is exact in bfloat16: e2m1 has 2
// significant bits, e4m3 4 and e8m0 1.
//   up to kFewTokens tokens: mma.sync. A warp unpacks and multiplies its 16 rows by itself, in the order that ptxas likes best.
//   more: wgmma, of four warps in step, and with registers that ptxas must not touch meanwhile; but faster once there is more to multiply.
// Both add the products of 16 k in the same way, so that a token's sums have the same bits in either.
#pragma once
#include "grouped_gemm/kernel_sm90.cuh"
#include "grouped_gemm/packed_word.h"

namespace moe::sm90 {

// What the products below have to be multiplied by: 4-bit values come with 2^-126, 8-bit ones with 2^-120, nvfp4 scales with 2^107, the
// others with 2^63. float8: nothing.
template <Packing kPacking>
constexpr float kUnpackedScale = kPacking == Packing::nvfp4   ? float(1 << 19)
                                 : kPacking == Packing::mxfp4 ? float(1ull << 63)
                                 : kPacking == Packing::mxfp8 ? float(1ull << 57)
                                                              : 1.f;

// f.operator()<Format>() if tokens are rounded to a format. The formats are those that fused_moe takes with these weights; tiles of 128 tokens
// have no registers for it (is_possible()).
template <class C, class F>
__device__ __forceinline__ void with_rounding(Format format, F&& f) {
  if constexpr (C::kPacked && !C::kFloat8 && C::kMaxTokens <= kMostTokensRounded) {
    constexpr bool kFp4 = C::kPacking != Packing::mxfp8;
    if (format == Format::as_nvfp4 && C::kPacking == Packing::nvfp4) f.template operator()<Format::as_nvfp4>();
    if (format == Format::as_mxfp4 && C::kPacking == Packing::mxfp4) f.template operator()<Format::as_mxfp4>();
    if (format == Format::as_mxfp8 && C::kPacking != Packing::nvfp4) f.template operator()<Format::as_mxfp8>();
    if (format == Format::as_fp8_block && C::kPacking == Packing::nvfp4) f.template operator()<Format::as_fp8_block>();
    if (format == Format::as_fp8_block_e8m0 && kFp4) f.template operator()<Format::as_fp8_block_e8m0>();
  }
}

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
  uint32_t bits[4];
  unpack_word(words[0], bits);
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = i % 2 == 0 ? times_lower(bits[i], scales) : times_upper(bits[i], scales);
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

// Bytes 0 and 2, or 1 and 3, each in the lower half of 16 bits.
__device__ __forceinline__ uint32_t every_other_byte(uint32_t x, int first) { return __byte_perm(x, 0, first == 0 ? 0x4240 : 0x4341); }

// A thread's part of half a block, of 32 k, as it is stored.
template <Packing kPacking>
struct PackedRegisters {
  static constexpr int kStepWords = packed_value_bytes(kPacking) / 2048;
  uint32_t values[2][kStepWords], scales;

  __device__ __forceinline__ void load(uint32_t block, int half, uint32_t thread) {  // of the warpgroup
    const uint32_t source = block + (half * 128 + thread) * sizeof(values);
    if constexpr (kStepWords == 1)
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(values[0][0]), "=r"(values[1][0]) : "r"(source));
    else
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(values[0][0]), "=r"(values[0][1]), "=r"(values[1][0]), "=r"(values[1][1])
                   : "r"(source));
    const uint32_t address = block + packed_value_bytes(kPacking) + (kPacking == Packing::nvfp4 ? thread / 4 * 8 + half * 4 : thread / 4 * 4);
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(scales) : "r"(address));
    if (kPacking != Packing::nvfp4) scales = every_other_byte(scales, half);
  }

  // The operand of two steps of 16 k. nvfp4 scales are stored with 5 bits of exponent, to which 224 is added, and 3 of mantissa.
  __device__ __forceinline__ void unpack(uint32_t* a) const {
    if constexpr (kPacking == Packing::nvfp4) {
#pragma unroll
      for (int step = 0; step < 2; ++step) unpack_step(values[step], every_other_byte(scales, step) * 16 + 0x70007000, a + 4 * step);
    } else {
#pragma unroll
      for (int step = 0; step < 2; ++step) unpack_step(values[step], scales * 128, a + 4 * step);
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
  const uint32_t thread = read_thread() % 128;
  clear(total);
  fence_registers(total);
#pragma unroll 1
  for (int i = 0; i < k_stages * kPasses; ++i) {
    const int pass = i % kPasses;
    if (pass == 0) wait_full<C>(smem, pipe);
    const uint32_t weights = smem.weights + pipe.stage * C::kWeightBytes + warpgroup * C::kRowBlockBytes;
    const uint32_t tokens = descriptor_low(smem.tokens) + pipe.stage * (C::kTokenBytes >> 4);
#pragma unroll
    for (int g = 0; g < 2; ++g)
      for (int h = 0; h < kHalves; ++h) {
        const int half = half_of(pass, g, h);
        packed[g][h].load(weights + half / 2 * C::kBlockBytes + (C::kWaves == 2 ? g * C::kWarpgroups * C::kRowBlockBytes : 0), half % 2, thread);
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
            a[g] + 4 * step, tokens + half / 2 * (C::kBlockTokenBytes >> 4) + 4 * (half % 2) + 2 * (step % 2), total, true);
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

constexpr int kFewTokens = 16;
template <class C, int kTokens>
constexpr bool kIsFew = C::kMaxTokens <= 64 && kTokens <= kFewTokens;  // with larger tiles a kernel has no registers for both loops

// d[16, 8] += a[16, 16] * b[8, 16]^T, of a warp: a and d as a warp of wgmma has them (mma_sm90.cuh), b one of load_matrices()' pairs.
__device__ __forceinline__ void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices of 8 rows of 16 bytes; lane l has the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address));
}

template <class C, int kTokens>
struct FewTokens {
  static constexpr int kHalves = 2 * C::kStageBlocks, kGroups = kTokens / 8;  // 32 k each, 8 tokens each
  struct Stage {
    PackedRegisters<C::kPacking> packed[C::kWaves][kHalves];
    uint32_t tokens[kGroups][kHalves][4];
  };
  const Smem<C>& smem;
  const uint32_t thread = read_thread() % 128;
  uint32_t weights, tokens;  // addresses in stage 0; of tokens: this lane's, of the first half of a K block; the other half is at 64 bytes more or less

  __device__ FewTokens(const Smem<C>& smem, int warpgroup) : smem(smem), weights(smem.weights + warpgroup * C::kRowBlockBytes) {
    const uint32_t lane = thread % 32, row = lane % 8, chunk = lane / 8;
    tokens = smem.tokens + row * kRowBytes + (chunk ^ row) * 16;  // 128-byte swizzle
  }

  __device__ __forceinline__ void load(Stage& s, const PipelineState<C::kStages>& pipe) const {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const uint32_t block = weights + pipe.stage * C::kWeightBytes + half / 2 * C::kBlockBytes;
      const uint32_t rows = ((tokens + pipe.stage * C::kTokenBytes) ^ half % 2 * 64) + half / 2 * C::kBlockTokenBytes;
#pragma unroll
      for (int w = 0; w < C::kWaves; ++w) s.packed[w][half].load(block + w * C::kWarpgroups * C::kRowBlockBytes, half % 2, thread);
#pragma unroll
      for (int j = 0; j < kGroups; ++j) load_matrices(s.tokens[j][half], rows + j * 8 * kRowBytes);
    }
  }

  __device__ __forceinline__ void multiply(const Stage& s, float (&total)[C::kWaves * kTokens / 2]) const {
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
      for (int w = 0; w < C::kWaves; ++w) {
        uint32_t a[8];
        s.packed[w][half].unpack(a);
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int j = 0; j < kGroups; ++j) mma_m16n8k16(total + (w * kGroups + j) * 4, a + 4 * step, s.tokens[j][half] + 2 * step);
      }
  }
};

template <class C, int kTokens>
__device__ __forceinline__ void multiply_packed_few(const Smem<C>& smem, PipelineState<C::kStages>& pipe, int k_stages, int warpgroup,
                                                    float (&total)[C::kWaves * kTokens / 2]) {
  using Loop = FewTokens<C, kTokens>;
  const Loop loop(smem, warpgroup);
  clear(total);
#pragma unroll 1
  for (int kb = 0; kb < k_stages; ++kb, pipe.advance()) {
    wait_full<C>(smem, pipe);
    typename Loop::Stage stage;
    loop.load(stage, pipe);
    loop.multiply(stage, total);
    // An arrival does not wait for loads in flight, and the bulk copy that refills the stage may overtake them. Without the fence, in one of 50
    // calls of a layer with K = 12288, a warp multiplied by 16 rows' scales of a later stage.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    release<C>(smem, pipe.stage);
  }
}

}  // namespace moe::sm90
