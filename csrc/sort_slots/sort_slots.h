// expert_offsets, slot_to_row, row_to_slot: a stable counting sort of slots by local expert (docs/ops.md). Free of
// torch.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace moe {

constexpr int kSortSlotsMaxExperts = 1024;

struct SortSlotsArgs {
  const int32_t* topk_ids = nullptr;    // [num_slots]; -1: not here
  const int32_t* expert_map = nullptr;  // [num_global_experts] -> local expert or -1; or null: ids are local
  int64_t num_slots = 0;
  int32_t num_global_experts = 0;     // of expert_map
  int32_t num_experts = 0;            // local, at most kSortSlotsMaxExperts
  int32_t alignment = 1;              // every expert's first row is a multiple of it
  int64_t num_rows = 0;               // of row_to_slot: max_rows(num_slots, num_experts, alignment)
  int32_t* expert_offsets = nullptr;  // [num_experts + 1]
  int32_t* slot_to_row = nullptr;     // [num_slots]; -1: absent, -2: id out of range
  int32_t* row_to_slot = nullptr;     // [num_rows]; -1: padding; or null: not wanted
  int32_t* cleared = nullptr;         // [num_cleared] or null: set to 0 for the kernels that follow
  int64_t num_cleared = 0;
};

#ifdef __CUDACC__
// Local expert of an id, -1: absent, -2: id out of range. Without branches: the loads of several ids are in flight at once.
__device__ __forceinline__ int local_expert(const SortSlotsArgs& args, int id) {
  const bool mapped = args.expert_map != nullptr;
  const bool in_range = static_cast<unsigned>(id) < static_cast<unsigned>(mapped ? args.num_global_experts : args.num_experts);
  int expert = in_range || id == -1 ? id : -2;
  if (mapped && in_range) expert = args.expert_map[id];
  return static_cast<unsigned>(expert) + 1 <= static_cast<unsigned>(args.num_experts) ? expert : -2;
}

__device__ __forceinline__ int expert_of(const SortSlotsArgs& args, int64_t slot) {
  return local_expert(args, args.topk_ids[slot]);
}
#endif

// Bytes of device memory that `sort_slots` needs: a pure function of sizes, 0 for few slots.
size_t sort_slots_workspace_bytes(int64_t num_slots, int32_t num_experts);
cudaError_t sort_slots(const SortSlotsArgs& args, void* workspace, cudaStream_t stream);

}  // namespace moe
