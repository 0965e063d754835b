"""Every refusal is one line, `op: argument: expected ..., got ...`: the op's, its backends' by name and the fakes'."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from moe_cases import Call, make_moe
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_moe_ops as moe
from torch_moe_ops.backends import CANDIDATES, OPS

DEVICE = "cpu"  # of what is refused: tests/gpu/test_refusals.py has it all on a GPU, too
ROUTING = moe.sort_slots(torch.tensor([[0, 1], [1, -1], [2, 0]]).int(), 3)


def valid(op: str) -> Call:
    """A call that works."""
    torch.manual_seed(0)
    if op == "fused_moe":
        return make_moe("fp8_block", num_tokens=3)
    if op == "grouped_gemm":
        moe_call = make_moe("fp8_block", num_tokens=3, num_experts=3)
        a, a_scale = moe.quantize(torch.randn(6, 160), "fp8_block")
        scales = {"a_scale": a_scale, "b_scale": moe_call.options["w13_scale"]}
        return Call(a, moe_call.args[1], ROUTING[0], **scales, format="fp8_block", b_parts=2)
    return {
        "topk": Call(torch.randn(3, 8), 2),
        "sort_slots": Call(torch.tensor([[0, 1]]).int(), 3),
        "quantize": Call(torch.randn(3, 8), "int8"),
        "permute": Call(torch.randn(3, 8).bfloat16(), ROUTING[1], 6),
        "act_mul": Call(torch.randn(6, 16).bfloat16(), ROUTING[0]),
        "finalize": Call(torch.randn(6, 8), ROUTING[1]),
        "pack_scale": Call(torch.zeros(256, 10).to(torch.float8_e4m3fn), "atom"),
        "unpack_scale": Call(torch.zeros(3, 2, 256).int().mT, "utccp", 256, 5, torch.float8_e4m3fn),
    }[op]


def message(op: torch._ops.OpOverload, call: Call) -> str:
    with pytest.raises(RuntimeError) as caught:
        call(op)
    return str(caught.value)


def on_device(call: Call) -> Call:
    """The same call with tensors that are made now, of the same strides."""

    def made(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        size = value.untyped_storage().nbytes() // value.element_size()
        copy = value.as_strided((size,), (1,), 0).to(DEVICE, copy=True)
        return copy.as_strided(value.shape, value.stride(), value.storage_offset())

    return Call(*map(made, call.args), **{name: made(value) for name, value in call.options.items()})


def refusals(op: str, *changes: tuple[tuple[object, ...], dict[str, object]]) -> str:
    """The messages for each change of a valid call: equal from the op, from its backends by name and from the fake, in
    inference mode and for tensors made there, too."""
    overloads = getattr(torch.ops.moe, op)
    on_device(valid(op))(overloads.default)
    lines = []
    for args, options in changes:
        changed = valid(op).but(*args, **options)
        call = on_device(changed)
        lines.append(message(overloads.default, call))
        with torch.inference_mode():
            born = on_device(changed)
        for name in ("default", *CANDIDATES[op]):
            overload = getattr(overloads, name)
            for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
                with mode():
                    assert message(overload, call) == message(overload, born) == lines[-1]
            with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
                fake_args = [fakes.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in call.args]
                assert message(overload, Call(*fake_args, **call.options)) == lines[-1]
    assert all("\n" not in line and line.startswith(f"{op}: ") for line in lines)
    return "\n".join(lines).replace("on cuda:0", "on cpu")


def test_topk() -> None:
    assert_expected_inline(
        refusals(
            "topk",
            ((torch.randn(3),), {}),
            ((torch.randn(3, 8).double(),), {}),
            ((torch.randn(8, 3).T,), {}),
            ((torch.randn(3, 8), 9), {}),
            ((), {"scoring": "tanh"}),
            ((), {"correction_bias": torch.randn(7)}),
            ((), {"num_groups": 3}),
            ((), {"num_groups": 4, "topk_groups": 5}),
            ((torch.randn(3, 8), 5), {"num_groups": 4, "topk_groups": 2}),
        ),
        """\
