// The producer warps of the SM90 grouped GEMM.
#pragma once
#include "grouped_gemm/kernel_sm90.cuh"

namespace moe::sm90 {

__device__ __forceinline__ void tma_load(uint32_t smem, const CUtensorMap* map, Barrier& barrier, int32_t c0, int32_t c1) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(smem), "l"(map),
               "r"(cute::cast_smem_ptr_to_uint(&barrier)), "r"(c0), "r"(c1) : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t smem, const CUtensorMap* map, Barrier& barrier, int32_t c0, int32_t c1, int32_t c2) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(smem), "l"(map),
               "r"(cute::cast_smem_ptr_to_uint(&barrier)), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t smem, const CUtensorMap* map, Barrier& barrier, int32_t c0, int32_t c1, int32_t c2, int32_t c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem), "l"(map),
               "r"(cute::cast_smem_ptr_to_uint(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

// The scales of the weights of wave w of a tile, one a K block.
template <class C>
__device__ __forceinline__ const float* weight_scales(const KernelParams& p, const Tile& tile, int w) {
  const GemmParams& g = p.gemm[tile.gemm];
  const int32_t blocks_per_part = (g.part_rows + 127) / 128;
  int32_t part, row;
  wave_origin<C>(p, tile, w, part, row);
  const int32_t block = part * blocks_per_part + min(row / 128, blocks_per_part - 1);
  return g.b_scale.data + tile.expert * g.b_scale.stride_group + block * g.b_scale.stride_row;
}

template <class C>
constexpr int kBlockK = 128 / int(sizeof(typename C::Element));

// Warp 0: a tile's weights; float8: first their scales, to L2, long before the token warps read them. All lanes go through the loop, with what the
// compiler knows to be uniform: else it moves the operands of each copy to uniform registers in a loop of its own. One lane is elected: of a lane chosen
// by its number the compiler does not know that it is alone, and makes a loop again (history, 39). Copies are few and large: with one for each 64 rows
// of packed weights this warp was what the others waited for (history, 34). Calls before_stage(0), before_stage(1), ..
template <class C, class F>
__device__ __forceinline__ void load_tile(const KernelParams& p, const Smem<C>& smem, const Tile& tile, PipelineState<C::kStages>& pipe, F&& before_stage) {
  auto uniform = [](int x) { return __shfl_sync(~0u, x, 0); };
  const GemmParams& g = p.gemm[uniform(tile.gemm)];
  constexpr int kCopies = C::kRows / C::kCopyRows;
  const int rows = C::kSplit ? g.tile_rows : C::kRows, lane = threadIdx.x % kLanes;
  const int bytes = C::kPacked ? rows / kPackedBlock * C::kRowBlockBytes : C::kStageBlocks * kRowBytes * rows;
  int row[kCopies], group[kCopies];
  for (int i = 0; i < kCopies; ++i) {
    int32_t part;
    block_origin<C>(p, tile, i * (C::kCopyRows / 64), part, row[i]);
    row[i] = uniform(row[i]);
    group[i] = uniform(tile.expert * g.parts + part);
    if constexpr (C::kFloat8 && !C::kPacked)
      for (int kb = lane; kb < g.k_blocks; kb += kLanes)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(weight_scales<C>(p, tile, i) + kb * g.b_scale.stride_k));
  }
  pipe = {uniform(pipe.stage), uint32_t(uniform(pipe.phase))};
#pragma unroll 1
  for (int kb = 0; kb < g.k_stages; ++kb, pipe.advance()) {
    before_stage(kb);
    if (C::kStagesAtOnce > 1 && kb % C::kStagesAtOnce == 0 && kb + C::kStagesAtOnce <= g.k_stages) {
      auto last = pipe;
      last.advance(C::kStagesAtOnce - 1);
      smem.empty[last.stage].wait(last.phase ^ 1);
    }
    smem.empty[pipe.stage].wait(pipe.phase ^ 1);
    if (!cute::elect_one_sync()) continue;
    Barrier& full = smem.full[pipe.stage];
    full.arrive_and_expect_tx(bytes);
    const uint32_t weights = smem.weights + pipe.stage * C::kWeightBytes;
    for (int i = 0; i < kCopies; ++i) {
      if (i * C::kCopyRows >= rows) break;
      if constexpr (C::kPacked) {
        tma_load(weights + i * (C::kCopyRows / kPackedBlock) * C::kRowBlockBytes, &g.weights, full, 0, kb * C::kStageWeightBlocks * kPackedPieces<C::kPacking>,
                 row[i] / kPackedBlock, group[i]);
      } else {
        for (int h = 0; h < C::kStageBlocks; ++h)
          tma_load(weights + h * C::kBlockWeightBytes + i * C::kCopyRows * kRowBytes, &g.weights, full, (kb * C::kStageBlocks + h) * kBlockK<C>, row[i],
                   group[i]);
      }
    }
  }
}

// Gated: GEMM2 is told of a tile of act once all consumers have stored it. That takes 2000 to 4000 cycles, which the consumers spent at every
// tile when they did it (history, 33).
template <class C>
__device__ __forceinline__ void signal_act(const KernelParams& p, const Smem<C>& smem, const TileSlot& slot, int32_t token_tile) {
  smem.tile_empty[slot.stage()].wait(slot.phase());
  if (threadIdx.x % kLanes == 0) add_release(p.ready + token_tile);
}

// Returns, in one lane, once act of a token tile is in memory, for TMA and for loads that do not look in L1.
__device__ __forceinline__ void poll_act(const KernelParams& p, int32_t token_tile) {
  while (load_acquire(p.ready + token_tile) < p.ready_count) __nanosleep(32);
}

// By a warp of its own (kSignalWarp), which also finds out (kAsksForActs), before the token warps need it, when act of GEMM2's tiles is complete:
// memory takes 500 to 800 cycles to tell, for each tile (history, 35).
template <class C>
__device__ void signal_acts(const KernelParams& p, const Smem<C>& smem) {
  TileSlot slot;
  while (true) {
    const Tile& tile = wait_tile(smem, slot);
    const int32_t size = tile.size, gemm = tile.gemm, token_tile = tile.token_tile;
    if (size == 0) return;
    const TileSlot its_slot = slot;
    const bool tells = C::kAsksForActs && threadIdx.x % kLanes == 0;
    // Of GEMM1's tiles, for whose act nobody waits, before they are released: the slot's next tile may be GEMM2's, whose wait would take the phase
    // before this one for its own.
    if (tells && gemm == 0) smem.act_full[its_slot.stage()].arrive();
    release_tile(smem, slot);  // copied
    if (tells && gemm == 1) {
      poll_act(p, token_tile);
      smem.act_full[its_slot.stage()].arrive();
    }
    __syncwarp();
    if (gemm == 0 && p.num_gemms == 2) signal_act<C>(p, smem, its_slot, token_tile);
  }
}

// By warp 0, while it loads the next tiles.
template <class C>
struct LateSignal {
  static constexpr bool kUsed = C::kGated && !C::kSignalWarp;
  // Stages that it can load before. Not those that have room only once a tile after it is finished: that may be one of GEMM2, and wait for
  // this one. Nor so many that tiles of one stage each need its slot.
  static constexpr int kMostStages = std::min(C::kStages, kTileSlots - 2);
  static_assert(!kUsed || C::kStagesAtOnce == 1, "the last of several stages has room later than the first");
  const KernelParams& p;
  const Smem<C>& smem;
  TileSlot slot = {~0u};  // of the tile; ~0: none
  int stage = 0;          // of the tile that is being loaded, before which it is time

  __device__ void signal() {
    if (!kUsed || slot.tiles == ~0u) return;
    signal_act<C>(p, smem, slot, smem.tiles[slot.stage()].token_tile);
    slot = {~0u};
  }
  // GEMM1 waits for nobody: in the middle of its tiles most loads are under way.
  __device__ void start_tile(const Tile& tile) { stage = tile.gemm == 0 ? max(C::kStages, p.gemm[0].k_stages / 2) : max(0, stage); }
  __device__ void end_tile(const Tile& tile, const TileSlot& next_slot) {
    stage -= p.gemm[tile.gemm].k_stages;
    if (!kUsed || tile.gemm == 1 || p.num_gemms == 1) return;
    signal();
    slot = {next_slot.tiles - 1};
    stage = kMostStages;
  }
};

constexpr int kDrawAhead = 4;  // stages

// Warp 0: draws tiles, tells the other warps, and fills the stages with weights. What comes next is drawn a few stages before it is loaded, which
// hides the counter's latency. Not earlier: tiles differ in how long they take, and those with the same weights, if neighbours begin one after the
// other, read them from memory once. `drawn` is lane 0's first tile. Split: the second one is drawn once the first is loaded and all
// thread blocks have theirs, because some start later, and tiles are few and long (4 tokens of DeepSeek-V3 TP8: 64 us if not, 55 so).
// Short tiles are taken several neighbours at a time, because drawing and finding one takes longer than loading it: narrow ones by their stages
// (TileFinder), and all of GEMM2 where it is split. Those are drawn, too, if thread blocks differ in how much of GEMM1 they had; where that
// cannot be, or tiles are few, every thread block gets as many.
template <class C>
__device__ void load_weights(const KernelParams& p, const Smem<C>& smem, int32_t drawn) {
  TileFinder<C> finder(p, smem);
  PipelineState<C::kStages> pipe;
  TileSlot slot;
  const bool leader = (threadIdx.x & 31) == 0;
  const int32_t gemm1_tiles = finder.end, grid = gridDim.x;
  int32_t index = 0, last = 0;
  bool first_draw = C::kSplit;  // still to come
  int draw_at = 0;              // stages of the current tile and its neighbours to be loaded before the next draw; -1: not among them
  Tile tile;
  auto draw = [&] { drawn = p.tile_counter == nullptr ? drawn + grid : atomicAdd(p.tile_counter, 1); };  // the leader
  LateSignal<C> late_signal{p, smem};
  while (true) {
    if (index + 1 < last) {
      tile = finder.next(tile, index++);
    } else {
      const int32_t number = __shfl_sync(~0u, drawn, 0);
      if (C::kSplit && number >= gemm1_tiles) {
        const bool first = finder.gemm == 0;
        if (first) finder.start_next();
        const int32_t tiles = finder.end - finder.begin;
        const bool dealt = gemm1_tiles <= grid || tiles < 8 * grid;
        const int32_t draws = dealt ? grid : 8 * grid, draw = !dealt ? number - gemm1_tiles : first ? blockIdx.x : draws;
        const int32_t each = tiles / draws, more = tiles - each * draws;  // tiles * i / draws, in 32 bits
        auto first_tile = [&](int32_t i) { return i < draws ? finder.begin + each * i + more * i / draws : finder.end; };
        index = first_tile(draw);
        last = first_tile(draw + 1);
        if (index == last) index = finder.end;  // fewer tiles than thread blocks
      } else {
        finder.tiles_of(number, index, last);
      }
      tile = finder.find(index);
      draw_at = first_draw ? -1 : max(0, (last - index) * p.gemm[tile.gemm].k_stages - kDrawAhead);
    }
    smem.tile_empty[slot.stage()].wait(slot.phase() ^ 1);
    if (leader) {
      smem.tiles[slot.stage()] = tile;
      smem.tile_full[slot.stage()].arrive();
    }
    slot.advance();
    if (tile.size == 0) return late_signal.signal();
    late_signal.start_tile(tile);
    auto before_stage = [&](int stage) {
      if (stage == draw_at && leader) draw();
      if (stage == late_signal.stage) late_signal.signal();
    };
    load_tile<C>(p, smem, tile, pipe, before_stage);
    draw_at -= p.gemm[tile.gemm].k_stages;
    late_signal.end_tile(tile, slot);
    if (first_draw && leader) {
      for (int tries = 0; tries < 20 && load_acquire(p.tile_counter) < grid; ++tries) __nanosleep(100);
      draw();
    }
    first_draw = false;
    __syncwarp();
  }
}

__device__ __forceinline__ void arrive(Barrier& barrier, int count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(cute::cast_smem_ptr_to_uint(&barrier)), "r"(count) : "memory");
}

