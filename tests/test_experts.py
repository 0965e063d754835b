"""Experts against a float32 loop over the dequantised weights, and what a user does with a module."""

import copy

import pytest
import torch
from torch.nn import functional as F

from torch_moe_ops import Experts
from torch_moe_ops.cli import _layer
from torch_moe_ops.experts import TENSORS, from_gate_up, local_expert_map, to_gate_up
from torch_moe_ops.formats import FORMATS, decode_scale, quantize_weight

CASE = _layer.Case("test", 4, 6, 128, 96, 2)


def make_inputs(num_tokens: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _layer.make_inputs(CASE, num_tokens, torch.Generator().manual_seed(seed))


def random_weights(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w13 = torch.randn(4, 2 * 96, 128, generator=generator) / 128**0.5
    return w13.bfloat16(), (torch.randn(4, 128, 96, generator=generator) / 96**0.5).bfloat16()


@pytest.mark.parametrize("format", FORMATS)
def test_forward_matches_the_loop(format):
    experts = Experts.from_weights(*random_weights(), format=format)
    hidden_states, *routing = make_inputs()
    inputs = (hidden_states.to(torch.float16 if format == "fp16" else torch.bfloat16), *routing)
    rows, expected = _layer.reference(experts, inputs)
    output = experts(*inputs)
    assert output.dtype == inputs[0].dtype
    assert _layer.relative_error(output[rows], expected) <= _layer.tolerance(experts)
    # The tolerance can tell: the answer of the neighbouring expert is far outside.
    wrong = (inputs[0], inputs[1], torch.where(inputs[2] >= 0, (inputs[2] + 1) % 4, -1))
    assert _layer.relative_error(experts(*wrong)[rows], expected) > 2 * _layer.tolerance(experts)


def test_the_loop_is_a_dense_layer():
    """With one expert that takes everything, the loop above is an ordinary gated MLP."""
    case = _layer.Case("one", 1, 1, 64, 32, 1)
    experts = _layer.make_experts(case, "bf16", device="cpu")
    inputs = _layer.make_inputs(case, 5, torch.Generator().manual_seed(0))
    rows, out = _layer.reference(experts, inputs)
    x = inputs[0].double()
    gate, up = (F.linear(x, part) for part in experts.w13[0].double().chunk(2))
    expected = F.linear(gate / (1 + torch.exp(-gate)) * up, experts.w2[0].double())
    assert rows.tolist() == [0, 1, 2, 3, 4] and (inputs[1] == 1).all()
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["bf16", "mxfp4"])
def test_compiles_whole_for_any_number_of_tokens(format):
    torch._dynamo.reset()
    experts = Experts.from_weights(*random_weights(), format=format)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for num_tokens in (7, 5, 12):
            inputs = make_inputs(num_tokens)
            assert torch.equal(compiled(*inputs), experts(*inputs))
    assert len(graphs) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_state_dict_round_trip(format, tmp_path):
    experts = Experts.from_weights(*random_weights(0), format=format, w13_bias=torch.ones(4, 192))
    torch.save(experts.state_dict(), tmp_path / "experts.pt")
    other = Experts.from_weights(*random_weights(1), format=format, w13_bias=torch.zeros(4, 192))
    other.load_state_dict(torch.load(tmp_path / "experts.pt", weights_only=True))
    for name, tensor in experts.state_dict().items():
        assert torch.equal(as_bytes(getattr(other, name)), as_bytes(tensor)), name
    empty = copy.deepcopy(experts).to("meta")
    empty.load_state_dict(experts.state_dict(), assign=True)
    if format != "fp16":
        assert torch.equal(empty(*make_inputs()), experts(*make_inputs()))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_takes_a_quantised_checkpoint():
    w13, w2 = random_weights()
    made = Experts.from_weights(w13, w2, format="fp8_block")
    w13_q, w13_scale, _ = quantize_weight(w13, "fp8_block", parts=2)
    w2_q, w2_scale, _ = quantize_weight(w2, "fp8_block")
    given = Experts(w13_q, w2_q, w13_scale=w13_scale, w2_scale=w2_scale, format="fp8_block")
    assert torch.equal(given(*make_inputs()), made(*make_inputs()))
    assert not list(given.parameters()) and set(given.state_dict()) == {"w13", "w2", "w13_scale", "w2_scale"}
    assert (given.num_experts, given.hidden_size, given.intermediate_size) == (4, 128, 96)
    assert "num_experts=4, hidden_size=128, intermediate_size=96, fp8_block, silu" in repr(given)


def test_options_reach_the_op():
    """Every tensor and setting changes the output as the op called by hand does."""
    w13, w2 = random_weights()
    generator = torch.Generator().manual_seed(5)
    options = dict(
        w13_bias=torch.randn(4, 192, generator=generator),
        w2_bias=torch.randn(4, 128, generator=generator),
        expert_map=torch.tensor([3, -1, 0, 1, 2, -1], dtype=torch.int32),
        activation="silu",
        alpha=1.702,
        beta=1.0,
        limit=0.5,
        routed_scaling_factor=2.5,
    )
    experts = Experts.from_weights(w13, w2, **options)
    hidden_states, topk_weights, _ = make_inputs()
    topk_ids = torch.randint(0, 6, topk_weights.shape, generator=generator, dtype=torch.int32)
    inputs = (hidden_states, topk_weights, topk_ids)
    expected = torch.ops.moe.fused_moe(hidden_states, w13, w2, topk_weights, topk_ids, **options)
    assert torch.equal(experts(*inputs), expected)
    for name in options:
        if name != "activation":
            fewer = {key: value for key, value in options.items() if key != name}
            other = Experts.from_weights(w13, w2, **fewer)
            if name == "expert_map":  # without the map, ids 4 and 5 do not exist
                inputs_here = (hidden_states, topk_weights, topk_ids.clamp(max=3))
                assert not torch.equal(other(*inputs_here), expected)
            else:
                assert not torch.equal(other(*inputs), expected), name


def test_router_weights_on_the_input_reach_the_op():
    w13, w2 = random_weights()
    hidden_states, *routing = make_inputs()
    inputs = (hidden_states, *(tensor[:, :1].clamp(min=0).contiguous() for tensor in routing))
    outputs = []
    for on_input in (False, True):
        experts = Experts.from_weights(w13, w2, apply_router_weight_on_input=on_input)
        outputs.append(experts(*inputs))
        weights = (hidden_states, w13, w2, *inputs[1:])
        assert torch.equal(outputs[-1], torch.ops.moe.fused_moe(*weights, apply_router_weight_on_input=on_input))
    assert not torch.equal(*outputs)


def test_global_scales_of_activations_reach_the_op():
    weights, inputs = random_weights(), make_inputs()
    scales = {"a13_global_scale": torch.tensor([0.3]), "a2_global_scale": torch.tensor([0.03])}
    experts = Experts.from_weights(*weights, format="nvfp4", **scales)
    tensors = {name: tensor for name, tensor in experts.named_buffers() if name not in ("w13", "w2")}
    assert tensors.keys() >= scales.keys()
    arguments = (inputs[0], experts.w13, experts.w2, *inputs[1:])
    expected = torch.ops.moe.fused_moe(*arguments, format="nvfp4", **tensors)
    assert torch.equal(experts(*inputs), expected)
    for name in scales:
        fewer = {key: value for key, value in scales.items() if key != name}
        other = Experts.from_weights(*weights, format="nvfp4", **fewer)
        assert not torch.equal(other(*inputs), expected), name


def test_local_expert_map_changes_no_id():
    expert_map = local_expert_map(3, 8)
    assert expert_map.dtype == torch.int32
    assert expert_map.tolist() == [0, 1, 2, -1, -1, -1, -1, -1]
    ids = torch.tensor([[2, -1], [0, 1], [-1, -1], [1, 2]], dtype=torch.int32)
    with_map = torch.ops.moe.sort_slots(ids, 3, expert_map=expert_map)
    assert all(map(torch.equal, with_map, torch.ops.moe.sort_slots(ids, 3)))
    assert torch.equal(local_expert_map(3, 3), torch.arange(3, dtype=torch.int32))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "fp8_block", "int8", "bf16"])
