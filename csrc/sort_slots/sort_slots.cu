// expert_offsets[e + 1] = expert_offsets[e] + round_up(slots of expert e, alignment);
// slot_to_row[s] = expert_offsets[e] + number of slots before s with the same expert e; row_to_slot is its inverse.
//
// A stable counting sort. Each thread block owns a tile of consecutive slots, each of its warps a run of that tile. A
// warp counts 32 slots at a time: `match_any` finds the lanes with the same expert, so ranks come out in slot order and
// no atomic is needed. Up to kSingleTile slots are one tile: one launch. Otherwise `count_kernel` writes each tile's
// counts and `scatter_kernel` starts every tile at the sum of the tiles before it: two launches, deterministic, no host
// sync.
#include <torch/csrc/stable/library.h>

#include "common/dtypes.h"
#include "common/launch.h"
#include "common/stream.h"
#include "common/tensor.h"
#include "sort_slots/sort_slots.h"

namespace moe {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kLanes;
static_assert(2 * kThreads >= kSortSlotsMaxExperts, "a thread scans two experts");
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr int64_t kSingleTile = 8192;  // a second launch costs about as much as a tile of this size
constexpr int64_t kMinTile = 2048;
constexpr int64_t kTiles = 128;        // about one a SM; every block sums the counts of all tiles
constexpr int64_t kMaxTile = 1 << 15;  // counts within a tile are 16 bits

struct Tiles {
  int64_t size, count;
};

Tiles tiles_of(int64_t num_slots) {
  if (num_slots <= kSingleTile) return {kSingleTile, 1};
  const int64_t size = std::clamp(round_up(ceil_div(num_slots, kTiles), kThreads), kMinTile, kMaxTile);
  return {size, ceil_div(num_slots, size)};
}

// Two experts share a 32-bit word of counts.
__host__ __device__ constexpr int padded_experts(int num_experts) { return (num_experts + 1) / 2 * 2; }

size_t shared_bytes(int num_experts) {
  return padded_experts(num_experts) * (kWarps * sizeof(uint16_t) + sizeof(int32_t));
}

// The run of slots that belongs to this warp, in batches of 32: visit(slot, expert, lanes with the same expert).
// Past the end of the run, slot is -1 and expert -1.
template <typename Visit>
__device__ __forceinline__ void for_each_batch(const SortSlotsArgs& args, int64_t tile_size, Visit&& visit) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t tile_begin = blockIdx.x * tile_size;
  const int64_t tile_end = min(tile_begin + tile_size, args.num_slots);
  const int64_t run = (tile_end - tile_begin + kThreads - 1) / kThreads * kLanes;
  const int64_t begin = tile_begin + warp * run, end = min(begin + run, tile_end);
  auto load = [&](int64_t slot) { return slot < end ? expert_of(args, slot) : -1; };
  int next = load(begin + lane);
  for (int64_t batch = begin; batch < end; batch += kLanes) {
    const int expert = next;
    next = load(batch + kLanes + lane);  // in flight while this batch is matched
    visit(batch + lane < end ? batch + lane : -1, expert, __match_any_sync(kAllLanes, expert));
  }
}

// counts[warp][expert] = slots of that expert in that warp's run; ends with a barrier.
__device__ __forceinline__ void count_tile(const SortSlotsArgs& args, int64_t tile_size, uint16_t* counts) {
  const int experts = padded_experts(args.num_experts);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  uint16_t* mine = counts + warp * experts;
  for (int e = lane; e < experts; e += kLanes) mine[e] = 0;
  __syncwarp();  // zeroed
  for_each_batch(args, tile_size, [&](int64_t, int expert, unsigned peers) {
    if (expert >= 0 && lane == __ffs(peers) - 1) mine[expert] += __popc(peers);
    __syncwarp();  // the next batch may count the same expert from another lane
  });
  __syncthreads();  // all runs are counted
}

// A pair of experts (2i, 2i + 1), the share of thread i.
struct Pair {
  int x = 0, y = 0;
};

// Replaces this thread's counts by the counts of the warps before, and returns the tile's counts.
__device__ __forceinline__ Pair scan_warps(uint16_t* counts, int experts) {
  const int i = threadIdx.x;
  if (2 * i >= experts) return {};
  uint32_t running = 0;  // two 16-bit sums; a tile has fewer than 2^16 slots, so nothing carries over
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    uint32_t& word = reinterpret_cast<uint32_t*>(counts + warp * experts)[i];
    const uint32_t count = word;
    word = running;
    running += count;
  }
  return {static_cast<int>(running & 0xffffu), static_cast<int>(running >> 16)};
}

