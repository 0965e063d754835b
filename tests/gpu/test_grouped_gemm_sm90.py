"""grouped_gemm.cutlass_sm90 with many wide tiles for each SM.

What one tile leaves behind in shared memory, or in a barrier, the next one finds.
"""

from __future__ import annotations

import pytest
import torch
from gpu_layers import DEVICE, why_not
from moe_cases import Call

from torch_moe_ops.formats import FORMATS

ops = torch.ops.moe
# Rows of an expert: narrow, half-wide and wide tiles, full, partly filled, and tall ones (up to 16 rows past 128).
HEIGHTS = (0, 1, 17, 40, 64, 65, 100, 113, 128, 129, 144, 145, 200, 256, 270, 288, 300)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("n, k", [(4096, 64), (4096, 128), (4096, 192), (4104, 256), (4160, 1024)])
@pytest.mark.parametrize("format", ["bf16", "fp16", "fp8_block"])
def test_many_wide_tiles(format: str, n: int, k: int, out_dtype: torch.dtype | None) -> None:
    """Small integers and power-of-two scales: sums are exact, so equality is asked for, of every one of many calls."""
    if reason := why_not("cutlass_sm90"):
        pytest.skip(reason)
    g, fmt, experts = torch.Generator(DEVICE).manual_seed(n + k), FORMATS[format], 96
    heights = torch.tensor(HEIGHTS, device=DEVICE)
    rows = heights[torch.randint(len(HEIGHTS), (experts,), generator=g, device=DEVICE)]
    offsets = torch.nn.functional.pad(rows.cumsum(0), (1, 0)).int()
    num_rows = int(offsets[-1])

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=g, device=DEVICE).float()

    options = {"format": format, "out_dtype": out_dtype}
    if fmt.has_scale:
        options["a_scale"] = integers(*fmt.act_scale_shape(num_rows, k)).exp2()
        options["b_scale"] = integers(experts, *fmt.weight_scale_shape(n, k, 1)).exp2()
    call = Call(integers(num_rows, k).to(fmt.dtype), integers(experts, n, k).to(fmt.dtype), offsets, **options)
    expected = call(ops.grouped_gemm.reference)
    outputs = [call(ops.grouped_gemm.cutlass_sm90) for _ in range(20)]
    different = [i for i, output in enumerate(outputs) if not torch.equal(output, expected)]
    assert not different
    for _ in range(200):  # one after the other, without a pause
        output = call(ops.grouped_gemm.cutlass_sm90)
    assert torch.equal(output, expected)
