// expert_offsets[e + 1] = expert_offsets[e] + round_up(slots of expert e, alignment);
// slot_to_row[s] = expert_offsets[e] + number of slots before s with the same expert e; row_to_slot is its inverse.
//
// A stable counting sort. A thread block of `scatter_kernel` has a tile of consecutive slots and ranks 512 of them at a time: in a warp by
// ballots, then over its warps. Where a tile's rows start follows from counts: those of each group of 8 tiles are made by `count_kernel`,
// those of the tiles before it in its group by the thread block itself. It waits only for the former, and only when its slots are ranked:
// with programmatic dependent launch the two kernels work side by side. Few slots are a single group, which takes one launch: every thread
// block counts all slots. Counts are sums of integers, ranks need no atomics: deterministic. No host sync.
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
static_assert(2 * kThreads >= kSortSlotsMaxExperts, "a thread has two experts");
constexpr int kExpertBits = 10;
static_assert(1 << kExpertBits >= kSortSlotsMaxExperts, "experts differ in these bits");
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr int kMaxTiles = 128;                       // about one a SM
constexpr int kGroupTiles = 8;                       // more is more to count, fewer is more to add up
constexpr int kMaxSingleTiles = 16;                  // one group: 8192 slots take 3.5 us so and 3.95 in two launches, 16384 4.9 and 3.95
constexpr int kMaxGroups = kMaxTiles / kGroupTiles;  // every thread block adds up the counts of all groups

struct Tiles {
  int size, count, groups;
};

// Up to kMaxTiles tiles, as small as they can be. The last tile and the last group may be cut short.
Tiles tiles_of(int64_t num_slots) {
  const int64_t size = std::max<int64_t>(kThreads, round_up(ceil_div(num_slots, kMaxTiles), kThreads));
  const int64_t count = std::max<int64_t>(1, ceil_div(num_slots, size));
  const int64_t groups = count <= kMaxSingleTiles ? 1 : ceil_div(count, kGroupTiles);
  return {static_cast<int>(size), static_cast<int>(count), static_cast<int>(groups)};
}

// Experts come in pairs (2i, 2i + 1), the share of thread i.
__host__ __device__ constexpr int padded_experts(int num_experts) { return (num_experts + 1) / 2 * 2; }

// Shared memory of scatter_kernel.
struct Shared {
  int experts;         // padded
  int32_t* first_row;  // [experts]: of the slots that are ranked; until that is known, how many slots are before the tile
  int32_t* end_row;    // [experts]: past all slots; until that is known, how many slots are in the tile or after it
  uint16_t* counts;    // [kWarps][experts]: of the slots that are ranked, those of the warps before

  __device__ __forceinline__ Shared(uint8_t* base, int num_experts)
      : experts(padded_experts(num_experts)),
        first_row(reinterpret_cast<int32_t*>(base)),
        end_row(first_row + experts),
        counts(reinterpret_cast<uint16_t*>(end_row + experts)) {}
  static size_t bytes(int num_experts) { return padded_experts(num_experts) * (2 * sizeof(int32_t) + kWarps * sizeof(uint16_t)); }
};

__device__ __forceinline__ int load_id(const SortSlotsArgs& args, int64_t slot, int64_t end) {
  return slot < end ? args.topk_ids[slot] : -1;
}

// before[expert] += slots in [begin, split) with that expert, after[expert] += those in [split, end).
__device__ __forceinline__ void count_slots(const SortSlotsArgs& args, int64_t begin, int64_t split, int64_t end, int32_t* before,
                                            int32_t* after) {
  for (int64_t slot = begin + threadIdx.x; slot < end; slot += kGroupTiles * kThreads) {
    int experts[kGroupTiles];  // ids at first: a loop each, so that the loads of one are in flight together
#pragma unroll
    for (int i = 0; i < kGroupTiles; ++i) experts[i] = load_id(args, slot + i * kThreads, end);
#pragma unroll
    for (int i = 0; i < kGroupTiles; ++i) experts[i] = local_expert(args, experts[i]);
#pragma unroll
    for (int i = 0; i < kGroupTiles; ++i)
      if (experts[i] >= 0) atomicAdd((slot + i * kThreads < split ? before : after) + experts[i], 1);
  }
}

// The lanes of this warp with the same expert; for a negative one, any lanes. `match_any` takes a step for each expert that occurs, this
// one for each bit.
__device__ __forceinline__ unsigned lanes_with(int expert) {
  unsigned lanes = __ballot_sync(kAllLanes, expert >= 0);
#pragma unroll
  for (int bit = 0; bit < kExpertBits; ++bit) {
    const bool is_set = expert >> bit & 1;
    const unsigned set = __ballot_sync(kAllLanes, is_set);
    lanes &= is_set ? set : ~set;
  }
  return lanes;
}

