// The SM90 grouped GEMM, alone or two of them fused: tiles, shared memory, and how thread blocks find their work.
//   out[r, n] = sum_k tokens[r, k] * weights[e, n, k] for rows r that expert e uses
//
// One persistent thread block per SM (two of some packed kernels) draws tiles (gemm, expert, weight rows, tokens) from a counter in device
// memory and finds them in expert_offsets, where it can (Known) while the kernel before still runs. Drawn in order, tiles with the same weight
// rows run at the same time, so that memory is read once for all of them (dealt out in advance, thread blocks drift apart: DeepSeek-V3 EP8 in
// bf16 read its weights twice at 8192 tokens, and was bound by that). The tokens of a neighbouring expert that a tile reads are never stored.
//
//   producer warp 0: draws tiles; TMA of weights, 128 or 256 bytes of K a stage, 128-byte swizzle (packed ones: bulk copies)
//   producer warps 1 to kTokenWarps: TMA of tokens (or gather_sm90.cuh, split_sm90.cuh), and for float8 products of the float32 scales (any
//   strides)
//   gated, the next producer warp, or where there is none warp 0: tells GEMM2 of act that is complete, and (16 bits) asks for it
//   1, 2 or 4 consumer warpgroups: wgmma, promotion (float8), epilogue. Two with two waves each or, where instructions decide (4-bit weights, up to
//   64 tokens), four with one: then two have gate and two up (paired), which these hand over at the end
//
// Narrow tiles (8 to 32 tokens, in some kernels 64; packed: up to 128): weight rows are wgmma's 64-row operand and tokens its N operand
// ("swap A/B"), so that decode multiplies hardly more tokens than there are. Wide tiles (128 tokens): tokens are the 64-row operand, one half
// for each warpgroup; a thread then needs two token scales a K block, where narrow tiles read one for each of its tokens (at 128 tokens ncu
// showed L1/shared memory 79 % busy with those, 50 % without). In both, gate and up of one channel meet in one thread, because a warpgroup
// computes one wave of gate rows and one of up rows (Mode::gated; paired: after the handing over). Half-wide tiles (64 tokens, where a kernel
// has wide ones of two waves): each warpgroup multiplies one wave by all tokens, and then they exchange gate for up. Tall tiles (16 bits, two
// waves; up to 144 tokens): a wide tile, and what is more than 128 tokens as in a narrow one, from the same stages (float8 has no registers for
// that: it was up to 12 % slower, history, 31).
//
// Two GEMMs in one launch: tiles of GEMM2 are drawn after all of GEMM1, and wait until the act of their tokens is complete
// (`ready`; split: gate_up itself says so). Their weights do not wait: the pipeline fills with them while GEMM1 ends. Every tile
// is drawn by a thread block that runs, and GEMM1 never waits, so this cannot deadlock, however few thread blocks are resident.
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
#include "grouped_gemm/token_tiles_sm90.h"

