"""topk_ids[t] = the top_k largest of choice[t] = score[t] + correction_bias; topk_weights[t] = score[t, topk_ids[t]].

router_logits [T, Eg] -> topk_weights float32 [T, K], topk_ids int32 [T, K], descending; score is the softmax or the
sigmoid of the logits. With groups, only the topk_groups groups with the largest sum of their two largest choices take
part. One program holds one token's experts as a tile [GROUPS, GROUP_SIZE]; each winner is the maximum of a 64-bit key
whose low half makes ties go to the lower id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_moe_ops.triton._common import EXACT, on_device, to_float32

# Smaller than every key of a real expert or group.
TAKEN = tl.constexpr(-(2**63))


@triton.jit
def _max(x):
    return tl.max(tl.max(x, axis=1), axis=0)


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def _ordering_key(x, index):
    """int64 keys that order by x (float32, not NaN), then by descending index."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 = +0: the two zeros tie
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _index_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _scores(logits, valid, SCORING: tl.constexpr):
    """Scores [GROUPS, GROUP_SIZE]; logits that are NaN or outside `valid` weigh 0."""
    usable = valid & (logits == logits)
    if SCORING == "softmax":
        largest = _max(tl.where(usable, logits, float("-inf")))
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        exp = tl.where(usable, tl.exp(logits - largest), 0.0)
        total = _sum(exp)
        score = exp / tl.where(total == 0, 1.0, total)
        return tl.where(score == score, score, 0.0)  # infinite logits
    else:
        return tl.where(usable, 1.0 / (1.0 + tl.exp(-logits)), 0.0)


@triton.jit
def _best_groups(
    choice, group, num_groups, TOPK_GROUPS: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr
):  # fmt: skip
    """int1 [GROUPS]: the topk_groups groups whose two largest choices (or one) have the largest sum."""
    member = tl.arange(0, GROUP_SIZE)[None, :]
    first = tl.max(choice, axis=1)
    first_at = tl.min(tl.where(choice == first[:, None], member, GROUP_SIZE), axis=1)
    second = tl.max(tl.where(member == first_at[:, None], float("-inf"), choice), axis=1)
    score = first if GROUP_SIZE == 1 else first + second
    key = tl.where(group < num_groups, _ordering_key(score, group), TAKEN)
    chosen = tl.zeros([GROUPS], tl.int32)
    for _ in range(TOPK_GROUPS):
        best = tl.max(key, axis=0)
        chosen = tl.where(key == best, 1, chosen)
        key = tl.where(key == best, TAKEN, key)
    return chosen != 0


@triton.jit
def _topk_kernel(
    router_logits_ptr, correction_bias_ptr, topk_weights_ptr, topk_ids_ptr,
    num_experts, num_groups, routed_scaling_factor,
    SCORING: tl.constexpr, RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, TOPK_GROUPS: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, GROUPS), tl.arange(0, GROUP_SIZE)
    group_size = num_experts // num_groups
    expert = group[:, None] * group_size + member[None, :]
    valid = (group[:, None] < num_groups) & (member[None, :] < group_size)
    logits_ptrs = router_logits_ptr + token * num_experts + expert
    logits = to_float32(tl.load(logits_ptrs, mask=valid, other=float("-inf")))
    score = _scores(logits, valid, SCORING)
    choice = score
    if correction_bias_ptr is not None:
        choice += tl.load(correction_bias_ptr + expert, mask=valid, other=0.0)
    choice = tl.where(valid & (logits == logits) & (choice == choice), choice, float("-inf"))
    eligible = valid
    if GROUPS > 1:
        eligible &= _best_groups(choice, group, num_groups, TOPK_GROUPS, GROUPS, GROUP_SIZE)[:, None]
    key = tl.where(eligible, _ordering_key(choice, expert), TAKEN)
    slot = tl.arange(0, SLOTS)
    weights = tl.zeros([SLOTS], tl.float32)
    ids = tl.zeros([SLOTS], tl.int32)
    for k in range(TOP_K):
        best = _max(key)
        winner = _index_of(best)
        ids = tl.where(slot == k, winner, ids)
        weights = tl.where(slot == k, _sum(tl.where(expert == winner, tl.where(valid, score, 0.0), 0.0)), weights)
        key = tl.where(key == best, TAKEN, key)
    if RENORMALIZE:
        weights = tl.math.div_rn(weights, tl.zeros([SLOTS], tl.float32) + (tl.sum(weights, axis=0) + 1e-20))
    tl.store(topk_weights_ptr + token * TOP_K + slot, weights * routed_scaling_factor, mask=slot < TOP_K)
    tl.store(topk_ids_ptr + token * TOP_K + slot, ids, mask=slot < TOP_K)


def topk(
    router_logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    correction_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = router_logits.shape
    topk_weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=router_logits.device)
    topk_ids = torch.empty((num_tokens, top_k), dtype=torch.int32, device=router_logits.device)
    if topk_ids.numel() == 0:
        return topk_weights, topk_ids
    with on_device(router_logits):
        _topk_kernel[(num_tokens,)](
            router_logits, correction_bias, topk_weights, topk_ids,
            num_experts, num_groups, routed_scaling_factor,
            SCORING=scoring, RENORMALIZE=renormalize, TOP_K=top_k, SLOTS=triton.next_power_of_2(top_k),
            TOPK_GROUPS=topk_groups, GROUPS=triton.next_power_of_2(num_groups),
            GROUP_SIZE=triton.next_power_of_2(num_experts // num_groups),
            num_warps=1 if num_experts <= 128 else 4, **EXACT,
        )  # fmt: skip
    return topk_weights, topk_ids
