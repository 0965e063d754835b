// The SM90 grouped GEMM kernel: roles, the choice of the tile's size, and how the two fused GEMMs wait for each other.
#pragma once
#include "grouped_gemm/epilogue_wide_sm90.cuh"
#include "grouped_gemm/gather_sm90.cuh"
#include "grouped_gemm/split_sm90.cuh"

namespace moe::sm90 {

// Inlined whatever the compiler thinks of it: in a function of its own, every wgmma waits for the one before (C7510).
template <class C>
__device__ __forceinline__ void consume(const KernelParams& p, const Smem<C>& smem) {
  PipelineState<C::kStages> pipe;
  TileSlot slot;
  int held = -1;  // the stage that is held, see release_held()
  // What decides about loops and descriptors is made uniform, so that the descriptors stay in uniform registers: otherwise ptxas
  // moves each of them there again before every wgmma (R2UR).
  auto uniform = [](uint32_t x) { return __shfl_sync(~0u, x, 0); };
  const int warpgroup = uniform(threadIdx.x / 128);
  if constexpr (C::kKeepsGlobalScales) keep_global_scales<C>(p, smem);
  while (true) {
    const Tile& tile = wait_tile(smem, slot);
    const uint32_t state = uniform(tile.size | (is_tall<C>(tile) || has_48<C>(tile)) << 7 | tile.gemm << 8 | pipe.phase << 9 | pipe.stage << 10);
    const int size = state & 0x7f;
    if (size == 0) return wait_stores<C>();
    const GemmParams& g = p.gemm[C::kFused ? state >> 8 & 1 : 0];
    const int k_stages = g.k_stages;
    pipe = {int(state >> 10), state >> 9 & 1};
    if constexpr (C::kSplit && C::kWarpgroups > 1)
      if (warpgroup * 64 >= g.tile_rows) {
        skip<C>(smem, pipe, k_stages);
        release_tile(smem, slot);
        continue;
      }
    auto narrow = [&]<int kTokens>() {
      float total[C::kWaves * kTokens / 2];
      multiply<C, kTokens>(smem, pipe, k_stages, warpgroup, held, total);
      NarrowEpilogue<C, kTokens>{p, smem, tile, g, total}.run();
    };
    auto wide = [&]<TileShape kShape>() {
      float total[C::kWaves * 64], extra[C::kExtraTokens > 0 ? C::kWaves * C::kExtraTokens / 2 : 1];
      multiply_wide<C, kShape>(smem, pipe, k_stages, warpgroup, g.stores_tiles, held, total, extra);
      WideEpilogue<C, kShape == TileShape::half_wide>{p, smem, tile, g, held, total}.run();
      if constexpr (kShape == TileShape::tall) {
        Tile rest = tile;
        rest.token += C::kMaxTokens;
        rest.valid_tokens -= C::kMaxTokens;
        NarrowEpilogue<C, C::kExtraTokens>{p, smem, rest, g, extra}.run();
      }
    };
    switch (size) {
      case 3: narrow.template operator()<8>(); break;
      case 4: narrow.template operator()<16>(); break;
      case 5: narrow.template operator()<32>(); break;
      case 6:
        if constexpr (C::kHasHalfWide) wide.template operator()<TileShape::half_wide>();
        if constexpr (C::kHas48)
          if (state >> 7 & 1) {
            narrow.template operator()<48>();
            break;
          }
        if constexpr (!C::kHasHalfWide && C::kMaxTokens >= 64) narrow.template operator()<64>();
        break;
      default:
        if constexpr (C::kExtraTokens > 0)
          if (state >> 7 & 1) {
            wide.template operator()<TileShape::tall>();
            break;
          }
        if constexpr (C::kHasWide) wide.template operator()<TileShape::wide>();
        else if constexpr (C::kMaxTokens == 128) narrow.template operator()<128>();
    }
    release_tile(smem, slot);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm) grouped_gemm_kernel(const __grid_constant__ KernelParams p) {
  // Aligned for the 128-byte swizzle, and known to be: an address rounded up took uniform registers, of which the main loops have none to spare.
  extern __shared__ __align__(1024) uint8_t memory[];
  const Smem<C> smem(memory, p.row_to_slot != nullptr);
  int expert = -1;
  if constexpr (C::kSplit) expert = p.local_expert(threadIdx.x);  // long before it is needed
  static_assert(sizeof(CUtensorMap) == 128 && offsetof(GemmParams, tokens) == 128);
  if (threadIdx.x < 12 && threadIdx.x / 6 < p.num_gemms)
    asm volatile("prefetch.tensormap [%0];" ::"l"(&p.gemm[threadIdx.x / 6].weights + threadIdx.x % 6) : "memory");
  if (threadIdx.x == kLanes) {  // another warp for each of these, because they take long
    for (int s = 0; s < C::kStages; ++s) {
      smem.full[s].init(1 + (smem.gathered ? kGatherArrivals<C> : C::kSplit ? C::kTokenSteps * kLanes : kScaleArrivals<C>));  // weights, and tokens
      smem.empty[s].init(C::kConsumers);
    }
    cutlass::arch::fence_barrier_init();
  }
  if (threadIdx.x == 2 * kLanes) {
    for (int s = 0; s < kTileSlots; ++s) {
      smem.tile_full[s].init(1);
      smem.tile_empty[s].init(C::kReaders);
      if (C::kAsksForActs) smem.act_full[s].init(1);
    }
    cutlass::arch::fence_barrier_init();
  }
  int32_t first_tile = blockIdx.x;
  auto draw = [&] {
    if (C::kSplit || p.known == Known::inputs) pdl_wait();
    if (threadIdx.x == C::kConsumers && p.tile_counter != nullptr) first_tile = atomicAdd(p.tile_counter, 1);
  };
  if constexpr (C::kSplit) {
    place_slots<C>(p, smem, expert, draw);
  } else {  // the barriers also publish the mbarriers
    draw();
    const bool counts = C::kGated && p.known == Known::counters;
    if (counts) count_slots<C>(p, smem);
    count_tiles<C>(p, smem, counts);
  }
  const int warp = __shfl_sync(~0u, int(threadIdx.x / kLanes) - C::kConsumers / kLanes, 0);  // uniform, see consume()
  if (warp != 0) {  // which reads weights, inputs and counters alone
    pdl_wait();
    pdl_launch_next();
  }
  if (warp >= 0) {
    if constexpr (C::kRebalanceRegisters) cutlass::arch::warpgroup_reg_dealloc<C::kProducerRegisters>();
    if (warp == 0) {
      load_weights<C>(p, smem, first_tile);
    } else if (C::kSignalWarp && warp == C::kTokenWarps + 1) {
      if constexpr (C::kSignalWarp) signal_acts<C>(p, smem);
    } else if (smem.gathered) {
      if constexpr (C::kCanGather) gather_tokens<C>(p, smem, warp - 1);
    } else if (warp <= C::kTokenWarps) {
      if constexpr (C::kSplit) make_tokens<C>(p, smem, warp - 1);
      else load_tokens<C>(p, smem, warp - 1);
    }
  } else {
    if constexpr (C::kRebalanceRegisters) cutlass::arch::warpgroup_reg_alloc<C::kConsumerRegisters>();
    consume<C>(p, smem);
  }
}

}  // namespace moe::sm90
