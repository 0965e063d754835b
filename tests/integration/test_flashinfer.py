"""S1-1: `cutlass_fused_moe` with FlashInfer's arguments and FlashInfer's [up; gate], against a dense float64 layer."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from moe_cases import Call
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import torch_moe_ops as moe
from torch_moe_ops.integration.flashinfer import ActivationType, cutlass_fused_moe

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
on_a_gpu = [pytest.mark.gpu, no_gpu]
T, E, K, H, I = 9, 6, 3, 192, 128  # noqa: E741

# FlashInfer 0.7.4, flashinfer/fused_moe/core.py; "required": no default; ...: its own "not given".
SIGNATURE = """
    input=required token_selected_experts=required token_final_scales=required fc1_expert_weights=required
    fc2_expert_weights=required output_dtype=required quant_scales=required fc1_expert_biases=None
    fc2_expert_biases=None input_sf=None swiglu_alpha=None swiglu_beta=None swiglu_limit=None tp_size=1 tp_rank=0
    ep_size=1 ep_rank=0 cluster_size=1 cluster_rank=0 output=None enable_alltoall=False
    use_deepseek_fp8_block_scale=False use_w4_group_scaling=False use_mxfp8_act_scaling=False min_latency_mode=False
    use_packed_weights=False use_wfp4afp8_humming=False tune_max_num_tokens=8192 enable_pdl=None activation_type=3
    swizzled_input_sf=True use_fused_finalize=None profile_ids=None workspace_buffer=None
    * clamped_relu2_limit=None situ_beta=None situ_linear_beta=None backend=cutlass nvfp4_4over6=...
