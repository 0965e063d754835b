"""Host time of an eager fused_moe call: checks, choice of backend, allocation and kernel launches.

    us = median over batches of (time to issue a batch of calls / calls in the batch)

No call waits for the GPU: the batches are issued without synchronising, with a wait between them that is not timed.
"""

from __future__ import annotations

import statistics
import time

import torch

from ...experts import Experts
from .. import _layer
from .measure import Point, chosen_backend, facts_of, fused_moe_call, make_all_inputs

# A batch of few launches: the driver makes the host wait once about a thousand of them are pending.
BATCH_CALLS = 32
BATCHES = 25


def measure_host_call(
    case: _layer.Case, experts: Experts, num_tokens: int, backend: str | None = None, routing: str = "uniform"
) -> Point:
    call, inputs = fused_moe_call(experts, backend), make_all_inputs(case, experts, num_tokens, routing)[0]
    us = []
    for _ in range(1 + BATCHES):  # the first batch warms up
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(BATCH_CALLS):
            call(*inputs)
        us.append(1e6 * (time.perf_counter() - start) / BATCH_CALLS)
    torch.cuda.synchronize()
    return Point(
        **facts_of("host_call", case, experts, num_tokens, routing),
        backend=backend or chosen_backend(case, experts),
        us=statistics.median(us[1:]),
        us_min=min(us[1:]),
        ok=True,
    )
