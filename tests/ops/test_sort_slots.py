"""sort_slots: what its three results promise each other, on random and adversarial routings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torch_moe_ops as moe


def check(ids: list[list[int]], top_k: int, num_experts: int, expert_map: list[int] | None, alignment: int) -> None:
    """Every promise of docs/ops.md, from the definition."""
    topk_ids = torch.tensor(ids, dtype=torch.int32).view(len(ids), top_k)
    map_tensor = None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32)
    results = moe.sort_slots(topk_ids, num_experts, expert_map=map_tensor, alignment=alignment)
    assert all(result.dtype == torch.int32 and result.is_contiguous() for result in results)
    offsets, slot_to_row, row_to_slot = (result.flatten().tolist() for result in results)
    local = [-1 if i < 0 else i if expert_map is None else expert_map[i] for row in ids for i in row]

    assert results[1].shape == topk_ids.shape and len(offsets) == num_experts + 1
    assert len(row_to_slot) == moe.max_rows(len(local), num_experts, alignment)
    assert offsets[0] == 0 and offsets[-1] <= len(row_to_slot)
    expected_rows = [-1] * len(row_to_slot)
    for e in range(num_experts):
        mine = [slot for slot, expert in enumerate(local) if expert == e]
        assert offsets[e] % alignment == 0
        assert offsets[e + 1] - offsets[e] == -(-len(mine) // alignment) * alignment
        for rank, slot in enumerate(mine):  # stable: slot order within an expert
            assert slot_to_row[slot] == offsets[e] + rank
            expected_rows[offsets[e] + rank] = slot
    assert [slot_to_row[slot] for slot, expert in enumerate(local) if expert < 0] == [-1] * local.count(-1)
    assert row_to_slot == expected_rows


@st.composite
def routings(draw: st.DrawFn) -> tuple[list[list[int]], int, int, list[int] | None, int]:
    num_experts, top_k = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    expert_map = None
    if draw(st.booleans()):
        expert_map = draw(st.lists(st.integers(-1, num_experts - 1), min_size=1, max_size=12))
    last = (num_experts if expert_map is None else len(expert_map)) - 1
    ids = draw(st.lists(st.lists(st.integers(-1, last), min_size=top_k, max_size=top_k), max_size=20))
    return ids, top_k, num_experts, expert_map, draw(st.sampled_from([1, 2, 4, 16]))


@settings(max_examples=150, deadline=None)
@given(routings())
def test_promises(routing: tuple[list[list[int]], int, int, list[int] | None, int]) -> None:
    check(*routing)


@pytest.mark.parametrize("alignment", [1, 8])
def test_adversarial(alignment: int) -> None:
    check([], 2, 4, None, alignment)
    check([[3, 3]] * 50, 2, 4, None, alignment)  # one hot expert
    check([[-1, -1]] * 5, 2, 4, None, alignment)  # nothing here
    check([[0, 7], [7, 0]], 2, 8, None, alignment)  # empty experts between
    check([[0], [1]], 1, 1, [-1, 0], alignment)  # one local expert of two


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 9))
def test_max_rows_is_the_exact_worst_case(num_slots: int, num_experts: int, alignment: int) -> None:
    """Each of u experts with one slot wastes A - 1 rows; what is left fills up one expert."""
    worst = 0
    for used in range(1, min(num_experts, num_slots) + 1):
        for full in range(alignment):  # slots that the last expert has beyond a multiple of A
            rest = num_slots - (used - 1)
            if rest >= 1 and (rest - full) % alignment == 0:
                worst = max(worst, (used - 1) * alignment + -(-rest // alignment) * alignment)
    assert moe.max_rows(num_slots, num_experts, alignment) == worst


def test_max_rows_refuses_sizes_that_there_are_not() -> None:
    for args, message in (
        ((10, 4, 0), "alignment: expected at least 1, got 0"),
        ((-1, 4, 1), "num_slots: expected at least 0, got -1"),
        ((10, -4, 8), "num_experts: expected at least 0, got -4"),
    ):
        with pytest.raises(RuntimeError, match=f"^max_rows: {message}$"):
            moe.max_rows(*args)


def test_ids_out_of_range() -> None:
    def message(ids: list[int], num_experts: int, expert_map: Tensor | None = None) -> str:
        with pytest.raises(RuntimeError) as caught:
            moe.sort_slots(torch.tensor([ids], dtype=torch.int32), num_experts, expert_map=expert_map)
        return str(caught.value)

    assert message([0, 9], 8) == "sort_slots: topk_ids: expected values in [-1, 8), got 9"
    assert message([-2], 8) == "sort_slots: topk_ids: expected values in [-1, 8), got -2"
    two = torch.tensor([0, 5], dtype=torch.int32)
    assert message([2], 8, two) == "sort_slots: topk_ids: expected values in [-1, 2), got 2"
    assert message([0], 4, two) == "sort_slots: expert_map: expected values in [-1, 4), got 5"
