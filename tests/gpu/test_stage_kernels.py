"""The hand-written CUDA stage kernels (`moe::X.cuda`) against `moe::X.reference` on the same GPU.

Bit for bit wherever docs/ops.md fixes the bits: maps, quantised values and scales, copies, the ordered sum of finalize.
Only softmax, sigmoid, erf and tanh may differ, and there the tolerance is derived next to the comparison.
"""

import math

import pytest
import torch
from torch import Tensor

import torch_moe_ops  # noqa: F401  (registers torch.ops.moe)
from torch_moe_ops.activations import ACTIVATIONS, LAYOUTS
from torch_moe_ops.formats import FORMATS
from torch_moe_ops.meta_kernels._sizes import max_rows
from torch_moe_ops.reference.quantize import global_scale_of_rows

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        not torch._C._dispatch_has_kernel_for_dispatch_key("moe::topk.cuda", "CUDA"), reason="needs the CUDA library"
    ),
]

ops = torch.ops.moe
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCALED = [name for name, format in FORMATS.items() if format.has_scale]
# Token counts: none, one, one past a warp, one past every block size, and enough for several chunks a thread.
TOKENS = [0, 1, 33, 4097]


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, device="cuda", generator=generator(seed))


def hard_numbers(rows: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of very different size with zeros of both signs, NaN, both infinities, an all-zero row and exact ties."""
    x = torch.randn((rows, k), device="cuda", generator=generator(seed))
    x *= torch.exp2(6 * torch.randn((rows, 1), device="cuda", generator=generator(seed + 1)))
    dice = rand(rows, k, seed=seed + 2)
    for i, value in enumerate((0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf)):
        x[(dice > i * 0.002) & (dice < i * 0.002 + 0.001)] = value
    x[rows // 2 : rows // 2 + 1] = 0.0
    x[rows // 3 : rows // 3 + 1] *= 1e-30
    x[:1] = torch.randint(-48, 49, (k,), device="cuda", generator=generator(seed + 3)) / 8
    return x.to(dtype)


def bits(x: Tensor) -> Tensor:
    """Comparable bits: NaNs are one number, whatever their sign and payload."""
    if x.dtype in (torch.int8, torch.uint8, torch.int32):
        return x
    if x.dtype == torch.float8_e8m0fnu:
        return x.contiguous().view(torch.uint8)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    return torch.where(x.float().isnan(), 0x7F, x.contiguous().view(integer))


def assert_same_bits(got: Tensor, expected: Tensor, rows: slice | Tensor = slice(None)) -> None:
    assert (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), expected.dtype)
    torch.testing.assert_close(bits(got)[rows], bits(expected)[rows], rtol=0, atol=0)


# ---- topk ------------------------------------------------------------------------------------------------------------

ROUTERS = [  # num_experts, num_groups, topk_groups, top_k
    (1, 1, 1, 1),
    (8, 1, 1, 8),
    (60, 1, 1, 4),
    (160, 8, 3, 6),
    (256, 8, 4, 8),
    (384, 1, 1, 6),
    (512, 16, 3, 32),
    (1024, 32, 5, 10),
]


def undecided_groups(logits: Tensor, scoring: str, num_groups: int, topk_groups: int) -> Tensor:
    """Tokens whose last group in and first group out differ by no more than float32's roundings, bool [T]."""
    if num_groups == topk_groups:
        return torch.zeros(len(logits), dtype=torch.bool, device="cuda")
    scores = logits.double().sigmoid() if scoring == "sigmoid" else logits.double().softmax(-1)
    groups = scores.unflatten(-1, (num_groups, -1)).topk(2, dim=-1).values.sum(-1).sort(dim=-1, descending=True).values
    margin = (groups[:, topk_groups - 1] - groups[:, topk_groups]) / groups[:, topk_groups]
    return (margin > 0) & (margin < 5e-7)  # 0: equal numbers, a tie for every implementation


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_experts, num_groups, topk_groups, top_k", ROUTERS)
def test_topk(num_experts, num_groups, topk_groups, top_k, dtype, scoring):
    options = {"scoring": scoring, "num_groups": num_groups, "topk_groups": topk_groups, "routed_scaling_factor": 2.5}
    for tokens in TOKENS:
        # Multiples of 1/64: choices of two experts are equal or differ by far more than the roundings.
        order = rand(tokens, num_experts, seed=tokens).argsort(-1)
        logits = ((order.float() - num_experts / 2) / 64).to(dtype)
        if tokens > 8:
            logits[1] = (logits[1] * 2).round() / 2  # many exact ties
            logits[2][rand(num_experts) < 0.3] = math.nan
            logits[3], logits[4, 0], logits[5] = math.nan, math.inf, -math.inf
        for renormalize in (True, False):
            weights, ids = ops.topk.cuda(logits, top_k, renormalize=renormalize, **options)
            expected_weights, expected_ids = ops.topk.reference(logits, top_k, renormalize=renormalize, **options)
            clear = ~undecided_groups(logits, scoring, num_groups, topk_groups)
            assert clear.float().mean() > 0.5 or tokens == 0
            assert torch.equal(ids[clear], expected_ids[clear])
            # exp, the sum of Eg terms in another order and two divisions: at most a few dozen roundings of 2^-24.
            torch.testing.assert_close(weights[clear], expected_weights[clear], rtol=4e-6, atol=1e-30)


def test_topk_correction_bias_only_selects():
    logits, bias = rand(200, 256).bfloat16(), torch.arange(256, device="cuda").flip(0).float()
    for scoring in ("softmax", "sigmoid"):
        options = {"scoring": scoring, "correction_bias": bias, "num_groups": 8, "topk_groups": 4}
        weights, ids = ops.topk.cuda(logits, 8, **options)
        expected_weights, expected_ids = ops.topk.reference(logits, 8, **options)
        assert torch.equal(ids, expected_ids)
        assert torch.equal(ids, torch.arange(8, device="cuda").int().expand(200, 8))
        torch.testing.assert_close(weights, expected_weights, rtol=4e-6, atol=0)


# ---- sort_slots ------------------------------------------------------------------------------------------------------


def routing(kind: str, tokens: int, top_k: int, num_ids: int) -> Tensor:
    ids = torch.randint(0, num_ids, (tokens, top_k), device="cuda", generator=generator(tokens)).int()
    if kind == "absent":
        ids.fill_(-1)
    if kind == "one hot expert":
        ids.fill_(num_ids - 1)
    if kind == "out of range":
        dice = rand(tokens, top_k, seed=1)
        for i, value in enumerate((-1, num_ids, -2, 2**31 - 1, -(2**31))):
            ids[(dice > i * 0.05) & (dice < i * 0.05 + 0.04)] = value
    return ids


@pytest.mark.parametrize("kind", ["random", "absent", "one hot expert", "out of range"])
@pytest.mark.parametrize("num_experts", [1, 8, 256, 384, 1024])
@pytest.mark.parametrize("alignment", [1, 16, 128])
def test_sort_slots(kind, num_experts, alignment):
    for tokens, top_k in [(0, 8), (1, 8), (33, 1), (33, 8), (1024, 8), (1025, 8), (4097, 6), (65536, 1)]:
        ids = routing(kind, tokens, top_k, num_experts)
        got = ops.sort_slots.cuda(ids, num_experts, alignment=alignment)
        for result, expected in zip(got, ops.sort_slots.reference(ids, num_experts, alignment=alignment), strict=True):
            assert_same_bits(result, expected)


@pytest.mark.parametrize("tokens", [1, 33, 4097])
def test_sort_slots_with_a_map_of_no_experts(tokens):
    ids = routing("out of range", tokens, 8, 48)
    expert_map = torch.empty(0, dtype=torch.int32, device="cuda")
    expected = ops.sort_slots.reference(ids, 48, expert_map=expert_map)
    for result, rows in zip(ops.sort_slots.cuda(ids, 48, expert_map=expert_map), expected, strict=True):
        assert_same_bits(result, rows)
    assert (expected[1] < 0).all()


@pytest.mark.parametrize("kind", ["random", "absent", "one hot expert", "out of range"])
def test_sort_slots_with_expert_map(kind):
    num_ids, num_experts = 384, 48
    expert_map = torch.full((num_ids,), -1, device="cuda", dtype=torch.int32)
    expert_map[torch.randperm(num_ids, device="cuda", generator=generator(0))[:num_experts]] = torch.arange(
        num_experts, device="cuda", dtype=torch.int32
    )
    if kind == "out of range":
        expert_map[:3] = torch.tensor([num_experts, -2, 2**31 - 1], device="cuda")
    for tokens in TOKENS:
        ids = routing(kind, tokens, 6, num_ids)
        options = {"expert_map": expert_map, "alignment": 128}
        got = ops.sort_slots.cuda(ids, num_experts, **options)
        for result, expected in zip(got, ops.sort_slots.reference(ids, num_experts, **options), strict=True):
            assert_same_bits(result, expected)


def test_sort_slots_of_two_hundred_thousand_tokens():
    ids = routing("out of range", 200_000, 8, 256)
    for result, expected in zip(
        ops.sort_slots.cuda(ids, 256, alignment=16), ops.sort_slots.reference(ids, 256, alignment=16), strict=True
    ):
        assert_same_bits(result, expected)


# ---- quantisers ------------------------------------------------------------------------------------------------------

# Widths: whole blocks, tensor-parallel shards, ragged last blocks, rows that 16-byte loads cannot take.
WIDTHS = [8, 50, 192, 200, 352, 1408, 7168]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize(format, dtype):
    for rows in TOKENS:
        for k in WIDTHS if rows < 4097 else (352, 7168):
            x = hard_numbers(rows, k, dtype, seed=rows + k)
            for global_scale in (None, torch.tensor([0.0123], device="cuda")) if format == "nvfp4" else (None,):
                got = ops.quantize.cuda(x, format, global_scale=global_scale)
                expected = ops.quantize.reference(x, format, global_scale=global_scale)
                assert_same_bits(got[0], expected[0])
                assert_same_bits(got[1], expected[1])


@pytest.mark.parametrize("format", SCALED)
def test_quantize_reads_rows_that_start_anywhere(format):
    storage = hard_numbers(1, 33 * 352 + 1, torch.bfloat16).flatten()
    x = storage[1:].view(33, 352)  # contiguous, but 2 bytes past a 16-byte boundary
    for got, expected in zip(ops.quantize.cuda(x, format), ops.quantize.reference(x, format), strict=True):
        assert_same_bits(got, expected)


def hidden_dtypes(format: str) -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16] if FORMATS[format].has_scale else [FORMATS[format].dtype]


