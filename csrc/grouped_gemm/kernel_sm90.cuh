// out[r, n] = sum_k tokens[r, k] * weights[e, n, k] for rows r of expert e, on SM90 tensor cores.
//
// One persistent thread block per SM walks the tiles (expert, weight rows, tokens), found on the device from
// expert_offsets. Weight rows are wgmma's 64-row operand and tokens its N operand: the tile height in tokens goes down
// to 8, so decode wastes nothing, and gate and up of one channel meet in one thread when a warpgroup computes one wave
// of gate rows and one of up rows (kGated). The tokens of a neighbouring expert that a tile reads are never stored.
//
//   producer warp 0: TMA of weights and tokens, 128 bytes of K a stage, 128-byte swizzle
//   producer warps 1 to 3: products of the float32 scales (any strides), float8 only
//   1 or 2 consumer warpgroups: wgmma, promotion (float8), epilogue
//
// float8: the wgmma sum of each 128-K block is scaled by a_scale * b_scale and added to float32 registers in K order.
// The order of every sum depends on K alone, so a token's result is the same bits in every tile shape and batch.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/copy_sm90_tma.hpp>

#include "common/launch.h"
#include "grouped_gemm/mma_sm90.cuh"
#include "grouped_gemm/sm90_config.h"

namespace moe::sm90 {

constexpr int kMaxExperts = 1024;
constexpr int kSmemLimit = 232448;  // bytes a thread block can have on SM90

// kRows = 64 * kWarpgroups * kWaves weight rows by up to kMaxTokens tokens.
template <class Element_, int kMaxTokens_, int kWarpgroups_, int kWaves_, bool kGated_>
struct Config {
  using Element = Element_;
  static constexpr bool kFloat8 = std::is_same_v<Element, __nv_fp8_e4m3>;
  static constexpr bool kGated = kGated_;
  static constexpr int kMaxTokens = kMaxTokens_, kWarpgroups = kWarpgroups_, kWaves = kWaves_;
  static constexpr int kWaveRows = 64 * kWarpgroups;     // weight rows of one wave: within one 128-row scale block
  static constexpr int kRows = kWaveRows * kWaves;
  static constexpr int kConsumers = 128 * kWarpgroups;
  static constexpr int kThreads = kConsumers + 128;
  static constexpr int kWeightBytes = kRows * 128, kTokenBytes = kMaxTokens * 128;
  static constexpr int kWaveScales = kFloat8 ? (kMaxTokens < 16 ? 16 : kMaxTokens) : 0;  // floats a wave and stage
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes + 4 * kWaves * kWaveScales;
  static constexpr int kStoreTokens = kMaxTokens < 64 ? kMaxTokens : 64;
  static constexpr int kStoreBytes = kWarpgroups * kStoreTokens * 128;
  // Gated float8: act [kMaxTokens, 128] bytes, amax [8 warps, kMaxTokens], 1/scale [kMaxTokens].
  static constexpr int kQuantBytes = kGated && kFloat8 ? kMaxTokens * (128 + 4 * 4 * kWarpgroups + 4) : 0;
  static constexpr int kStagingBytes = kStoreBytes > kQuantBytes ? kStoreBytes : kQuantBytes;
  static constexpr int kFixedBytes = 1024 + kStagingBytes + 8 * (kMaxExperts + 1) + 16 * 16;
  static constexpr int kFittingStages = (kSmemLimit - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kFittingStages < 12 ? kFittingStages : 12;
  static constexpr int kSmemBytes = kFixedBytes + kStages * kStageBytes;
  static constexpr bool kRebalanceRegisters = kWarpgroups == 2;
  static_assert(!kGated || kWaves == 2);
  static_assert(!(kGated && kFloat8) || kWaveRows == 128, "a float8 scale group is 128 channels");
  static_assert(kStages >= 3);
};

using Barrier = cutlass::arch::ClusterTransactionBarrier;

// Shared memory of a thread block; operands as addresses in the shared window, so that no access is a generic one.
template <class C>
struct Smem {
  uint32_t weights, tokens, staging, scales;
  uint8_t* staging_ptr;
  Barrier* full;
  Barrier* empty;
  int32_t* offsets;     // [E + 1] first row of each expert
  int32_t* tile_begin;  // [E + 1] token tiles before each expert

