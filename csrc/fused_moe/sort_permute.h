// sort_slots and permute of few slots in one launch, or sort_slots alone: the same results, bit for bit.
#pragma once
#include "permute/permute.h"
#include "sort_slots/sort_slots.h"

namespace moe {

// Every thread block reads all slots and ranks those of its token: as much work as measured to pay (256 tokens, top 9), and no more.
constexpr int64_t kSortPermuteMaxSlots = 2304;
constexpr bool sort_permute_pays(int64_t num_tokens, int64_t num_slots) {
  return num_slots > 0 && num_slots <= kSortPermuteMaxSlots && num_tokens * num_slots <= 256 * kSortPermuteMaxSlots;
}

// `permute_args.slot_to_row` is `sort_args.slot_to_row`, written here. bf16, fp16 and fp8_block without global scales;
// sort_args.row_to_slot is not written, sort_args.alignment must be 1.
cudaError_t sort_permute(const SortSlotsArgs& sort_args, const PermuteArgs& permute_args, cudaStream_t stream);

// slot_to_row and what is to be cleared, alone: the tokens are permuted by whoever reads them. `cleared` starts at a multiple of 16 bytes,
// num_cleared is a multiple of 4; expert_offsets and row_to_slot are not written, alignment must be 1.
cudaError_t sort_clear(const SortSlotsArgs& sort_args, cudaStream_t stream);

}  // namespace moe