def test_no_tokens(format):
    w13, w2 = random_weights()
    scales = {"a13_global_scale": torch.ones(4), "a2_global_scale": torch.ones(4)} if format == "nvfp4" else {}
    experts = Experts.from_weights(w13, w2, format=format, **scales)
    x = torch.zeros(0, 128, dtype=torch.bfloat16)
    assert experts(x, torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int32)).shape == (0, 128)


def test_not_gated():
    w13, w2 = random_weights()
    experts = Experts.from_weights(w13[:, :96].contiguous(), w2, format="int8", activation="relu2_no_mul")
    assert experts.w13_scale.shape == (4, 96, 1)
    assert experts(*make_inputs()).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu])
@pytest.mark.parametrize("group", [1, 8])
def test_to_gate_up(dtype, group):
    gate = torch.arange(1, 17).view(1, 16, 1) * torch.ones(3, 1, 2)
    up = 128 / gate if dtype == torch.float8_e8m0fnu else gate + 16
    gate, up = gate.to(dtype), up.to(dtype)
    want = torch.stack([*gate.unbind(1), *up.unbind(1)], 1)
    interleaved = []
    for first in range(0, 16, group):
        interleaved += [*gate[:, first : first + group].unbind(1), *up[:, first : first + group].unbind(1)]
    got = to_gate_up(torch.stack(interleaved, 1), "interleaved", group=group)
    assert got.dtype == dtype and torch.equal(as_bytes(got), as_bytes(want))
    swapped = torch.stack([*up.unbind(1), *gate.unbind(1)], 1)
    assert torch.equal(as_bytes(to_gate_up(swapped, "up_gate")), as_bytes(want))
    assert to_gate_up(want, "gate_up") is want


