"""What test_errors.py refuses on a CPU, on a GPU: the same lines from the ops and from every backend called by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import torch_moe_ops as moe
from torch_moe_ops.backends import GEMM_OPS, OPS

test_errors = pytest.importorskip("test_errors", reason="needs expecttest")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_errors, "DEVICE", "cuda")


@pytest.mark.parametrize(
    "test",
    [
        test_errors.test_topk,
        test_errors.test_sort_slots,
        test_errors.test_quantize_and_permute,
        test_errors.test_grouped_gemm,
        test_errors.test_act_mul_and_finalize,
        test_errors.test_fused_moe,
        test_errors.test_pack_scale,
        test_errors.test_unpack_scale,
        test_errors.test_unpack_scale_of_words_that_tma_cannot_read,
        test_errors.test_tensors_that_were_left_out,
    ],
    ids=lambda test: test.__name__.removeprefix("test_"),
)
def test_refusals(test: Callable) -> None:
    test()


@pytest.mark.parametrize("op", OPS)
def test_what_is_not_refused_runs_in_inference_mode(op: str) -> None:
    call = test_errors.on_device(test_errors.valid(op))
    facts = {"format": call.options["format"]} if op in GEMM_OPS else {}
    for verdict in moe.explain(op, device="cuda", **facts).verdicts:
        if verdict.reason is None:
            with torch.inference_mode():
                call(getattr(getattr(torch.ops.moe, op), verdict.backend))
            torch.cuda.synchronize()