"""
NUMBERS = {"Gelu": 0, "Relu": 1, "Silu": 2, "Swiglu": 3, "Geglu": 4, "SwigluBias": 5, "Relu2": 6, "SwigluStep": 7} | {
    "GegluTanh": 8, "Identity": 9, "Situ": 10, "InvalidType": 11, "ClampedRelu2": 12, "PowLU": 13
}  # fmt: skip

# activation_type, the numbers given, and the mathematics: (gate, up) -> y, or x -> y where there is no gate.
GPT_OSS = {"swiglu_alpha": 1.702, "swiglu_beta": 1.0, "swiglu_limit": 1.5}
GATED = {
    "swiglu": (ActivationType.Swiglu, {}, lambda g, u: F.silu(g) * u),
    "swiglu_limit": (
        ActivationType.Swiglu, {"swiglu_limit": 0.5}, lambda g, u: F.silu(g.clamp(max=0.5)) * u.clamp(-0.5, 0.5)
    ),
    "swiglu_bias": (
        ActivationType.SwigluBias,
        GPT_OSS,
        lambda g, u: (u.clamp(-1.5, 1.5) + 1) * g.clamp(max=1.5) * torch.sigmoid(1.702 * g.clamp(max=1.5)),
    ),
    "swiglu_step": (ActivationType.SwigluStep, {}, lambda g, u: F.silu(g).clamp(max=7) * u.clamp(-7, 7)),
    "swiglu_step_limit": (
        ActivationType.SwigluStep, {"swiglu_limit": 0.5}, lambda g, u: F.silu(g).clamp(max=0.5) * u.clamp(-0.5, 0.5)
    ),
    "geglu": (ActivationType.Geglu, {}, lambda g, u: F.gelu(g) * u),
    "geglu_tanh": (ActivationType.GegluTanh, {}, lambda g, u: F.gelu(g, approximate="tanh") * u),
}  # fmt: skip
NOT_GATED = {
    "silu": (ActivationType.Silu, {}, F.silu),
    "gelu": (ActivationType.Gelu, {}, F.gelu),
    "relu2": (ActivationType.Relu2, {}, lambda x: F.relu(x) ** 2),
}
ACTIVATIONS = GATED | NOT_GATED


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_a_gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@dataclass
class Layer:
    """What FlashInfer is called with, in 16 bits; fc1 [E, 2I, H] is up over gate."""

    input: Tensor
    ids: Tensor
    weights: Tensor
    fc1: Tensor
    fc2: Tensor
    fc1_bias: Tensor | None = None
    fc2_bias: Tensor | None = None

    def call(self, **options: object) -> Call:
        biases = {"fc1_expert_biases": self.fc1_bias, "fc2_expert_biases": self.fc2_bias}
        tensors = (self.input, self.ids, self.weights, self.fc1, self.fc2)
        return Call(*tensors, self.input.dtype, None, **(biases | options))

    def __call__(self, **options: object) -> Tensor:
        [output] = self.call(**options)(cutlass_fused_moe)
        return output


def make_layer(
    dtype: torch.dtype = torch.bfloat16, *, device: str = "cpu", gated: bool = True, bias: bool = False, size: int = I
) -> Layer:
    g = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    rows = (2 if gated else 1) * size
    tensors = [randn(T, H), randn(E, rows, H) / H**0.5 * 2, randn(E, H, size) / size**0.5]
    tensors[1][:, : size // 2] *= 2.0  # halves that differ in size show a wrong scale
    x, fc1, fc2 = (tensor.to(device, dtype) for tensor in tensors)
    biases = (randn(E, rows).to(device, dtype), randn(E, H).to(device, dtype)) if bias else (None, None)
    ids = torch.rand(T, E, generator=g).argsort(1)[:, :K].int().contiguous()
    return Layer(x, ids.to(device), (torch.rand(T, K, generator=g) + 0.1).to(device), fc1, fc2, *biases)


def dense(layer: Layer, act, first: int = 0, quantised=lambda x, _: x) -> tuple[Tensor, Tensor]:  # noqa: ANN001
    """The layer in float64, expert by expert, and the same with the absolute values of all that the second GEMM adds:
    u of that bounds what one rounding of y, of the experts' outputs or of the output may change. `first`: the number
    of this rank's first expert. `quantised`: what is done to both GEMMs' activations."""
    x, fc1, fc2 = quantised(layer.input.float(), "fc1").double(), layer.fc1.double(), layer.fc2.double()
    output, size = torch.zeros_like(x), torch.zeros_like(x)
    for expert in range(len(fc1)):
        weight = (layer.weights * (layer.ids == first + expert)).sum(1, keepdim=True).double()
        h = x @ fc1[expert].T
        if layer.fc1_bias is not None:
            h = h + layer.fc1_bias[expert].double()
        if fc1.shape[1] == 2 * fc2.shape[2]:
            up, gate = h.chunk(2, dim=1)  # FlashInfer's order
            y = act(gate, up)
        else:
            y = act(h)
        y = quantised(y.float(), "fc2").double()
        bias = torch.zeros(1) if layer.fc2_bias is None else layer.fc2_bias[expert].double()
        output += weight * (y @ fc2[expert].T + bias.to(x.device))
        size += weight * (y.abs() @ fc2[expert].T.abs() + bias.abs().to(x.device))
    return output, size


def assert_within_roundings(got: Tensor, expected: tuple[Tensor, Tensor], roundings: float = 3.0) -> None:
    """y, the experts' outputs and the output are rounded to 16 bits; a sixth more for float32 sums and second order."""
    unit = torch.finfo(got.dtype).eps / 2
    excess = (got.double() - expected[0]).abs() - roundings * 7 / 6 * unit * expected[1] - 1e-6
    assert excess.max() <= 0


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def test_s1_1_the_signature_is_flashinfers() -> None:
    parameters, words = inspect.signature(cutlass_fused_moe).parameters, []
    for name, parameter in parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        default = "required" if parameter.default is parameter.empty else parameter.default
        default = "..." if type(default) is object else default
        words.append(f"{name}={int(default) if isinstance(default, IntEnum) else default}")
    assert words == SIGNATURE.split()
    assert {kind.name: int(kind) for kind in ActivationType} == NUMBERS


def test_s1_1_needs_no_flashinfer() -> None:
    code = "import sys, torch_moe_ops.integration.flashinfer; assert 'flashinfer' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_s1_1_the_example_in_the_documentation_runs() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/flashinfer.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert names["output"].shape == (16, 512) and names["output"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_s1_1_activations(name: str, dtype: torch.dtype, device: str) -> None:
    activation, numbers, act = ACTIVATIONS[name]
    layer = make_layer(dtype, device=device, gated=name in GATED)
    assert_within_roundings(layer(activation_type=activation, **numbers), dense(layer, act))