@pytest.mark.parametrize("layout, group", [("up_gate", 1), ("interleaved", 1), ("interleaved", 8), ("interleaved", 16)])
def test_layouts_are_the_same_layer(layout, group):
    w13, w2 = random_weights()
    gate, up = w13.chunk(2, 1)
    bias = torch.randn(4, 192)
    bias_gate, bias_up = bias.chunk(2, 1)
    if layout == "up_gate":
        given, given_bias = torch.cat([up, gate], 1), torch.cat([bias_up, bias_gate], 1)
    else:
        given, given_bias = (
            torch.stack([first.unflatten(1, (-1, group)), second.unflatten(1, (-1, group))], 2).flatten(1, 3)
            for first, second in ((gate, up), (bias_gate, bias_up))
        )
    experts = Experts.from_weights(w13, w2, format="nvfp4", w13_bias=bias)
    other = Experts.from_weights(given, w2, format="nvfp4", w13_bias=given_bias, w13_layout=layout, w13_group=group)
    for name in TENSORS:
        mine, yours = getattr(experts, name), getattr(other, name)
        assert (mine is None) == (yours is None) and (mine is None or torch.equal(as_bytes(mine), as_bytes(yours))), (
            name
        )


def test_gate_and_up_have_their_own_global_scale():
    w13, w2 = random_weights()
    w13[:, 96:] *= 64
    experts = Experts.from_weights(w13, w2, format="nvfp4")
    assert experts.w13_global_scale.shape == (4, 2) and experts.w2_global_scale.shape == (4, 1)
    ratio = experts.w13_global_scale[:, 1] / experts.w13_global_scale[:, 0]
    assert ((ratio > 20) & (ratio < 200)).all()
    assert decode_scale(experts.w13_scale).view(4, 2, -1).amax(-1).eq(448).all()