topk: router_logits: expected bfloat16 or float16 or float32 [T, Eg] on cpu, got float32 [3] on cpu
topk: router_logits: expected bfloat16 or float16 or float32 [T, Eg] on cpu, got float64 [3, 8] on cpu
topk: router_logits: expected contiguous bfloat16 or float16 or float32 [T, Eg] on cpu, got float32 [3, 8] on cpu with strides [1, 3]
topk: top_k: expected 1 to 8, got 9
topk: scoring: expected one of softmax, sigmoid, got tanh
topk: correction_bias: expected float32 [8] on cpu, got float32 [7] on cpu
topk: num_groups: expected a divisor of 8, got 3
topk: topk_groups: expected 1 to 4, got 5
topk: top_k: expected 1 to 4, got 5""",  # noqa: E501
    )


def test_sort_slots() -> None:
    ids = torch.tensor([[0, 1]])
    assert_expected_inline(
        refusals(
            "sort_slots",
            ((ids,), {}),
            ((ids.int(), 0), {}),
            ((), {"expert_map": torch.tensor([0])}),
            ((), {"alignment": 0}),
        ),
        """\
sort_slots: topk_ids: expected int32 [T, K] on cpu, got int64 [1, 2] on cpu
sort_slots: num_experts: expected at least 1, got 0
sort_slots: expert_map: expected int32 [Eg] on cpu, got int64 [1] on cpu
sort_slots: alignment: expected 1 to 1048576, got 0""",
    )


def test_quantize_and_permute() -> None:
    lines = refusals(
        "quantize",
        ((torch.randn(3, 8), "int4"), {}),
        ((torch.randn(3, 7), "nvfp4"), {}),
        ((torch.randn(8), "int8"), {}),
        ((), {"global_scale": torch.ones(1)}),
        ((torch.randn(3, 8), "nvfp4"), {"global_scale": torch.ones(3)}),
    )
    x, rows = torch.randn(3, 8).bfloat16(), ROUTING[1]
    lines += "\n" + refusals(
        "permute",
        ((x.float(),), {}),
        ((x.half(),), {}),
        ((x, rows[:2].contiguous()), {}),
        ((x, rows.long()), {}),
        ((x, rows, -1), {}),
        ((), {"topk_weights": torch.ones(3, 3)}),
        ((), {"format": "nvfp4", "global_scale": torch.ones(3)}),
        ((), {"format": "nvfp4", "global_scale": torch.ones(4), "expert_offsets": ROUTING[0]}),
    )
    assert_expected_inline(
        lines,
        """\
quantize: format: expected one of bf16, fp16, int8, fp8_block, fp8_block_e8m0, mxfp8, mxfp4, nvfp4, got int4
quantize: input: expected a multiple of 2 columns for nvfp4, got [3, 7]
quantize: input: expected bfloat16 or float16 or float32 [rows, K] on cpu, got float32 [8] on cpu
quantize: global_scale: expected none for int8, got [1]
quantize: global_scale: expected float32 [1] on cpu, got float32 [3] on cpu
permute: hidden_states: expected bfloat16 or float16 [T, H] on cpu, got float32 [3, 8] on cpu
permute: format: expected fp16 or a quantised format for float16 values, got bf16
permute: slot_to_row: expected int32 [3, 2] on cpu, got int32 [2, 2] on cpu
permute: slot_to_row: expected int32 [T, K] on cpu, got int64 [3, 2] on cpu
permute: num_rows: expected at least 0, got -1
permute: topk_weights: expected float32 [3, 2] on cpu, got float32 [3, 3] on cpu
permute: global_scale: expected float32 [1] on cpu, got float32 [3] on cpu
permute: global_scale: expected float32 [3] on cpu, got float32 [4] on cpu""",
    )


def test_grouped_gemm() -> None:
    call = valid("grouped_gemm")
    a, b, offsets = call.args
    a_scale, b_scale = call.options["a_scale"], call.options["b_scale"]
    assert_expected_inline(
        refusals(
            "grouped_gemm",
            ((a.float(),), {}),
            ((a, b[:, :, :128].contiguous()), {}),
            ((a, b.mT), {}),
            ((a, b, offsets[:3].contiguous()), {}),
            ((a, b, offsets.long()), {}),
            ((), {"a_scale": None}),
            ((), {"a_scale": a_scale[:, :1]}),
            ((), {"a_scale": a_scale.double()}),
            ((), {"b_scale": None}),
            ((), {"b_scale": b_scale[:, :1]}),
            ((), {"b_parts": 5}),
            ((), {"b_parts": 2**32}),
            ((), {"b_global_scale": torch.ones(3)}),
            ((), {"a_global_scale": torch.ones(1)}),
            ((), {"bias": torch.ones(3, 5)}),
            ((), {"expert_rows": torch.ones(4).int()}),
            ((), {"expert_rows": torch.ones(3).long()}),
            ((), {"expert_rows": torch.ones(6).int()[::2]}),
            ((), {"act_format": "int8"}),
            ((), {"format": "bf16", "act_format": "fp16"}),
            ((), {"out_dtype": torch.float64}),
        ),
        """\
