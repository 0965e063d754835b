// out[r, n] = sum_k tokens[r, k] * weights[e, n, k] for rows r of expert e, on SM90 tensor cores.
//
// One persistent thread block per SM draws tiles (expert, weight rows, tokens) from a counter in device memory and finds
// them in expert_offsets. Drawn in order, tiles with the same weight rows run at the same time, so that memory is read once
// for all of them (dealt out in advance, thread blocks drift apart: DeepSeek-V3 EP8 in bf16 read its weights twice at 8192
// tokens, and was bound by that). The tokens of a neighbouring expert that a tile reads are never stored.
//
//   producer warp 0: draws tiles; TMA of weights and tokens, 128 bytes of K a stage, 128-byte swizzle
//   producer warps 1 to 3: products of the float32 scales (any strides), float8 only
//   1 or 2 consumer warpgroups: wgmma, promotion (float8), epilogue
//
// Narrow tiles (8 to 64 tokens): weight rows are wgmma's 64-row operand and tokens its N operand ("swap A/B"), so that
// decode multiplies hardly more tokens than there are. Wide tiles (128 tokens): tokens are the 64-row operand, one half
// for each warpgroup; a thread then needs two token scales a K block, where narrow tiles read one for each of its tokens
// (at 128 tokens ncu showed L1/shared memory 79 % busy with those, 50 % without). In both, gate and up of one channel meet in one
// thread, because a warpgroup computes one wave of gate rows and one of up rows (kGated).
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
constexpr int kTileSlots = 4;       // tiles drawn and not finished
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
  static constexpr int kWaveScales = kFloat8 ? kMaxTokens : 0;  // floats a wave and stage
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes + 4 * kWaves * kWaveScales;
  // Epilogue: 64 tokens x 64 columns of 16 bits for each warpgroup. Gated float8, narrow: act [64, 128] bytes, amax
  // [8 warps, 64], 1/scale [64]; wide: act [16, 128] bytes for each warp.
  static constexpr int kStoreBytes = kWarpgroups * 64 * 128;
  static constexpr int kQuantBytes = kGated && kFloat8 ? 64 * (128 + 4 * 4 * kWarpgroups + 4) : 0;
  static constexpr int kStagingBytes = kStoreBytes > kQuantBytes ? kStoreBytes : kQuantBytes;
  static constexpr int kReaders = kConsumers / 32 + (kFloat8 ? 3 : 0);  // warps that are told of a tile
  static constexpr int kFixedBytes = 1024 + kStagingBytes + 8 * (kMaxExperts + 1) + 16 * 16 + kTileSlots * 48;
  static constexpr int kFittingStages = (kSmemLimit - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kFittingStages < 12 ? kFittingStages : 12;
  static constexpr int kSmemBytes = kFixedBytes + kStages * kStageBytes;
  // With 64 and 128 tokens in one kernel of two waves, ptxas runs out of registers and makes every wgmma wait (C7511):
  // 33 to 64 tokens then take a wide tile.
  static constexpr bool kHas64 = kMaxTokens == 64 || kWaves == 1;
  static constexpr bool kRebalanceRegisters = kWarpgroups == 2;
  static_assert(kMaxTokens == 64 || (kMaxTokens == 128 && kWarpgroups == 2), "a wide tile gives 64 tokens to each of two warpgroups");
  static_assert(!kGated || kWaves == 2);
  static_assert(!(kGated && kFloat8) || kWaveRows == 128, "a float8 scale group is 128 channels");
  static_assert(kStages >= 3);
};

using Barrier = cutlass::arch::ClusterTransactionBarrier;

struct Tile {
  int32_t expert;
  int32_t part, row;      // first weight row, within its part (gated: the same row of both parts)
  int32_t token;          // first row of the token matrix
  int32_t valid_tokens;
  int32_t size;           // log2 of the tokens multiplied, 8 .. kMaxTokens: one that holds valid_tokens; 0: no more tiles
};

// Shared memory of a thread block; operands as addresses in the shared window, so that no access is a generic one.
template <class C>
struct Smem {
  uint32_t weights, tokens, staging, scales;
  uint8_t* staging_ptr;
  Barrier* full;        // stages
  Barrier* empty;
  Barrier* tile_full;   // tiles
  Barrier* tile_empty;
  Tile* tiles;
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
    tile_full = empty + C::kStages;
    tile_empty = tile_full + kTileSlots;
    tiles = reinterpret_cast<Tile*>(tile_empty + kTileSlots);
    offsets = reinterpret_cast<int32_t*>(tiles + kTileSlots);
    tile_begin = offsets + kMaxExperts + 1;
  }
};

// Finds tiles by their index, in any increasing order. Within an expert, tiles with the same weight rows follow each other.
template <class C>
struct TileFinder {
  const KernelParams& p;
  const Smem<C>& smem;
  int32_t row_tiles, tiles_per_part, total, expert = 0;