  __device__ explicit Smem(uint8_t* raw) {
    uint8_t* base = raw + (-cute::cast_smem_ptr_to_uint(raw) & 1023u);
    weights = cute::cast_smem_ptr_to_uint(base);
    tokens = weights + C::kStages * C::kWeightBytes;
    staging = tokens + C::kStages * C::kTokenBytes;
    staging_ptr = base + (staging - weights);
    scales = staging + C::kStagingBytes;
    full = reinterpret_cast<Barrier*>(staging_ptr + C::kStagingBytes + C::kStages * 4 * C::kWaves * C::kWaveScales);
    empty = full + C::kStages;
    offsets = reinterpret_cast<int32_t*>(empty + C::kStages);
    tile_begin = offsets + kMaxExperts + 1;
  }
};

struct Tile {
  int32_t expert;
  int32_t part, row;          // first weight row, within its part (gated: the same row of both parts)
  int64_t token;              // first row of the token matrix
  int32_t valid_tokens;
  int32_t size;               // log2 of the tokens multiplied, 8 .. kMaxTokens: the smallest that holds valid_tokens
};

// Walks the tiles of this thread block; every role does it for itself. Within an expert, tiles that share weight rows
// are neighbours in time, so all but the first find them in L2.
template <class C>
struct TileWalk {
  const KernelParams& p;
  const Smem<C>& smem;
  int32_t row_tiles, tiles_per_part, total, index, expert = 0;

  __device__ TileWalk(const KernelParams& p, const Smem<C>& smem) : p(p), smem(smem) {
    constexpr int kStep = C::kGated ? C::kWaveRows : C::kRows;
    tiles_per_part = (p.part_rows + kStep - 1) / kStep;
    row_tiles = C::kGated ? tiles_per_part : tiles_per_part * p.parts;
    total = smem.tile_begin[p.num_experts] * row_tiles;
    index = blockIdx.x;
  }

  // Warp-collective: 32 experts are tried at once.
  __device__ bool next(Tile& tile) {
    if (index >= total) return false;
    const int lane = threadIdx.x & 31;
    while (true) {
      const int e = expert + lane;
      const bool past = e >= p.num_experts || smem.tile_begin[e + 1] * row_tiles > index;
      const uint32_t mask = __ballot_sync(~0u, past);
      if (mask) {
        expert += __ffs(mask) - 1;
        break;
      }
      expert += 32;
    }
    const int32_t begin = smem.tile_begin[expert], token_tiles = smem.tile_begin[expert + 1] - begin;
    const int32_t local = index - begin * row_tiles;
    const int32_t row_tile = local / token_tiles, token_tile = local - row_tile * token_tiles;
    tile.expert = expert;
    tile.part = C::kGated ? 0 : row_tile / tiles_per_part;
    tile.row = (row_tile - tile.part * tiles_per_part) * (C::kGated ? C::kWaveRows : C::kRows);
    const int32_t first = token_tile * C::kMaxTokens;
    tile.token = int64_t(smem.offsets[expert]) + first;
    tile.valid_tokens = min(C::kMaxTokens, smem.offsets[expert + 1] - smem.offsets[expert] - first);
    tile.size = max(3, 32 - __clz(tile.valid_tokens - 1));
    index += gridDim.x;
    return true;
  }
};

// The part and the row within it that wave w of a tile starts at.
template <class C>
__device__ __forceinline__ void wave_origin(const KernelParams& p, const Tile& tile, int w, int32_t& part, int32_t& row) {
  part = C::kGated ? (w == 0 ? p.gated.gate_part : 1 - p.gated.gate_part) : tile.part;
  row = C::kGated ? tile.row : tile.row + w * C::kWaveRows;
}

template <class C>
__device__ __forceinline__ void count_tiles(const KernelParams& p, const Smem<C>& smem) {
  for (int e = threadIdx.x; e <= p.num_experts; e += C::kThreads) smem.offsets[e] = p.expert_offsets[e];
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    int32_t before = 0;
    for (int first = 0; first < p.num_experts; first += 32) {
      const int e = first + lane;
      int32_t count = e < p.num_experts ? (smem.offsets[e + 1] - smem.offsets[e] + C::kMaxTokens - 1) / C::kMaxTokens : 0;
      for (int d = 1; d < 32; d *= 2) {
        const int32_t other = __shfl_up_sync(~0u, count, d);
        if (lane >= d) count += other;
      }
      if (e < p.num_experts) smem.tile_begin[e + 1] = before + count;
      before += __shfl_sync(~0u, count, 31);
    }
    if (lane == 0) smem.tile_begin[0] = 0;
  }
  __syncthreads();
}

__device__ __forceinline__ void tma_load(uint32_t smem, const CUtensorMap* map, uint64_t* barrier, uint64_t hint, int32_t c0, int32_t c1) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;"
               ::"r"(smem), "l"(map), "r"(cute::cast_smem_ptr_to_uint(barrier)), "r"(c0), "r"(c1), "l"(hint) : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t smem, const CUtensorMap* map, uint64_t* barrier, uint64_t hint, int32_t c0, int32_t c1,
                                         int32_t c2) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;"
               ::"r"(smem), "l"(map), "r"(cute::cast_smem_ptr_to_uint(barrier)), "r"(c0), "r"(c1), "r"(c2), "l"(hint) : "memory");
}

