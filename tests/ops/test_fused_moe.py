"""fused_moe against a float64 loop over tokens and experts, in every format and under adversarial routings."""

from __future__ import annotations

import pytest
import torch
from moe_cases import Call, activate, make_moe
from torch import Tensor

import torch_moe_ops as moe
from torch_moe_ops.activations import ACTIVATIONS
from torch_moe_ops.formats import FORMATS
from torch_moe_ops.packed_weights import PACKABLE

QUANTISED = ["int8", "fp8_block", "mxfp8", "mxfp4", "nvfp4"]


def through(format: str, x: Tensor, global_scale: Tensor | None) -> Tensor:
    """x [K] as the GEMM sees it: quantised and back, in float64."""
    fmt = FORMATS[format]
    values, scale = fmt.quantize(x[None].float(), fmt.act_block, global_scale)
    return fmt.dequantize(values, scale, fmt.act_block, global_scale)[0].double()


def of_expert(scale: Tensor | None, e: int) -> Tensor | None:
    return scale if scale is None or scale.numel() == 1 else scale[e]


def slow_moe(call: Call) -> Tensor:
    """The definition, one (token, k) at a time; intermediates are rounded where the stages store them."""
    x, w13, w2, topk_weights, topk_ids = call.args
    o = call.options
    format = o["format"]
    act_format, fmt = o["act_format"] or format, FORMATS[format]
    parts = 2 if ACTIVATIONS[o["activation"]].gated else 1
    dense13 = fmt.dequantize(w13, o["w13_scale"], fmt.weight_block, o["w13_global_scale"], parts).double()
    dense2 = fmt.dequantize(w2, o["w2_scale"], fmt.weight_block, o["w2_global_scale"]).double()
    on_input, expert_map = o.get("apply_router_weight_on_input", False), o.get("expert_map")
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, ids in enumerate(topk_ids.tolist()):
        for k, id in enumerate(ids):
            e = id if id < 0 or expert_map is None else int(expert_map[id])
            if e < 0:
                continue
            weight = topk_weights[t, k]
            token = x[t].float() * weight if on_input else x[t]
            a = through(act_format, token.to(x.dtype) if act_format in ("bf16", "fp16") else token,
                        of_expert(o.get("a13_global_scale"), e))  # fmt: skip
            gate_up = dense13[e] @ a
            if o.get("w13_bias") is not None:
                gate_up += o["w13_bias"][e].double()
            y = activate(gate_up.float(), o["activation"], o.get("w13_layout", "gate_up"),
                         o.get("alpha", 1.0), o.get("beta", 0.0), o.get("limit"))  # fmt: skip
            expert_out = dense2[e] @ through(act_format, y.to(x.dtype) if act_format in ("bf16", "fp16") else y,
                                             of_expert(o.get("a2_global_scale"), e))  # fmt: skip
            if o.get("w2_bias") is not None:
                expert_out += o["w2_bias"][e].double()
            out[t] += (1.0 if on_input else weight.double()) * expert_out.to(x.dtype).double()
    return out * o.get("routed_scaling_factor", 1.0)


def compare(call: Call) -> None:
    got, expected = call(moe.fused_moe), slow_moe(call)
    assert got.dtype == call.args[0].dtype and got.shape == call.args[0].shape and got.is_contiguous()
    # Loop and op round at the same places, so they differ where a sum lands next to a rounding boundary: the output
    # (half an ulp of the dtype in each element) and, rarely, one step of an intermediate. A wrong scale, row or weight
    # is an error of 1e-1 and more.
    eps = torch.finfo(got.dtype).eps
    assert (got.double() - expected).norm() <= eps * expected.norm()


def test_every_format(format: str) -> None:
    compare(make_moe(format, routed_scaling_factor=2.5))


@pytest.mark.parametrize("act_format", ["bf16", "fp16"])
@pytest.mark.parametrize("format", QUANTISED)
def test_weight_only(format: str, act_format: str) -> None:
    compare(make_moe(format, act_format=act_format, num_tokens=9))


@pytest.mark.parametrize("format, act_format", [("mxfp4", "mxfp8"), ("mxfp4", "fp8_block"), ("nvfp4", "fp8_block")])
def test_8_bit_activations_with_4_bit_weights(format: str, act_format: str) -> None:
    compare(make_moe(format, act_format=act_format, num_tokens=9))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    limit = {"limit": 1.0} if activation == "swiglustep" else {}
    for format in ("bf16", "fp8_block"):
        compare(make_moe(format, activation=activation, num_tokens=9, **limit))