// The sum of x over the threads before this one. All threads call it, once.
__device__ __forceinline__ int exclusive_sum(int x) {
  __shared__ int warp_sums[kWarps];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  int sum = x;
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    const int before = __shfl_up_sync(kAllLanes, sum, lanes);
    if (lane >= lanes) sum += before;
  }
  if (lane == kLanes - 1) warp_sums[warp] = sum;
  __syncthreads();  // warp_sums is complete
  for (int w = 0; w < warp; ++w) sum += warp_sums[w];
  return sum - x;
}

__device__ __forceinline__ int align(int rows, int alignment) { return (rows + alignment - 1) / alignment * alignment; }

__device__ __forceinline__ void fill_row_to_slot(const SortSlotsArgs& args) {
  if (args.row_to_slot == nullptr) return;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t quads = reinterpret_cast<uintptr_t>(args.row_to_slot) % 16 == 0 ? args.num_rows / 4 : 0;
  for (int64_t i = thread; i < quads; i += threads)
    reinterpret_cast<int4*>(args.row_to_slot)[i] = make_int4(-1, -1, -1, -1);
  for (int64_t row = 4 * quads + thread; row < args.num_rows; row += threads) args.row_to_slot[row] = -1;
}

// tile_counts[tile][expert], and row_to_slot = -1 everywhere.
__global__ void __launch_bounds__(kThreads) count_kernel(SortSlotsArgs args, int64_t tile_size, int32_t* tile_counts) {
  extern __shared__ __align__(16) uint8_t shared[];
  uint16_t* counts = reinterpret_cast<uint16_t*>(shared);
  const int experts = padded_experts(args.num_experts);
  pdl_wait();
  pdl_launch_next();
  fill_row_to_slot(args);
  count_tile(args, tile_size, counts);
  const Pair count = scan_warps(counts, experts);
  int2* out = reinterpret_cast<int2*>(tile_counts + blockIdx.x * experts);
  if (2 * threadIdx.x < experts) out[threadIdx.x] = make_int2(count.x, count.y);
}

// kSingle: the only tile; it fills row_to_slot itself and needs no tile_counts.
template <bool kSingle>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(SortSlotsArgs args, int64_t tile_size, const int32_t* tile_counts, int num_tiles) {
  extern __shared__ __align__(16) uint8_t shared[];
  uint16_t* counts = reinterpret_cast<uint16_t*>(shared);
  const int experts = padded_experts(args.num_experts), i = threadIdx.x;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  int32_t* first_row = reinterpret_cast<int32_t*>(counts + kWarps * experts);  // [experts], of this tile
  pdl_wait();
  pdl_launch_next();
  if constexpr (kSingle) fill_row_to_slot(args);
  count_tile(args, tile_size, counts);
  Pair total = scan_warps(counts, experts), before;
  if (!kSingle && 2 * i < experts) {
    total = {};
#pragma unroll 8
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int2 count = reinterpret_cast<const int2*>(tile_counts + static_cast<int64_t>(tile) * experts)[i];
      total.x += count.x;
      total.y += count.y;
      before.x += tile < blockIdx.x ? count.x : 0;
      before.y += tile < blockIdx.x ? count.y : 0;
    }
  }
  const int rows_x = align(total.x, args.alignment), rows_y = align(total.y, args.alignment);
  const int offset = exclusive_sum(rows_x + rows_y);
  if (2 * i < experts) {
    first_row[2 * i] = offset + before.x;
    first_row[2 * i + 1] = offset + rows_x + before.y;
  }
  if (blockIdx.x == 0) {
    if (2 * i < args.num_experts) args.expert_offsets[2 * i] = offset;
    if (2 * i + 1 < args.num_experts) args.expert_offsets[2 * i + 1] = offset + rows_x;
    if (i == kThreads - 1) args.expert_offsets[args.num_experts] = offset + rows_x + rows_y;
  }
  for (int64_t j = blockIdx.x * kThreads + i; j < args.num_cleared; j += gridDim.x * kThreads) args.cleared[j] = 0;
  __syncthreads();  // first_row, every warp's counts and row_to_slot = -1 are complete
  uint16_t* mine = counts + warp * experts;
  for_each_batch(args, tile_size, [&](int64_t slot, int expert, unsigned peers) {
    const int rank = expert >= 0 ? mine[expert] + __popc(peers & ((1u << lane) - 1)) : 0;
    __syncwarp();  // every lane has read the count that its leader now raises
    if (expert >= 0 && lane == __ffs(peers) - 1) mine[expert] += __popc(peers);
    __syncwarp();  // raised before the next batch reads it
    if (slot < 0) return;
    const int row = expert >= 0 ? first_row[expert] + rank : expert;
    args.slot_to_row[slot] = row;
    if (row >= 0 && args.row_to_slot != nullptr) args.row_to_slot[row] = static_cast<int32_t>(slot);
  });
}

}  // namespace

