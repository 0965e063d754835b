// sort_slots and permute of few slots in one launch: the same results, bit for bit.
#pragma once
#include "permute/permute.h"
#include "sort_slots/sort_slots.h"

namespace moe {

// A thread block ranks its token's slots among all slots, so the work grows with their square.
constexpr int64_t kSortPermuteMaxSlots = 2304;

// `permute_args.slot_to_row` is `sort_args.slot_to_row`, written here. bf16, fp16 and fp8_block without global scales;
// sort_args.row_to_slot is not written, sort_args.alignment must be 1.
cudaError_t sort_permute(const SortSlotsArgs& sort_args, const PermuteArgs& permute_args, cudaStream_t stream);

}  // namespace moe