PERMUTE_SHAPES = [(0, 2, 128), (1, 8, 7168), (33, 8, 352), (33, 2, 200), (5, 40, 192), (4097, 3, 2048)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("weighted", [False, True])
def test_permute(format, weighted):
    for dtype in hidden_dtypes(format):
        for tokens, top_k, hidden in PERMUTE_SHAPES:
            x, slots = hard_numbers(tokens, hidden, dtype, seed=tokens), tokens * top_k
            num_rows = slots + 5
            slot_to_row = torch.randperm(num_rows, device="cuda", generator=generator(slots))[:slots].int()
            dice = rand(slots, seed=slots)
            slot_to_row[dice < 0.2], slot_to_row[dice > 0.95] = -1, -2
            used = slot_to_row[slot_to_row >= 0].long()
            thirds = [0, num_rows // 3, num_rows // 3, num_rows // 2, num_rows]
            options = {
                "format": format,
                "topk_weights": rand(tokens, top_k) if weighted else None,
                "expert_offsets": torch.tensor(thirds, device="cuda", dtype=torch.int32),
            }
            for count in (0, 1, 4) if format == "nvfp4" else (0,):
                options["global_scale"] = rand(count) + 0.01 if count else None
                arguments = (x, slot_to_row.view(tokens, top_k), num_rows)
                got, expected = ops.permute.cuda(*arguments, **options), ops.permute.reference(*arguments, **options)
                assert_same_bits(got[0], expected[0], used)
                assert_same_bits(got[1], expected[1], used)


# ---- act_mul ---------------------------------------------------------------------------------------------------------

# y = f(gate) * up in float32. expf and division err by less than 4 ulp (2^-24 each) together; erf and tanh lose the
# relative accuracy of 1 + erf(x) in the negative tail, where |f| < |x| * 2^-22 bounds the absolute error instead.
RELATIVE, ABSOLUTE = 16 * 2.0**-24, 2.0**-20


def act_mul_case(name: str, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict]:
    """gate_up with |x| <= 6, every third row unused and poisoned, and an activation's options."""
    columns = 2 * width if ACTIVATIONS[name].gated else width
    gate_up = (rand(rows, columns, seed=rows) * 12 - 6).to(dtype)
    used = rows - rows // 3
    gate_up[used:] = math.nan
    options = {"limit": 2.5} if name == "swiglustep" else {}
    return gate_up, torch.tensor([0, 0, used // 2, used], device="cuda", dtype=torch.int32), options


def largest_error(format: str, quantised: tuple, y: Tensor, global_scale: Tensor | None) -> float:
    """The largest error of a quantisation of y [rows, k], relative to the largest value of its row."""
    record, block = FORMATS[format], FORMATS[format].act_block
    values, scale = (t[: len(y)].unsqueeze(1) for t in quantised)  # a row is a matrix, with a global scale of its own
    global_scale = None if global_scale is None else global_scale[: len(y)]
    error = record.dequantize(values, scale, block, global_scale).squeeze(1) - y
    return (error.abs() / y.abs().amax(-1, keepdim=True)).max().item()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_act_mul_values(name, layout):
    if layout != "gate_up" and not ACTIVATIONS[name].gated:
        pytest.skip("refused")
    for rows, width in [(0, 64), (1, 352), (33, 100), (4097, 1408)]:
        gate_up, expert_offsets, options = act_mul_case(name, rows, width, torch.float32)
        arguments, used = (gate_up, expert_offsets), rows - rows // 3
        options |= {"activation": name, "layout": layout, "format": "fp16"}
        got = ops.act_mul.cuda(*arguments, **options)[0][:used].float()
        expected = ops.act_mul.reference(*arguments, **options)[0][:used].float()
        # One float16 rounding (2^-11 either way) on top of float32's.
        torch.testing.assert_close(got, expected, rtol=2.0**-10 + RELATIVE, atol=ABSOLUTE)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_act_mul_quantises_exactly(format, dtype):
    """relu has no transcendental function: values and scales are exact, and so is the use of each expert's scale."""
    if not FORMATS[format].has_scale and dtype not in (torch.float32, FORMATS[format].dtype):
        pytest.skip("not a conversion that act_mul makes")
    for rows, width in [(0, 64), (1, 7168), (33, 100), (33, 352), (4097, 704)]:
        for layout in LAYOUTS:
            gate_up, expert_offsets, _ = act_mul_case("relu", rows, width, dtype)
            used = rows - rows // 3
            options = {"activation": "relu", "layout": layout, "format": format}
            if format == "nvfp4" and rows:
                options["global_scale"] = torch.tensor([0.1, 0.02, 0.5], device="cuda")
            got = ops.act_mul.cuda(gate_up, expert_offsets, **options)
            expected = ops.act_mul.reference(gate_up, expert_offsets, **options)
            assert_same_bits(got[0], expected[0], slice(used))
            assert_same_bits(got[1], expected[1], slice(used))


@pytest.mark.parametrize("format", FORMATS)
def test_act_mul_silu(format):
    dtype = hidden_dtypes(format)[0]
    for rows, width in [(1, 352), (33, 704), (4097, 1536)]:
        gate_up, expert_offsets, _ = act_mul_case("silu", rows, width, dtype)
        used = rows - rows // 3
        options = {"alpha": 1.702, "beta": 1.0, "limit": 3.0, "layout": "interleaved", "format": format}
        global_scale = torch.tensor([0.1, 0.02, 0.5], device="cuda") if format == "nvfp4" else None
        got = ops.act_mul.cuda(gate_up, expert_offsets, global_scale=global_scale, **options)
        expected = ops.act_mul.reference(gate_up, expert_offsets, global_scale=global_scale, **options)
        gate, up = gate_up[..., 0::2].float().clamp(max=3.0), gate_up[..., 1::2].float().clamp(-3.0, 3.0)
        y = ((up + 1.0) * gate * torch.sigmoid(1.702 * gate))[:used]
        row_scale = global_scale_of_rows(global_scale, expert_offsets, rows)
        errors = [largest_error(format, result, y, row_scale) for result in (got, expected)]
        # y may fall on the other side of a boundary between codes, which costs its own error and no more.
        assert errors[0] <= errors[1] + RELATIVE
        assert (bits(got[0])[:used] != bits(expected[0])[:used]).float().mean() < 0.01


# ---- finalize --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_finalize(dtype, weighted):
    for tokens, top_k, hidden in [(0, 8, 64), (1, 1, 7168), (33, 8, 352), (33, 9, 50), (5, 40, 200), (4097, 6, 2048)]:
        slots = tokens * top_k
        expert_out = torch.randn((slots + 3, hidden), device="cuda", generator=generator(slots)).to(dtype)
        slot_to_row = torch.randperm(slots + 3, device="cuda", generator=generator(slots))[:slots].int()
        slot_to_row[rand(slots, seed=1) < 0.2] = -1
        slot_to_row = slot_to_row.view(tokens, top_k).contiguous()
        if tokens > 2:
            slot_to_row[1], slot_to_row[2, -1] = -1, -2
        unused = torch.ones(slots + 3, dtype=torch.bool, device="cuda")
        unused[slot_to_row[slot_to_row >= 0].long()] = False
        expert_out[unused] = math.nan
        weights = rand(tokens, top_k, seed=2).masked_fill(slot_to_row < 0, math.nan) if weighted else None
        options = {"topk_weights": weights, "routed_scaling_factor": 2.5}
        got = ops.finalize.cuda(expert_out, slot_to_row, **options)
        assert_same_bits(got, ops.finalize.reference(expert_out, slot_to_row, **options))
        if tokens > 2:
            assert got[2].isnan().all() and (got[1] == 0).all()


# ---- together --------------------------------------------------------------------------------------------------------


def test_stages_follow_the_routing_in_a_replayed_graph():
    """Kernels of one stream overlap their prologues (programmatic dependent launch): replays must still be exact."""
    tokens, experts, top_k, hidden = 64, 32, 4, 1024
    logits, x = rand(tokens, experts, seed=1), torch.randn(tokens, hidden, device="cuda").bfloat16()
    rows = max_rows(tokens * top_k, experts, 16)

    def pipeline() -> tuple[Tensor, ...]:
        weights, ids = ops.topk.cuda(logits, top_k)
        expert_offsets, slot_to_row, _ = ops.sort_slots.cuda(ids, experts, alignment=16)
        permuted, _ = ops.permute.cuda(x, slot_to_row, rows)
        act, _ = ops.act_mul.cuda(permuted, expert_offsets, activation="relu")
        return slot_to_row, act, ops.finalize.cuda(act, slot_to_row, topk_weights=weights)

    pipeline()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = pipeline()
    for seed in range(20):
        logits.copy_(rand(tokens, experts, seed=seed))
        x.copy_(torch.randn(tokens, hidden, device="cuda", generator=generator(seed)))
        graph.replay()
        slot_to_row, _, output = (result.clone() for result in results)
        expected_slot_to_row, _, expected_output = pipeline()
        assert torch.equal(slot_to_row, expected_slot_to_row)
        assert_same_bits(output, expected_output)


def test_rows_do_not_depend_on_the_batch():
    x = torch.randn(300, 2 * 704, device="cuda", generator=generator(5)).bfloat16()
    for rows in (1, 7, 33):
        offsets, all_offsets = (torch.tensor([0, n], device="cuda", dtype=torch.int32) for n in (rows, 300))
        few = ops.act_mul.cuda(x[:rows], offsets, format="fp8_block")
        many = ops.act_mul.cuda(x, all_offsets, format="fp8_block")
        assert torch.equal(bits(few[0]), bits(many[0])[:rows]) and torch.equal(few[1], many[1][:rows])


def test_kernels_check_their_arguments():
    """Behind Python's checks, which this passes by: what would be read out of bounds is refused by the kernels' own."""

    def kernel(op, *args, **options):
        return op.cuda.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **options)

    x, rows = torch.zeros(4, 64, device="cuda", dtype=torch.bfloat16), torch.zeros(4, 128, device="cuda")
    one, none = (torch.zeros(n, device="cuda", dtype=torch.int32) for n in (1, 0))
    words = torch.zeros(1, 1, device="cuda", dtype=torch.int32).expand(4, 2)
    atoms = torch.zeros(513, device="cuda").byte()[1:].view(1, 1, 32, 4, 4)  # at an odd address
    offsets = torch.tensor([0, 128], device="cuda").int()
    logits = torch.zeros(4, 64, device="cuda")
    for op, message in (
        (lambda: kernel(ops.quantize, x, "nvfp4", global_scale=torch.tensor(0.5)), "quantize: global_scale"),
        (lambda: kernel(ops.act_mul, rows, one), "act_mul: expert_offsets"),
        (lambda: kernel(ops.act_mul, rows, none), "act_mul: expert_offsets"),
        (lambda: kernel(ops.unpack_scale, words, "words", 4, 8, torch.uint8), "unpack_scale: packed"),
        (lambda: kernel(ops.unpack_scale, words.contiguous(), "words", 4, 8, torch.float32), "unpack_scale: dtype"),
        (lambda: kernel(ops.unpack_scale, atoms, "atom", 128, 4, torch.uint8), "unpack_scale: packed"),
        (lambda: kernel(ops.topk, logits, 2**32 + 1), "topk: top_k"),
        (lambda: kernel(ops.topk, logits, 1, num_groups=2**32 + 1), "topk: num_groups"),
        (lambda: kernel(ops.topk, logits, 1, num_groups=2, topk_groups=2**32 + 1), "topk: topk_groups"),
        (
            lambda: kernel(ops.unpack_scale, atoms.cpu(), "atom", 128, 4, torch.uint8, expert_offsets=offsets),
            "unpack_scale: packed",
        ),
    ):
        with pytest.raises(RuntimeError, match=rf"^{message}: expected [^\n]*, got [^\n]*$"):
            op()


def test_int8_scales_of_rows_without_columns():
    x, offsets = torch.empty((4, 0), dtype=torch.bfloat16, device="cuda"), torch.tensor([0, 4]).int().cuda()
    rows = torch.arange(4, device="cuda").int().view(4, 1)
    for op, args in ((ops.quantize, (x,)), (ops.permute, (x, rows, 4)), (ops.act_mul, (x, offsets))):
        dirty = torch.full((4096,), math.nan, device="cuda")
        del dirty  # the allocator hands the same memory out again
        assert torch.equal(op.cuda(*args, format="int8")[1], op.reference(*args, format="int8")[1])
