"""The SGLang adapter without SGLang: its translation of SGLang's objects, and its layers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from expecttest import assert_expected_inline
from sglang_stand_ins import (
    FORMATS,
    GPT_OSS,
    NVFP4,
    E,
    H,
    I,
    K,
    T,
    fp8_method,
    make_config,
    make_dispatched,
    make_layer,
    make_method,
    quantise,
    run,
)
from torch import Tensor, nn
from torch.nn import functional as F

import torch_moe_ops as moe
from torch_moe_ops import backends
from torch_moe_ops.integration.sglang import methods, support
from torch_moe_ops.integration.sglang.layer import LayerRunner


def expect_close(layer, dispatched, activation, actual, *, on_input: bool = False) -> None:
    """The sum over k in float64, from the definition.

    S = sum over k of w_k * (|w2| |y| + |bias|) bounds every partial sum. y, an expert's output and the output are
    rounded to bf16, each with a relative error of at most 2^-8 / 2; float32 sums of at most 256 terms add far less.
    """
    weights, ids = dispatched.topk_output.topk_weights.double(), dispatched.topk_output.topk_ids
    w13, w2 = layer.w13_weight.double(), layer.w2_weight.double()
    b13 = getattr(layer, "w13_weight_bias", torch.zeros(w13.shape[:2])).double()
    b2 = getattr(layer, "w2_weight_bias", torch.zeros(w2.shape[:2])).double()
    expected, bound = torch.zeros(T, H).double(), torch.zeros(T, H).double()
    for t, k in torch.cartesian_prod(torch.arange(T), torch.arange(ids.shape[1])).tolist():
        if (e := ids[t, k]) < 0:
            continue
        x = dispatched.hidden_states[t].double()
        if on_input:
            x = (x * weights[t, k]).to(torch.bfloat16).double()
        y = activation(w13[e] @ x + b13[e])
        weight = 1.0 if on_input else weights[t, k]
        expected[t] += weight * (w2[e] @ y + b2[e])
        bound[t] += weight * (w2[e].abs() @ y.abs() + b2[e].abs())
    error = (actual.double() - expected).abs()
    assert (error <= 3 * 2**-9 * bound * 1.01 + 1e-6).all(), (error / bound).max()


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2)
    return F.silu(gate) * up


# formats --------------------------------------------------------------------------------------------------------------


def test_formats_of_unquantised_experts() -> None:
    assert methods.stored(make_method(), make_layer()).format == "bf16"
    assert methods.stored(make_method(), make_layer(torch.float16)).format == "fp16"


@pytest.mark.parametrize("format, method, names, act_format", FORMATS, ids=[case[0] for case in FORMATS])
def test_quantised_weights_go_with_their_scales(format, method, names, act_format) -> None:
    layer, dispatched = make_layer(), make_dispatched()
    call = quantise(layer, format, **names)
    if format == "nvfp4":  # the largest of all experts, local or not
        layer.w13_input_scale, layer.w2_input_scale = torch.tensor([[0.01, 0.02], [0.03, 0.01]]), torch.tensor([0.04])
        call |= {"a13_global_scale": torch.tensor([0.03]), "a2_global_scale": torch.tensor([0.04])}
    topk_output = dispatched.topk_output
    call |= {"topk_weights": topk_output.topk_weights, "topk_ids": topk_output.topk_ids}
    expected = moe.fused_moe(dispatched.hidden_states, **call, format=format, act_format=act_format)
    assert torch.equal(run(method, layer, make_config(), dispatched), expected)


@pytest.mark.parametrize("format, config", [("mxfp4", {}), ("mxfp4", GPT_OSS), ("nvfp4", {}), ("mxfp8", {})])
def test_s2_23_weights_are_packed_once_after_loading(monkeypatch, format: str, config: dict) -> None:
    """As on an H200, with the reference in its place: bf16 activations, and gate over up."""
    monkeypatch.setattr("torch_moe_ops.backends.explain", explain_like_sm90)
    layer, dispatched = make_layer(bias=bool(config)), make_dispatched()
    method, names = {
        "mxfp4": (make_method("Mxfp4MoEMethod"), {}),
        "nvfp4": (NVFP4, {"global_scale": "weight_scale_2"}),
        "mxfp8": (fp8_method(use_mxfp8=True, weight_block_size=[1, 32]), {"scale": "weight_scale_inv"}),
    }[format]
    call = quantise(layer, format, **names)
    layer.w13_input_scale, layer.w2_input_scale = torch.tensor([[0.01, 0.02]]), torch.tensor([0.04])
    layer.w13_weight_packed = layer.w13_weight  # compressed-tensors' name for them
    options = {"alpha": 1.702, "beta": 1.0, "limit": 7.0, "w13_layout": "interleaved"} if config else {}
    if config:
        call |= {"w13_bias": layer.w13_weight_bias, "w2_bias": layer.w2_weight_bias}
    routed = dispatched.topk_output.topk_weights, dispatched.topk_output.topk_ids
    weights = call.pop("w13"), call.pop("w2")
    expected = moe.fused_moe(
        dispatched.hidden_states, *weights, *routed, **call, format=format, act_format="bf16", **options
    )
    assert torch.equal(run(method, layer, make_config(**config), dispatched), expected)
    assert layer.w13_weight.dim() == layer.w2_weight.dim() == 4
    scale = getattr(layer, f"w13_{names.get('scale', 'weight_scale')}")
    assert scale is layer.w13_weight_packed is None  # nothing is kept twice
    # A session that updates weights ends with this call; SGLang > 0.5.17 reads the sentence and refuses the weights.
    method.process_weights_after_loading(layer)
    assert torch.equal(method.apply(layer=layer, dispatch_output=dispatched).hidden_states, expected)
    assert layer._derived_weight_cache_error.startswith("torch_moe_ops: weights that were packed")


def explain_like_sm90(**facts: object) -> backends.Explanation:
    problem = moe.explain(device="cpu").problem._replace(act_format=facts["act_format"], packed=facts["packed"])
    reason = None if facts["packed"] and facts["act_format"] == "bf16" else "needs weights packed by pack_weight"
    return backends.Explanation(problem, (backends.Verdict("reference", reason),))


def test_expert_parallelism_tells_how_many_experts_the_router_has(monkeypatch) -> None:
    """The ids stay what they are: local ones, or -1."""
    calls = []

    def fused_moe(*args: Tensor, **options: object) -> Tensor:
        calls.append(options)
        return moe.fused_moe(*args, **options)

    monkeypatch.setattr(
        "torch_moe_ops.integration.sglang.layer.moe", SimpleNamespace(**vars(moe) | {"fused_moe": fused_moe})
    )
    dispatched = make_dispatched()
    dispatched.topk_output.topk_ids[::2, 0] = -1
    alone = run(make_method(), make_layer(), make_config(), dispatched)
    assert "expert_map" not in calls[-1]
    method, layer = make_method(), make_layer()
    assert torch.equal(run(method, layer, make_config(num_experts=4 * E), dispatched), alone)
    expert_map = calls[-1]["expert_map"]
    assert expert_map.tolist() == [*range(E), *[-1] * (3 * E)]
    # SGLang's memory saver restores buffers, checkpoints hold none, and graphs keep addresses over weight updates.
    assert [name for name, buffer in layer.named_buffers() if buffer is expert_map] and not layer.state_dict()
    method.process_weights_after_loading(layer)
    method.apply(layer=layer, dispatch_output=dispatched)
    assert calls[-1]["expert_map"] is expert_map
    # The experts of all ranks in the place of this one's: ids are the router's.
    for name in ("w13_weight", "w2_weight"):
        setattr(layer, name, getattr(layer, name).repeat(4, 1, 1))
    dispatched.topk_output.topk_ids += E * (dispatched.topk_output.topk_ids >= 0)
    assert torch.equal(method.apply(layer=layer, dispatch_output=dispatched).hidden_states, alone)
    assert "expert_map" not in calls[-1]


def test_scales_stay_where_they_are_when_weights_are_updated() -> None:
    """A CUDA graph that was captured before reads the new ones."""
    layer = make_layer()
    for name, parts in (("w13", 2), ("w2", 1)):
        setattr(layer, f"{name}_weight", getattr(layer, f"{name}_weight").to(torch.float8_e4m3fn))
        setattr(layer, f"{name}_weight_scale", torch.ones(E, parts)[:, : 2 if parts == 2 else 1].squeeze(1))
    method = fp8_method(weight_block_size=None)
    run(method, layer, make_config(), make_dispatched())
    scale = layer.w13_weight_scale_inv
    layer.w13_weight_scale.mul_(2)
    method.process_weights_after_loading(layer)
    assert layer.w13_weight_scale_inv is scale and (scale == 2).all()


@pytest.mark.parametrize("method", [fp8_method(weight_block_size=None), make_method("ModelOptFp8MoEMethod")])
def test_fp8_with_a_scale_per_tensor_is_fp8_with_equal_blocks(method) -> None:
    layer, dispatched = make_layer(), make_dispatched()
    reference = make_layer()
    for name, parts in (("w13", 2), ("w2", 1)):
        weight = getattr(layer, f"{name}_weight").float().unflatten(1, (parts, -1))
        scale = weight.abs().amax((2, 3)) / 448 * torch.arange(1, 1 + E * parts).view(E, parts)  # all different
        values = (weight / scale[:, :, None, None]).to(torch.float8_e4m3fn)
        setattr(layer, f"{name}_weight", values.flatten(1, 2))
        setattr(layer, f"{name}_weight_scale", scale if parts == 2 else scale[:, 0])
        setattr(reference, f"{name}_weight", (values.float() * scale[:, :, None, None]).flatten(1, 2))
    output = run(method, layer, make_config(), dispatched).float()
    expected = moe.fused_moe(
        dispatched.hidden_states,
        reference.w13_weight.bfloat16(),
        reference.w2_weight.bfloat16(),
        dispatched.topk_output.topk_weights,
        dispatched.topk_output.topk_ids,
    ).float()
    # e4m3 rounds each activation by at most 2^-4 of itself, twice, and the errors are independent: a tenth of that sum
    assert (output - expected).norm() < 2 * 2**-4 * expected.norm()


def test_compressed_tensors_nvfp4_is_modelopts_with_inverse_global_scales() -> None:
    layer, dispatched = make_layer(), make_dispatched()
    call = quantise(layer, "nvfp4", global_scale="unused")
    for name in ("w13", "w2"):
        setattr(layer, f"{name}_weight_packed", getattr(layer, f"{name}_weight"))
        delattr(layer, f"{name}_weight")
        setattr(layer, f"{name}_weight_global_scale", 1 / call[f"{name}_global_scale"])
    layer.w13_input_global_scale = torch.tensor([[50.0, 25.0]] * E)
    layer.w2_input_global_scale = torch.tensor([40.0] * E)
    layer.scheme = make_method("CompressedTensorsW4A4Nvfp4MoE")
    method = make_method("CompressedTensorsFusedMoEMethod", load_up_proj_weight_first=True)
    topk_output = dispatched.topk_output
    call |= {"topk_weights": topk_output.topk_weights, "topk_ids": topk_output.topk_ids}
    call |= {"a13_global_scale": torch.tensor([0.04]), "a2_global_scale": torch.tensor([0.025])}
    call |= {name: 1 / (1 / call[name]) for name in ("w13_global_scale", "w2_global_scale")}
    expected = moe.fused_moe(dispatched.hidden_states, **call, format="nvfp4")
    assert torch.equal(run(method, layer, make_config(), dispatched), expected)
    assert not method.load_up_proj_weight_first  # gate over up, as everywhere


def test_a_sharded_state_is_loaded_over_a_prepared_layer() -> None:
    """SGLang then prepares weights that hold anything, and copies the state over the layer afterwards."""

    def make(loaded: bool) -> tuple[object, nn.Module, Tensor]:
        layer = make_layer()
        call = quantise(layer, "nvfp4", weight="weight_packed", global_scale="unused")
        for name in ("w13", "w2"):
            scale = 1 / call[f"{name}_global_scale"] if loaded else torch.full_like(call[f"{name}_global_scale"], 3e-3)
            setattr(layer, f"{name}_weight_global_scale", nn.Parameter(scale, requires_grad=False))
            scale = torch.full((E,), 50.0 if loaded else 3e-3)
            setattr(layer, f"{name}_input_global_scale", nn.Parameter(scale, requires_grad=False))
        layer.scheme = make_method("CompressedTensorsW4A4Nvfp4MoE")
        method = make_method("CompressedTensorsFusedMoEMethod")
        return method, layer, run(method, layer, make_config(), make_dispatched())

    (_, loaded, expected), (method, layer, _) = make(True), make(False)
    layer.load_state_dict(loaded.state_dict())
    assert torch.equal(method.apply(layer=layer, dispatch_output=make_dispatched()).hidden_states, expected)


def test_compressed_tensors_nvfp4_of_weights_alone_has_16_bit_activations() -> None:
    """SGLang 0.5.23 loads W4A4 checkpoints so on a GPU without NVFP4, with or without the activations' scales."""
    layer, dispatched = make_layer(), make_dispatched()
    call = quantise(layer, "nvfp4", weight="weight_packed", global_scale="unused")
    for name in ("w13", "w2"):
        setattr(layer, f"{name}_weight_global_scale", 1 / call[f"{name}_global_scale"])
    layer.scheme = make_method("CompressedTensorsW4A16Nvfp4MoE")
    method = make_method("CompressedTensorsFusedMoEMethod")
    call |= {name: 1 / (1 / call[name]) for name in ("w13_global_scale", "w2_global_scale")}
    topk_output = dispatched.topk_output
    call |= {"topk_weights": topk_output.topk_weights, "topk_ids": topk_output.topk_ids}
    expected = moe.fused_moe(dispatched.hidden_states, **call, format="nvfp4", act_format="bf16")
    assert torch.equal(run(method, layer, make_config(), dispatched), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_fp4_experts_of_an_fp8_checkpoint_are_mxfp4(monkeypatch, packed) -> None:
    """DeepSeek-V4. SGLang loads the values as int8 and their scales, which the checkpoint has as e8m0, as float32."""
    layer, dispatched = make_layer(), make_dispatched()
    call = quantise(layer, "mxfp4", scale="weight_scale_inv")
    for name in ("w13", "w2"):
        setattr(layer, f"{name}_weight", nn.Parameter(call[name].view(torch.int8), requires_grad=False))
        scale = call[f"{name}_scale"].view(torch.float8_e8m0fnu).float()
        setattr(layer, f"{name}_weight_scale_inv", nn.Parameter(scale, requires_grad=False))
    topk_output = dispatched.topk_output
    call |= {"topk_weights": topk_output.topk_weights, "topk_ids": topk_output.topk_ids}
    expected = moe.fused_moe(dispatched.hidden_states, **call, format="mxfp4", act_format="bf16", limit=0.5)
    config = make_config(swiglu_limit=0.5)
    if packed:
        monkeypatch.setattr("torch_moe_ops.backends.explain", explain_like_sm90)
    assert torch.equal(run(fp8_method(is_fp4_expert=True), layer, config, dispatched), expected)
    assert layer.w13_weight.dim() == (4 if packed else 3)


def compressed_tensors(scheme: str, **attributes: object) -> tuple[object, nn.Module]:
    layer = make_layer()
    layer.scheme = make_method(scheme, **attributes)
    return make_method("CompressedTensorsFusedMoEMethod"), layer


def test_compressed_tensors_with_fp8() -> None:
    def stored(strategy: str, block: list[int] | None) -> methods.Stored:
        attributes = {"weight_quant": SimpleNamespace(strategy=strategy), "weight_block_size": block}
        return methods.stored(*compressed_tensors("CompressedTensorsW8A8Fp8MoE", **attributes))

    assert stored("block", [128, 128]).names == methods.SCALES
    assert stored("tensor", None).prepare is methods.repeat_scales
    with pytest.raises(support.Unsupported, match="got FP8 experts with a scale per channel$"):
        stored("channel", None)
    with pytest.raises(support.Unsupported, match=r"got FP8 experts in blocks of \[64, 128\]$"):
        stored("block", [64, 128])


ONLINE = SimpleNamespace(get_name=lambda: "nvfp4_online", is_checkpoint_nvfp4_serialized=False)


@pytest.mark.parametrize(
    "method, layer, got",
    [
        (make_method("GPTQMoEMethod"), make_layer(), "experts under GPTQMoEMethod"),
        (make_method(), make_layer(torch.float32), "unquantised experts in torch.float32"),
        (make_method("ModelOptFp8MoEMethod"), make_layer(), "experts to be quantised to FP8 while they are loaded"),
        (fp8_method(weight_block_size=None), make_layer(), "FP8 experts in torch.bfloat16"),
        (fp8_method(weight_block_size=[64, 1]), make_layer(torch.float8_e4m3fn), "FP8 experts in blocks of [64, 1]"),
        (
            make_method("ModelOptNvFp4FusedMoEMethod", quant_config=ONLINE),
            make_layer(),
            "experts to be quantised to NVFP4 while they are loaded",
        ),
        (*compressed_tensors("CompressedTensorsWNA16MoE"), "experts under CompressedTensorsWNA16MoE"),
    ],
)
def test_other_methods_are_refused_in_one_sentence(method: object, layer: nn.Module, got: str) -> None:
    with pytest.raises(support.Unsupported) as caught:
        methods.stored(method, layer)
    assert str(caught.value) == f"--moe-runner-backend torch_moe: expected {support.supported()}, got {got}"
    assert "\n" not in str(caught.value)


def test_the_sentence_names_what_the_package_runs_on_the_device() -> None:
    assert_expected_inline(
        support.supported("cpu"),
        """\
a model with experts in bf16, fp16, FP8 (128x128 blocks or a scale per tensor), MXFP8, W8A8 INT8, MXFP4, NVFP4, served \
with tensor or expert parallelism, --moe-a2a-backend none, no LoRA and no single-batch overlap""",
    )


def test_a_format_without_a_backend_on_the_device_is_refused_when_the_layer_is_built(monkeypatch) -> None:
    problem = moe.explain(device="cpu").problem

    def explain(**facts: object) -> backends.Explanation:
        return backends.Explanation(problem, (backends.Verdict("triton", "multiplies bf16, got nvfp4"),))

    monkeypatch.setattr("torch_moe_ops.backends.explain", explain)
    with pytest.raises(support.Unsupported, match=r"bf16 experts that no backend runs here \(triton: multiplies bf16,"):
        LayerRunner(make_method(), make_layer(), make_config(), None, SimpleNamespace)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "situ"},
        {"activation": "silu_rounded"},
        {"activation": "relu2"},
        {"activation": "gelu", "gemm1_alpha": 1.702},
        {"activation": "gelu", "is_gated": False, "gemm1_clamp_limit": 7.0},
        {"gemm1_beta": 1.0},
    ],
)
def test_other_activations_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(support.Unsupported):
        support.activation_options(make_config(**changes))