@pytest.mark.parametrize("name", ["geglu", "geglu_tanh", "gelu"])
def test_s1_1_the_two_gelus(name: str, device: str) -> None:
    """At -2.25 they differ by 1%, which the tolerance of sums hides."""
    activation, _, act = ACTIVATIONS[name]
    layer = make_layer(torch.float16, device=device, gated=name in GATED)
    layer.input.zero_()[:, 0], layer.fc2[:], layer.fc1[:] = 1.0, layer.fc2.abs(), 1.0
    layer.fc1[:, -I:] = -2.25
    assert relative(layer(activation_type=activation), dense(layer, act)[0]) < 3 * 2**-11


def test_s1_1_fc1_is_up_over_gate(device: str) -> None:
    """The exchanged halves give another result, and moe::fused_moe that of the halves in its own order."""
    layer, act = make_layer(device=device, bias=True), GATED["swiglu"][2]
    assert_within_roundings(layer(), dense(layer, act))
    swapped = make_layer(device=device, bias=True)
    swapped.fc1, swapped.fc1_bias = layer.fc1.roll(I, 1), layer.fc1_bias.roll(I, 1)
    assert relative(swapped(), dense(layer, act)[0]) > 0.5
    biases = {"w13_bias": swapped.fc1_bias, "w2_bias": layer.fc2_bias}
    ours = moe.fused_moe(layer.input, swapped.fc1, layer.fc2, layer.weights, layer.ids, **biases)
    assert_within_roundings(ours, dense(layer, act))


@pytest.mark.parametrize("name", ["swiglu_bias", "relu2"])
def test_s1_1_biases(name: str, device: str) -> None:
    activation, numbers, act = ACTIVATIONS[name]
    layer = make_layer(device=device, gated=name in GATED, bias=True)
    assert_within_roundings(layer(activation_type=activation, **numbers), dense(layer, act))


def test_s1_1_numbers_as_tensors_on_the_cpu(device: str) -> None:
    layer = make_layer(device=device)
    tensors = {name: torch.full((E,), value) for name, value in GPT_OSS.items()}
    assert torch.equal(layer(**tensors), layer(**{name: value.tolist()[0] for name, value in tensors.items()}))
    assert not torch.equal(layer(**tensors), layer())


def test_s1_1_flashinfers_own_enum() -> None:
    """It is another class with the same numbers."""
    theirs, layer = IntEnum("Theirs", NUMBERS), make_layer(gated=False)
    assert torch.equal(layer(activation_type=theirs.Relu2), layer(activation_type=ActivationType.Relu2))
    assert torch.equal(layer(activation_type=6), layer(activation_type=ActivationType.Relu2))


def test_s1_1_expert_parallel(device: str) -> None:
    """Each rank gives its experts' part, the parts add up to one rank's result, and experts nobody has add nothing."""
    layer, act = make_layer(device=device, bias=True), GATED["swiglu"][2]
    absent = layer.ids.clone()
    absent[0, 0], absent[1, 1], absent[2] = E, -1, E + 70
    total = torch.zeros(T, H, dtype=torch.float64, device=device)
    for rank in range(3):
        here = slice(2 * rank, 2 * rank + 2)
        biases = layer.fc1_bias[here], layer.fc2_bias[here]
        part = Layer(layer.input, layer.ids, layer.weights, layer.fc1[here], layer.fc2[here], *biases)
        output = part(ep_size=3, ep_rank=rank, enable_alltoall=True)
        assert_within_roundings(output, dense(part, act, first=2 * rank))
        total += output
        part.ids = absent
        output = part(ep_size=3, ep_rank=rank)
        assert_within_roundings(output, dense(part, act, first=2 * rank))
        assert not output[2].any()
    one, size = dense(layer, act)
    assert_within_roundings(total.to(torch.bfloat16), (one, size), roundings=4)
    assert_within_roundings(layer(), (one, size))