@pytest.mark.parametrize("layout", ["gate_up", "up_gate", "interleaved"])
def test_gpt_oss(layout: str) -> None:
    """Biases, alpha, beta and limit, in every layout of w13."""
    options = {"alpha": 1.702, "beta": 1.0, "limit": 1.5, "w13_layout": layout, "bias": True}
    for format in ("bf16", "mxfp4"):
        compare(make_moe(format, num_tokens=9, **options))


def test_float16_tokens_with_quantised_experts(format: str) -> None:
    if format != "bf16":
        compare(make_moe(format, dtype=torch.float16, num_tokens=9))


def test_global_scales() -> None:
    """Gate and up have their own weight scale; activations one each, or one per expert."""
    a13, a2 = torch.rand(5) * 0.01 + 1e-3, torch.rand(5) * 0.01 + 1e-3
    compare(make_moe("nvfp4", a13_global_scale=a13, a2_global_scale=a2))
    compare(make_moe("nvfp4", a13_global_scale=a13[:1], a2_global_scale=a2[0]))
    call = make_moe("nvfp4")
    per_part = call.options["w13_global_scale"] * torch.tensor([[1.0, 10.0]])
    compare(call.but(w13_global_scale=per_part))
    compare(
        call.but(w13_global_scale=per_part[:, 0].contiguous(), w2_global_scale=call.options["w2_global_scale"][:, 0])
    )


def test_router_weight_on_input(format: str) -> None:
    compare(make_moe(format, top_k=1, apply_router_weight_on_input=True, num_tokens=9))


def test_expert_map_and_absent_slots(format: str) -> None:
    """Three of eight experts live here; some slots are -1."""
    call = make_moe(format, num_experts=3, num_tokens=12)
    ids = torch.randint(-1, 8, (12, 2), generator=torch.Generator().manual_seed(1)).int()
    ids[5] = -1
    local = torch.tensor([-1, 2, -1, 0, -1, -1, 1, -1]).int()
    call = call.but(*call.args[:4], ids, expert_map=local)
    compare(call)
    assert not call(moe.fused_moe)[5].any()


def test_ranks_add_up_to_the_whole() -> None:
    """Expert parallelism: each rank's part, added in float32, is the result of one rank."""
    call = make_moe("bf16", num_experts=4)
    x, w13, w2, topk_weights, ids = call.args
    total = torch.zeros(x.shape)
    for first in (0, 2):
        local = torch.full((4,), -1).int()
        local[first : first + 2] = torch.tensor([0, 1]).int()
        part = slice(first, first + 2)
        total += moe.fused_moe(x, w13[part], w2[part], topk_weights, ids, expert_map=local).float()
    whole = call(moe.fused_moe).float()
    assert (total - whole).norm() <= 2**-7 * whole.norm()  # each of the three outputs is rounded to bfloat16


@pytest.mark.parametrize("routing", ["one hot expert", "empty experts", "nothing here", "the same expert twice"])
def test_adversarial_routing(format: str, routing: str) -> None:
    call = make_moe(format, num_tokens=11)
    ids = call.args[4].clone()
    if routing == "empty experts":
        ids = ids % 2 * 4
    else:
        ids[:] = {"one hot expert": torch.tensor([3, -1]), "nothing here": -1, "the same expert twice": 2}[routing]
    call = call.but(*call.args[:4], ids.int())
    compare(call)
    if routing == "nothing here":
        assert not call(moe.fused_moe).any()


def test_no_tokens(format: str) -> None:
    assert make_moe(format, num_tokens=0)(moe.fused_moe).shape == (0, 160)


def test_a_token_depends_on_itself_alone(format: str) -> None:
    """Batch invariance, bit for bit: alone, in another order, and next to NaN."""
    call = make_moe(format, num_tokens=24)
    x, w13, w2, topk_weights, ids = call.args
    together = call(moe.fused_moe)
    for t in (0, 7, 23):
        assert torch.equal(
            call.but(x[t : t + 1], w13, w2, topk_weights[t : t + 1], ids[t : t + 1])(moe.fused_moe)[0], together[t]
        )
    order = torch.randperm(24)
    assert torch.equal(call.but(x[order], w13, w2, topk_weights[order], ids[order])(moe.fused_moe), together[order])
    poisoned = x.clone()
    poisoned[3] = float("nan")
    others = torch.arange(24) != 3
    assert torch.equal(call.but(poisoned)(moe.fused_moe)[others], together[others])