template <int kStages>
struct PipelineState {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Producer warp 0: one lane fills the stages with weights and tokens.
template <class C>
__device__ void load_tiles(const KernelParams& p, const Smem<C>& smem) {
  constexpr int kBlockK = 128 / int(sizeof(typename C::Element));
  constexpr uint64_t kHint = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  TileWalk<C> walk(p, smem);
  PipelineState<C::kStages> pipe;
  const bool leader = cute::elect_one_sync();
  for (Tile tile; walk.next(tile);) {
    const CUtensorMap* tokens = &p.tokens[tile.size - 3];
    for (int kb = 0; kb < p.k_blocks; ++kb, pipe.advance()) {
      smem.empty[pipe.stage].wait(pipe.phase ^ 1);
      if (!leader) continue;
      auto barrier = reinterpret_cast<uint64_t*>(&smem.full[pipe.stage]);
      smem.full[pipe.stage].arrive_and_expect_tx(C::kWeightBytes + (128 << tile.size));
      for (int w = 0; w < C::kWaves; ++w) {
        int32_t part, row;
        wave_origin<C>(p, tile, w, part, row);
        tma_load(smem.weights + pipe.stage * C::kWeightBytes + w * C::kWaveRows * 128, &p.weights, barrier, kHint, kb * kBlockK, row,
                 tile.expert * p.parts + part);
      }
      tma_load(smem.tokens + pipe.stage * C::kTokenBytes, tokens, barrier, kHint, kb * kBlockK, int32_t(tile.token));
    }
  }
}

// A thread's four token scales for two groups of eight tokens are neighbours: one 16-byte load in promote().
__device__ __forceinline__ int scale_index(int token) { return token / 16 * 16 + token % 8 / 2 * 4 + token / 8 % 2 * 2 + token % 2; }

// Producer warps 1 to 3, float8: a_scale * b_scale of each (wave, token), the K blocks dealt out in turn so that three
// loads from memory are in flight. The products leave the consumers one FMA per value.
template <class C>
__device__ void load_scales(const KernelParams& p, const Smem<C>& smem, int turn) {
  TileWalk<C> walk(p, smem);
  PipelineState<C::kStages> pipe;
  const int lane = threadIdx.x & 31;
  const int32_t blocks_per_part = (p.part_rows + 127) / 128;
  for (Tile tile; walk.next(tile);) {
    const float* b_scale[C::kWaves];
#pragma unroll
    for (int w = 0; w < C::kWaves; ++w) {
      int32_t part, row;
      wave_origin<C>(p, tile, w, part, row);
      const int32_t block = part * blocks_per_part + min(row / 128, blocks_per_part - 1);
      b_scale[w] = p.b_scale.data + tile.expert * p.b_scale.stride_group + block * p.b_scale.stride_row;
    }
    const float* a_scale = p.a_scale.data + (tile.token + lane) * p.a_scale.stride_row;
    for (int kb = 0; kb < p.k_blocks; ++kb, pipe.advance()) {
      turn = turn == 0 ? 2 : turn - 1;
      if (turn != 2) {
        a_scale += p.a_scale.stride_k;
        continue;
      }
      float a[(C::kMaxTokens + 31) / 32], b[C::kWaves];
#pragma unroll
      for (int i = 0; i < (C::kMaxTokens + 31) / 32; ++i)
        a[i] = lane + 32 * i < tile.valid_tokens ? __ldg(a_scale + 32 * i * p.a_scale.stride_row) : 0.f;
      a_scale += p.a_scale.stride_k;
#pragma unroll
      for (int w = 0; w < C::kWaves; ++w) b[w] = __ldg(b_scale[w] + kb * p.b_scale.stride_k);
      smem.empty[pipe.stage].wait(pipe.phase ^ 1);
      const uint32_t scales = smem.scales + pipe.stage * (4 * C::kWaves * C::kWaveScales);
#pragma unroll
      for (int i = 0; i < (C::kMaxTokens + 31) / 32; ++i) {
        const int token = lane + 32 * i;
        if (token < (1 << tile.size)) {
#pragma unroll
          for (int w = 0; w < C::kWaves; ++w)
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(scales + 4 * (w * C::kWaveScales + scale_index(token))), "f"(__fmul_rn(a[i], b[w])) : "memory");
        }
      }
      __syncwarp();
      if (lane == 0) smem.full[pipe.stage].arrive();
    }
  }
}