def test_s1_1_tensor_parallel(device: str) -> None:
    """Shards of I: each adds its part of the sum, rank 0 alone fc2's bias."""
    layer, act = make_layer(device=device, bias=True), GATED["swiglu"][2]
    total = torch.zeros(T, H, dtype=torch.float64, device=device)
    for rank in range(2):
        shard = slice(rank * I // 2, (rank + 1) * I // 2)
        fc1 = layer.fc1.unflatten(1, (2, I))[:, :, shard].flatten(1, 2).contiguous()
        bias = layer.fc1_bias.unflatten(1, (2, I))[:, :, shard].flatten(1, 2).contiguous()
        fc2 = layer.fc2[:, :, shard].contiguous()
        part = Layer(layer.input, layer.ids, layer.weights, fc1, fc2, bias, layer.fc2_bias)
        total += part(tp_size=2, tp_rank=rank)
    assert_within_roundings(total.to(torch.bfloat16), dense(layer, act), roundings=4)


def test_s1_1_absent_slots_and_no_scales(device: str) -> None:
    layer, act = make_layer(device=device), GATED["swiglu"][2]
    layer.ids[0], layer.ids[1, 2] = -1, -1
    assert_within_roundings(layer(), dense(layer, act))
    weights, layer.weights = layer.weights, None
    [output] = layer.call()(cutlass_fused_moe)
    layer.weights = torch.ones_like(weights)
    assert_within_roundings(output, dense(layer, act))


def test_s1_1_output(device: str) -> None:
    layer = make_layer(device=device)
    for output in (torch.full_like(layer.input, torch.nan), torch.zeros(H, T, device=device).bfloat16().mT):
        result = layer.call(output=output)(cutlass_fused_moe)
        assert isinstance(result, list) and result[0] is output
        assert torch.equal(output, layer())


def test_s1_1_hints_change_nothing(device: str) -> None:
    layer = make_layer(device=device)
    hints = {"tune_max_num_tokens": 1, "enable_pdl": True, "use_fused_finalize": False, "profile_ids": [3, -1]}
    hints |= {"workspace_buffer": torch.empty(1, dtype=torch.uint8), "swizzled_input_sf": False, "nvfp4_4over6": None}
    assert torch.equal(layer(**hints, enable_alltoall=True, tp_size=4), layer())


# quantised weights ----------------------------------------------------------------------------------------------------


def fp8_blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, FlashInfer's scales [E, ceil(N/128), ceil(K/128)], and the values they stand for."""
    experts, n, k = weight.shape
    padded = F.pad(weight.float(), (0, -k % 128, 0, -n % 128)).unflatten(2, (-1, 128)).unflatten(1, (-1, 128))
    scale = padded.abs().amax((2, 4), keepdim=True).clamp(min=1e-4) / 448
    values = (padded / scale).to(torch.float8_e4m3fn)
    stands_for = (values.float() * scale).flatten(3, 4).flatten(1, 2)[:, :n, :k]
    return values.flatten(3, 4).flatten(1, 2)[:, :n, :k].contiguous(), scale[:, :, 0, :, 0].contiguous(), stands_for


def fp8_rounded(x: Tensor, _: str) -> Tensor:
    """As both GEMMs' activations are: a scale to 128 values of a row."""
    blocks = F.pad(x, (0, -x.shape[1] % 128)).unflatten(1, (-1, 128))
    scale = blocks.abs().amax(2, keepdim=True).clamp(min=1e-10) / 448
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(1)[:, : x.shape[1]]


@pytest.mark.parametrize("name", ["swiglu", "relu2"])
def test_s1_1_fp8_blocks(name: str, device: str) -> None:
    """Two roundings to bf16, of 2^-8 each at most."""
    activation, _, act = ACTIVATIONS[name]
    layer = make_layer(device=device, gated=name in GATED, bias=True)
    fc1, scale1, layer.fc1 = fp8_blocks(layer.fc1)
    fc2, scale2, layer.fc2 = fp8_blocks(layer.fc2)
    options = {"use_deepseek_fp8_block_scale": True, "activation_type": activation}
    call = layer.call(**options).but(layer.input, layer.ids, layer.weights, fc1, fc2, torch.bfloat16, [scale1, scale2])
    [output] = call(cutlass_fused_moe)
    assert relative(output, dense(layer, act, quantised=fp8_rounded)[0]) < 2 * 2**-8


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nvfp4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., N, K] -> 4-bit codes, e4m3 scales, what they stand for; x ~= code * scale * global_scale."""
    blocks = x.float().unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(-1, keepdim=True) / (6 * global_scale)).clamp(max=448).to(torch.float8_e4m3fn)
    scaled = blocks * (1 / (scale.float().clamp(min=2**-9) * global_scale))
    table, odd = E2M1.to(x.device), torch.arange(8, device=x.device) % 2
    code = ((scaled.abs().double()[..., None] - table).abs() + odd * 1e-9).argmin(-1)  # ties to even codes
    stands_for = scaled.sign() * table[code] * scale.float() * global_scale
    return (code + 8 * (scaled < 0)).flatten(-2).to(torch.uint8), scale.squeeze(-1), stands_for.flatten(-2)


def swizzled(scale: Tensor) -> Tensor:
    """[E, N, C] as FlashInfer lays it out: 128x4 tiles, in which scale (m, k) is byte m % 32 * 16 + m / 32 * 4 + k."""
    experts, n, columns = scale.shape
    rows, tiles = -(-n // 128) * 128, -(-columns // 4)
    m, k = torch.meshgrid(torch.arange(n), torch.arange(columns), indexing="ij")
    place = (m // 128 * tiles + k // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4
    packed = torch.zeros(experts, rows * tiles * 4, dtype=torch.uint8, device=scale.device)
    packed[:, place.flatten().to(scale.device)] = scale.view(torch.uint8).flatten(1)
    return packed.view(torch.int32).view(experts, rows, tiles)


def nvfp4_call(layer: Layer, *, per_expert: bool = False, **options: object) -> tuple[Call, object]:
    """The call with both weights as NVFP4 (layer then has what they stand for), and the rounding of activations."""
    weights, scales, a_globals = [], [], {"fc1": 0.07, "fc2": 0.05}
    for name, a_global in a_globals.items():
        weight = getattr(layer, name)
        w_global = weight.float().abs().amax((1, 2)) / (6 * 448)
        codes, scale, stands_for = nvfp4(weight, w_global[:, None, None, None])
        setattr(layer, name, stands_for)
        weights.append((codes[..., 0::2] | codes[..., 1::2] << 4).view(torch.int64))
        act = torch.full((E,) if per_expert else (), 1 / a_global, device=weight.device)
        scales += [act, swizzled(scale), w_global * a_global]
    call = layer.call(**options).but(layer.input, layer.ids, layer.weights, *weights, torch.bfloat16, scales)
    return call, lambda x, gemm: nvfp4(x, torch.tensor(a_globals[gemm], device=x.device))[2]


@pytest.mark.parametrize(
    "name, size, per_expert", [("swiglu", 96, False), ("relu2", 64, True), ("swiglu_bias", 256, True)]
)
def test_s1_1_nvfp4(name: str, size: int, per_expert: bool, device: str) -> None:
    """Two roundings to bf16, of 2^-8 each at most, and as much for values that float64 rounds to another e2m1."""
    activation, numbers, act = ACTIVATIONS[name]
    layer = make_layer(device=device, gated=name in GATED, bias=True, size=size)
    call, rounded = nvfp4_call(layer, per_expert=per_expert, activation_type=activation, **numbers)
    [output] = call(cutlass_fused_moe)
    assert relative(output, dense(layer, act, quantised=rounded)[0]) < 4 * 2**-8


# torch.compile, fake tensors, CUDA ------------------------------------------------------------------------------------


def calls() -> dict[str, Call]:
    fp8, layer = make_layer(), make_layer(bias=True)
    layer.ids += E // 2  # some of rank 0
    (fc1, scale1, _), (fc2, scale2, _) = fp8_blocks(fp8.fc1), fp8_blocks(fp8.fc2)
    fp8 = Layer(fp8.input, fp8.ids, fp8.weights, fc1, fc2).call(use_deepseek_fp8_block_scale=True)
    return {
        "bf16": layer.call(**GPT_OSS, ep_size=2, ep_rank=1),
        "fp8": fp8.but(*fp8.args[:6], [scale1, scale2]),
        "nvfp4": nvfp4_call(make_layer())[0],
    }


@pytest.mark.parametrize("format", ["bf16", "fp8", "nvfp4"])
def test_s1_1_one_graph_for_any_number_of_tokens(format: str) -> None:
    torch._dynamo.reset()
    call, compilations = calls()[format], []

    def run(x: Tensor, ids: Tensor, weights: Tensor, output: Tensor) -> Tensor:
        return call.but(x, ids, weights)(cutlass_fused_moe, output=output)[0]

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]):  # noqa: ANN202
        compilations.append(graph)
        return graph

    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (9, 4, 7):
        routed = [tensor[:tokens].contiguous() for tensor in call.args[:3]]
        outputs = torch.zeros(tokens, H).bfloat16(), torch.zeros(tokens, H).bfloat16()
        assert compiled(*routed, outputs[0]) is outputs[0]
        assert torch.equal(outputs[0], run(*routed, outputs[1])) and outputs[0].any()
    assert len(compilations) <= 2  # dynamic=True tries float arguments as symbols first


@pytest.mark.parametrize("format", ["bf16", "fp8", "nvfp4"])
def test_s1_1_fake_tensors(format: str) -> None:
    call = calls()[format]
    with FakeTensorMode() as mode:

        def fake(value: object) -> object:
            if isinstance(value, list):
                return [fake(element) for element in value]
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        options = {name: fake(value) for name, value in call.options.items()}
        [output] = cutlass_fused_moe(*map(fake, call.args), **options)
    assert (output.shape, output.dtype, output.is_contiguous()) == ((T, H), torch.bfloat16, True)


@no_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("format", ["bf16", "fp8", "nvfp4"])
def test_s1_1_no_synchronisation_and_cuda_graphs(format: str) -> None:
    call = calls()[format].to("cuda")
    call = call.but(*call.args[:6], call.args[6] and [scale.cuda() for scale in call.args[6]])
    [expected] = call(cutlass_fused_moe)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(cutlass_fused_moe)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        [output] = call(cutlass_fused_moe)
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)


# refusals -------------------------------------------------------------------------------------------------------------


def refusals(layer: Layer, *changes: dict[str, object]) -> str:
    names = list(inspect.signature(cutlass_fused_moe).parameters)
    call, lines = layer.call(), []
    for change in changes:
        arguments = dict(zip(names, call.args, strict=False)) | call.options | change
        with pytest.raises(RuntimeError) as caught:
            cutlass_fused_moe(**arguments)
        lines.append(str(caught.value))
        assert "\n" not in lines[-1]
    return "\n".join(lines)


def test_s1_1_refuses_what_is_not_here() -> None:
    one = torch.ones(1)
    changes = [
        {"input_sf": torch.ones(T, 12)},
        {"cluster_size": 2},
        {"cluster_rank": 1},
        {"use_w4_group_scaling": True},
        {"use_mxfp8_act_scaling": True},
        {"min_latency_mode": True},
        {"use_packed_weights": True},
        {"use_wfp4afp8_humming": True},
        {"clamped_relu2_limit": one},
        {"situ_beta": one},
        {"situ_linear_beta": one},
        {"backend": "cake"},
        {"nvfp4_4over6": "a recipe"},
        *({"activation_type": ActivationType[name]} for name in ("Relu", "Identity", "Situ", "ClampedRelu2", "PowLU")),
        {"activation_type": 99},
    ]
    assert_expected_inline(
        refusals(make_layer(), *changes),
        """\