def test_the_stages_one_by_one(format: str) -> None:
    """fused_moe is the chain of the ops, bit for bit; rows nobody owns are poisoned on the way."""
    call = make_moe(format, num_tokens=13)
    x, w13, w2, topk_weights, ids = call.args
    o = call.options
    offsets, slot_to_row, row_to_slot = moe.sort_slots(ids, 5, alignment=4)
    unused = row_to_slot < 0
    assert unused.any()

    def poison(tensor: Tensor) -> Tensor:
        bits = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
        bits[unused] = 0x7F if bits.dtype == torch.uint8 else float("nan")
        return tensor

    a, a_scale = map(poison, moe.permute(x, slot_to_row, len(row_to_slot), format=format))
    gate_up = poison(moe.grouped_gemm(a, w13, offsets, a_scale=a_scale, b_scale=o["w13_scale"],
                                      b_global_scale=o["w13_global_scale"], b_parts=2, format=format,
                                      out_dtype=torch.float32))  # fmt: skip
    act, act_scale = map(poison, moe.act_mul(gate_up, offsets, format=format))
    expert_out = poison(moe.grouped_gemm(act, w2, offsets, a_scale=act_scale, b_scale=o["w2_scale"],
                                         b_global_scale=o["w2_global_scale"], format=format))  # fmt: skip
    out = moe.finalize(expert_out, slot_to_row, topk_weights=topk_weights)
    assert torch.equal(out, call(moe.fused_moe))


def test_workspace_bytes_counts_the_intermediates(format: str) -> None:
    call = make_moe(format, num_tokens=13)
    x, ids = call.args[0], call.args[4]
    maps = moe.sort_slots(ids, 5)
    permuted = moe.permute(x, maps[1], 26, format=format)
    gate_up = torch.empty(26, 192, dtype=torch.float32)  # the widest that a backend keeps
    act = moe.act_mul(gate_up, maps[0], format=format)
    expert_out = torch.empty(26, 160, dtype=x.dtype)
    stored = sum(t.untyped_storage().nbytes() for t in (*maps, *permuted, gate_up, *act, expert_out))
    if format in PACKABLE:  # packed weights are multiplied by the numbers that the values stand for, as bf16
        stored += 2 * 26 * (160 + 96) - permuted[0].nbytes - act[0].nbytes
    # The last column of the two MN-major scales is counted with its padding, at most 3 float32.
    slack = 2 * 3 * 4 if format == "fp8_block" else 0
    assert stored <= moe.workspace_bytes(13, 160, 96, 5, 2, format) <= stored + slack


def test_workspace_bytes_follows_alignment_and_activation() -> None:
    """bf16: each row more is H in and out of the GEMMs and 3I in between, without up I less; 3 index arrays besides."""
    sizes = (13, 160, 96, 5, 2)
    rows, padded = moe.max_rows(13 * 2, 5), moe.max_rows(13 * 2, 5, 8)
    assert padded > rows
    row_bytes = 2 * 160 + 4 * 2 * 96 + 2 * 96 + 2 * 160 + 4
    assert moe.workspace_bytes(*sizes, alignment=8) - moe.workspace_bytes(*sizes) == (padded - rows) * row_bytes
    assert moe.workspace_bytes(*sizes) - moe.workspace_bytes(*sizes, activation="silu_no_mul") == rows * 4 * 96


def test_workspace_bytes_refuses_what_the_op_refuses() -> None:
    sizes = {"num_tokens": 13, "hidden_size": 160, "intermediate_size": 96, "num_experts": 5, "top_k": 2}
    for wrong, message in (
        ({"alignment": 0}, "alignment: expected at least 1, got 0"),
        ({"num_experts": 0}, "num_experts: expected at least 1, got 0"),
        ({"hidden_size": -160}, "hidden_size: expected at least 0, got -160"),
        ({"act_format": "int8"}, "act_format: expected bf16 for bf16 weights, got int8"),
        ({"act_format": "fp7"}, "act_format: expected bf16 for bf16 weights, got fp7"),
    ):
        with pytest.raises(RuntimeError, match=f"^workspace_bytes: {message}$"):
            moe.workspace_bytes(**sizes | wrong)


@pytest.mark.parametrize("format", ["bf16", *QUANTISED])
def test_autocast_changes_nothing(format: str) -> None:
    call = make_moe(format)
    expected = call(torch.ops.moe.fused_moe.reference)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(call(torch.ops.moe.fused_moe.reference), expected)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_facts_name_the_bias_that_fewer_backends_add(dtypes: tuple[str, str]) -> None:
    from torch_moe_ops.ops.fused_moe import facts

    call = make_moe(bias=True)
    biases = {
        f"w{gemm}_bias": call.options[f"w{gemm}_bias"].to(getattr(torch, dtype))
        for gemm, dtype in zip((13, 2), dtypes, strict=True)
    }
    assert facts(*call.args, **call.options | biases)["bias_dtype"] == torch.float32