def test_other_uses_of_the_router_weights_are_refused() -> None:
    with pytest.raises(support.Unsupported, match="with top_k 2"):
        support.router_weight_options(make_config(apply_router_weight_on_input=True))
    config = make_config(apply_router_weight_on_input=True, top_k=None)
    with pytest.raises(RuntimeError, match="apply_router_weight_on_input: expected top_k 1, got top_k 2"):
        run(make_method(), make_layer(), config, make_dispatched())


def test_other_forms_of_the_routers_output_are_refused() -> None:
    dispatched = make_dispatched()
    dispatched.topk_output = make_method("PackedTopKOutput", packed_topk_ids=dispatched.topk_output.topk_ids)
    with pytest.raises(support.Unsupported, match="got a router that gives PackedTopKOutput$"):
        run(make_method(), make_layer(), make_config(), dispatched)


# one layer ------------------------------------------------------------------------------------------------------------


def clamped_oai(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=0.7), up.clamp(-0.7, 0.7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


ACTIVATIONS = [
    ({}, silu_mul),
    ({"activation": "gelu"}, lambda x: F.gelu(x[:I]) * x[I:]),
    ({"activation": "gelu_tanh"}, lambda x: F.gelu(x[:I], approximate="tanh") * x[I:]),
    ({"gemm1_alpha": 1.702, "gemm1_clamp_limit": 0.7}, lambda x: clamped_oai(x[0::2], x[1::2])),
    (
        {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 0.7, "gate_up_interleaved": False},
        lambda x: clamped_oai(x[:I], x[I:]),
    ),
    ({"gemm1_clamp_limit": 0.5}, lambda x: F.silu(x[:I]).clamp(max=0.5) * x[I:].clamp(-0.5, 0.5)),
    ({"swiglu_limit": 0.5}, lambda x: F.silu(x[:I].clamp(max=0.5)) * x[I:].clamp(-0.5, 0.5)),
    ({"activation": "relu2", "is_gated": False}, lambda x: F.relu(x).square()),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("changes, activation", ACTIVATIONS, ids=[str(changes or "silu") for changes, _ in ACTIVATIONS])
def test_a_layer_computes_what_sglang_defines(changes, activation, bias) -> None:
    config = make_config(**changes)
    layer, dispatched = make_layer(parts=2 if config.is_gated else 1, bias=bias), make_dispatched()
    expect_close(layer, dispatched, activation, run(make_method(), layer, config, dispatched))


def test_experts_of_other_ranks_are_left_out() -> None:
    layer, dispatched = make_layer(), make_dispatched()
    ids = dispatched.topk_output.topk_ids
    ids[ids >= E // 2] = -1
    ids[0] = -1
    output = run(make_method(), layer, make_config(), dispatched)
    expect_close(layer, dispatched, silu_mul, output)
    assert not output[0].any()


def test_tensor_parallel_ranks_add_up() -> None:
    """Each rank has half of the intermediate columns, gate and up alike; the ranks' outputs are summed."""
    layer, dispatched, total = make_layer(), make_dispatched(), 0
    gate, up = layer.w13_weight.chunk(2, dim=1)
    for half in (slice(0, I // 2), slice(I // 2, I)):
        rank = make_layer()
        rank.w13_weight = torch.cat([gate[:, half], up[:, half]], dim=1)
        rank.w2_weight = layer.w2_weight[:, :, half].contiguous()
        total += run(make_method(), rank, make_config(), dispatched).double()
    expect_close(layer, dispatched, silu_mul, total)


@pytest.mark.parametrize("top_k", [1, None])
def test_router_weight_on_the_input(top_k: int | None) -> None:
    """Llama 4 does not tell its layer how many experts a token has."""
    layer, dispatched = make_layer(), make_dispatched(top_k=1)
    config = make_config(apply_router_weight_on_input=True, top_k=top_k)
    expect_close(layer, dispatched, silu_mul, run(make_method(), layer, config, dispatched), on_input=True)


@pytest.mark.parametrize("changes", [{}, {"no_combine": True}])
def test_a_rank_without_tokens(changes) -> None:
    """Data-parallel attention leaves a rank idle."""
    layer, dispatched = make_layer(), make_dispatched()
    topk = dispatched.topk_output
    topk.topk_weights, topk.topk_ids = topk.topk_weights[:0], topk.topk_ids[:0]
    dispatched.hidden_states = dispatched.hidden_states[:0]
    output = run(make_method(), layer, make_config(**changes), dispatched)
    assert output.shape == ((0, K, H) if changes else (0, H))


@pytest.mark.parametrize("keep", [False, True])
def test_outputs_that_are_not_combined(keep) -> None:
    """no_combine: [T, K, H], neither scaled nor, unless `keep`, weighted; the experts of other ranks give zeros."""
    layer, dispatched = make_layer(), make_dispatched()
    dispatched.topk_output.topk_ids[3, 1] = -1
    config = make_config(no_combine=True, no_combine_keep_router_weight=keep, routed_scaling_factor=2.5)
    output = run(make_method(), layer, config, dispatched)
    assert output.shape == (T, K, H) and not output[3, 1].any()
    weights = 1.0 if keep else dispatched.topk_output.topk_weights[..., None].double()
    expect_close(layer, dispatched, silu_mul, (output.double() * weights).sum(1))


def test_rows_that_pad_the_batch_are_not_read() -> None:
    """Data-parallel attention pads the batch with rows of any content and ids of -1."""
    layer, dispatched = make_layer(), make_dispatched()
    expected = run(make_method(), layer, make_config(), dispatched)
    dispatched.topk_output.topk_ids[5:] = -1
    dispatched.topk_output.topk_weights[5:] = float("nan")
    dispatched.hidden_states[5:] = float("nan")
    output = run(make_method(), layer, make_config(), dispatched)
    assert torch.equal(output[:5], expected[:5]) and not output[5:].any()


def test_redundant_experts_are_experts_like_others() -> None:
    """Expert balancing stores a copy of an expert, sends it some of its tokens, and moves weights between slots."""
    layer, dispatched = make_layer(), make_dispatched()
    expected = run(make_method(), layer, make_config(), dispatched)
    for name in ("w13_weight", "w2_weight"):
        weight = getattr(layer, name)
        setattr(layer, name, torch.cat([weight, weight[:2]]))
    ids = dispatched.topk_output.topk_ids
    ids[::2] = torch.where(ids[::2] < 2, ids[::2] + E, ids[::2])
    assert torch.equal(run(make_method(), layer, make_config(), dispatched), expected)


def test_weights_replaced_while_serving_are_used() -> None:
    method, layer, dispatched = make_method(), make_layer(), make_dispatched()
    run(method, layer, make_config(), dispatched)
    layer.w2_weight = -3 * layer.w2_weight
    output = method.apply(layer=layer, dispatch_output=dispatched).hidden_states
    expect_close(layer, dispatched, silu_mul, output)


def test_weights_of_wrong_sizes_are_refused_when_loaded() -> None:
    layer = make_layer()
    layer.w13_weight = layer.w13_weight[:, :-8].contiguous()
    with pytest.raises(RuntimeError, match="^Experts: w13: expected "):
        run(make_method(), layer, make_config(), make_dispatched())


@pytest.mark.parametrize("on_gpu, expected", [(True, 2.5), (False, 1.0)])  # on a CPU the runner is not to apply it
def test_the_scaling_factor_is_applied_once(on_gpu: bool, expected: float) -> None:
    assert support.routed_scaling_factor(make_config(routed_scaling_factor=2.5), on_gpu=on_gpu) == expected
    assert support.routed_scaling_factor(make_config(), on_gpu=on_gpu) == 1.0


@pytest.mark.parametrize("changes", [{"gemm1_alpha": 1.702}, {"gemm1_clamp_limit": 7.0}], ids=str)
def test_two_limits_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(support.Unsupported, match=r"got swiglu_limit 10\.0 with gemm1_alpha .* and gemm1_clamp_limit "):
        support.activation_options(make_config(swiglu_limit=10.0, **changes))


def test_a_configuration_that_changes_after_the_layer_is_built_is_followed() -> None:
    """GigaChat 3.5 sets the limit so."""
    layer, dispatched, config, method = make_layer(), make_dispatched(), make_config(), make_method()
    LayerRunner(method, layer, config, None, SimpleNamespace).take_over(method)
    config.gemm1_clamp_limit = 0.5
    method.process_weights_after_loading(layer)
    output = method.apply(layer=layer, dispatch_output=dispatched).hidden_states
    expect_close(layer, dispatched, lambda x: F.silu(x[:I]).clamp(max=0.5) * x[I:].clamp(-0.5, 0.5), output)
    config.swiglu_limit = 0.5
    with pytest.raises(support.Unsupported, match="got swiglu_limit 0.5 with gemm1_alpha None and gemm1_clamp_limit 0"):
        method.process_weights_after_loading(layer)


def test_mxfp4_experts_that_the_ranks_do_not_share_in_whole_blocks_are_refused() -> None:
    layer = make_layer()
    quantise(layer, "mxfp4")
    layer.intermediate_size_per_partition = 112
    layer.w2_weight = nn.Parameter(layer.w2_weight[..., :56].contiguous(), requires_grad=False)
    layer.moe_runner_config.gemm1_alpha = 1.702  # gpt-oss
    with pytest.raises(support.Unsupported, match="got MXFP4 experts of 112 columns on a rank, no multiple of 32$"):
        methods.stored(make_method("Mxfp4MoEMethod"), layer)


def test_scales_shared_by_interleaved_rows_are_refused() -> None:
    layer = make_layer()
    quantise(layer, "fp8_block", scale="weight_scale_inv")
    with pytest.raises(support.Unsupported, match="got FP8 .* experts with gate and up interleaved row by row$"):
        run(fp8_method(), layer, make_config(gemm1_alpha=1.702), make_dispatched())


def test_a_model_without_memory_is_refused() -> None:
    layer = make_layer().to("meta")
    layer.w13_weight, layer.w2_weight = layer.w13_weight.to("meta"), layer.w2_weight.to("meta")
    with pytest.raises(
        support.Unsupported, match="got a model that SGLang builds without memory, as with --load-format"
    ):
        run(make_method(), layer, make_config(), make_dispatched())


def test_invented_input_scales_are_refused() -> None:
    """SGLang takes input scales that a checkpoint does not have for 1."""
    layer = make_layer()
    quantise(layer, "nvfp4", global_scale="weight_scale_2")
    layer.w13_input_scale, layer.w2_input_scale = torch.ones(E, 2), torch.ones(E)
    with pytest.raises(support.Unsupported, match="got NVFP4 experts without input scales, which SGLang takes for 1"):
        run(NVFP4, layer, make_config(), make_dispatched())


def test_parameters_that_are_replaced_keep_their_loader() -> None:
    layer = nn.Module()
    layer.scale = nn.Parameter(torch.ones(3))
    layer.scale.weight_loader = loader = object()
    methods.replace_parameter(layer, "scale", torch.ones(2, dtype=torch.bfloat16))
    assert layer.scale.weight_loader is loader and layer.scale.dtype == torch.bfloat16