namespace moe::sm90 {

constexpr int kMaxExperts = 1024;
constexpr int kTileSlots = 8;       // tiles drawn and not finished
constexpr int kDrawStages = 12;     // narrow tiles of up to half as many are drawn several at a time, up to so many in all
constexpr int kSmemLimit = 232448;  // bytes a thread block can have on SM90; two share 1 KiB more than that, and need 1 KiB each
constexpr int kLanes = 32;
constexpr int kRowBytes = 128;      // of K, of an operand row in shared memory

struct Tile {
  int32_t gemm;           // 0 or 1
  int32_t expert;
  int32_t part, row;      // first weight row, within its part (gated: the same row of both parts)
  int32_t token;          // first row of the token matrix
  int32_t valid_tokens;
  int32_t size;           // log2 of the tokens multiplied, 8 .. kMaxTokens, without those that a tall tile has more; 0: no more tiles
  int32_t token_tile;     // token tiles before it, of all experts: the same for both GEMMs
};

// kRows = 64 * kWarpgroups * kWaves weight rows by up to kMaxTokens tokens. Split: GemmParams::tile_rows, of which alone something is loaded and stored;
// stages are made for kRows, so with half as many rows less is in flight, which 8 and 16 bits notice (history, 28).
template <class Element_, int kMaxTokens_, int kWarpgroups_, int kWaves_, Mode kMode_, Packing kPacking_ = Packing::none, int kBlocksPerSm_ = 1>
struct Config {
  using Element = Element_;  // of the tokens, and of what is multiplied
  static constexpr Packing kPacking = kPacking_;
  static constexpr bool kPacked = kPacking != Packing::none;
  static constexpr bool kFloat8 = std::is_same_v<Element, __nv_fp8_e4m3>;
  static constexpr Mode kMode = kMode_;
  static constexpr bool kFused = kMode != Mode::plain, kGated = kMode == Mode::gated, kSplit = kMode == Mode::split;
  static constexpr int kMaxTokens = kMaxTokens_, kWarpgroups = kWarpgroups_, kWaves = kWaves_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;      // 2: the latency of unpacking weights is hidden, but each tile takes longer
  static constexpr int kWaveRows = 64 * kWarpgroups;      // weight rows of one wave: not packed, within one 128-row scale block
  static constexpr int kRows = kWaveRows * kWaves;
  static constexpr bool kPaired = kGated && kWaves == 1;  // gate and up of a channel are in two warpgroups
  static constexpr int kConsumers = 128 * kWarpgroups;
  static constexpr bool kCanGather = kGated && kMaxTokens == 128;
  static constexpr bool kHasWide = kMaxTokens == 128 && !kPacked;  // packed weights are an operand in registers: the 64-row one
  // With narrow tiles of 64 tokens beside wide ones of two waves, ptxas runs out of registers and makes every wgmma wait (C7511): those kernels
  // have half-wide ones, which take the wide ones' loop.
  static constexpr bool kHasHalfWide = kHasWide && kWaves == 2;
  static constexpr bool kStoresTiles = kHasWide && (kFloat8 || !kFused);  // by TMA, not by the consumers (history, 37, 38)
  static constexpr bool kHoldsStage = kStoresTiles && !kFloat8;           // see release_held()
  static constexpr int kExtraTokens = kHasHalfWide && !kFloat8 ? sm90::kExtraTokens : 0;  // of tall tiles; with one wave they would cost a stage of six
  // Tiles of 48 tokens. Packed weights are unpacked or multiplied, hardly both at a time (history, 34), so that less to multiply counts; with 16-bit
  // tokens those kernels have no registers for one loop more.
  static constexpr bool kHas48 = kPacked && kFloat8 && kMaxTokens == 64;
  static constexpr int kBlockBytes = packed_block_bytes(kPacking);  // packed: of 64 weight rows
  // K blocks, 128 bytes of a token, in a stage. With few tokens a block is less work than its barriers, and float8 sums of two blocks, which do
  // not wait for each other, take hardly longer than one; but with 128 rows five stages are too few. 4-bit weights with 16-bit tokens: where instructions
  // decide, those of a loop count half (history, 34).
  static constexpr bool kTwoBlocksOf16Bit = kSplit || (is_4bit(kPacking) && (kWarpgroups == 4 || (kGated && kBlocksPerSm == 2)));
  static constexpr int kStageBlocks = (kFloat8 ? kSplit && !kPacked && kWarpgroups == 1 : kTwoBlocksOf16Bit) ? 2 : 1;
  // Stages whose weights are asked for together, once all are free: neighbouring bytes of a row at a time are read faster from memory (history, 33),
  // but not by 64 SMs with a tile of 64 rows each (36).
  static constexpr int kStagesAtOnce = !kSplit && !kPacked && kMaxTokens <= 64 && kRows == 256 ? 2 : 1;
  static constexpr int kStageWeightBlocks = kStageBlocks * (kPacked && kFloat8 ? 2 : 1);  // packed: of 64 k each
  static constexpr int kBlockWeightBytes = kRows * 128, kBlockTokenBytes = (kMaxTokens + kExtraTokens) * 128;
  static constexpr int kRowBlockBytes = kStageWeightBlocks * kBlockBytes;  // packed: of 64 weight rows, in a stage
  static constexpr int kCopyRows = !kPacked ? kWaveRows : kRows < 128 ? kRows : 128;  // weight rows that one instruction loads
  static constexpr int kWeightBytes = kPacked ? kRows / kPackedBlock * kRowBlockBytes : kStageBlocks * kBlockWeightBytes;
  static constexpr int kTokenBytes = kStageBlocks * kBlockTokenBytes;
  static constexpr int kWaveScales = kFloat8 ? kMaxTokens : 0;  // floats a wave and stage
  static constexpr int kBlockScaleBytes = 4 * kWaves * kWaveScales, kScaleBytes = kStageBlocks * kBlockScaleBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes + kScaleBytes + 2 * 8;  // with its two barriers
  // Epilogue: 64 tokens (packed: all) x 64 columns of 16 bits for each warpgroup. Gated float8, narrow: act [64, 128] bytes, amax
  // [8 warps, 64], 1/scale [64]; wide: act [16, 128] bytes for each warp.
  static constexpr int kStoreTokens = kPacked ? kMaxTokens : 64, kStoreBytes = kWarpgroups * kStoreTokens * 128;
  static constexpr int kQuantBytes = kGated && kFloat8 ? 64 * (128 + 4 * 8 + 4) : 0;
  static constexpr int kStagingBytes = kStoreBytes > kQuantBytes ? kStoreBytes : kQuantBytes;
  static constexpr bool kDrawsSeveral = !kSplit && kMaxTokens < 128;  // of short tiles, at a time
  // Whether signal_acts() has a warp. Gathering takes all that there are: with two instead of three, layers were up to 10 % slower.
  static constexpr bool kSignalWarp = kGated && !kCanGather;
  static constexpr bool kAsksForActs = kSignalWarp && !kFloat8;  // float8 has two token warps, which ask as soon, and no room for the barriers
  // Global scales of all experts in shared memory: loading them for each tile was a seventh of the instructions of a short one. Kernels of 128 tokens have
  // no room, and tiles enough to multiply.
  static constexpr bool kKeepsGlobalScales = kFused && kPacking == Packing::nvfp4 && kMaxTokens <= 64;
  static constexpr int kGlobalScaleBytes = kKeepsGlobalScales ? 3 * kMaxExperts * 4 : 0;
  static constexpr int kRowTokenBytes = kSplit ? 2 * kMaxSplitSlots : 0;
  static constexpr int kTileSlotBytes = kTileSlots * ((2 + kAsksForActs) * 8 + int(sizeof(Tile)));
  static constexpr int kFixedBytes = kStagingBytes + 8 * (kMaxExperts + 1) + kGlobalScaleBytes + kRowTokenBytes + kTileSlotBytes;
  static constexpr int kStagesBytes = (kBlocksPerSm == 2 ? kSmemLimit / 2 - 512 : kSmemLimit) - kFixedBytes;  // at most
  static constexpr int kFittingStages = kStagesBytes / kStageBytes;
  static_assert(kFittingStages == kStagesBytes / (kStageBytes - kStageBlocks * kExtraTokens * 128), "tall tiles would cost a stage");
  static constexpr int kStages = kFittingStages < 18 ? kFittingStages : 18;
  static constexpr int kSmemBytes = kFixedBytes + kStages * kStageBytes;
  static_assert(kStages >= 5 || kPacked || kMaxTokens > 64, "tiles of 64 tokens would lose a stage: float8 has room for just five");
  // Warps that load tokens. Split: they quantise them, too, and tiles have as few as two K blocks, and a latency for each. They take steps of
  // 128 k in turn, kTokenSteps of them a stage, and nobody may miss a round of the pipeline.
  static constexpr int kTokenSteps = kSplit ? kTokenBytes / (kMaxTokens * 128 * int(sizeof(Element))) : 1;
  static constexpr int kSplitTokenWarps = kStages * kTokenSteps < 7 ? kStages * kTokenSteps : 7;
  static constexpr int kTokenWarps = kSplit ? kSplitTokenWarps : kCanGather ? 3 : kFloat8 ? 3 - kSignalWarp : 1;
  static constexpr int kThreads = kConsumers + (kSplit ? 256 : 128);
  static constexpr int kReaders = kConsumers + kLanes * (kTokenWarps + kSignalWarp);  // threads that are told of a tile
  // Registers a thread, moved from producers to consumers. All warpgroups start with kStartRegisters each and share exactly that: asking for more
  // waits for ever.
  static constexpr bool kRebalanceRegisters = kWarpgroups >= 2 && kThreads == kConsumers + 128;
  static constexpr bool kBusyProducers = kFloat8 || kCanGather;  // 56 (of four warpgroups: 32) registers would be too few for them
  static constexpr int kStartRegisters = kWarpgroups == 4 ? 96 : kBlocksPerSm == 2 ? 80 : 168;
  static constexpr int kProducerRegisters = kWarpgroups == 4 ? (kBusyProducers ? 64 : 32) : kBlocksPerSm == 2 ? 48 : kBusyProducers ? 72 : 56;
  static constexpr int kConsumerRegisters = kWarpgroups == 4 ? (kBusyProducers ? 104 : 112) : kBlocksPerSm == 2 ? 96 : kBusyProducers ? 216 : 224;
  static_assert(!kRebalanceRegisters || kProducerRegisters + kWarpgroups * kConsumerRegisters <= (kWarpgroups + 1) * kStartRegisters);
  static_assert((kPacking == Packing::mxfp4_e4m3) == (kPacked && kFloat8) && !(kPacked && kFloat8 && kMaxTokens > 64));
  static_assert(kBlocksPerSm == 1 || kMaxTokens == 32);
  static_assert(kMaxTokens == 32 || kMaxTokens == 64 || (kMaxTokens == 128 && kWarpgroups == 2), "a wide tile gives 64 tokens to each of two warpgroups");
  static_assert(!kPacked || kCopyRows / kPackedBlock * kRowBlockBytes % 128 == 0, "TMA stores from a multiple of 128 on");
  static_assert(!kGated || kRows == 256, "a float8 scale group is 128 channels");
  static_assert(!kPaired || (kPacked && kWarpgroups == 4 && kStoreBytes == 2 * 128 * kMaxTokens / 2 * 4), "up is handed over there");
  static_assert(!kSplit || kWaves == 1);
  static_assert(!kHasHalfWide || kStagingBytes >= kConsumers / 32 * 16 * 128, "half-wide tiles exchange 16 floats a lane");
  static_assert(kStages >= 3 && kStages * kTokenSteps >= kTokenWarps);
};

// A box has at most 256 elements a dimension: of 8 bytes, a packed block is so many pieces.
template <Packing kPacking>
constexpr int kPackedPieces = kPacking == Packing::mxfp8 ? 4 : 2;

using Barrier = cutlass::arch::ClusterTransactionBarrier;

template <class C>
__device__ __forceinline__ bool is_tall(const Tile& tile) { return C::kExtraTokens > 0 && tile.valid_tokens > C::kMaxTokens; }
// A tile of 64 tokens, of which at most 48 exist, and are multiplied.
template <class C>
__device__ __forceinline__ bool has_48(const Tile& tile) { return C::kHas48 && tile.size == 6 && tile.valid_tokens <= 48; }
template <class C>
__device__ __forceinline__ int32_t tokens_of(const Tile& tile) { return (1 << tile.size) + (is_tall<C>(tile) ? C::kExtraTokens : 0); }

// Shared memory of a thread block; operands as addresses in the shared window, so that no access is a generic one.
template <class C>
struct Smem {
  uint32_t weights, tokens, staging, scales;
  uint8_t* staging_ptr;
  Barrier* full;        // stages
  Barrier* empty;
  Barrier* tile_full;   // tiles
  Barrier* tile_empty;
  Barrier* act_full;    // gated: see signal_acts()
  Tile* tiles;
  int32_t* offsets;     // [E + 1] first row of each expert
  int32_t* tile_begin;  // [E + 1] token tiles before each expert
  float* global_scales; // [3][kMaxExperts] load_global_scale() of GEMM1's parts and of GEMM2
  uint16_t* row_tokens; // split: [rows] of each row of GEMM1