cutlass_fused_moe: input_sf: expected None (16-bit input, which is quantised here), got float32 [9, 12] on cpu
cutlass_fused_moe: cluster_size: expected 1 (FlashInfer takes no other), got 2
cutlass_fused_moe: cluster_rank: expected 0 (FlashInfer takes no other), got 1
cutlass_fused_moe: use_w4_group_scaling: expected False (prepare such weights once: torch_moe_ops.Experts), got True
cutlass_fused_moe: use_mxfp8_act_scaling: expected False (prepare such weights once: torch_moe_ops.Experts), got True
cutlass_fused_moe: min_latency_mode: expected False (FlashInfer takes no other), got True
cutlass_fused_moe: use_packed_weights: expected False (prepare such weights once: torch_moe_ops.Experts), got True
cutlass_fused_moe: use_wfp4afp8_humming: expected False (prepare such weights once: torch_moe_ops.Experts), got True
cutlass_fused_moe: clamped_relu2_limit: expected None (no ClampedRelu2 here), got float32 [1] on cpu
cutlass_fused_moe: situ_beta: expected None (no Situ here), got float32 [1] on cpu
cutlass_fused_moe: situ_linear_beta: expected None (no Situ here), got float32 [1] on cpu
cutlass_fused_moe: backend: expected cutlass (the backend is chosen as torch_moe_ops.explain says), got cake
cutlass_fused_moe: nvfp4_4over6: expected None, got a recipe
cutlass_fused_moe: activation_type: expected one of Swiglu, SwigluBias, SwigluStep, Geglu, GegluTanh, Silu, Gelu, Relu2, got Relu
cutlass_fused_moe: activation_type: expected one of Swiglu, SwigluBias, SwigluStep, Geglu, GegluTanh, Silu, Gelu, Relu2, got Identity
cutlass_fused_moe: activation_type: expected one of Swiglu, SwigluBias, SwigluStep, Geglu, GegluTanh, Silu, Gelu, Relu2, got Situ
cutlass_fused_moe: activation_type: expected one of Swiglu, SwigluBias, SwigluStep, Geglu, GegluTanh, Silu, Gelu, Relu2, got ClampedRelu2
cutlass_fused_moe: activation_type: expected one of Swiglu, SwigluBias, SwigluStep, Geglu, GegluTanh, Silu, Gelu, Relu2, got PowLU
cutlass_fused_moe: activation_type: expected one of Swiglu, SwigluBias, SwigluStep, Geglu, GegluTanh, Silu, Gelu, Relu2, got 99""",  # noqa: E501
    )


def test_s1_1_refuses_numbers_that_it_cannot_use() -> None:
    changes = [
        {"swiglu_limit": torch.ones(E, device="meta")},
        {"swiglu_alpha": torch.tensor([1.0, 2, 1, 1, 1, 1])},
        {"swiglu_limit": -1.0},
        {"swiglu_beta": 1.0, "activation_type": ActivationType.SwigluStep},
        {"swiglu_limit": torch.ones(E), "activation_type": ActivationType.Geglu},
        {"swiglu_alpha": 1.0, "activation_type": ActivationType.Relu2},
        {"ep_size": 2, "ep_rank": 2},
        {"tp_size": 2, "tp_rank": -1},
    ]
    assert_expected_inline(
        refusals(make_layer(), *changes),
        """\