  __device__ TileFinder(const KernelParams& p, const Smem<C>& smem) : p(p), smem(smem) {
    constexpr int kStep = C::kGated ? C::kWaveRows : C::kRows;
    tiles_per_part = (p.part_rows + kStep - 1) / kStep;
    row_tiles = C::kGated ? tiles_per_part : tiles_per_part * p.parts;
    total = smem.tile_begin[p.num_experts] * row_tiles;
  }

  // Warp-collective: 32 experts are tried at once.
  __device__ Tile find(int32_t index) {
    if (index >= total) return {};
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
    const int32_t row_tile = local / token_tiles, first = (local - row_tile * token_tiles) * C::kMaxTokens;
    Tile tile;
    tile.expert = expert;
    tile.part = C::kGated ? 0 : row_tile / tiles_per_part;
    tile.row = (row_tile - tile.part * tiles_per_part) * (C::kGated ? C::kWaveRows : C::kRows);
    tile.token = smem.offsets[expert] + first;
    tile.valid_tokens = min(C::kMaxTokens, smem.offsets[expert + 1] - tile.token);
    tile.size = max(3, 32 - __clz(tile.valid_tokens - 1));
    if (!C::kHas64 && tile.size == 6) tile.size = 7;
    return tile;
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

// Producer warp 0: draws tiles, tells the other warps, and fills the stages. The next tile is drawn before the current one
// is loaded, so the counter's latency is hidden.
template <class C>
__device__ void load_tiles(const KernelParams& p, const Smem<C>& smem) {
  constexpr int kBlockK = 128 / int(sizeof(typename C::Element));
  constexpr uint64_t kHint = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  TileFinder<C> finder(p, smem);
  PipelineState<C::kStages> pipe;
  PipelineState<kTileSlots> slot;
  const bool leader = cute::elect_one_sync();
  for (int32_t index = blockIdx.x, drawn;; index = __shfl_sync(~0u, drawn, 0) + gridDim.x, slot.advance()) {
    const Tile tile = finder.find(index);
    if ((threadIdx.x & 31) == 0 && tile.size != 0) drawn = atomicAdd(p.tile_counter, 1);
    smem.tile_empty[slot.stage].wait(slot.phase ^ 1);
    if (leader) {
      smem.tiles[slot.stage] = tile;
      smem.tile_full[slot.stage].arrive();
    }
    if (tile.size == 0) return;
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
      tma_load(smem.tokens + pipe.stage * C::kTokenBytes, tokens, barrier, kHint, kb * kBlockK, tile.token);
    }
  }
}

// The tile that a reader warp works on next; released, by the same warp, once it is finished.
template <class C>
__device__ __forceinline__ const Tile& wait_tile(const Smem<C>& smem, const PipelineState<kTileSlots>& slot) {
  smem.tile_full[slot.stage].wait(slot.phase);
  return smem.tiles[slot.stage];
}
template <class C>
__device__ __forceinline__ void release_tile(const Smem<C>& smem, PipelineState<kTileSlots>& slot) {
  __syncwarp();
  if ((threadIdx.x & 31) == 0) smem.tile_empty[slot.stage].arrive();
  slot.advance();
}

// A thread's four token scales for two groups of eight tokens are neighbours: one 16-byte load in multiply_float8().
__device__ __forceinline__ int scale_index(int token) { return token / 16 * 16 + token % 8 / 2 * 4 + token / 8 % 2 * 2 + token % 2; }

// Producer warps 1 to 3, float8: a_scale * b_scale of each (wave, token), the K blocks dealt out in turn so that three
// loads from memory are in flight. The products leave the consumers one FMA per value.
template <class C>
__device__ void load_scales(const KernelParams& p, const Smem<C>& smem, int turn) {
  PipelineState<C::kStages> pipe;
  PipelineState<kTileSlots> slot;
  const int lane = threadIdx.x & 31;
  const int32_t blocks_per_part = (p.part_rows + 127) / 128;
  while (true) {
    const Tile tile = wait_tile(smem, slot);
    release_tile(smem, slot);  // copied
    if (tile.size == 0) return;
    const float* b_scale[C::kWaves];
#pragma unroll
    for (int w = 0; w < C::kWaves; ++w) {
      int32_t part, row;
      wave_origin<C>(p, tile, w, part, row);
      const int32_t block = part * blocks_per_part + min(row / 128, blocks_per_part - 1);
      b_scale[w] = p.b_scale.data + tile.expert * p.b_scale.stride_group + block * p.b_scale.stride_row;
    }
    const float* a_scale = p.a_scale.data + int64_t(tile.token + lane) * p.a_scale.stride_row;
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

}  // namespace moe::sm90
