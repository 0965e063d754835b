// Main loops of the SM90 grouped GEMM, one for each of {float8, 16 bits} x {narrow, wide tile}: they add all K blocks of a
// tile into `total`, float32 registers of the consumers, wave after wave.
//   narrow: wave w is total[w * kTokens / 2 ..] = [64 weight rows of this warpgroup, kTokens tokens]
//   wide:   wave w is total[w * 64 ..]          = [64 tokens of this warpgroup, 128 weight rows]; half-wide: of all 64 tokens, total[0 ..] is
//           the wave of this warpgroup's number
//   tall:   wide, and the tokens past 128 as in a narrow tile of kExtraTokens, in `extra`
// in wgmma's register layout (mma_sm90.cuh).
#pragma once
#include "grouped_gemm/packed_float8_mainloop_sm90.cuh"
#include "grouped_gemm/packed_mainloop_sm90.cuh"

namespace moe::sm90 {

constexpr int kWideBytes = 128 * kRowBytes;  // 128 weight rows: wave w + 1 after wave w

enum class TileShape { narrow, half_wide, wide, tall };

// Low words of the descriptors of a stage's operands: what this warpgroup has of them. Narrow: its rows of each wave; wide: its tokens;
// half-wide: its wave.
template <class C, TileShape kShape>
struct Operands {
  static constexpr int kWeightRows = kShape == TileShape::narrow ? 64 : kShape == TileShape::half_wide ? C::kWaveRows : 0;
  static constexpr int kTokenRows = kShape == TileShape::wide || kShape == TileShape::tall ? 64 : 0;
  uint32_t weights, tokens;
  __device__ Operands(const Smem<C>& smem, int stage, int warpgroup)
      : weights(descriptor_low(smem.weights + warpgroup * kWeightRows * kRowBytes) + stage * (C::kWeightBytes >> 4)),
        tokens(descriptor_low(smem.tokens + warpgroup * kTokenRows * kRowBytes) + stage * (C::kTokenBytes >> 4)) {}
};

// float8, narrow: one wgmma sum for each wave or, where a stage has two of them, each K block, in `partial`.
template <class C, int kTokens>
struct NarrowFloat8 {
  static_assert(C::kWaves == 1 || C::kStageBlocks == 1);
  static constexpr int kWave = kTokens / 2, kQuads = kTokens < 16 ? 1 : kTokens / 16, kSums = C::kWaves * C::kStageBlocks;
  static constexpr int kGroups = C::kWaves;  // of wgmma, a stage
  using Sum = float[kSums * kWave];
  using Total = float[C::kWaves * kWave];
  const Smem<C>& smem;
  PipelineState<C::kStages> pipe;  // of the stage to be issued next
  int warpgroup;

  __device__ void issue(Sum& partial) {
    const Operands<C, TileShape::narrow> in(smem, pipe.stage, warpgroup);
    wait_full<C>(smem, pipe);
    fence_registers(partial);
    unrolled<C::kWaves>([&](auto w) {
      cute::warpgroup_arrive();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk)  // 32 bytes of K each: descriptor + 2
        unrolled<C::kStageBlocks>([&](auto h) {
          Mma<typename C::Element, kTokens, (w + h) * kWave>::run(
              in.weights + h * (C::kBlockWeightBytes >> 4) + w * (C::kWaveRows * kRowBytes >> 4) + 2 * kk,
              in.tokens + h * (C::kBlockTokenBytes >> 4) + 2 * kk, partial, kk > 0);
        });
      cute::warpgroup_commit_batch();
    });
    pipe.advance();
  }

  // total += scale * partial, of a stage; `kAhead` wgmma groups were issued after those of `partial`.
  template <int kAhead>
  __device__ void promote(int stage, Sum& partial, Total& total) {
    const uint32_t scales = smem.scales + stage * C::kScaleBytes + (threadIdx.x & 3) * 16;
    float scale[kSums * kQuads][4];  // loaded while wgmma runs
#pragma unroll
    for (int q = 0; q < kSums * kQuads; ++q)
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(scale[q][0]), "=f"(scale[q][1]), "=f"(scale[q][2]), "=f"(scale[q][3])
                   : "r"(scales + q / kQuads * (4 * C::kWaveScales) + q % kQuads * 64));
    unrolled<kSums>([&](auto sum) {
      constexpr int kWaveOf = C::kWaves == 1 ? 0 : sum;
      cute::warpgroup_wait<kAhead + kGroups - 1 - kWaveOf>();
      fence_registers(partial);
#pragma unroll
      for (int i = 0; i < kWave; ++i)
        total[kWaveOf * kWave + i] =
            fmaf(scale[sum * kQuads + i / 8][i % 8 / 4 * 2 + i % 2], partial[sum * kWave + i], total[kWaveOf * kWave + i]);
    });
    release<C>(smem, stage);
  }
};