// At a stage's barrier, of the token warp: every lane that stores scales says so itself.
template <class C>
constexpr int kScaleArrivals = C::kFloat8 ? kLanes : 1;

// Warps 1 to kTokenWarps: the tokens of a stage and, for float8, a_scale * b_scale of each (wave, token); the products leave
// the consumers one FMA per value. The K blocks are dealt out in turn, and scales are loaded kAhead of a warp's own blocks ahead.
template <class C>
struct TokenLoader {
  static constexpr int kRowsPerLane = C::kMaxTokens / kLanes, kAhead = 128 / C::kMaxTokens;
  struct Scales {
    float a[kRowsPerLane], b[C::kWaves];
  };
  const KernelParams& p;
  const Smem<C>& smem;
  const int lane = threadIdx.x & 31;
  Tile tile;
  const float* a_scale;
  const float* b_scale[C::kWaves];

  __device__ void wait_for_act(const TileSlot& slot) const {  // of the tile
    if constexpr (C::kAsksForActs) {
      smem.act_full[slot.stage()].wait(slot.phase());
    } else {
      if (lane == 0) poll_act(p, tile.token_tile);
      __syncwarp();
    }
  }

  __device__ void start_tile() {
    if constexpr (C::kFloat8) {
      const GemmParams& g = p.gemm[tile.gemm];
#pragma unroll
      for (int w = 0; w < C::kWaves && !C::kPacked; ++w) b_scale[w] = weight_scales<C>(p, tile, w);
      a_scale = g.a_scale.data + int64_t(tile.token + lane) * g.a_scale.stride_row;
    }
  }