ERRORS = {
    "Experts: w13: expected bfloat16 [4, 192, 128] on cpu, got bfloat16 [4, 192, 64] on cpu": lambda w13, w2: Experts(
        w13[..., :64].contiguous(), w2
    ),
    "Experts: w13_scale: expected a scale for int8, got None": lambda w13, w2: Experts(
        w13.to(torch.int8), w2.to(torch.int8), format="int8"
    ),
    "Experts: beta: expected 0.0 for gelu, got 1.0": lambda w13, w2: Experts(w13, w2, activation="gelu", beta=1.0),
    "Experts: w2: expected [E, H, I], got [128, 96]": lambda w13, w2: Experts(w13, w2[0]),
    "Experts: w13_layout: expected gate_up for silu_no_mul, which is not gated, got up_gate": lambda w13, w2: (
        Experts.from_weights(w13, w2, activation="silu_no_mul", w13_layout="up_gate")
    ),
    "Experts: a13_global_scale: expected float32 [4] on cpu, got float32 [3] on cpu": lambda w13, w2: (
        Experts.from_weights(w13, w2, format="nvfp4", a13_global_scale=torch.ones(3))
    ),
    "Experts: a2_global_scale: expected none for bf16, got [1]": lambda w13, w2: Experts(
        w13, w2, a2_global_scale=torch.ones(1)
    ),
    "Experts: expert_map: expected int32 [Eg] on cpu, got int64 [4] on cpu": lambda w13, w2: Experts(
        w13, w2, expert_map=torch.arange(4)
    ),
    "Experts: w13: expected packed or not as w2 is, got [1, 128, 64]": lambda *_: Experts(
        (half := Experts.from_weights(torch.ones(1, 128, 128), torch.ones(1, 128, 64), format="mxfp4")).w13,
        half.packed().w2,
        w13_scale=half.w13_scale,
        format="mxfp4",
    ),
    "Experts: w2: expected at least one expert, got [0, 128, 96]": lambda w13, w2: Experts(w13[:0], w2[:0]),
    "Experts: w13: expected bfloat16 [4, 192, 128] on cpu, got bfloat16 [4, 192, 128] on meta": lambda w13, w2: Experts(
        w13.to("meta"), w2
    ),
    "Experts: w2: expected [E, H, I], got [4, 1, 128, 96]": lambda w13, w2: Experts(w13, w2[:, None]),
    "to_gate_up: group: expected at least 1, got 0": lambda w13, w2: to_gate_up(w13, "interleaved", group=0),
    "from_gate_up: group: expected at least 1, got -1": lambda w13, w2: from_gate_up(w13, "interleaved", group=-1),
    "local_expert_map: num_experts: expected 1 to num_router_experts (4), got 5": lambda *_: local_expert_map(5, 4),
    "to_gate_up: layout: expected one of gate_up, up_gate, interleaved, got up": lambda w13, w2: to_gate_up(w13, "up"),
    "from_gate_up: tensor: expected [E, rows, ...], rows a multiple of 2, got [4, 3]": lambda w13, w2: from_gate_up(
        torch.ones(4, 3), "up_gate"
    ),
    "Experts: w13: expected a tensor, got None": lambda w13, w2: Experts(None, w2),
    "Experts: routed_scaling_factor: expected a number, got '2'": lambda w13, w2: Experts(
        w13, w2, routed_scaling_factor="2"
    ),
    "Experts: expert_map: expected values in [-1, 4), got 7": lambda w13, w2: Experts(
        w13, w2, expert_map=torch.tensor([0, 7]).int()
    ),
    "to_gate_up: tensor: expected [E, rows, ...], rows a multiple of 256, got [4, 192, 128]": lambda w13, w2: (
        to_gate_up(w13, "interleaved", group=128)
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(RuntimeError) as error:
        ERRORS[message](*random_weights())
    assert str(error.value) == message


@pytest.mark.parametrize("format", ["bf16", "fp8_block", "nvfp4"])
def test_dtypes_are_the_formats(format):
    """model.to(bfloat16) rounds no scale, and .half() makes no other weights."""
    experts = Experts.from_weights(*random_weights(), format=format, w13_bias=torch.randn(4, 192))
    before = {name: tensor.clone() for name, tensor in experts.named_buffers()}
    torch.nn.Sequential(experts).to(torch.float16).double().bfloat16().half()
    for name, tensor in experts.named_buffers():
        assert tensor.dtype == before[name].dtype and torch.equal(as_bytes(tensor), as_bytes(before[name]))
    assert {tensor.device.type for tensor in experts.to("meta", torch.float16).buffers()} == {"meta"}
    assert experts.w13.dtype == before["w13"].dtype
