// The token warps of a kernel that gathers: GEMM1's tokens are rows of the caller's matrix, in any order, copied by cp.async.
//   row r of GEMM1 = gathered[row_to_slot[r] / top_k]
// A lane copies 16 bytes, a warp 128 bytes of four rows at a time. All token warps work on every stage, because one alone would need
// longer for its 128 rows than the tensor cores need for a stage. Nobody but the consumers waits for the copies (wait_full()): token warps
// that waited for them, to fence and to arrive, had two stages in flight instead of four, and layers took up to 15 % longer.
#pragma once
#include "grouped_gemm/producers_sm90.cuh"

namespace moe::sm90 {

// The 128-byte swizzle of TMA: 16-byte chunk c of row r is at c ^ (r % 8).
template <class C>
struct Gather {
  using Loader = TokenLoader<C>;
  using Scales = typename Loader::Scales;
  static constexpr int kRowsAtOnce = 4, kCopies = ((C::kMaxTokens + C::kExtraTokens) / kRowsAtOnce + C::kTokenWarps - 1) / C::kTokenWarps;
  const KernelParams& p;
  const Loader& loader;
  const int warp;                     // of the token warps
  uint32_t source[kCopies];           // in chunks of 16 bytes
  uint32_t exists;                    // bit j: of copy j
  uint32_t scale[Loader::kRowsPerLane];

  __device__ int row_of(int j) const { return kRowsAtOnce * (warp + C::kTokenWarps * j) + loader.lane / 8; }
  __device__ uint32_t token_of(int row) const { return uint32_t(__ldg(p.row_to_slot + loader.tile.token + row)) / p.top_k; }

  __device__ void start_tile() {
    exists = 0;
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      const bool valid = row_of(j) < loader.tile.valid_tokens;
      source[j] = valid ? token_of(row_of(j)) * p.row_chunks + loader.lane % 8 : 0;
      exists |= uint32_t(valid) << j;
    }
    if constexpr (C::kFloat8)
#pragma unroll
      for (int i = 0; i < Loader::kRowsPerLane; ++i) {
        const int row = loader.lane + kLanes * i;
        scale[i] = row < loader.tile.valid_tokens ? token_of(row) * uint32_t(p.gemm[0].a_scale.stride_row) : 0;
      }
  }

  // Past the last k and the last row: zeros.
  __device__ void copy(int stage, int kb) const {
    const int lane = loader.lane, groups = tokens_of<C>(loader.tile) / kRowsAtOnce;
    const uint8_t* tokens = static_cast<const uint8_t*>(p.gathered) + kb * 128;
    const uint32_t mask = kb * 8 + lane % 8 < p.row_chunks ? exists : 0;
    // Copy j goes kRowsAtOnce * kTokenWarps * j rows further down: the row's swizzle is that of copy 0 or, for odd j, that one's plus 4.
    const int row = row_of(0);
    const uint32_t target = loader.smem.tokens + stage * C::kTokenBytes + row * 128 + (lane % 8 ^ row % 8) * 16;
    unrolled<kCopies>([&](auto j) {
      static_assert(kRowsAtOnce * C::kTokenWarps % 8 == 4);
      constexpr int kOffset = kRowsAtOnce * C::kTokenWarps * j * 128;
      if (warp + C::kTokenWarps * j < groups)
        asm volatile("cp.async.cg.shared.global [%0 + %3], [%1], 16, %2;" ::"r"(j % 2 == 0 ? target : target ^ 64), "l"(tokens + uint64_t(source[j]) * 16),
                     "r"((mask >> j & 1) * 16), "n"(kOffset) : "memory");
    });
    // Arrives when this thread's copies have landed.
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(cute::cast_smem_ptr_to_uint(&loader.smem.full[stage])) : "memory");
  }

  __device__ Scales load_scales(int kb) const {
    const GemmParams& g = p.gemm[0];
    Scales s;
#pragma unroll
    for (int i = 0; i < Loader::kRowsPerLane; ++i)
      s.a[i] = loader.lane + kLanes * i < loader.tile.valid_tokens ? __ldg(g.a_scale.data + scale[i] + kb * g.a_scale.stride_k) : 0.f;
#pragma unroll
    for (int w = 0; w < C::kWaves; ++w) s.b[w] = __ldg(loader.b_scale[w] + kb * g.b_scale.stride_k);
    return s;
  }
};

// Of GEMM1, in place of load_tokens(), which then takes over. Every lane of every token warp arrives at every stage, and the warp whose turn
// the K block is once more.
template <class C>
constexpr int kGatherArrivals = C::kTokenWarps * kLanes + kScaleArrivals<C>;

template <class C>
__device__ void gather_tokens(const KernelParams& p, const Smem<C>& smem, int warp) {
  static_assert(C::kCanGather);
  PipelineState<C::kStages> pipe;
  TileSlot slot;
  TokenLoader<C> loader{p, smem};
  Gather<C> gather{p, loader, warp};
  const int k_stages = p.gemm[0].k_stages;
  while (true) {
    loader.tile = wait_tile(smem, slot);
    if (loader.tile.size == 0 || loader.tile.gemm == 1) return load_tokens<C>(p, smem, warp, pipe, slot);
    release_tile(smem, slot);  // copied
    loader.start_tile();
    gather.start_tile();
    typename TokenLoader<C>::Scales scales;
    int turn = warp;  // the next K block whose scales are this warp's
    if (C::kFloat8 && turn < k_stages) scales = gather.load_scales(turn);
    for (int kb = 0; kb < k_stages; ++kb, pipe.advance()) {
      smem.empty[pipe.stage].wait(pipe.phase ^ 1);
      gather.copy(pipe.stage, kb);
      if (kb != turn) continue;
      loader.template store_scales<false>(pipe.stage, scales);
      turn += C::kTokenWarps;
      if (C::kFloat8 && turn < k_stages) scales = gather.load_scales(turn);
    }
  }
}

}  // namespace moe::sm90