// The scales of one wave on their way to promote(): those of the first 64 tokens are loaded while wgmma runs, the others
// while the first are used (all at once would take more registers than there are).
template <int kTokens>
struct ScaleLoads {
  static constexpr int kQuads = kTokens < 16 ? 1 : kTokens / 16, kEarly = kQuads < 4 ? kQuads : 4;
  float quads[kEarly][4];
  uint32_t address;

  __device__ void load(int quad) {
    float(&q)[4] = quads[quad % kEarly];
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(q[0]), "=f"(q[1]), "=f"(q[2]), "=f"(q[3]) : "r"(address + quad * 64));
  }
  __device__ void start(uint32_t scales) {
    address = scales + (threadIdx.x & 3) * 16;
#pragma unroll
    for (int quad = 0; quad < kEarly; ++quad) load(quad);
  }
};

// total[row, token] += scale[token] * partial[row, token]
template <int kTokens>
__device__ __forceinline__ void promote(float (&total)[kTokens / 2], const float (&partial)[kTokens / 2], ScaleLoads<kTokens>& scales) {
#pragma unroll
  for (int quad = 0; quad < scales.kQuads; ++quad) {
    const float(&s)[4] = scales.quads[quad % scales.kEarly];
#pragma unroll
    for (int i = 0; i < 8 && 8 * quad + i < kTokens / 2; ++i)
      total[8 * quad + i] = fmaf(s[i / 4 * 2 + i % 2], partial[8 * quad + i], total[8 * quad + i]);
    if (quad + scales.kEarly < scales.kQuads) scales.load(quad + scales.kEarly);
  }
}

template <class C>
__device__ __forceinline__ void release(const Smem<C>& smem, int stage) {
  __syncwarp();
  if ((threadIdx.x & 31) == 0) smem.empty[stage].arrive();
}