cutlass_fused_moe: swiglu_limit: expected a float, or a tensor on the CPU (on a GPU it would have to be read), got float32 [6] on meta
cutlass_fused_moe: swiglu_alpha: expected one value for all experts, got [1.0, 2.0]
fused_moe: limit: expected a number >= 0, got -1.0
cutlass_fused_moe: swiglu_beta: expected None for SwigluStep, got 1.0
cutlass_fused_moe: swiglu_limit: expected None for Geglu, got float32 [6] on cpu
cutlass_fused_moe: swiglu_alpha: expected None for Relu2, got 1.0
cutlass_fused_moe: ep_rank: expected 0 to 1, got 2
cutlass_fused_moe: tp_rank: expected 0 to 1, got -1""",  # noqa: E501
    )


def test_s1_1_refuses_tensors_that_do_not_fit() -> None:
    layer = make_layer()
    fp8 = {name: torch.zeros(shape).to(torch.float8_e4m3fn) for name, shape in (
        ("fc1_expert_weights", (E, 2 * I, H)), ("fc2_expert_weights", (E, H, I))
    )}  # fmt: skip
    nvfp4 = {"fc1_expert_weights": torch.zeros(E, 2 * I, H // 16).long()}
    nvfp4 |= {"fc2_expert_weights": torch.zeros(E, H, I // 16).long()}
    scales, one = [torch.ones(E, 2, 2), torch.ones(E, 2, 1)], torch.ones(E)
    six = [one, torch.zeros(E, 2 * I, 3).int(), one, one, torch.zeros(E, H, 2).int(), one]
    small = {"fc1_expert_weights": torch.zeros(E, 384, H).to(torch.float8_e4m3fn)}
    block = {"use_deepseek_fp8_block_scale": True}
    changes = [
        {"input": layer.input.to(torch.float8_e4m3fn)},
        {"input": layer.input.float()},
        {"output_dtype": torch.float16},
        {"output_dtype": torch.float32},
        {"output": torch.zeros(T, H)},
        {"output": torch.zeros(T + 1, H).bfloat16()},
        {"quant_scales": scales},
        block,
        {"fc1_expert_weights": torch.zeros(E, 2 * I, H // 2, dtype=torch.uint8)},
        {"fc1_expert_weights": layer.fc1.half(), "fc2_expert_weights": layer.fc2.half()},
        {"fc1_expert_weights": layer.fc1[:, :I].contiguous()},
        {"activation_type": ActivationType.Silu},
        fp8,
        fp8 | block,
        fp8 | block | {"quant_scales": scales[:1]},
        fp8 | small | block | {"quant_scales": scales},
        fp8 | block | {"quant_scales": [scales[0].bfloat16(), scales[1]]},
        nvfp4,
        nvfp4 | block,
        nvfp4 | {"quant_scales": [*six[:1], torch.zeros(E, 2 * I, 12, dtype=torch.uint8), *six[2:]]},
        nvfp4 | {"quant_scales": [*six[:4], torch.zeros(E, H, 2).int(), one]},
        {"token_selected_experts": layer.ids.long()},
        {"token_final_scales": layer.weights.bfloat16()},
        {"token_selected_experts": layer.ids + E},
        {"fc1_expert_biases": torch.zeros(E, I)},
    ]
    assert_expected_inline(
        refusals(layer, *changes),
        """\