// Replaces the counts of this thread's experts by those of the warps before, and returns their sums over all warps.
__device__ __forceinline__ int2 scan_warps(uint16_t* counts, int experts) {
  const int i = threadIdx.x;
  if (2 * i >= experts) return {};
  uint32_t words[kWarps], sums = 0;  // two of 16 bits; kThreads slots are counted, so nothing carries over
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) words[warp] = reinterpret_cast<uint32_t*>(counts + warp * experts)[i];
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    reinterpret_cast<uint32_t*>(counts + warp * experts)[i] = sums;
    sums += words[warp];
  }
  return make_int2(sums & 0xffffu, sums >> 16);
}

// How many threads before this one have the same expert. `counted`: how many of all have those of this thread's share. Ends with a barrier.
__device__ __forceinline__ int rank_threads(const Shared& s, int expert, int2& counted) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  uint16_t* mine = s.counts + warp * s.experts;
#pragma unroll 1
  for (int i = lane; i < s.experts / 2; i += kLanes) reinterpret_cast<uint32_t*>(mine)[i] = 0;
  const unsigned lanes = lanes_with(expert), before = lanes & ((1u << lane) - 1);
  __syncwarp();  // zeroed
  if (expert >= 0 && before == 0) mine[expert] = __popc(lanes);
  __syncthreads();  // all warps have counted
  counted = scan_warps(s.counts, s.experts);
  __syncthreads();  // scanned
  return expert >= 0 ? mine[expert] + __popc(before) : 0;
}

// The sum of x over the threads before this one. All threads call it, once.
__device__ __forceinline__ int exclusive_sum(int x) {
  __shared__ int warp_sums[kWarps];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  int sum = x;
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    const int before = __shfl_up_sync(kAllLanes, sum, lanes);
    if (lane >= lanes) sum += before;
  }
  if (lane == kLanes - 1) warp_sums[warp] = sum;
  __syncthreads();  // warp_sums is complete
  return sum - x + __reduce_add_sync(kAllLanes, lane < warp ? warp_sums[lane] : 0);
}

__device__ __forceinline__ int align(int rows, int alignment) {
  return (static_cast<unsigned>(rows) + alignment - 1) / alignment * alignment;
}

// Makes rows of the counts in first_row and end_row and of the groups' counts, and writes expert_offsets. Ends with a barrier.
template <bool kSingle>
__device__ __forceinline__ void find_rows(const SortSlotsArgs& args, const Shared& s, const int32_t* group_counts, int num_groups) {
  const int i = threadIdx.x, group = blockIdx.x / kGroupTiles;
  int2& first_row = reinterpret_cast<int2*>(s.first_row)[i];
  int2& end_row = reinterpret_cast<int2*>(s.end_row)[i];
  int2 before{}, total{};
  if (2 * i < s.experts) {
    before = first_row;
    if (kSingle) total = make_int2(before.x + end_row.x, before.y + end_row.y);
#pragma unroll
    for (int g = 0; g < (kSingle ? 0 : kMaxGroups); ++g) {
      const int2 count = g < num_groups ? reinterpret_cast<const int2*>(group_counts + g * s.experts)[i] : int2{};
      total = make_int2(total.x + count.x, total.y + count.y);
      if (g < group) before = make_int2(before.x + count.x, before.y + count.y);
    }
  }
  const int rows = align(total.x, args.alignment);
  int2 offset;
  offset.x = exclusive_sum(rows + align(total.y, args.alignment));
  offset.y = offset.x + rows;
  if (2 * i < s.experts) {
    first_row = make_int2(offset.x + before.x, offset.y + before.y);
    end_row = make_int2(offset.x + total.x, offset.y + total.y);
  }
  if (blockIdx.x == 0) {
    if (2 * i < args.num_experts) args.expert_offsets[2 * i] = offset.x;
    if (2 * i + 1 < args.num_experts) args.expert_offsets[2 * i + 1] = offset.y;
    if (i == kThreads - 1) args.expert_offsets[args.num_experts] = offset.y + align(total.y, args.alignment);
  }
  __syncthreads();  // first_row and end_row are rows
}

// row_to_slot = -1 where no slot is: the padding after the rows of each expert, and what comes after the last one.
__device__ __forceinline__ void fill_padding(const SortSlotsArgs& args, const int32_t* end_row) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const auto fill = [&](int64_t begin, int64_t end, int64_t step) {
#pragma unroll 1
    for (int64_t row = begin; row < end; row += step) args.row_to_slot[row] = -1;
  };