  __device__ Scales load_scales(int kb) const {
    const GemmParams& g = p.gemm[tile.gemm];
    Scales s;
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
      const float* address = a_scale + kb * g.a_scale.stride_k + kLanes * i * g.a_scale.stride_row;
      const bool exists = lane + kLanes * i < tile.valid_tokens;
      if (C::kFused && tile.gemm == 1) s.a[i] = exists ? __ldcg(address) : 0.f;  // written by this launch: not from L1
      else s.a[i] = exists ? __ldg(address) : 0.f;
    }
#pragma unroll
    for (int w = 0; w < C::kWaves; ++w) s.b[w] = C::kPacked ? 1.f : __ldg(b_scale[w] + kb * g.b_scale.stride_k);
    return s;
  }

  // And arrives. kAlone: no other token warp has to do with the stage.
  template <bool kAlone>
  __device__ void store_scales(int stage, const Scales& s) const {
    const uint32_t scales = smem.scales + stage * C::kScaleBytes;
#pragma unroll
    for (int i = 0; C::kFloat8 && i < kRowsPerLane; ++i) {
      const int token = lane + kLanes * i;
      if (token < (1 << tile.size)) {
#pragma unroll
        for (int w = 0; w < C::kWaves; ++w)
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(scales + 4 * (w * C::kWaveScales + scale_index(token))), "f"(__fmul_rn(s.a[i], s.b[w])) : "memory");
      }
    }
    const bool arrives = C::kFloat8 || lane == 0;
    if (kAlone && smem.gathered) arrive(smem.full[stage], arrives + C::kTokenWarps);  // for the other token warps, too
    else if (arrives) smem.full[stage].arrive();
  }

  __device__ void fill(int stage, int kb, const Scales& s) const {
    Barrier& full = smem.full[stage];
    if (lane == 0) {
      asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(cute::cast_smem_ptr_to_uint(&full)), "r"(tokens_of<C>(tile) * kRowBytes * C::kStageBlocks) : "memory");
      for (int h = 0; h < C::kStageBlocks; ++h)
        tma_load(smem.tokens + stage * C::kTokenBytes + h * C::kBlockTokenBytes, &p.gemm[tile.gemm].tokens[tile.size - 3], full,
                 (kb * C::kStageBlocks + h) * kBlockK<C>, tile.token);
      if (is_tall<C>(tile))
        tma_load(smem.tokens + stage * C::kTokenBytes + C::kMaxTokens * kRowBytes, &p.gemm[tile.gemm].tokens[kExtraMap], full, kb * kBlockK<C>,
                 tile.token + C::kMaxTokens);
    }
    store_scales<true>(stage, s);
  }
};