cutlass_fused_moe: input: expected bfloat16 or float16, which is quantised here, got float8_e4m3fn
cutlass_fused_moe: input: expected bfloat16 or float16, which is quantised here, got float32
cutlass_fused_moe: output_dtype: expected bfloat16, as input, got float16
cutlass_fused_moe: output_dtype: expected bfloat16, as input, got float32
cutlass_fused_moe: output: expected bfloat16 [9, 192] on cpu, got float32 [9, 192] on cpu
cutlass_fused_moe: output: expected bfloat16 [9, 192] on cpu, got bfloat16 [10, 192] on cpu
cutlass_fused_moe: quant_scales: expected 0 tensors for bfloat16 weights, got 2
cutlass_fused_moe: use_deepseek_fp8_block_scale: expected False for bfloat16 weights, got True
cutlass_fused_moe: fc1_expert_weights: expected bfloat16, float16, float8_e4m3fn or int64 (NVFP4); prepare such weights once: torch_moe_ops.Experts, got uint8
fused_moe: w2: expected bfloat16 [E, H, I] on cpu, got float16 [6, 192, 128] on cpu
fused_moe: w13: expected bfloat16 [6, 256, 192] on cpu, got bfloat16 [6, 128, 192] on cpu
fused_moe: w13: expected bfloat16 [6, 128, 192] on cpu, got bfloat16 [6, 256, 192] on cpu
cutlass_fused_moe: use_deepseek_fp8_block_scale: expected True for float8_e4m3fn weights (a scale per tensor: repeat it once, for every block), got False
cutlass_fused_moe: quant_scales: expected 2 tensors for float8_e4m3fn weights, got 0
cutlass_fused_moe: quant_scales: expected 2 tensors for float8_e4m3fn weights, got 1
cutlass_fused_moe: fc1_expert_weights: expected halves of a multiple of 128 rows, so that no scale is of both, got [6, 384, 192]
fused_moe: w13_scale: expected float32 [6, 2, 2] on cpu, got bfloat16 [6, 2, 2] on cpu
cutlass_fused_moe: quant_scales: expected 6 tensors for int64 weights, got 0
cutlass_fused_moe: use_deepseek_fp8_block_scale: expected False for int64 weights, got True
cutlass_fused_moe: quant_scales[1]: expected int32 [6, 256, 3] on cpu, got uint8 [6, 256, 12] on cpu
cutlass_fused_moe: quant_scales[4]: expected int32 [6, 256, 2] on cpu, got int32 [6, 192, 2] on cpu
fused_moe: topk_ids: expected int32 [T, K] on cpu, got int64 [9, 3] on cpu
fused_moe: topk_weights: expected float32 [9, 3] on cpu, got bfloat16 [9, 3] on cpu
sort_slots: topk_ids: expected values in [-1, 6), got 11
fused_moe: w13_bias: expected bfloat16 or float16 or float32 [6, 256] on cpu, got float32 [6, 128] on cpu""",  # noqa: E501
    )