// The second wave multiplies while the first is promoted. Up to 32 tokens, where a stage is little work, the next stage
// is issued before the last one is promoted.
template <class C, int kTokens>
__device__ __forceinline__ void multiply_float8(const Smem<C>& smem, PipelineState<C::kStages>& pipe, int k_stages, int warpgroup,
                                                float (&total)[C::kWaves * kTokens / 2]) {
  using Loop = NarrowFloat8<C, kTokens>;
  Loop loop{smem, pipe, warpgroup};
  typename Loop::Sum partial;
  clear(total);
  if constexpr (kTokens <= 32) {
    typename Loop::Sum other;
    auto stage_after = [](int stage) { return stage + 1 == C::kStages ? 0 : stage + 1; };
    int stage = pipe.stage;
    loop.issue(partial);
#pragma unroll 1
    for (int left = k_stages - 1;; left -= 2) {  // of `left` stages nothing is issued; `partial` is in flight
      if (left == 0) {
        loop.template promote<0>(stage, partial, total);
        break;
      }
      loop.issue(other);
      loop.template promote<Loop::kGroups>(stage, partial, total);
      stage = stage_after(stage);
      if (left == 1) {
        loop.template promote<0>(stage, other, total);
        break;
      }
      loop.issue(partial);
      loop.template promote<Loop::kGroups>(stage, other, total);
      stage = stage_after(stage);
    }
  } else {
#pragma unroll 1
    for (int kb = 0; kb < k_stages; ++kb) {
      const int stage = loop.pipe.stage;
      loop.issue(partial);
      loop.template promote<0>(stage, partial, total);
    }
  }
  pipe = loop.pipe;
}

// float8, wide: registers for one wgmma sum only; the other warpgroup multiplies while this one promotes.
template <class C, TileShape kShape>
__device__ __forceinline__ void multiply_float8_wide(const Smem<C>& smem, PipelineState<C::kStages>& pipe, int k_blocks, int warpgroup,
                                                     float (&total)[C::kWaves * 64]) {
  constexpr bool kHalfWide = kShape == TileShape::half_wide;
  float partial[64];
  clear(total);
  const int token = threadIdx.x % (kHalfWide ? 128 : 256) / 32 * 16 + threadIdx.x % 32 / 4;  // this thread's first; its second is eight below
  const int first_scale = kHalfWide ? warpgroup * C::kWaveScales : 0;
  const uint32_t scale_offset[2] = {4u * (scale_index(token) + first_scale), 4u * (scale_index(token + 8) + first_scale)};
#pragma unroll 1
  for (int kb = 0; kb < k_blocks; ++kb, pipe.advance()) {
    const Operands<C, kShape> in(smem, pipe.stage, warpgroup);
    const uint32_t scales = smem.scales + pipe.stage * C::kScaleBytes;
    wait_full<C>(smem, pipe);
#pragma unroll
    for (int w = 0; w < (kHalfWide ? 1 : C::kWaves); ++w) {
      fence_registers(partial);
      cute::warpgroup_arrive();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk)
        Mma<typename C::Element, 128>::run(in.tokens + 2 * kk, in.weights + w * (kWideBytes >> 4) + 2 * kk, partial, kk > 0);
      cute::warpgroup_commit_batch();
      float scale[2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(scale[half]) : "r"(scales + w * (4 * C::kWaveScales) + scale_offset[half]));
      cute::warpgroup_wait<0>();
      fence_registers(partial);
#pragma unroll
      for (int i = 0; i < 64; ++i) total[w * 64 + i] = fmaf(scale[i / 2 % 2], partial[i], total[w * 64 + i]);
    }
    release<C>(smem, pipe.stage);
  }
}

