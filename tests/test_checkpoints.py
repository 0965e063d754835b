"""load_experts: tensors as other tools write them, to the op arguments that mean the same, from safetensors files.

Each writer below states its layout from the tool's own documentation; what the layer then means is computed from the
written tensors in float64, without this package's loader.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import torch_moe_ops as moe
from torch_moe_ops.formats import FORMATS, quantize_weight

save_file = pytest.importorskip("safetensors.torch").save_file
checkpoints = pytest.importorskip("torch_moe_ops.checkpoints")
load_experts = checkpoints.load_experts

E, H, I = 4, 256, 128  # noqa: E741
PREFIX = "model.layers.3.mlp.experts"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Tensors = dict[str, Tensor]


def projections(names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> dict[str, Tensor]:
    """{expert}.{projection} -> bf16 weight; up is ten times as large as gate, and experts differ."""
    generator = torch.Generator().manual_seed(0)
    result = {}
    for expert in range(E):
        for name, shape, size in zip(names, ((I, H), (I, H), (H, I)), (0.02, 0.2, 0.05), strict=True):
            result[f"{expert}.{name}"] = (torch.randn(shape, generator=generator) * size * (1 + expert)).bfloat16()
    return result


def quantised(weight: Tensor, format: str) -> tuple[Tensor, Tensor, Tensor]:
    values, scale, global_scale = quantize_weight(weight[None], format)
    return values[0], scale[0], None if global_scale is None else global_scale.reshape(())


def modelopt_nvfp4(name: str, weight: Tensor) -> Tensors:
    values, scale, scale_2 = quantised(weight, "nvfp4")
    input_scale = torch.tensor(0.001 * (1 + len(name) % 3))
    return {"weight": values, "weight_scale": scale, "weight_scale_2": scale_2, "input_scale": input_scale}


def compressed_nvfp4(name: str, weight: Tensor) -> Tensors:
    values, scale, global_scale = quantised(weight, "nvfp4")
    inverse = {"weight_global_scale": (1 / global_scale).view(1), "input_global_scale": torch.tensor([512.0])}
    return {"weight_packed": values, "weight_scale": scale, **inverse}


def compressed_mxfp4(name: str, weight: Tensor) -> Tensors:
    values, scale, _ = quantised(weight, "mxfp4")
    return {"weight_packed": values, "weight_scale": scale.view(torch.uint8)}


def deepseek_mxfp4(name: str, weight: Tensor) -> Tensors:
    values, scale, _ = quantised(weight, "mxfp4")
    return {"weight": values.view(torch.int8), "scale": scale}


def deepseek_fp8(name: str, weight: Tensor) -> Tensors:
    values, scale, _ = quantised(weight, "fp8_block")
    return {"weight": values, "weight_scale_inv": scale}


def compressed_fp8(name: str, weight: Tensor) -> Tensors:
    values, scale, _ = quantised(weight, "fp8_block")
    return {"weight": values, "weight_scale": scale.bfloat16()}


def compressed_int8(name: str, weight: Tensor) -> Tensors:
    values, scale, _ = quantised(weight, "int8")
    return {"weight": values, "weight_scale": scale}


def mxfp8(name: str, weight: Tensor) -> Tensors:
    values, scale, _ = quantised(weight, "mxfp8")
    return {"weight": values, "weight_scale": scale.view(torch.uint8)}


def bfloat16(name: str, weight: Tensor) -> Tensors:
    return {"weight": weight, "bias": weight[:, 0].clone()}


WRITERS: dict[str, tuple[Callable[[str, Tensor], Tensors], str]] = {
    "ModelOpt NVFP4": (modelopt_nvfp4, "nvfp4"),
    "compressed-tensors NVFP4": (compressed_nvfp4, "nvfp4"),
    "compressed-tensors MXFP4": (compressed_mxfp4, "mxfp4"),
    "DeepSeek MXFP4": (deepseek_mxfp4, "mxfp4"),
    "DeepSeek FP8": (deepseek_fp8, "fp8_block"),
    "compressed-tensors FP8": (compressed_fp8, "fp8_block"),
    "compressed-tensors INT8": (compressed_int8, "int8"),
    "MXFP8": (mxfp8, "mxfp8"),
    "bfloat16": (bfloat16, "bf16"),
}


def written(writer: Callable[[str, Tensor], Tensors], **names: object) -> Tensors:
    tensors = {}
    for name, weight in projections(**names).items():
        tensors |= {f"{PREFIX}.{name}.{suffix}": tensor for suffix, tensor in writer(name, weight).items()}
    return tensors | {"model.layers.3.mlp.shared_experts.gate_proj.weight": torch.zeros(2)}


def meaning(tensors: Tensors, name: str) -> Tensor:
    """The weight that the written tensors stand for, float64 [rows, k], from the public definitions."""
    t = {key.removeprefix(f"{PREFIX}.{name}."): tensor for key, tensor in tensors.items() if f".{name}." in key}
    codes = t.get("weight_packed", t.get("weight"))
    scale = next((t[suffix] for suffix in ("weight_scale", "weight_scale_inv", "scale") if suffix in t), None)
    if scale is None:
        return codes.double()
    if codes.dtype in (torch.uint8, torch.int8) and scale.dtype in (
        torch.float8_e4m3fn,
        torch.uint8,
        torch.float8_e8m0fnu,
    ):
        bytes_ = codes.view(torch.uint8)
        codes = E2M1[torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(-2).long()]
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = 2.0 ** (scale.view(torch.uint8).double() - 127)
    rows, k = codes.shape
    scale = scale.double()
    scale = scale.repeat_interleave(-(-rows // scale.shape[0]), 0).repeat_interleave(-(-k // scale.shape[1]), 1)
    x = codes.double() * scale[:rows, :k]
    x = x * t["weight_scale_2"].double() if "weight_scale_2" in t else x
    return x / t["weight_global_scale"].double() if "weight_global_scale" in t else x


def loaded_weight(arguments: dict[str, object], name: str) -> Tensor:
    """w13 or w2 of the op arguments, dequantised: float32 [E, N, K]."""
    fmt = FORMATS[arguments["format"]]
    scale, global_scale = arguments.get(f"{name}_scale"), arguments.get(f"{name}_global_scale")
    return fmt.dequantize(arguments[name], scale, fmt.weight_block, global_scale, 2 if name == "w13" else 1)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_arguments_mean_what_was_written(kind: str, tmp_path: Path) -> None:
    writer, format = WRITERS[kind]
    tensors = written(writer)
    save_file(tensors, tmp_path / "model.safetensors")
    arguments = load_experts(tmp_path, PREFIX)
    assert arguments["format"] == format
    w13, w2 = loaded_weight(arguments, "w13"), loaded_weight(arguments, "w2")
    for expert in range(E):
        gate, up, down = (meaning(tensors, f"{expert}.{name}") for name in ("gate_proj", "up_proj", "down_proj"))
        # Codes and block scales are exact; two products and 1 / global scale round in float32.
        torch.testing.assert_close(w13[expert].double(), torch.cat([gate, up]), rtol=2.0**-21, atol=0)
        torch.testing.assert_close(w2[expert].double(), down, rtol=2.0**-21, atol=0)
    experts = moe.Experts(**arguments)
    output = experts(torch.randn(3, H).bfloat16(), torch.rand(3, 2), torch.tensor([[0, 1], [2, 3], [1, 3]]).int())
    assert output.shape == (3, H) and output.isfinite().all()


def test_s2_18_global_scales_stay_apart(tmp_path: Path) -> None:
    """float32, per expert, gate and up on their own; input scales are the larger of gate's and up's."""
    tensors = written(modelopt_nvfp4)
    for expert in range(E):
        tensors[f"{PREFIX}.{expert}.gate_proj.input_scale"] = torch.tensor(0.25 + expert)
        tensors[f"{PREFIX}.{expert}.up_proj.input_scale"] = torch.tensor(0.5 + expert)
    save_file(tensors, tmp_path / "model.safetensors")
    arguments = load_experts(tmp_path, PREFIX)
    global_scale = arguments["w13_global_scale"]
    assert global_scale.dtype == torch.float32 and global_scale.shape == (E, 2)
    for expert in range(E):
        for part, name in enumerate(("gate_proj", "up_proj")):
            assert global_scale[expert, part] == tensors[f"{PREFIX}.{expert}.{name}.weight_scale_2"]
        assert arguments["w2_global_scale"][expert] == tensors[f"{PREFIX}.{expert}.down_proj.weight_scale_2"]
    assert arguments["a13_global_scale"].tolist() == [0.5, 1.5, 2.5, 3.5]
    weight_only = load_experts(tmp_path, PREFIX, act_format="bf16")
    assert "a13_global_scale" not in weight_only and weight_only["act_format"] == "bf16"
    moe.Experts(**weight_only)


def test_divisors_become_multipliers(tmp_path: Path) -> None:
    save_file(written(compressed_nvfp4), tmp_path / "model.safetensors")
    arguments = load_experts(tmp_path, PREFIX)
    assert torch.equal(arguments["a2_global_scale"], torch.full((E,), 1 / 512))
    assert (arguments["w13_global_scale"] < 1).all()


def test_mixtral_names(tmp_path: Path) -> None:
    """w1 is gate, w3 up, w2 down."""
    tensors = written(deepseek_fp8, names=("w1", "w3", "w2"))
    save_file(tensors, tmp_path / "model.safetensors")
    w13 = loaded_weight(load_experts(tmp_path, PREFIX), "w13")
    torch.testing.assert_close(w13[1, I:].double(), meaning(tensors, "1.w3"), rtol=2.0**-23, atol=0)


# ---- gpt-oss ---------------------------------------------------------------------------------------------------------


def gpt_oss_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, rows, k in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
        weight = torch.randn(E, rows, k, generator=generator) * 0.05
        values, scale, _ = quantize_weight(weight, "mxfp4")
        tensors[f"{PREFIX}.{name}_blocks"] = values.unflatten(-1, (-1, 16)).contiguous()
        tensors[f"{PREFIX}.{name}_scales"] = scale.view(torch.uint8)
        tensors[f"{PREFIX}.{name}_bias"] = torch.randn(E, rows, generator=generator).bfloat16()
    return tensors


def gpt_oss_layer(tensors: Tensors, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """The model's own formulas in float64: interleaved rows, clamps at 7, (up + 1) * gate * sigmoid(1.702 * gate)."""

    def weight(name: str) -> Tensor:
        blocks, scales = tensors[f"{PREFIX}.{name}_blocks"], tensors[f"{PREFIX}.{name}_scales"]
        values = torch.stack((E2M1[(blocks & 15).long()], E2M1[(blocks >> 4).long()]), -1).flatten(-2).double()
        return (values * 2.0 ** (scales.double() - 127)[..., None]).flatten(-2)

    w13, w2 = weight("gate_up_proj"), weight("down_proj")
    b13, b2 = (tensors[f"{PREFIX}.{name}_bias"].double() for name in ("gate_up_proj", "down_proj"))
    output = torch.zeros(len(x), H, dtype=torch.float64)
    for token in range(len(x)):
        for weight_of_slot, expert in zip(topk_weights[token], topk_ids[token], strict=True):
            gate_up = w13[expert] @ x[token].double() + b13[expert]
            gate, up = gate_up[0::2].clamp(max=7), gate_up[1::2].clamp(-7, 7)
            act = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            output[token] += weight_of_slot.double() * (w2[expert] @ act + b2[expert])
    return output


