// The SM90 grouped GEMM kernel: roles, and the choice of the tile's size.
#pragma once
#include "grouped_gemm/epilogue_wide_sm90.cuh"

namespace moe::sm90 {

template <class C>
__device__ void consume(const KernelParams& p, const Smem<C>& smem) {
  PipelineState<C::kStages> pipe;
  PipelineState<kTileSlots> slot;
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // uniform: descriptors stay in uniform registers
  while (true) {
    const Tile& tile = wait_tile(smem, slot);
    auto narrow = [&]<int kTokens>() {
      float total[C::kWaves * kTokens / 2];
      multiply<C, kTokens>(smem, pipe, p.k_blocks, warpgroup, total);
      NarrowEpilogue<C, kTokens>{p, smem, tile, total}.run();
    };
    switch (tile.size) {
      case 0: return;
      case 3: narrow.template operator()<8>(); break;
      case 4: narrow.template operator()<16>(); break;
      case 5: narrow.template operator()<32>(); break;
      case 6:
        if constexpr (C::kHas64) narrow.template operator()<64>();
        break;
      default:
        if constexpr (C::kMaxTokens == 128) {
          float total[C::kWaves * 64];
          multiply_wide<C>(smem, pipe, p.k_blocks, warpgroup, total);
          WideEpilogue<C>{p, smem, tile, total}.run();
        }
    }
    release_tile(smem, slot);
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
    for (int s = 0; s < kTileSlots; ++s) {
      smem.tile_full[s].init(1);
      smem.tile_empty[s].init(C::kReaders);
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