  bool gathered;        // GEMM1's tokens come by cp.async (gather_sm90.cuh)

  __device__ Smem(uint8_t* base, bool gathered) : gathered(C::kCanGather && gathered) {
    tokens = cute::cast_smem_ptr_to_uint(base);
    weights = tokens + C::kStages * C::kTokenBytes;
    staging = weights + C::kStages * C::kWeightBytes;
    staging_ptr = base + (staging - tokens);
    scales = staging + C::kStagingBytes;
    full = reinterpret_cast<Barrier*>(staging_ptr + C::kStagingBytes + C::kStages * C::kScaleBytes);
    empty = full + C::kStages;
    tile_full = empty + C::kStages;
    tile_empty = tile_full + kTileSlots;
    act_full = tile_empty + kTileSlots;
    tiles = reinterpret_cast<Tile*>(act_full + (C::kAsksForActs ? kTileSlots : 0));
    offsets = reinterpret_cast<int32_t*>(tiles + kTileSlots);
    tile_begin = offsets + kMaxExperts + 1;
    global_scales = reinterpret_cast<float*>(tile_begin + kMaxExperts + 1);
    row_tokens = reinterpret_cast<uint16_t*>(global_scales + C::kGlobalScaleBytes / 4);
  }
};

// Of the `size` rows of an expert's range, those that it uses: all of them where two GEMMs are fused.
template <class C>
__device__ __forceinline__ int32_t rows_in_use(const KernelParams& p, int32_t expert, int32_t size) {
  return C::kFused || p.expert_rows == nullptr || size == 0 ? size : moe::rows_in_use(p.expert_rows[expert], size);
}

__device__ __forceinline__ int32_t load_acquire(const int32_t* address) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// Adds 1 once what this thread knows to be stored is in memory, for TMA to read, too.
__device__ __forceinline__ void add_release(int32_t* address) {
  asm volatile("fence.proxy.async.global;" ::: "memory");
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(address) : "memory");
}