// float8 main loop: wgmma sums of one K block each, promoted to float32 totals. Up to 64 tokens there are registers for one
// sum per wave, and the second wave multiplies while the first is promoted.
template <class C, int kTokens>
__device__ __forceinline__ void multiply_float8(const Smem<C>& smem, PipelineState<C::kStages>& pipe, int k_blocks, int warpgroup,
                                                float (&total)[C::kWaves][kTokens / 2]) {
  constexpr int kPartials = kTokens <= 64 ? C::kWaves : 1;
  float partial[kPartials][kTokens / 2];
#pragma unroll
  for (int w = 0; w < C::kWaves; ++w)
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) total[w][i] = 0.f;
  for (int kb = 0; kb < k_blocks; ++kb, pipe.advance()) {
    const uint32_t scales = smem.scales + pipe.stage * (4 * C::kWaves * C::kWaveScales);
    const uint64_t token_desc = smem_descriptor(smem.tokens + pipe.stage * C::kTokenBytes);
    const uint64_t weight_desc = smem_descriptor(smem.weights + pipe.stage * C::kWeightBytes + warpgroup * 64 * 128);
    auto issue = [&](int w, float(&d)[kTokens / 2]) {
      fence_registers(d);
      cute::warpgroup_arrive();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk)  // 32 bytes of K each: descriptor + 2
        Mma<typename C::Element, kTokens>::run(weight_desc + w * (C::kWaveRows * 128 >> 4) + 2 * kk, token_desc + 2 * kk, d, kk > 0);
      cute::warpgroup_commit_batch();
    };
    smem.full[pipe.stage].wait(pipe.phase);
    ScaleLoads<kTokens> loads[kPartials];
    if constexpr (kPartials == C::kWaves) {
#pragma unroll
      for (int w = 0; w < C::kWaves; ++w) issue(w, partial[w]);
#pragma unroll
      for (int w = 0; w < C::kWaves; ++w) loads[w].start(scales + 4 * w * C::kWaveScales);
#pragma unroll
      for (int w = 0; w < C::kWaves; ++w) {
        if (w + 1 < C::kWaves) cute::warpgroup_wait<1>();
        else cute::warpgroup_wait<0>();
        fence_registers(partial[w]);
        promote<kTokens>(total[w], partial[w], loads[w]);
      }
    } else {
#pragma unroll
      for (int w = 0; w < C::kWaves; ++w) {
        issue(w, partial[0]);
        loads[0].start(scales + 4 * w * C::kWaveScales);
        cute::warpgroup_wait<0>();
        fence_registers(partial[0]);
        promote<kTokens>(total[w], partial[0], loads[0]);
      }
    }
    release<C>(smem, pipe.stage);
  }
}

// 16-bit main loop: one K block in flight while the next is issued.
template <class C, int kTokens>
__device__ __forceinline__ void multiply_16bit(const Smem<C>& smem, PipelineState<C::kStages>& pipe, int k_blocks, int warpgroup,
                                               float (&total)[C::kWaves][kTokens / 2]) {
  int previous = -1;
#pragma unroll
  for (int w = 0; w < C::kWaves; ++w) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) total[w][i] = 0.f;
    fence_registers(total[w]);
  }
  for (int kb = 0; kb < k_blocks; ++kb, pipe.advance()) {
    const uint64_t token_desc = smem_descriptor(smem.tokens + pipe.stage * C::kTokenBytes);
    const uint64_t weight_desc = smem_descriptor(smem.weights + pipe.stage * C::kWeightBytes + warpgroup * 64 * 128);
    smem.full[pipe.stage].wait(pipe.phase);
    cute::warpgroup_arrive();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk)
#pragma unroll
      for (int w = 0; w < C::kWaves; ++w)
        Mma<typename C::Element, kTokens>::run(weight_desc + w * (C::kWaveRows * 128 >> 4) + 2 * kk, token_desc + 2 * kk, total[w],
                                               true);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    if (previous >= 0) release<C>(smem, previous);
    previous = pipe.stage;
  }
  cute::warpgroup_wait<0>();
#pragma unroll
  for (int w = 0; w < C::kWaves; ++w) fence_registers(total[w]);
  release<C>(smem, previous);
}

}  // namespace moe::sm90