def test_gpt_oss_is_the_layer_of_the_model(tmp_path: Path) -> None:
    tensors = gpt_oss_tensors()
    save_file(tensors, tmp_path / "model-00000-of-00001.safetensors")
    arguments = load_experts(tmp_path, PREFIX)
    assert (arguments["format"], arguments["act_format"]) == ("mxfp4", "bf16")
    x, topk_weights = torch.randn(5, H).bfloat16() * 3, torch.rand(5, 2)
    topk_ids = torch.tensor([[0, 1], [2, 3], [1, 3], [0, 3], [2, 1]]).int()
    output = moe.Experts(**arguments)(x, topk_weights, topk_ids)
    expected = gpt_oss_layer(tensors, x, topk_weights, topk_ids)
    # act and output are rounded to bf16 (2^-9 each), what is left is float32.
    assert (output.double() - expected).norm() / expected.norm() < 2.0**-8


# ---- files and ranks -------------------------------------------------------------------------------------------------


def test_one_file_many_files_and_an_index(tmp_path: Path) -> None:
    tensors = written(modelopt_nvfp4)
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for folder in ("one", "many", "indexed"):
        (tmp_path / folder).mkdir()
    save_file(tensors, tmp_path / "one/model.safetensors")
    for folder in ("many", "indexed"):
        for file, part in halves.items():
            save_file({name: tensors[name] for name in part}, tmp_path / folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (tmp_path / "indexed/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    results = [load_experts(tmp_path / name, PREFIX) for name in ("one", "one/model.safetensors", "many", "indexed")]
    for result in results[1:]:
        assert result.keys() == results[0].keys()
        for name, value in result.items():
            if isinstance(value, Tensor):
                assert torch.equal(value.view(torch.uint8), results[0][name].view(torch.uint8)), name


@pytest.mark.parametrize("kind", ["ModelOpt NVFP4", "gpt-oss"])
def test_ranks_add_up(kind: str, tmp_path: Path) -> None:
    """Expert parallelism: each rank loads its experts, and the sum of the ranks' outputs is the layer's."""
    save_file(gpt_oss_tensors() if kind == "gpt-oss" else written(modelopt_nvfp4), tmp_path / "model.safetensors")
    checkpoint = checkpoints.Checkpoint(tmp_path)
    whole = load_experts(checkpoint, PREFIX)
    ranks = [load_experts(checkpoint, PREFIX, experts=chosen) for chosen in ([0, 2], [3, 1])]
    assert [rank["expert_map"].tolist() for rank in ranks] == [[0, -1, 1, -1], [-1, 1, -1, 0]]
    assert torch.equal(ranks[1]["w13"][0], whole["w13"][3])
    x, topk_weights = torch.randn(6, H).bfloat16(), torch.rand(6, 2)
    topk_ids = torch.tensor([[0, 1], [2, 3], [1, 3], [0, 3], [2, 1], [0, 2]]).int()
    expected = moe.Experts(**whole)(x, topk_weights, topk_ids).float()
    total = sum(moe.Experts(**rank)(x, topk_weights, topk_ids).float() for rank in ranks)
    torch.testing.assert_close(total, expected, rtol=2.0**-6, atol=float(expected.abs().max()) * 2.0**-7)


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_errors(tmp_path: Path) -> None:
    good = written(modelopt_nvfp4)
    name = f"{PREFIX}.2.up_proj"
    changed = {
        "per-channel FP8": {
            f"{PREFIX}.{n}.{suffix}": tensor
            for n in projections()
            for suffix, tensor in {
                "weight": torch.zeros(I, H).to(torch.float8_e4m3fn),
                "weight_scale": torch.ones(I, 1),
            }.items()
        },
        "wrong packing dtype": good | {f"{name}.weight": good[f"{name}.weight"].to(torch.int32)},
        "another shape": good | {f"{name}.weight": torch.zeros(I, H, dtype=torch.uint8)},
        "scales of blocks of 32": good | {f"{name}.weight_scale": good[f"{name}.weight_scale"][:, ::2].contiguous()},
        "scales of another type": good | {f"{name}.weight_scale": good[f"{name}.weight_scale"].float()},
        "a zero global scale": good | {f"{name}.weight_scale_2": torch.tensor(0.0)},
        "a tensor nobody reads": good | {f"{name}.weight_zero_point": torch.zeros(I)},
        "a bias of one expert": good | {f"{name}.bias": torch.zeros(I)},
        "biases of another type": good | {f"{PREFIX}.{n}.bias": torch.zeros(I).int() for n in projections()},
        "a missing tensor": {n: tensor for n, tensor in good.items() if n != f"{name}.weight_scale_2"},
        "a missing expert": {n: tensor for n, tensor in good.items() if not n.startswith(f"{PREFIX}.1.")},
        "fused experts": {f"{PREFIX}.gate_up_proj": torch.zeros(E, H, 2 * I)},
        "other names": {n.replace("gate_proj", "fc1"): tensor for n, tensor in good.items()},
    }
    lines = []

    def note(what: str, tensors: Tensors, prefix: str = PREFIX, **options: object) -> None:
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(RuntimeError) as caught:
            load_experts(tmp_path, prefix, **options)
        assert "\n" not in str(caught.value)
        line = str(caught.value).replace(PREFIX, "EXPERTS")
        lines.append(f"{what}\n{textwrap.fill(line, 110, initial_indent='  ', subsequent_indent='    ')}")

    for what, tensors in changed.items():
        note(what, tensors)
    note("another format, unasked", good, format="mxfp4")
    note("another prefix", good, prefix="model.layers.9.mlp.experts")
    note("experts that are not there", good, experts=[0, 4])
    note("a format nobody knows", good, act_format="fp7")
    note("activations that these weights do not take", good, act_format="int8")
    assert_expected_inline(
        "\n".join(lines),
        """\
per-channel FP8
  load_experts: EXPERTS.0.gate_proj: expected tensors of ModelOpt NVFP4, compressed-tensors NVFP4, compressed-
    tensors MXFP4, DeepSeek MXFP4, MXFP8, DeepSeek FP8, compressed-tensors FP8, compressed-tensors INT8,
    bfloat16, float16, got weight float8_e4m3fn [128, 256], weight_scale float32 [128, 1]
wrong packing dtype
  load_experts: EXPERTS.2.up_proj.weight: expected uint8 [128, 128] on cpu, got int32 [128, 128] on cpu
another shape
  load_experts: EXPERTS.2.up_proj.weight: expected uint8 [128, 128] on cpu, got uint8 [128, 256] on cpu
scales of blocks of 32
  load_experts: EXPERTS.2.up_proj.weight_scale: expected float8_e4m3fn [128, 16] on cpu, got float8_e4m3fn
    [128, 8] on cpu
scales of another type
  load_experts: EXPERTS.2.up_proj.weight_scale: expected float8_e4m3fn [128, 16] on cpu, got float32 [128, 16]
    on cpu
a zero global scale
  load_experts: EXPERTS.2.up_proj.weight_scale_2: expected a positive finite number, got 0.0
a tensor nobody reads
  load_experts: EXPERTS.2.up_proj.weight_zero_point: expected no such tensor in a ModelOpt NVFP4 checkpoint,
    got float32 [128]
a bias of one expert
  load_experts: EXPERTS.0.gate_proj.bias: expected a tensor, as other experts have it, got none
biases of another type
  load_experts: EXPERTS.0.gate_proj.bias: expected bfloat16, float16 or float32, got int32 [128] on cpu
a missing tensor
  load_experts: EXPERTS.2.up_proj.weight_scale_2: expected a tensor, as other experts have it, got none
a missing expert
  load_experts: EXPERTS: expected experts 0 to 3, got none of 1
fused experts
  load_experts: EXPERTS: expected experts 0, 1, 2, ... or gpt-oss's gate_up_proj_blocks, got gate_up_proj
other names
  load_experts: EXPERTS.0: expected gate_proj, up_proj, down_proj or w1, w3, w2, got down_proj, fc1, up_proj
another format, unasked
  load_experts: format: expected nvfp4, which the checkpoint holds (ModelOpt NVFP4); convert_weight changes
    it, got mxfp4
another prefix
  load_experts: prefix: expected the name in front of the experts' tensors, like EXPERTS, got
    model.layers.9.mlp.experts
experts that are not there
  load_experts: experts: expected different numbers from 0 to 3, got [0, 4]
a format nobody knows
  load_experts: act_format: expected nvfp4 or bf16 or fp16 or fp8_block or fp8_block_e8m0 for nvfp4 weights,
    got fp7
activations that these weights do not take
  load_experts: act_format: expected nvfp4 or bf16 or fp16 or fp8_block or fp8_block_e8m0 for nvfp4 weights,
    got int8""",
    )


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="^Checkpoint: path: expected a .safetensors file or a directory with some"):
        load_experts(tmp_path, PREFIX)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {f"{PREFIX}.0.w1.weight": "x"}}))
    with pytest.raises(RuntimeError, match="^Checkpoint: path: expected the file x, which the index names, got none"):
        load_experts(tmp_path, PREFIX)