// Finds tiles by their index, in any increasing order. Within an expert, tiles with the same weight rows follow each other. The last
// expert's tiles come first: a shared expert that is fused with the routed ones is the last, and its tiles, of all tokens, take longest.
template <class C>
struct TileFinder {
  const KernelParams& p;
  const Smem<C>& smem;
  int32_t gemm = 0, begin = 0, end = 0;                  // the tiles of this GEMM
  int32_t first_draw = 0, end_draw = 0, per_draw;        // its draws, of that many neighbouring tiles each
  int32_t row_tiles;
  int32_t expert, first_token_tile, token_tiles;         // of the tile found last

  __device__ TileFinder(const KernelParams& p, const Smem<C>& smem) : p(p), smem(smem) { start_gemm(); }

  __device__ bool both_parts() const { return C::kGated && gemm == 0; }
  __device__ int32_t row_step() const { return C::kSplit ? p.gemm[gemm].tile_rows : both_parts() ? C::kRows / 2 : C::kRows; }

  __device__ void start_gemm() {
    row_tiles = p.gemm[gemm].row_tiles;
    begin = end;
    end += smem.tile_begin[p.num_experts] * row_tiles;
    per_draw = 1;
    if constexpr (C::kDrawsSeveral)  // at most an eighth of what a thread block gets, so that they end together
      while (per_draw < p.gemm[gemm].most_per_draw && (per_draw + 1) * int32_t(8 * gridDim.x) <= end - begin) ++per_draw;
    first_draw = end_draw;
    end_draw += per_draw == 1 ? end - begin : (end - begin + per_draw - 1) / per_draw;
    expert = p.num_experts - 1;
  }