grouped_gemm: a: expected float8_e4m3fn [P, K] on cpu, got float32 [6, 160] on cpu
grouped_gemm: b: expected float8_e4m3fn [3, 192, 160] on cpu, got float8_e4m3fn [3, 192, 128] on cpu
grouped_gemm: b: expected contiguous float8_e4m3fn [E, N, K] on cpu, got float8_e4m3fn [3, 160, 192] on cpu with strides [30720, 1, 160]
grouped_gemm: expert_offsets: expected int32 [4] on cpu, got int32 [3] on cpu
grouped_gemm: expert_offsets: expected int32 [4] on cpu, got int64 [4] on cpu
grouped_gemm: a_scale: expected a scale for fp8_block, got None
grouped_gemm: a_scale: expected float32 [6, 2] on cpu, got float32 [6, 1] on cpu
grouped_gemm: a_scale: expected float32 [6, 2] on cpu, got float64 [6, 2] on cpu
grouped_gemm: b_scale: expected a scale for fp8_block, got None
grouped_gemm: b_scale: expected float32 [3, 2, 2] on cpu, got float32 [3, 1, 2] on cpu
grouped_gemm: b: expected a multiple of 5 rows per expert, got [3, 192, 160]
grouped_gemm: b_parts: expected 1 to 2147483647, got 4294967296
grouped_gemm: b_global_scale: expected none for fp8_block, got [3]
grouped_gemm: a_global_scale: expected none for fp8_block, got [1]
grouped_gemm: bias: expected bfloat16 or float16 or float32 [3, 192] on cpu, got float32 [3, 5] on cpu
grouped_gemm: expert_rows: expected int32 [3] on cpu, got int32 [4] on cpu
grouped_gemm: expert_rows: expected int32 [3] on cpu, got int64 [3] on cpu
grouped_gemm: expert_rows: expected contiguous int32 [3] on cpu, got int32 [3] on cpu with strides [2]
grouped_gemm: act_format: expected fp8_block or bf16 or fp16 for fp8_block weights, got int8
grouped_gemm: act_format: expected bf16 for bf16 weights, got fp16
grouped_gemm: out_dtype: expected one of bfloat16, float16, float32, got float64""",  # noqa: E501
    )


def test_act_mul_and_finalize() -> None:
    lines = refusals(
        "act_mul",
        ((torch.randn(6, 15).bfloat16(),), {}),
        ((), {"activation": "swish"}),
        ((), {"activation": "gelu", "alpha": 2.0}),
        ((), {"activation": "gelu", "beta": 1.0}),
        ((), {"activation": "relu", "limit": 1.0}),
        ((), {"activation": "swiglustep"}),
        ((), {"limit": -1.0}),
        ((), {"activation": "swiglustep", "limit": float("nan")}),
        ((), {"layout": "up"}),
        ((), {"layout": "up_gate", "activation": "relu2_no_mul"}),
        ((torch.randn(6, 16).bfloat16(), torch.zeros(1).int()), {}),
        ((), {"format": "fp16"}),
    )
    rows = ROUTING[1]
    lines += "\n" + refusals(
        "finalize",
        ((torch.randn(6, 8).double(),), {}),
        ((torch.randn(6, 8), rows.flatten()), {}),
        ((), {"topk_weights": torch.ones(3, 2).bfloat16()}),
    )
    assert_expected_inline(
        lines,
        """\