def test_weights_alone_that_are_quantised_meet_bf16_activations(tmp_path: Path) -> None:
    for writer, input_scale in ((compressed_nvfp4, "input_global_scale"), (modelopt_nvfp4, "input_scale")):
        tensors = {name: tensor for name, tensor in written(writer).items() if not name.endswith(input_scale)}
        save_file(tensors, tmp_path / "model.safetensors")
        assert load_experts(tmp_path, PREFIX)["act_format"] == "bf16"
        assert load_experts(tmp_path, PREFIX, act_format="nvfp4")["act_format"] == "nvfp4"


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(RuntimeError) as caught:
        load_experts(path, PREFIX, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "DIR").replace(PREFIX, "EXPERTS")


def test_gpt_oss_tensors_have_as_many_experts(tmp_path: Path) -> None:
    for name, tensor in gpt_oss_tensors().items():
        save_file(gpt_oss_tensors() | {name: tensor[:-1].contiguous()}, tmp_path / "model.safetensors")
        assert "expected [" in refusal(tmp_path)
    lines = []
    for name, change in (
        (f"{PREFIX}.down_proj_scales", lambda t: t.unsqueeze(-1)),
        (f"{PREFIX}.gate_up_proj_blocks", lambda t: t.flatten(2)),
        (f"{PREFIX}.gate_up_proj_bias", lambda t: t[0].contiguous()),
    ):
        save_file(gpt_oss_tensors() | {name: change(gpt_oss_tensors()[name])}, tmp_path / "model.safetensors")
        lines.append(refusal(tmp_path))
    assert_expected_inline(
        "\n".join(lines),
        """\
load_experts: EXPERTS.down_proj_scales: expected [4, rows, K / 32], got [4, 256, 4, 1]
load_experts: EXPERTS.gate_up_proj_blocks: expected [4, rows, K / 32, 16], got [4, 256, 128]
load_experts: EXPERTS.gate_up_proj_bias: expected [4, rows], got [256]""",
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    good, path = written(modelopt_nvfp4), tmp_path / "model.safetensors"
    index = tmp_path / "model.safetensors.index.json"
    lines = []
    save_file(good, path)
    save_file(dict(list(good.items())[:1]), tmp_path / "model2.safetensors")
    lines.append(refusal(tmp_path))
    (tmp_path / "model2.safetensors").unlink()
    for text in ("", "[]", "{}"):
        index.write_text(text)
        lines.append(refusal(tmp_path))
    index.write_text(json.dumps({"weight_map": {name: path.name for name in (*good, f"{PREFIX}.0.gate_proj.bias")}}))
    lines.append(refusal(tmp_path))
    index.unlink()
    path.write_bytes(path.read_bytes()[:-8])
    lines.append(refusal(tmp_path))
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    lines.append(refusal(tmp_path))
    assert_expected_inline(
        "\n".join(lines),
        """\
Checkpoint: EXPERTS.0.gate_proj.weight: expected a tensor in one file, got model.safetensors and model2.safetensors
Checkpoint: DIR/model.safetensors.index.json: expected JSON with a weight_map, got JSONDecodeError: Expecting value: line 1 column 1 (char 0)
Checkpoint: DIR/model.safetensors.index.json: expected JSON with a weight_map, got TypeError: list indices must be integers or slices, not str
Checkpoint: DIR/model.safetensors.index.json: expected JSON with a weight_map, got KeyError: 'weight_map'
Checkpoint: model.safetensors: EXPERTS.0.gate_proj.bias: expected a tensor, which the index names, got File does not contain tensor EXPERTS.0.gate_proj.bias
Checkpoint: DIR/model.safetensors: expected a complete safetensors file, got Error while deserializing header: incomplete metadata, file not fully covered
Checkpoint: DIR/model.safetensors: expected a complete safetensors file, got Error while deserializing header: header too large""",  # noqa: E501
    )


def test_an_index_stays_in_its_directory(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    save_file(written(modelopt_nvfp4), tmp_path / "model.safetensors")
    for file in ("../model.safetensors", "a/../../model.safetensors", str(tmp_path / "model.safetensors")):
        weight_map = dict.fromkeys(written(modelopt_nvfp4), file)
        (tmp_path / "inner/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        got = refusal(tmp_path / "inner").replace(str(tmp_path), "..")
        file = file.replace(str(tmp_path), "..")
        assert got == f"Checkpoint: DIR/model.safetensors.index.json: expected files of its directory, got {file}"


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    save_file(written(bfloat16), tmp_path / "model.safetensors")
    checkpoint = checkpoints.Checkpoint(tmp_path)
    for read in (checkpoint.read, checkpoint.shape, lambda name: checkpoint.read(name, 0)):
        with pytest.raises(RuntimeError, match=f"^Checkpoint: name: expected a tensor of {tmp_path}, got nope$"):
            read("nope")


def test_the_dot_after_the_prefix(tmp_path: Path) -> None:
    save_file(written(bfloat16), tmp_path / "model.safetensors")
    expected, dotted = (load_experts(tmp_path, prefix)["w13"] for prefix in (PREFIX, f"{PREFIX}."))
    assert torch.equal(dotted, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "bfloat16"])
def test_scales_are_finite(kind: str, value: float, tmp_path: Path) -> None:
    tensors = written(WRITERS[kind][0])
    suffixes = ("weight_scale", "weight_scale_inv", "scale")
    [name] = [f"{PREFIX}.2.down_proj.{s}" for s in suffixes if f"{PREFIX}.2.down_proj.{s}" in tensors]
    if tensors[name].element_size() == 1:  # E8M0's and E4M3's only NaN but for its sign; they have no infinity
        value = float("nan")
        tensors[name].view(torch.uint8)[-1, -1] = 0x7F if tensors[name].dtype == torch.float8_e4m3fn else 0xFF
    else:
        tensors[name][-1, -1] = value
    save_file(tensors, tmp_path / "model.safetensors")
    shown = name.replace(PREFIX, "EXPERTS")
    assert refusal(tmp_path) == f"load_experts: {shown}: expected finite numbers, got {value}"


def test_scales_of_gpt_oss_are_finite(tmp_path: Path) -> None:
    tensors = gpt_oss_tensors()
    tensors[f"{PREFIX}.down_proj_scales"][1, -1, -1] = 0xFF
    save_file(tensors, tmp_path / "model.safetensors")
    assert refusal(tmp_path) == "load_experts: EXPERTS.down_proj_scales: expected finite numbers, got nan"


def test_experts_are_whole_numbers(tmp_path: Path) -> None:
    save_file(written(modelopt_nvfp4), tmp_path / "model.safetensors")
    chosen = load_experts(tmp_path, PREFIX, experts=torch.tensor([2, 1]))
    assert chosen["expert_map"].tolist() == [-1, 1, 0, -1]
    assert refusal(tmp_path, experts=[0.0]) == "load_experts: experts: expected a sequence of whole numbers, got [0.0]"


def test_global_scales_are_float32_whatever_torchs_default(tmp_path: Path) -> None:
    save_file(written(modelopt_nvfp4), tmp_path / "model.safetensors")
    expected = load_experts(tmp_path, PREFIX)
    torch.set_default_dtype(torch.bfloat16)
    try:
        experts = load_experts(tmp_path, PREFIX)
    finally:
        torch.set_default_dtype(torch.float32)
    assert experts.keys() == expected.keys()
    assert experts["w13_global_scale"].dtype == torch.float32
    assert torch.equal(experts["w13_global_scale"], expected["w13_global_scale"])


def test_an_index_that_names_no_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": ["a"]}))
    with pytest.raises(RuntimeError, match="expected JSON with a weight_map, got AttributeError: "):
        load_experts(tmp_path, PREFIX)