  __device__ void start_next() {
    ++gemm;
    start_gemm();
  }

  // [index, last): the tiles of a draw; at or past the end if there are none.
  __device__ void tiles_of(int32_t draw, int32_t& index, int32_t& last) {
    while (draw >= end_draw && gemm + 1 < p.num_gemms) start_next();
    index = begin + (draw - first_draw) * per_draw;
    last = min(index + per_draw, end);
  }

  // Warp-collective: 32 experts are tried at once. A division takes as long as all the rest, hence the conditions before them.
  __device__ Tile find(int32_t index) {
    while (index >= end) {
      if (gemm + 1 == p.num_gemms) return {};
      start_next();
    }
    index = end - 1 - index;
    const int lane = threadIdx.x & 31;
    auto past = [&](int e) { return __ballot_sync(~0u, e <= 0 || smem.tile_begin[e] * row_tiles <= index); };
    uint32_t mask = past(expert - lane);
    if (mask == 0) {  // not among the next 32: those of which every 32nd is past, too
      static_assert(kMaxExperts <= 32 * 32);
      expert -= 32 * __ffs(past(expert - 32 * (lane + 1))) - 31;
      mask = past(expert - lane);
    }
    expert -= __ffs(mask) - 1;
    first_token_tile = smem.tile_begin[expert];
    token_tiles = smem.tile_begin[expert + 1] - first_token_tile;
    const int32_t local = index - first_token_tile * row_tiles;
    const int32_t row_tile = token_tiles == 1 ? local : local / token_tiles;
    Tile tile = {};
    tile.gemm = gemm;
    tile.expert = expert;
    if (!C::kGated) tile.part = row_tiles == p.gemm[gemm].tiles_per_part ? 0 : row_tile / p.gemm[gemm].tiles_per_part;
    tile.row = (row_tile - tile.part * p.gemm[gemm].tiles_per_part) * row_step();
    set_tokens(tile, local - row_tile * token_tiles);
    return tile;
  }