// 16 bits, narrow and wide: one K block in flight while the next is issued. `issue(stage)` starts the wgmma of a block. hold: the last stage.
template <class C, class Issue, int... kCount>
__device__ __forceinline__ void multiply_16bit(const Smem<C>& smem, PipelineState<C::kStages>& pipe, int k_stages, bool hold, int& held, Issue&& issue,
                                               float (&... sums)[kCount]) {
  int previous = -1;
  (clear(sums), ...);
  (fence_registers(sums), ...);
#pragma unroll 1
  for (int kb = 0; kb < k_stages; ++kb, pipe.advance()) {
    wait_full<C>(smem, pipe);
    cute::warpgroup_arrive();
    issue(pipe.stage);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    if (previous >= 0) release<C>(smem, previous);
    else release_held<C>(smem, held);
    previous = pipe.stage;
  }
  cute::warpgroup_wait<0>();
  (fence_registers(sums), ...);
  if (C::kHoldsStage && hold) held = previous;
  else release<C>(smem, previous);
}

template <class C, int kTokens>
__device__ __forceinline__ void multiply(const Smem<C>& smem, PipelineState<C::kStages>& pipe, int k_stages, int warpgroup, int& held,
                                         float (&total)[C::kWaves * kTokens / 2]) {
  if constexpr (C::kPacked && C::kFloat8) {
    multiply_packed_float8<C, kTokens>(smem, pipe, k_stages, warpgroup, total);
  } else if constexpr (C::kPacked && kIsFew<C, kTokens>) {
    multiply_packed_few<C, kTokens>(smem, pipe, k_stages, warpgroup, total);
  } else if constexpr (C::kPacked) {
    multiply_packed<C, kTokens>(smem, pipe, k_stages, warpgroup, total);
  } else if constexpr (C::kFloat8) {
    multiply_float8<C, kTokens>(smem, pipe, k_stages, warpgroup, total);
  } else {
    const auto issue = [&](int stage) {
      const Operands<C, TileShape::narrow> in(smem, stage, warpgroup);
#pragma unroll
      for (int kk = 0; kk < 4 * C::kStageBlocks; ++kk)
        unrolled<C::kWaves>([&](auto w) {
          Mma<typename C::Element, kTokens, w * kTokens / 2>::run(
              in.weights + kk / 4 * (C::kBlockWeightBytes >> 4) + w * (C::kWaveRows * kRowBytes >> 4) + 2 * (kk % 4),
              in.tokens + kk / 4 * (C::kBlockTokenBytes >> 4) + 2 * (kk % 4), total, true);
        });
    };
    multiply_16bit<C>(smem, pipe, k_stages, false, held, issue, total);
  }
}

template <class C, TileShape kShape, int kExtra>
__device__ __forceinline__ void multiply_wide(const Smem<C>& smem, PipelineState<C::kStages>& pipe, int k_stages, int warpgroup, bool hold, int& held,
                                              float (&total)[C::kWaves * 64], float (&extra)[kExtra]) {
  if constexpr (C::kFloat8) {
    multiply_float8_wide<C, kShape>(smem, pipe, k_stages, warpgroup, total);
  } else {
    // All waves in one instruction: the tokens are read from shared memory once.
    const auto issue = [&](int stage) {
      const Operands<C, kShape> in(smem, stage, warpgroup);
      const Operands<C, TileShape::narrow> narrow(smem, stage, warpgroup);
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) {
        Mma<typename C::Element, (kShape == TileShape::half_wide ? 1 : C::kWaves) * 128>::run(in.tokens + 2 * kk, in.weights + 2 * kk, total, true);
        if constexpr (kShape == TileShape::tall)
          unrolled<C::kWaves>([&](auto w) {
            Mma<typename C::Element, C::kExtraTokens, w * C::kExtraTokens / 2>::run(narrow.weights + w * (C::kWaveRows * kRowBytes >> 4) + 2 * kk,
                                                                                    narrow.tokens + (C::kMaxTokens * kRowBytes >> 4) + 2 * kk, extra, true);
          });
      }
    };
    if constexpr (kShape == TileShape::tall) multiply_16bit<C>(smem, pipe, k_stages, hold, held, issue, total, extra);
    else multiply_16bit<C>(smem, pipe, k_stages, hold, held, issue, total);
  }
}

}  // namespace moe::sm90