act_mul: gate_up: expected an even number of columns for silu, got [6, 15]
act_mul: activation: expected one of silu, gelu, gelu_tanh, relu, swiglustep, relu2_no_mul, gelu_no_mul, silu_no_mul, got swish
act_mul: alpha: expected 1.0 for gelu, got 2.0
act_mul: beta: expected 0.0 for gelu, got 1.0
act_mul: limit: expected none for relu, got 1.0
act_mul: limit: expected a number for swiglustep, got None
act_mul: limit: expected a number >= 0, got -1.0
act_mul: limit: expected a number >= 0, got nan
act_mul: layout: expected one of gate_up, up_gate, interleaved, got up
act_mul: layout: expected gate_up for relu2_no_mul, which is not gated, got up_gate
act_mul: expert_offsets: expected int32 [E + 1] of at least one expert, got int32 [1] on cpu
act_mul: format: expected bf16 or a quantised format for bfloat16 values, got fp16
finalize: expert_out: expected bfloat16 or float16 or float32 [P, H] on cpu, got float64 [6, 8] on cpu
finalize: slot_to_row: expected int32 [T, K] on cpu, got int32 [6] on cpu
finalize: topk_weights: expected float32 [3, 2] on cpu, got bfloat16 [3, 2] on cpu""",  # noqa: E501
    )


def test_fused_moe() -> None:
    x, w13, w2, topk_weights, ids = valid("fused_moe").args
    assert_expected_inline(
        refusals(
            "fused_moe",
            ((x.float(),), {}),
            ((x[:, :128].contiguous(),), {}),
            ((x, w13[:, :100].contiguous()), {}),
            ((x, w13, w2[:4].contiguous()), {}),
            ((x, w13, w2, topk_weights.half()), {}),
            ((x, w13, w2, topk_weights[:2].contiguous()), {}),
            ((x, w13, w2, topk_weights, ids.long()), {}),
            ((x, w13, w2, topk_weights, ids[:2].contiguous()), {}),
            ((), {"w13_scale": None}),
            ((), {"w2_scale": torch.ones(5, 2, 2)}),
            ((), {"w13_bias": torch.ones(5, 96)}),
            ((), {"w2_bias": torch.ones(5, 96)}),
            ((), {"a13_global_scale": torch.ones(1)}),
            ((), {"a2_global_scale": torch.ones(1)}),
            ((), {"format": "fp4"}),
            ((), {"act_format": "fp16"}),
            ((), {"act_format": "mxfp8"}),
            ((), {"activation": "silu_no_mul"}),
            ((), {"apply_router_weight_on_input": True}),
            ((), {"w13_layout": "rows"}),
            ((), {"expert_map": torch.zeros(2, 2).int()}),
        ),
        """\
fused_moe: hidden_states: expected bfloat16 or float16 [T, H] on cpu, got float32 [3, 160] on cpu
fused_moe: w13: expected float8_e4m3fn [5, 192, 128] on cpu, got float8_e4m3fn [5, 192, 160] on cpu
fused_moe: w13: expected float8_e4m3fn [5, 192, 160] on cpu, got float8_e4m3fn [5, 100, 160] on cpu
fused_moe: w13: expected float8_e4m3fn [4, 192, 160] on cpu, got float8_e4m3fn [5, 192, 160] on cpu
fused_moe: topk_weights: expected float32 [3, 2] on cpu, got float16 [3, 2] on cpu
fused_moe: topk_weights: expected float32 [3, 2] on cpu, got float32 [2, 2] on cpu
fused_moe: topk_ids: expected int32 [T, K] on cpu, got int64 [3, 2] on cpu
fused_moe: topk_ids: expected int32 [3, 2] on cpu, got int32 [2, 2] on cpu
fused_moe: w13_scale: expected a scale for fp8_block, got None
fused_moe: w2_scale: expected float32 [5, 2, 1] on cpu, got float32 [5, 2, 2] on cpu
fused_moe: w13_bias: expected bfloat16 or float16 or float32 [5, 192] on cpu, got float32 [5, 96] on cpu
fused_moe: w2_bias: expected bfloat16 or float16 or float32 [5, 160] on cpu, got float32 [5, 96] on cpu
fused_moe: a13_global_scale: expected none for fp8_block, got [1]
fused_moe: a2_global_scale: expected none for fp8_block, got [1]
fused_moe: format: expected one of bf16, fp16, int8, fp8_block, fp8_block_e8m0, mxfp8, mxfp4, nvfp4, got fp4
fused_moe: act_format: expected bf16 or a quantised format for bfloat16 values, got fp16
fused_moe: act_format: expected fp8_block or bf16 or fp16 for fp8_block weights, got mxfp8
fused_moe: w13: expected float8_e4m3fn [5, 96, 160] on cpu, got float8_e4m3fn [5, 192, 160] on cpu
fused_moe: apply_router_weight_on_input: expected top_k 1, got top_k 2
fused_moe: w13_layout: expected one of gate_up, up_gate, interleaved, got rows
fused_moe: expert_map: expected int32 [Eg] on cpu, got int32 [2, 2] on cpu""",
    )


def test_pack_scale() -> None:
    offsets = torch.tensor([0, 100, 256]).int()
    assert_expected_inline(
        refusals(
            "pack_scale",
            ((torch.zeros(256, 10),), {}),
            ((torch.zeros(256).to(torch.uint8),), {}),
            ((torch.zeros(256, 10).to(torch.uint8), "swizzled"), {}),
            ((torch.zeros(200, 10).to(torch.uint8), "utccp"), {}),
            ((torch.zeros(256, 10).to(torch.uint8), "words"), {"expert_offsets": offsets}),
            ((torch.zeros(2, 256, 10).to(torch.uint8),), {"expert_offsets": offsets}),
            ((), {"expert_offsets": offsets.long()}),
        ),
        """\