  // find(index + 1), where tile is find(index).
  __device__ Tile next(Tile tile, int32_t index) {
    const int32_t token_tile = tile.token_tile - first_token_tile;
    if (token_tile == 0) {
      if (tile.row == 0) return find(index + 1);
      tile.row -= row_step();
    }
    if (token_tiles > 1) set_tokens(tile, (token_tile == 0 ? token_tiles : token_tile) - 1);
    return tile;
  }

  __device__ void set_tokens(Tile& tile, int32_t token_tile) const {
    const int32_t first = smem.offsets[expert], rows = rows_in_use<C>(p, expert, smem.offsets[expert + 1] - first);
    const TokenTiles tiles(rows, C::kMaxTokens, C::kExtraTokens);
    const int32_t begin = tiles.begin(token_tile);
    tile.token = first + begin;
    tile.valid_tokens = tiles.begin(token_tile + 1) - begin;
    tile.size = max(3, 32 - __clz(min(tile.valid_tokens, C::kMaxTokens) - 1));
    tile.token_tile = first_token_tile + token_tile;
  }
};

// The part and the row within it that a block of 64 weight rows of a tile starts at. Warpgroup g's of wave w is w * kWarpgroups + g.
template <class C>
__device__ __forceinline__ void block_origin(const KernelParams& p, const Tile& tile, int block, int32_t& part, int32_t& row) {
  constexpr int kBlocksOfPart = C::kRows / 128;  // gated
  const bool both_parts = C::kGated && tile.gemm == 0;
  part = both_parts ? (block < kBlocksOfPart ? p.gate_part : 1 - p.gate_part) : tile.part;
  row = tile.row + 64 * (both_parts ? block % kBlocksOfPart : block);
}
template <class C>
__device__ __forceinline__ void wave_origin(const KernelParams& p, const Tile& tile, int w, int32_t& part, int32_t& row) {
  block_origin<C>(p, tile, w * C::kWarpgroups, part, row);
}

// smem.offsets, and from it the token tiles before each expert. `counted`: offsets[e + 1] holds the rows of expert e, else they are read from
// expert_offsets. Its barriers are for all threads.
template <class C>
__device__ __forceinline__ void count_tiles(const KernelParams& p, const Smem<C>& smem, bool counted) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  auto warp_sums = reinterpret_cast<int2*>(smem.staging_ptr);
  const int32_t first_row = counted ? 0 : p.expert_offsets[0];
  int2 before = {first_row, 0};  // rows, tiles
  for (int first = 0; first < p.num_experts; first += C::kThreads) {
    const int e = first + threadIdx.x;
    const bool exists = e < p.num_experts;
    const int32_t rows = !exists ? 0 : counted ? smem.offsets[e + 1] : p.expert_offsets[e + 1] - p.expert_offsets[e];
    int2 sum = {rows, TokenTiles(rows_in_use<C>(p, e, rows), C::kMaxTokens, C::kExtraTokens).count};
    for (int d = 1; d < kLanes; d *= 2) {
      const int2 other = {__shfl_up_sync(~0u, sum.x, d), __shfl_up_sync(~0u, sum.y, d)};
      if (lane >= d) sum.x += other.x, sum.y += other.y;
    }
    if (lane == kLanes - 1) warp_sums[warp] = sum;
    __syncthreads();  // warp_sums is complete
    const int2 other = lane < warp ? warp_sums[lane] : int2{};  // of the warps before
    sum = {sum.x + __reduce_add_sync(~0u, other.x), sum.y + __reduce_add_sync(~0u, other.y)};
    if (exists) {
      smem.offsets[e + 1] = before.x + sum.x;
      smem.tile_begin[e + 1] = before.y + sum.y;
    }
    if (e == 0) smem.offsets[0] = first_row, smem.tile_begin[0] = 0;
    __syncthreads();  // offsets and tile_begin are complete, warp_sums free
    const int last = min(first + C::kThreads, p.num_experts);
    before = {smem.offsets[last], smem.tile_begin[last]};
  }
}

