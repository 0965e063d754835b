"""topk, sort_slots and finalize against loops that a reader can check by eye."""

import math

import pytest
import torch

import torch_moe_ops  # noqa: F401  (registers torch.ops.moe)

ops = torch.ops.moe


def choose(choice: list[float], num_groups: int, topk_groups: int, top_k: int) -> list[int]:
    """Ids of the top_k largest choices in the best groups; sorted() is stable, so ties go to the lower id."""
    size = len(choice) // num_groups
    groups = [sum(sorted(choice[g * size : (g + 1) * size], reverse=True)[:2]) for g in range(num_groups)]
    best = sorted(range(num_groups), key=lambda g: -groups[g])[:topk_groups]
    ids = [i for i in range(len(choice)) if i // size in best]
    return sorted(ids, key=lambda i: -choice[i])[:top_k]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "num_experts, groups, top_k", [(12, (3, 2), 4), (12, (1, 1), 3), (8, (1, 1), 8), (20, (4, 1), 2)]
)
def test_topk(scoring, dtype, num_experts, groups, top_k):
    num_groups, topk_groups = groups
    generator = torch.Generator().manual_seed(num_experts)
    # Multiples of 1/4 and a coarse bias: many exact ties, and choices that else differ by far more than a rounding.
    logits = (torch.randint(-8, 8, (5, num_experts), generator=generator) / 4).to(dtype)
    bias = torch.randint(-1, 2, (num_experts,), generator=generator).float() if scoring == "sigmoid" else None
    for renormalize in (True, False):
        weights, ids = ops.topk.triton(
            logits, top_k, scoring=scoring, correction_bias=bias, num_groups=num_groups, topk_groups=topk_groups,
            renormalize=renormalize, routed_scaling_factor=2.5,
        )  # fmt: skip
        scores = logits.double().softmax(-1) if scoring == "softmax" else logits.double().sigmoid()
        # Choices that are not exact ties differ by more than 2^-20, so rounding to it leaves their order alone.
        choice = (scores + (0 if bias is None else bias)).mul(2**20).round()
        for token in range(len(logits)):
            expected_ids = choose(choice[token].tolist(), num_groups, topk_groups, top_k)
            assert ids[token].tolist() == expected_ids
            expected = scores[token, expected_ids]
            if renormalize:
                expected = expected / expected.sum()
            torch.testing.assert_close(weights[token].double(), 2.5 * expected, rtol=2e-6, atol=0)


def test_topk_ranks_nan_last_and_weighs_it_zero():
    nan = math.nan
    logits = torch.tensor([[nan, 1.0, 0.0, nan], [nan, nan, nan, nan]])
    weights, ids = ops.topk.triton(logits, 3)
    assert ids.tolist() == [[1, 2, 0], [0, 1, 2]]
    torch.testing.assert_close(weights[0], torch.tensor([math.e / (math.e + 1), 1 / (math.e + 1), 0.0]))
    assert weights[1].tolist() == [0.0, 0.0, 0.0]
    grouped = torch.tensor([[0.0, 0.0, 0.0, 9.0, nan, 8.0]])  # last in its group, still before the group that lost
    assert ops.topk.triton(grouped, 3, num_groups=2, topk_groups=1)[1].tolist() == [[3, 5, 4]]


def sort_by_loop(topk_ids, num_experts, expert_map, alignment):
    slots_of = [[] for _ in range(num_experts)]
    slot_to_row = [-1] * topk_ids.numel()
    for slot, id in enumerate(topk_ids.flatten().tolist()):
        if expert_map is not None and 0 <= id < len(expert_map):
            id = int(expert_map[id])
        elif expert_map is not None and id != -1:
            id = -2
        if 0 <= id < num_experts:
            slots_of[id].append(slot)
        elif id != -1:
            slot_to_row[slot] = -2
    offsets, row_to_slot = [0], []
    for slots in slots_of:
        for slot in slots:
            slot_to_row[slot] = len(row_to_slot)
            row_to_slot.append(slot)
        row_to_slot += [-1] * (-len(row_to_slot) % alignment)
        offsets.append(len(row_to_slot))
    return offsets, slot_to_row, row_to_slot


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("routing", ["mixed", "hot", "none", "out_of_range"])
def test_sort_slots(routing, alignment):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 6, (150, 3), dtype=torch.int32, generator=generator)  # two blocks of slots
    ids[ids == 2] = 3  # expert 2 stays empty
    if routing == "hot":
        ids.fill_(4)
    elif routing == "none":
        ids.fill_(-1)
    elif routing == "out_of_range":
        ids[::7, 0], ids[::11, 1] = 6, -5
    for expert_map in (None, torch.tensor([1, -1, 0, 2, -1, 5], dtype=torch.int32)):
        num_experts = 6
        offsets, slot_to_row, row_to_slot = ops.sort_slots.triton(
            ids, num_experts, expert_map=expert_map, alignment=alignment
        )
        expected = sort_by_loop(ids, num_experts, expert_map, alignment)
        assert offsets.tolist() == expected[0]
        assert slot_to_row.flatten().tolist() == expected[1]
        assert row_to_slot.tolist() == expected[2] + [-1] * (len(row_to_slot) - len(expected[2]))


def test_sort_slots_of_no_tokens():
    offsets, slot_to_row, row_to_slot = ops.sort_slots.triton(torch.empty(0, 4, dtype=torch.int32), 3)
    assert (offsets.tolist(), slot_to_row.shape, row_to_slot.shape) == ([0, 0, 0, 0], (0, 4), (0,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_finalize(dtype):
    generator = torch.Generator().manual_seed(5)
    expert_out = torch.randn(7, 40, generator=generator).to(dtype)
    expert_out[6] = float("nan")  # no slot maps to it
    slot_to_row = torch.tensor([[0, 4, 1], [-1, 2, -1], [3, -2, 5], [-1, -1, -1]], dtype=torch.int32)
    topk_weights = torch.rand(4, 3, generator=generator)
    topk_weights[1, 0] = float("nan")  # of a skipped slot
    for weights in (topk_weights, None):
        out = ops.finalize.triton(expert_out, slot_to_row, topk_weights=weights, routed_scaling_factor=2.5)
        assert out.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
        expected = torch.zeros(4, 40)
        for token, k in (slot_to_row >= 0).nonzero().tolist():
            weight = 1.0 if weights is None else weights[token, k]
            expected[token] += weight * expert_out[slot_to_row[token, k]].float()
        expected[2] = float("nan")
        torch.testing.assert_close(out, (2.5 * expected).to(out.dtype), rtol=0, atol=0, equal_nan=True)


def test_groups_of_one_expert() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 0.0, 2.0, 1.0]])
    for num_groups, topk_groups in ((4, 2), (4, 3), (4, 4)):
        got, expected = (
            op(logits, 2, num_groups=num_groups, topk_groups=topk_groups)[1]
            for op in (ops.topk.triton, ops.topk.reference)
        )
        assert torch.equal(got, expected)


def test_rows_that_do_not_exist_are_neither_written_nor_read():
    x = torch.randn(3, 16)
    slot_to_row = torch.tensor([[0, 1], [2, 5], [-1, 3]], dtype=torch.int32)
    permuted, _ = ops.permute.triton(x.bfloat16(), slot_to_row, 3)
    assert torch.equal(permuted, x.bfloat16()[[0, 0, 1]])
    out = ops.finalize.triton(permuted, slot_to_row)

    assert out[0].isfinite().all() and out[1:].isnan().all()