#pragma unroll 1
  for (int e = blockIdx.x + warp * gridDim.x; e < args.num_experts; e += kWarps * gridDim.x)
    fill(int64_t(end_row[e]) + lane, align(end_row[e], args.alignment), kLanes);  // the next expert is aligned
  const int end = args.num_experts > 0 ? align(end_row[args.num_experts - 1], args.alignment) : 0;
  fill(int64_t(end) + blockIdx.x * kThreads + threadIdx.x, args.num_rows,
       gridDim.x * kThreads);
}

// group_counts[group][expert]
__global__ void __launch_bounds__(kThreads) count_kernel(SortSlotsArgs args, int tile_size, int32_t* group_counts) {
  extern __shared__ __align__(16) uint8_t shared[];
  int32_t* counts = reinterpret_cast<int32_t*>(shared);
  const int experts = padded_experts(args.num_experts);
  const int64_t size = int64_t(kGroupTiles) * tile_size, begin = blockIdx.x * size, end = min(begin + size, args.num_slots);
#pragma unroll 1
  for (int e = threadIdx.x; e < experts; e += kThreads) counts[e] = 0;
  __syncthreads();  // zeroed
  pdl_wait();
  pdl_launch_next();
  count_slots(args, begin, end, end, counts, counts);
  __syncthreads();  // counted
#pragma unroll 1
  for (int e = threadIdx.x; e < experts; e += kThreads) group_counts[blockIdx.x * experts + e] = counts[e];
}

// kSingle: all tiles are one group, there was no count_kernel.
template <bool kSingle>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(SortSlotsArgs args, int tile_size, const int32_t* group_counts, int num_groups) {
  extern __shared__ __align__(16) uint8_t shared[];
  const Shared s(shared, args.num_experts);
  const int i = threadIdx.x;
  const int64_t begin = int64_t(blockIdx.x) * tile_size, end = min(begin + tile_size, args.num_slots);
  const int64_t group_begin = kSingle ? 0 : int64_t(blockIdx.x / kGroupTiles * kGroupTiles) * tile_size;
#pragma unroll 1
  for (int e = i; e < 2 * s.experts; e += kThreads) s.first_row[e] = 0;  // and end_row
  __syncthreads();  // zeroed
  // Unless kSingle, this kernel started when count_kernel had waited for the ids; now there is only group_counts to wait for.
  if constexpr (kSingle) pdl_wait();
  const int id = load_id(args, begin + i, end);
  count_slots(args, group_begin, begin, kSingle ? args.num_slots : begin, s.first_row, s.end_row);
  int expert = local_expert(args, id);
  int2 counted;
  int rank = rank_threads(s, expert, counted);
  if constexpr (!kSingle) pdl_wait();
  pdl_launch_next();
  find_rows<kSingle>(args, s, group_counts, num_groups);
  for (int64_t slot = begin + i;;) {
    if (slot < end) {
      const int row = expert >= 0 ? s.first_row[expert] + rank : expert;
      args.slot_to_row[slot] = row;
      if (row >= 0 && args.row_to_slot != nullptr) args.row_to_slot[row] = static_cast<int32_t>(slot);
    }
    slot += kThreads;
    if (slot - i >= end) break;
    __syncthreads();  // first_row has been read
    if (2 * i < s.experts) {
      s.first_row[2 * i] += counted.x;
      s.first_row[2 * i + 1] += counted.y;
    }
    expert = local_expert(args, load_id(args, slot, end));
    rank = rank_threads(s, expert, counted);
  }
  if (args.row_to_slot != nullptr) fill_padding(args, s.end_row);
  for (int64_t j = blockIdx.x * kThreads + i; j < args.num_cleared; j += gridDim.x * kThreads) args.cleared[j] = 0;
}

}  // namespace

size_t sort_slots_workspace_bytes(int64_t num_slots, int32_t num_experts) {
  const int groups = tiles_of(num_slots).groups;
  return groups > 1 ? groups * padded_experts(num_experts) * sizeof(int32_t) : 0;
}

cudaError_t sort_slots(const SortSlotsArgs& args, void* workspace, cudaStream_t stream) {
  const Tiles tiles = tiles_of(args.num_slots);
  const dim3 grid(tiles.count), block(kThreads);
  const size_t shared = Shared::bytes(args.num_experts), counts_bytes = padded_experts(args.num_experts) * sizeof(int32_t);
  auto* group_counts = static_cast<int32_t*>(workspace);
  if (tiles.groups == 1) return launch(scatter_kernel<true>, grid, block, shared, stream, args, tiles.size, nullptr, 1);
  const cudaError_t error = launch(count_kernel, dim3(tiles.groups), block, counts_bytes, stream, args, tiles.size, group_counts);
  if (error != cudaSuccess) return error;
  return launch(scatter_kernel<false>, grid, block, shared, stream, args, tiles.size, group_counts, tiles.groups);
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