pack_scale: scale: expected one byte a scale, [rows, columns] or [E, rows, columns], got float32 [256, 10] on cpu
pack_scale: scale: expected one byte a scale, [rows, columns] or [E, rows, columns], got uint8 [256] on cpu
pack_scale: layout: expected one of words, words_mn, utccp, atom, got swizzled
pack_scale: rows: expected a multiple of 128 for utccp, got 200
pack_scale: expert_offsets: expected none but for one matrix in the layout atom, got [3]
pack_scale: expert_offsets: expected none but for one matrix in the layout atom, got [3]
pack_scale: expert_offsets: expected int32 [E + 1] on cpu, got int64 [3] on cpu""",
    )


def test_unpack_scale() -> None:
    """The mistakes that a kernel would turn into shifted scales."""
    e4m3, words = torch.float8_e4m3fn, torch.zeros(256, 2).int()
    assert_expected_inline(
        refusals(
            "unpack_scale",
            ((torch.zeros(256, 12).to(e4m3),), {}),  # not packed
            ((words.to(torch.int16),), {}),  # wrong packing dtype
            ((words,), {}),  # K-major where MN-major is needed
            ((words[:128],), {}),  # too small
            ((words.mT.contiguous().mT, "utccp", 250, 10), {}),
            ((words, "words", 256, 10, torch.int8), {}),
            ((words, "words", -1, 10), {}),
            ((torch.zeros(256, 4).to(e4m3), "atom", 256, 3, e4m3), {}),  # not packed
            ((torch.zeros(1, 1, 32, 4, 4).to(e4m3), "atom", 256, 3, e4m3), {}),  # too small
            ((torch.zeros(2, 1, 32, 4, 4).to(e4m3), "atom", 256, 3, torch.uint8), {}),  # another format's
        ),
        """\
