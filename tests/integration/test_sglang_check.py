"""`python -m torch_moe_ops.integration.sglang check`: what it reads of a model's configuration, and what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from torch_moe_ops.integration.sglang import check, support
from torch_moe_ops.integration.sglang.__main__ import main as adapter_main

QWEN = {
    "hidden_size": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "intermediate_size": 999,
    "num_hidden_layers": 4,
    "torch_dtype": "bfloat16",
}
FP8_CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def mixed_precision(*layers: tuple[str, str]) -> dict:
    quantised = {f"model.layers.0.{name}": {"quant_algo": algorithm} for name, algorithm in layers}
    return {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": quantised}}


def test_check_reads_the_experts_of_a_rank() -> None:
    assert check.read_config(QWEN, tp=4, ep=2) == check.ExpertsOfRank("bf16", 256, 128, 4, 2)
    assert check.read_config(QWEN | {"text_config": None}) == check.ExpertsOfRank("bf16", 256, 256, 8, 2)
    per_tensor = {"quantization_config": {"quant_method": "fp8"}}  # of any size: its scales are repeated for each block
    assert check.read_config(QWEN | per_tensor, tp=4) == check.ExpertsOfRank("fp8_block", 256, 64, 8, 2)
    mixtral = {"architectures": ["MixtralForCausalLM"]}
    assert check.read_config(QWEN | mixtral) == check.ExpertsOfRank("bf16", 256, 256, 8, 2)
    assert check.read_config(QWEN | mixtral | FP8_CONFIG) == check.ExpertsOfRank("fp8_block", 256, 256, 8, 2)
    assert check.read_config({"text_config": QWEN | FP8_CONFIG}) == check.ExpertsOfRank("fp8_block", 256, 256, 8, 2)


@pytest.mark.parametrize(
    "config, ranks, sentence",
    [
        ({**QWEN, "num_experts": None}, {}, "no num_experts or n_routed_experts"),
        (QWEN, {"tp": 2, "ep": 3}, "--tp 2 --ep 3 does not divide"),
        (QWEN | {"hidden_size": "256"}, {}, "config.json: hidden_size: expected a positive whole number, got '256'"),
        (QWEN | {"num_experts": True}, {}, "config.json: num_experts: expected a positive whole number, got True"),
        ([QWEN], {}, "config.json: expected an object, got list"),
        (QWEN | FP8_CONFIG, {"tp": 4}, "128x128 blocks do not fit 64 columns on a rank: use --ep 4"),
        (QWEN | {"quantization_config": {"quant_method": "gptq"}}, {}, "got quant_method gptq"),
        (QWEN | {"torch_dtype": "float32"}, {}, "got float32"),
        (
            {"architectures": ["AfmoeForCausalLM"]},
            {},
            "got AfmoeForCausalLM, whose code is made for SGLang's own experts",
        ),
        (
            QWEN | {"quantization_config": mixed_precision(("mlp.experts.0.w1", "FP8_PB_WO"))},
            {"tp": 4},
            "128x128 blocks do not fit 64 columns on a rank",
        ),
        (
            {"architectures": ["MixtralForCausalLM"], "quantization_config": {"quant_method": "w8a8_int8"}},
            {},
            "got QuantMixtralForCausalLM, whose code is made for SGLang's own experts",
        ),
        (
            {"architectures": ["MixtralForCausalLM"], "quantization_config": {"quantization": {"quant_algo": "FP8"}}},
            {},
            "got QuantMixtralForCausalLM, ",
        ),
        (
            {"architectures": ["DbrxForCausalLM"], "text_config": {"architectures": ["Text"]}},
            {},
            "got DbrxForCausalLM, ",
        ),
    ],
)
def test_check_says_why_not(config, ranks, sentence) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check.read_config(config, **ranks)


def weights_of(bits: int, type: str, strategy: str, **more: object) -> dict:
    return {"num_bits": bits, "type": type, "strategy": strategy} | more


@pytest.mark.parametrize(
    "quantisation, format",
    [
        ({"quant_method": "fp8"}, "fp8_block"),
        ({"quant_method": "fp8", "routed_experts_quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "fp8", "moe_quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "mxfp8"}, "mxfp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "w8a8_int8"}, "int8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}, "nvfp4"),  # hf_quant_config.json
        ((weights_of(8, "float", "block", block_structure=[128, 128]), weights_of(8, "float", "group")), "fp8_block"),
        ((weights_of(8, "float", "tensor"), weights_of(8, "float", "tensor")), "fp8_block"),
        ((weights_of(8, "int", "channel"), weights_of(8, "int", "token", dynamic=True)), "int8"),
        ((weights_of(4, "float", "tensor_group"), weights_of(4, "float", "tensor_group")), "nvfp4"),
        ((weights_of(4, "float", "group", group_size=32), None), "mxfp4"),
        ((weights_of(4, "int", "group", group_size=32), None), None),
        ((weights_of(8, "float", "channel"), weights_of(8, "float", "token", dynamic=True)), None),
        ((weights_of(4, "float", "tensor_group"), None), "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8_block"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, None),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, None),
        (mixed_precision(("mlp.experts.0.w1", "NVFP4"), ("self_attn.q_proj", "FP8")), "nvfp4"),
        (mixed_precision(("mlp.experts.0.w1", "NVFP4"), ("mlp.experts.1.w1", "FP8")), None),
        (mixed_precision(("mlp.experts.0.w1", "MXFP8"), ("self_attn.q_proj", "FP8")), "mxfp8"),
        (mixed_precision(("mlp.experts.0.w1", "FP8_PB_WO")), "fp8_block"),
        (mixed_precision(("mlp.experts.0.w1", "FP8_BLOCK_SCALES")), "fp8_block"),
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, None),
    ],
)
def test_check_reads_the_format(quantisation, format) -> None:
    if isinstance(quantisation, tuple):
        group = dict(zip(("weights", "input_activations"), quantisation, strict=True))
        quantisation = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    if format is None:
        with pytest.raises(ValueError, match="^expected a model with experts in .* got "):
            check.read_format({"quantization_config": quantisation})
    else:
        assert check.read_format({"quantization_config": quantisation}) == format


def test_check_reads_which_layers_have_experts() -> None:
    assert check.moe_layers(QWEN | {"first_k_dense_replace": 1}) == [1, 2, 3]
    assert check.moe_layers({"text_config": QWEN | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}}) == [1]
    assert check.moe_layers(QWEN | {"interleave_moe_layer_step": 2, "first_k_dense_replace": None}) == [1, 3]


def test_check_reads_the_names_of_step() -> None:
    names = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_top_k"}
    config = {names.get(name, name): value for name, value in QWEN.items()}
    assert check.read_config(config) == check.read_config(QWEN)


def test_check_knows_the_dtype_of_the_hidden_states() -> None:
    experts = check.read_config(QWEN | {"quantization_config": {"quant_method": "mxfp4"}})
    assert "fp16 activations" in str(check.choose(experts, "fp16", "cpu")[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": "fp8"},
        {"quantization_config": {"quant_method": 5}},
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": [1]}},
        {"num_hidden_layers": "2"},
        {"text_config": "x"},
    ],
    ids=str,
)
def test_what_no_configuration_holds_is_one_line(changes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN | changes))
    assert adapter_main(["check", str(tmp_path), "--device", "cpu"]) == 1
    assert "\nnot supported: config.json: " in capsys.readouterr().out


def test_check_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    assert adapter_main(["check", str(tmp_path), "--device", "cpu", "--port", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("not looked at: --port 1\n") and out.endswith("\nsupported\n")
    assert "4 layers with experts: 0, 1, 2, 3\n" in out
    assert adapter_main(["check", str(tmp_path), "--device", "cpu", "--moe-a2a-backend", "deepep"]) == 1
    refusal = f"not supported: expected {support.supported('cpu')}, got --moe-a2a-backend deepep\n"
    assert refusal in capsys.readouterr().out
    absent = tmp_path / "absent"
    assert adapter_main(["check", str(absent)]) == 2
    out, err = capsys.readouterr()
    assert "not supported" not in out
    assert err == f"check: model_dir: expected a directory with a config.json, got {absent}\n"