size_t sort_slots_workspace_bytes(int64_t num_slots, int32_t num_experts) {
  const int64_t tiles = tiles_of(num_slots).count;
  return tiles > 1 ? tiles * padded_experts(num_experts) * sizeof(int32_t) : 0;
}

cudaError_t sort_slots(const SortSlotsArgs& args, void* workspace, cudaStream_t stream) {
  const Tiles tiles = tiles_of(args.num_slots);
  const dim3 grid(static_cast<unsigned>(tiles.count)), block(kThreads);
  const size_t shared = shared_bytes(args.num_experts);
  auto* tile_counts = static_cast<int32_t*>(workspace);
  const int num_tiles = static_cast<int>(tiles.count);
  if (tiles.count == 1) return launch(scatter_kernel<true>, grid, block, shared, stream, args, tiles.size, nullptr, 1);
  const cudaError_t error = launch(count_kernel, grid, block, shared, stream, args, tiles.size, tile_counts);
  if (error != cudaSuccess) return error;
  return launch(scatter_kernel<false>, grid, block, shared, stream, args, tiles.size, tile_counts, num_tiles);
}

namespace {

std::tuple<Tensor, Tensor, Tensor> sort_slots_cuda(const Tensor& topk_ids, int64_t num_experts,
                                                   const std::optional<Tensor>& expert_map, int64_t alignment) {
  constexpr const char* kOp = "sort_slots";
  expect_tensor(kOp, "topk_ids", topk_ids, {ScalarType::Int}, {"T", "K"}, topk_ids);
  MOE_EXPECT(num_experts >= 1 && num_experts <= kSortSlotsMaxExperts, kOp, "num_experts",
             "1 to " << kSortSlotsMaxExperts, num_experts);
  MOE_EXPECT(alignment >= 1 && alignment <= 1 << 20, kOp, "alignment", "1 to " << (1 << 20), alignment);
  expect_tensor(kOp, "expert_map", expert_map, {ScalarType::Int}, {"Eg"}, topk_ids);
  const int64_t num_slots = topk_ids.numel();
  const int64_t padding = std::min(num_experts, num_slots) * (alignment - 1);
  const int64_t num_rows = (num_slots + padding) / alignment * alignment;
  MOE_EXPECT(num_rows <= INT32_MAX, kOp, "topk_ids", "at most " << INT32_MAX << " rows", num_rows);
  Tensor expert_offsets = empty({num_experts + 1}, ScalarType::Int, topk_ids);
  Tensor slot_to_row = empty({topk_ids.size(0), topk_ids.size(1)}, ScalarType::Int, topk_ids);
  Tensor row_to_slot = empty({num_rows}, ScalarType::Int, topk_ids);
  SortSlotsArgs args;
  args.topk_ids = pointer<const int32_t>(topk_ids);
  args.expert_map = pointer<const int32_t>(expert_map);
  args.num_slots = num_slots;
  args.num_global_experts = expert_map ? static_cast<int32_t>(expert_map->numel()) : 0;
  args.num_experts = static_cast<int32_t>(num_experts);
  args.alignment = static_cast<int32_t>(alignment);
  args.num_rows = num_rows;
  args.expert_offsets = pointer<int32_t>(expert_offsets);
  args.slot_to_row = pointer<int32_t>(slot_to_row);
  args.row_to_slot = pointer<int32_t>(row_to_slot);
  const auto bytes = static_cast<int64_t>(sort_slots_workspace_bytes(num_slots, args.num_experts));
  const Tensor workspace = empty({bytes}, ScalarType::Byte, topk_ids);
  const CudaScope scope(topk_ids);
  check_cuda(kOp, sort_slots(args, workspace.data_ptr(), scope.stream));
  return {expert_offsets, slot_to_row, row_to_slot};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) { m.impl("sort_slots.cuda", TORCH_BOX(&moe::sort_slots_cuda)); }