// For count_tiles(): offsets[e + 1] = slots of expert e. Its barriers are for all threads.
template <class C>
__device__ __forceinline__ void count_slots(const KernelParams& p, const Smem<C>& smem) {
  int expert = p.local_expert(threadIdx.x);
  for (int e = threadIdx.x; e <= p.num_experts; e += C::kThreads) smem.offsets[e] = 0;
  __syncthreads();  // zeroed
  for (int slot = threadIdx.x; slot < p.num_slots; expert = p.local_expert(slot += C::kThreads))
    if (expert >= 0) atomicAdd(smem.offsets + expert + 1, 1);
  __syncthreads();  // offsets[e + 1] is complete
}

template <int kStages>
struct PipelineState {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void advance(int count = 1) {  // at most kStages
    stage += count;
    if (stage >= kStages) {
      stage -= kStages;
      phase ^= 1;
    }
  }
};

// Which of the tile slots a warp is at: one register, where PipelineState takes two.
struct TileSlot {
  uint32_t tiles = 0;  // before it
  __device__ uint32_t stage() const { return tiles % kTileSlots; }
  __device__ uint32_t phase() const { return tiles / kTileSlots % 2; }
  __device__ void advance() { ++tiles; }
};

// The tile that a reader warp works on next; released, by every lane of it, once it is finished.
template <class C>
__device__ __forceinline__ const Tile& wait_tile(const Smem<C>& smem, const TileSlot& slot) {
  smem.tile_full[slot.stage()].wait(slot.phase());
  return smem.tiles[slot.stage()];
}
template <class C>
__device__ __forceinline__ void release_tile(const Smem<C>& smem, TileSlot& slot) {
  __syncwarp();  // not needed, but without it ptxas spills in a float8 kernel
  smem.tile_empty[slot.stage()].arrive();
  slot.advance();
}

// A stage's operands are there.
template <class C>
__device__ __forceinline__ void wait_full(const Smem<C>& smem, const PipelineState<C::kStages>& pipe) {
  smem.full[pipe.stage].wait(pipe.phase);
  if (smem.gathered) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads what cp.async wrote
}

// Done with a stage's operands. Every lane says so itself: racecheck does not follow `__syncwarp()` and one lane's arrival, and that is no faster.
// What was read by ordinary loads must have been used, or be fenced from TMA: an arrival does not wait for loads in flight (multiply_packed_few()).
// Only ordinary stores, which refill the scales and split tokens, come after them in any case.
template <class C>
__device__ __forceinline__ void release(const Smem<C>& smem, int stage) {
  smem.empty[stage].arrive();
}

// Before staging that TMA stores from (store_tile()) is written again, or the thread block ends, by all lanes of the warp that stored.
template <class C>
__device__ __forceinline__ void wait_stores() {
  if constexpr (C::kStoresTiles) {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    __syncwarp();
  }
}

// The last stage of a wide tile is staging, too, once it is multiplied: nothing of the tile waits until TMA has read what is staged before. It is
// released while the next tile's first stage is multiplied.
template <class C>
__device__ __forceinline__ void release_held(const Smem<C>& smem, int& held) {
  if (!C::kHoldsStage || held < 0) return;
  wait_stores<C>();
  release<C>(smem, held);
  held = -1;
}

// Stages that this warpgroup has no rows of.
template <class C>
__device__ __forceinline__ void skip(const Smem<C>& smem, PipelineState<C::kStages>& pipe, int k_stages) {
#pragma unroll 1
  for (int kb = 0; kb < k_stages; ++kb, pipe.advance()) {
    wait_full<C>(smem, pipe);
    release<C>(smem, pipe.stage);
  }
}

// threadIdx.x, read anew: addresses made from it are not kept in registers from tile to tile, of which split256 has none to spare (it spilled).
__device__ __forceinline__ uint32_t read_thread() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

template <int kCount>
__device__ __forceinline__ void clear(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) d[i] = 0.f;
}

// A thread's four token scales for two groups of eight tokens are neighbours: one 16-byte load in multiply_float8().
__device__ __forceinline__ int scale_index(int token) { return token / 16 * 16 + token % 8 / 2 * 4 + token / 8 % 2 * 2 + token % 2; }

}  // namespace moe::sm90