// `first`: which of the token warps, and its first K block from the stage and tile on that `pipe` and `slot` stand at.
template <class C>
__device__ void load_tokens(const KernelParams& p, const Smem<C>& smem, int first, PipelineState<C::kStages> pipe = {}, TileSlot slot = {}) {
  using Loader = TokenLoader<C>;
  pipe.advance(first);
  Loader loader{p, smem};
  while (true) {
    loader.tile = wait_tile(smem, slot);
    const TileSlot its_slot = slot;
    release_tile(smem, slot);  // copied
    if (loader.tile.size == 0) return;
    const int k_stages = p.gemm[loader.tile.gemm].k_stages;
    if (first < k_stages) {  // `first` is this warp's first stage of the tile
      if (C::kGated && loader.tile.gemm == 1) loader.wait_for_act(its_slot);
      loader.start_tile();
      typename Loader::Scales scales[Loader::kAhead];
      if constexpr (C::kFloat8)
#pragma unroll
        for (int i = 0; i < Loader::kAhead; ++i)
          if (first + i * C::kTokenWarps < k_stages) scales[i] = loader.load_scales(first + i * C::kTokenWarps);
      while (first < k_stages) {
#pragma unroll
        for (int i = 0; i < Loader::kAhead; ++i) {
          if (first >= k_stages) break;
          smem.empty[pipe.stage].wait(pipe.phase ^ 1);
          loader.fill(pipe.stage, first, scales[i]);
          if constexpr (C::kFloat8) {
            const int ahead = first + Loader::kAhead * C::kTokenWarps;
            if (ahead < k_stages) scales[i] = loader.load_scales(ahead);
          }
          first += C::kTokenWarps;
          pipe.advance(C::kTokenWarps);
        }
      }
    }
    first -= k_stages;
  }
}

}  // namespace moe::sm90