unpack_scale: packed: expected int32 or uint32 [256, 2] on cpu, got float8_e4m3fn [256, 12] on cpu
unpack_scale: packed: expected int32 or uint32 [256, 2] on cpu, got int16 [256, 2] on cpu
unpack_scale: packed: expected MN-major words, strides [1, ..] for utccp, got [2, 1]
unpack_scale: packed: expected int32 or uint32 [256, 2] on cpu, got int32 [128, 2] on cpu
unpack_scale: rows: expected a multiple of 128 for utccp, got 250
unpack_scale: dtype: expected one of float8_e4m3fn, float8_e8m0fnu, uint8, got int8
unpack_scale: rows: expected at least 0, got -1
unpack_scale: packed: expected float8_e4m3fn or uint8 [2, 1, 32, 4, 4] on cpu, got float8_e4m3fn [256, 4] on cpu
unpack_scale: packed: expected float8_e4m3fn or uint8 [2, 1, 32, 4, 4] on cpu, got float8_e4m3fn [1, 1, 32, 4, 4] on cpu
unpack_scale: packed: expected uint8 [2, 1, 32, 4, 4] on cpu, got float8_e4m3fn [2, 1, 32, 4, 4] on cpu""",
    )


def test_unpack_scale_of_words_that_tma_cannot_read() -> None:
    for stride in (258, 4):
        call = valid("unpack_scale").but(torch.zeros(1000).int().as_strided((256, 2), (1, stride)))
        expected = f"strides [1, a multiple of 4 from 256 on] (16 bytes, for TMA), got [1, {stride}]"
        assert refusals("unpack_scale", (call.args, {})) == f"unpack_scale: packed: expected {expected}"


@pytest.mark.parametrize("op", OPS)
def test_grad_is_refused(op: str) -> None:
    """By the op, by its backends called by name, and when compiling; not without grad mode."""
    if op in ("sort_slots", "pack_scale", "unpack_scale"):
        pytest.skip("takes integers and bytes only")
    call = valid(op)
    names = [argument.name for argument in getattr(torch.ops.moe, op).default._schema.arguments]
    position = next((i for i, a in enumerate(call.args) if a.is_floating_point() and a.element_size() > 1), None)
    if position is None:
        call, name = call.but(a_scale=call.options["a_scale"].requires_grad_()), "a_scale"
    else:
        call.args[position].requires_grad_()
        name = names[position]
    expected = f"{op}: {name}: expected no grad, got requires_grad=True (inference only; use torch.no_grad())"
    for name in ("default", *CANDIDATES[op]):
        overload = getattr(getattr(torch.ops.moe, op), name)
        assert message(overload, call) == expected
        with pytest.raises(Exception, match="expected no grad") as caught:
            torch.compile(call, backend="aot_eager", fullgraph=True)(overload)
        assert expected in str(caught.value)
    for name in ("default", "reference"):
        with torch.no_grad():
            call(getattr(getattr(torch.ops.moe, op), name))


def test_a_backend_without_a_kernel() -> None:
    for op in OPS:
        for backend in set(CANDIDATES[op]) - {"reference", "triton"}:
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    line = message(getattr(getattr(torch.ops.moe, op), backend), valid(op))
                assert line == f"{op}: backend: expected one with a kernel for cpu tensors, got {backend}"


def test_devices_must_agree() -> None:
    x = torch.randn(3, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        bias = torch.empty(8, device="meta")
        with pytest.raises(RuntimeError) as caught:
            moe.topk(x, 2, correction_bias=bias)
    assert str(caught.value) == "topk: correction_bias: expected float32 [8] on cpu, got float32 [8] on meta"


def test_tensors_that_were_left_out() -> None:
    hidden_states, w13 = valid("fused_moe").args[:2]
    assert_expected_inline(
        "\n".join(
            (
                refusals("fused_moe", ((hidden_states, w13, None), {})),
                refusals("grouped_gemm", ((valid("grouped_gemm").args[0], None), {})),
                refusals("finalize", ((torch.randn(6, 8), None), {})),
                refusals("act_mul", ((torch.randn(6, 16).bfloat16(), None), {})),
            )
        ),
        """\
fused_moe: w2: expected a tensor, got None
grouped_gemm: b: expected a tensor, got None
finalize: slot_to_row: expected a tensor, got None
act_mul: expert_offsets: expected a tensor, got None""",
    )


@pytest.mark.parametrize(
    "offsets, got",
    [([-1, 2, 4, 6], "-1 first"), ([0, 5, 2, 6], "2 after 5"), ([0, 2, 4, 7], "7 after 4"), ([7, 8, 9, 9], "7 first")],
)
def test_offsets_that_no_rows_have(offsets: list[int], got: str) -> None:
    """Of a CPU's tensors: Python's slices would take negative ones for rows from the end."""
    expert_offsets, rows = torch.tensor(offsets).int(), torch.randn(6, 16).bfloat16()
    nvfp4 = {"global_scale": torch.ones(3), "format": "nvfp4"}
    calls = {
        "grouped_gemm": Call(rows, torch.randn(3, 8, 16).bfloat16(), expert_offsets),
        "act_mul": Call(rows, expert_offsets),
        "permute": Call(rows[:3], ROUTING[1], 6, expert_offsets=expert_offsets, **nvfp4),
        "pack_scale": Call(torch.zeros(6, 4).byte(), "atom", expert_offsets=expert_offsets),
    }
    packed = moe.pack_scale(torch.zeros(6, 4).byte(), "atom", expert_offsets=torch.tensor([0, 2, 4, 6]).int())
    calls["unpack_scale"] = Call(packed, "atom", 6, 4, torch.uint8, expert_offsets=expert_offsets)
    for op, call in calls.items():
        expected = f"{op}: expert_offsets: expected values in [0, 6] that do not decrease, got {got}"
        assert message(getattr(torch.ops.moe, op).default, call) == expected
