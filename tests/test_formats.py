"""The quantisers, bit for bit, against a scalar reference in exact rational arithmetic.

The reference shares nothing with the package: the value tables come from the bit layouts of the published formats (OCP
MX v1.0 for e2m1, e4m3, e8m0), a value is rounded by searching the table with fractions, and float32 operations are
Python's float64 ones rounded once more (53 >= 2 * 24 + 2 bits, so that is one rounding for +, -, *, / of float32s).
"""

import bisect
import ctypes
import math
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torch_moe_ops
from torch_moe_ops import formats
from torch_moe_ops.formats import FORMATS

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
QUANTISED = ["int8", "fp8_block", "fp8_block_e8m0", "mxfp8", "mxfp4", "nvfp4"]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [math.ldexp(c & 7, -9) if c < 8 else math.ldexp(8 + (c & 7), (c >> 3) - 10) for c in range(127)]
TABLES = {"e2m1": E2M1, "e4m3": E4M3}
F32_MAX = math.ldexp(2 - math.ldexp(1, -23), 127)


def f32(x: float) -> float:
    return ctypes.c_float(x).value


def f32_bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def nearest_code(table: list[float], x: float) -> int:
    """Code of the table entry nearest to |x|, ties to the even code, saturating; the sign goes in front."""
    sign = len(E2M1) if table is E2M1 else 128
    m = abs(x)
    if m >= table[-1]:
        code = len(table) - 1
    else:
        low = bisect.bisect_right(table, m) - 1
        below, above = Fraction(m) - Fraction(table[low]), Fraction(table[low + 1]) - Fraction(m)
        code = low + (above < below or (above == below and low % 2 == 1))
    return code + sign * (math.copysign(1.0, x) < 0)


def divide(a: float, b: float) -> float:
    if b == 0:
        return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a)
    return f32(a / b)


def reference_block(name: str, xs: list[float], g: float = 1.0) -> tuple[list[int], int]:
    """One block -> (codes, bits of the scale), straight from the text of docs/ops.md."""
    fmt = FORMATS[name]
    amax = min(max([abs(x) for x in xs if not math.isnan(x)], default=0.0), F32_MAX)
    if name in ("int8", "fp8_block"):
        scale = f32(max(amax, f32(1e-10)) / fmt.max_value)
        scale_bits, inverse = f32_bits(scale), divide(1.0, scale)
    elif name in ("fp8_block_e8m0", "mxfp8", "mxfp4"):
        bits = f32_bits(f32(amax / fmt.max_value))
        scale_bits = min((bits >> 23) + (bits & 0x7FFFFF != 0), 254)
        inverse = math.ldexp(1.0, 127 - scale_bits)
    else:
        scale_bits = nearest_code(E4M3, f32(amax / f32(6 * g)))
        scale = E4M3[scale_bits]
        inverse = divide(1.0, f32(scale * g)) if scale else 0.0
    codes = []
    for x in xs:
        y = math.nan if math.isinf(x) and inverse == 0 else f32(x * inverse)
        if name == "int8":
            codes.append(0 if math.isnan(y) else int(max(-127, min(127, y if math.isinf(y) else round(y)))) & 0xFF)
        elif name in ("fp8_block", "fp8_block_e8m0", "mxfp8"):
            codes.append(0x7F if math.isnan(y) else nearest_code(E4M3, y))
        else:
            codes.append(0x7 if math.isnan(y) else nearest_code(E2M1, y))
    return codes, scale_bits


def codes_of(name: str, values: torch.Tensor) -> torch.Tensor:
    """Stored values -> one integer code per value; the sign of an e4m3 NaN does not count."""
    codes = values.cpu().contiguous().view(torch.uint8)
    if FORMATS[name].pack == 2:
        return torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()
    codes = codes.int()
    return torch.where((codes & 0x7F) == 0x7F, 0x7F, codes) if "fp8" in name else codes


def bits_of(scale: torch.Tensor) -> torch.Tensor:
    scale = scale.cpu().contiguous()
    return scale.view(torch.int32) if scale.dtype == torch.float32 else scale.view(torch.uint8).int()


def check_against_reference(name: str, x: torch.Tensor, block: tuple[int, int], g: float | None = None) -> None:
    """x [rows, k] in float32, on every device."""
    rows, k = x.shape
    br, bk = block
    want_codes = torch.zeros(rows, k, dtype=torch.int32)
    want_scale = torch.zeros(-(-rows // br), -(-k // bk), dtype=torch.int32)
    for i in range(want_scale.shape[0]):
        for j in range(want_scale.shape[1]):
            tile = x[i * br : (i + 1) * br, j * bk : (j + 1) * bk]
            codes, want_scale[i, j] = reference_block(name, tile.flatten().tolist(), 1.0 if g is None else g)
            want_codes[i * br : (i + 1) * br, j * bk : (j + 1) * bk] = torch.tensor(codes).view(tile.shape)
    for device in DEVICES:
        g_tensor = None if g is None else torch.tensor([g], device=device)
        values, scale = FORMATS[name].quantize(x.to(device), block, g_tensor)
        assert values.is_contiguous() and values.dtype == FORMATS[name].dtype
        torch.testing.assert_close(bits_of(scale), want_scale, rtol=0, atol=0)
        torch.testing.assert_close(codes_of(name, values), want_codes, rtol=0, atol=0)


# ---- number types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_s2_16_e2m1_table_ties_and_specials(device):
    midpoints = [(a + b) / 2 for a, b in zip(E2M1, E2M1[1:], strict=False)]
    points = torch.tensor(E2M1 + midpoints + [7.0, 1e30, 1e-45, math.inf])
    above, below = (torch.nextafter(points, torch.tensor(end)) for end in (math.inf, -math.inf))
    points = torch.cat([points, above, below])
    points = torch.cat([points, -points])
    want = torch.tensor([nearest_code(E2M1, x) for x in points.tolist()], dtype=torch.uint8)
    assert torch.equal(formats.encode_e2m1(points.to(device)).cpu(), want)
    assert want[8:15].tolist() == [0, 2, 2, 4, 4, 6, 6]  # the seven ties, by hand
    assert formats.encode_e2m1(torch.tensor([math.nan, -math.nan], device=device)).tolist() == [7, 7]
    codes = torch.arange(16, dtype=torch.uint8, device=device)
    decoded = formats.decode_e2m1(codes).cpu()
    want_bits = torch.tensor(E2M1 + [-x for x in E2M1]).view(torch.int32)  # bits, so that -0 counts
    assert torch.equal(decoded.view(torch.int32), want_bits)
    assert torch.equal(formats.encode_e2m1(formats.decode_e2m1(codes)), codes)


def test_pack_e2m1_puts_the_even_k_low():
    codes = torch.tensor([[1, 2, 15, 8]], dtype=torch.uint8)
    packed = formats.pack_e2m1(codes)
    assert packed.tolist() == [[0x21, 0x8F]]
    assert torch.equal(formats.unpack_e2m1(packed), formats.decode_e2m1(codes))


@pytest.mark.parametrize("device", DEVICES)
def test_every_packed_byte_round_trips(device):
    packed = torch.arange(256, dtype=torch.uint8, device=device).view(16, 16)
    values = formats.unpack_e2m1(packed)
    assert values.shape == (16, 32)
    assert torch.equal(formats.pack_e2m1(formats.encode_e2m1(values)), packed)  # -0 included


@pytest.mark.parametrize("device", DEVICES)
def test_e4m3_of_every_bf16(device):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    want = [0x7F if math.isnan(x) else nearest_code(E4M3, x) for x in every.tolist()]
    got = codes_of("fp8_block", formats.encode_e4m3(every.to(device)))
    assert torch.equal(got, torch.tensor(want, dtype=torch.int32))


@pytest.mark.parametrize("device", DEVICES)
def test_e8m0_all_codes(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e8m0fnu)
    decoded = formats.decode_scale(codes).cpu()
    assert decoded.isnan().tolist() == [False] * 255 + [True]
    assert decoded[:255].tolist() == [math.ldexp(1.0, b - 127) for b in range(255)]
    # The exponent field, one more when the mantissa is not 0: powers of two stay, all else goes up, 254 is the end.
    powers = decoded[1:255].to(device)
    assert bits_of(formats.encode_e8m0(powers)).tolist() == list(range(1, 255))
    above = bits_of(formats.encode_e8m0(torch.nextafter(powers, torch.tensor(math.inf, device=device))))
    assert above.tolist() == [min(b + 1, 254) for b in range(1, 255)]
    denormals = torch.tensor([0.0, 1e-45, 2.0**-127, 2.0**-126 - 2.0**-149], device=device)
    assert bits_of(formats.encode_e8m0(denormals)).tolist() == [0, 1, 1, 1]


# ---- quantise --------------------------------------------------------------------------------------------------------

AWKWARD = {
    "zero": [0.0, -0.0, 0.0, 0.0],
    "nan_only": [math.nan] * 4,
    "nan": [1.0, math.nan, -3.0, 0.25],
    "inf": [math.inf, 1.0, -math.inf, F32_MAX],
    "inf_and_nan": [math.inf, math.nan, -2.0, 0.0],
    "denormal": [1e-45, -1e-40, 1e-38, 2e-39],
    "tiny": [1e-12, -3e-11, 1e-13, 0.0],
    "huge": [F32_MAX, -1e38, 3e38, 1.0],
    "mixed": [1e30, 1e-30, -1.0, 5.0],
    "exact_max": [448.0, -6.0, 127.0, 2688.0],
    "one": [1.0, 1.0, 1.0, 1.0],
}


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("case", AWKWARD)
def test_quantize_awkward_blocks(name, case):
    x = torch.tensor([AWKWARD[case]])
    check_against_reference(name, x, (1, 4))
    check_against_reference(name, x, (1, 3))  # ragged


@pytest.mark.parametrize("g", [1.0, 0.37, 1e-3, 1e-30, 1e30, 2.0**-140])
def test_nvfp4_global_scale(g):
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 40)
    check_against_reference("nvfp4", x, (1, 16), g)


@pytest.mark.parametrize("name", QUANTISED)
def test_quantize_random_ragged(name):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 70, generator=generator) * torch.logspace(-8, 8, 70)[torch.randperm(70, generator=generator)]
    for block in [(1, 16), (1, 32), (3, 20), (1, 70), (7, 128)]:
        check_against_reference(name, x, block)
        check_against_reference(name, x.bfloat16().float(), block)


float32s = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(QUANTISED), xs=st.lists(float32s, min_size=2, max_size=12), block_k=st.integers(1, 12))
def test_quantize_anything(name, xs, block_k):
    xs = xs[: len(xs) // 2 * 2]
    check_against_reference(name, torch.tensor([xs]), (1, block_k))


def error_bound(name: str, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """|x - dequantize(quantize(x))| at most; step = scale * global_scale of the element's block.

    e4m3: half a unit in the last place, 2^-4 |x|, or half the denormal spacing, 2^-10 steps. e2m1: half the spacing is
    1/4 of a step up to 2, and at most a fifth of |x| above (2.5 and 5 are the worst). nvfp4's scale is itself rounded:
    where it is an e4m3 denormal the block maximum can be 1.5 * 6 steps and saturates, a third of |x|; where it becomes
    0, |x| <= 6 * 2^-10 g. int8: half a step. `slack` covers the roundings of scale, 1/scale, x * inverse and
    value * scale, each 2^-24 of x.
    """
    slack = (x.abs() + step) * 2.0**-21
    if name == "int8":
        return step / 2 + slack
    if "fp8" in name:
        return torch.maximum(x.abs() / 16, step * 2.0**-10) + slack
    return torch.maximum(x.abs() / (3 if name == "nvfp4" else 5), step / 4) + slack


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(QUANTISED),
    xs=st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32),
    block_k=st.sampled_from([2, 16, 20, 32]),
)
def test_error_is_bounded(name, xs, block_k):
    fmt = FORMATS[name]
    x = torch.tensor([xs])
    g = None
    if fmt.has_global_scale:
        g = (x.abs().amax() / 2688).clamp(min=1e-30).reshape(1)
    values, scale = fmt.quantize(x, (1, block_k), g)
    error = (fmt.dequantize(values, scale, (1, block_k), g) - x).abs()
    step = formats.decode_scale(scale).repeat_interleave(block_k, 1)[:, : x.shape[1]] * (1.0 if g is None else g)
    bound = error_bound(name, x, step) + (0 if g is None else 6 * 2.0**-10 * g)
    assert (error <= bound).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", QUANTISED)
def test_round_trip_of_representable_values(name, device):
    """Blocks that hold the largest value come back with the same codes and the same scale."""
    fmt = FORMATS[name]
    generator = torch.Generator().manual_seed(3)
    table = {"int8": list(range(128)), "mxfp4": E2M1, "nvfp4": E2M1}.get(name, E4M3)
    index = torch.randint(0, len(table), (6, 64), generator=generator)
    index[:, ::16] = len(table) - 1
    sign = torch.randint(0, 2, (6, 64), generator=generator) * 2 - 1
    value = torch.tensor(table, dtype=torch.float32)[index] * sign
    step = 2.0 ** torch.randint(-5, 5, (6, 4), generator=generator).float()
    x = (value * step.repeat_interleave(16, 1)).to(device)
    values, scale = fmt.quantize(x, (1, 16))
    assert torch.equal(formats.decode_scale(scale).cpu(), step)
    assert torch.equal(fmt.dequantize(values, scale, (1, 16)), x)


# ---- shapes, parts, weights ------------------------------------------------------------------------------------------


def test_the_table_of_formats():
    assert torch_moe_ops.FORMATS is FORMATS
    assert list(FORMATS) == ["bf16", "fp16", *QUANTISED]
    rows = {
        f.name: (f.dtype, f.max_value, f.scale_dtype, f.act_block, f.weight_block, f.pack) for f in FORMATS.values()
    }
    assert rows["int8"] == (torch.int8, 127, torch.float32, (1, None), (1, None), 1)
    assert rows["fp8_block"] == (torch.float8_e4m3fn, 448, torch.float32, (1, 128), (128, 128), 1)
    assert rows["fp8_block_e8m0"] == (torch.float8_e4m3fn, 448, torch.float8_e8m0fnu, (1, 128), (128, 128), 1)
    assert rows["mxfp8"] == (torch.float8_e4m3fn, 448, torch.float8_e8m0fnu, (1, 32), (1, 32), 1)
    assert rows["mxfp4"] == (torch.uint8, 6, torch.float8_e8m0fnu, (1, 32), (1, 32), 2)
    assert rows["nvfp4"] == (torch.uint8, 6, torch.float8_e4m3fn, (1, 16), (1, 16), 2)
    assert [f.name for f in FORMATS.values() if f.has_global_scale] == ["nvfp4"]
    assert torch.finfo(torch.float8_e4m3fn).max == formats.E4M3_MAX == E4M3[-1]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows,k,parts", [(0, 64, 1), (6, 64, 1), (6, 100, 2), (384, 300, 2), (384, 256, 1)])
def test_shapes(name, rows, k, parts):
    fmt = FORMATS[name]
    values, scale = fmt.quantize(torch.randn(rows, k), fmt.act_block)
    assert values.shape == (rows, k // fmt.pack) and scale.shape == fmt.act_scale_shape(rows, k)
    weight = torch.randn(2, rows, k)
    values, scale = fmt.quantize(weight, fmt.weight_block, parts=parts)
    assert values.shape == (2, rows, k // fmt.pack) and scale.shape == (2, *fmt.weight_scale_shape(rows, k, parts))
    assert scale.dtype == fmt.scale_dtype
    assert fmt.dequantize(values, scale, fmt.weight_block, parts=parts).shape == weight.shape


def test_fp8_block_scale_shapes_by_hand():
    fmt = FORMATS["fp8_block"]
    assert fmt.act_scale_shape(7, 7168) == (7, 56)
    assert fmt.weight_scale_shape(2 * 2880, 2880, parts=2) == (46, 23)  # 2 * ceil(22.5), ceil(22.5)
    assert fmt.weight_scale_shape(2 * 2880, 2880) == (45, 23)
    assert FORMATS["int8"].weight_scale_shape(10, 64) == (10, 1)


@pytest.mark.parametrize("name", QUANTISED)
def test_parts_are_independent_matrices(name):
    fmt = FORMATS[name]
    generator = torch.Generator().manual_seed(4)
    gate, up = torch.randn(2, 3, 200, 144, generator=generator)
    up *= 100
    both = torch.cat([gate, up], 1)
    g = torch.rand(3, 2, generator=generator) + 0.5 if fmt.has_global_scale else None
    values, scale = fmt.quantize(both, fmt.weight_block, g, parts=2)
    gate_q = fmt.quantize(gate, fmt.weight_block, None if g is None else g[:, 0])
    up_q = fmt.quantize(up, fmt.weight_block, None if g is None else g[:, 1:])
    assert torch.equal(codes_of(name, values), codes_of(name, torch.cat([gate_q[0], up_q[0]], 1)))
    assert torch.equal(bits_of(scale), torch.cat([bits_of(gate_q[1]), bits_of(up_q[1])], 1))
    dequantised = fmt.dequantize(values, scale, fmt.weight_block, g, parts=2)
    want = fmt.dequantize(*up_q, fmt.weight_block, None if g is None else g[:, 1:])
    assert torch.equal(dequantised[:, 200:], want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FORMATS)
def test_quantize_weight(name, device, monkeypatch):
    """Chunked equals whole; the nvfp4 global scale makes the largest block scale 448."""
    fmt = FORMATS[name]
    weight = torch.randn(5, 2 * 130, 96, generator=torch.Generator().manual_seed(5)).to(device, torch.bfloat16)
    weight[0, 0] = 0
    weight[3, :130] = 0  # one part of one expert
    monkeypatch.setattr(formats, "CHUNK_ELEMENTS", 2 * 260 * 96)
    values, scale, g = formats.quantize_weight(weight, name, parts=2)
    if not fmt.has_scale:
        assert scale is None and g is None and torch.equal(values, weight.to(fmt.dtype))
        return
    want_values, want_scale = fmt.quantize(weight, fmt.weight_block, g, parts=2)
    assert torch.equal(codes_of(name, values), codes_of(name, want_values))
    assert torch.equal(bits_of(scale), bits_of(want_scale))
    assert scale.shape == (5, *fmt.weight_scale_shape(260, 96, 2))
    assert (g is not None) == fmt.has_global_scale
    if g is not None:
        amax = weight.float().view(5, 2, -1).abs().amax(-1).cpu()
        assert torch.equal(g.cpu(), torch.where(amax > 0, amax / torch.tensor(2688.0), 1.0))
        largest = scale.float().view(5, 2, -1).amax(-1).cpu()
        assert torch.equal(largest, torch.where(amax > 0, 448.0, 0.0))
        given = torch.full((5, 2), 0.01, device=device)
        values, scale, g = formats.quantize_weight(weight, name, parts=2, global_scale=given)
        assert torch.equal(g, given)
        assert torch.equal(bits_of(scale), bits_of(fmt.quantize(weight, fmt.weight_block, given, parts=2)[1]))


def test_bf16_quantize_copies():
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    values, scale = FORMATS["bf16"].quantize(x, None)
    assert torch.equal(values, x) and values.data_ptr() != x.data_ptr() and scale.shape == (3, 0)


ERRORS = {
    f"topk: format: expected one of {', '.join(FORMATS)}, got fp7": lambda: formats.get_format("topk", "fp7"),
    "quantize: input: expected an even last dimension for mxfp4, got [2, 5]": lambda: FORMATS["mxfp4"].quantize(
        torch.ones(2, 5), (1, 32)
    ),
    "quantize: parts: expected a divisor of 3 rows, got 2": lambda: FORMATS["int8"].quantize(
        torch.ones(3, 4), (1, None), parts=2
    ),
    "quantize: global_scale: expected none for int8, got [1]": lambda: FORMATS["int8"].quantize(
        torch.ones(3, 4), (1, None), torch.ones(1)
    ),
    "quantize: global_scale: expected 1 element, [3] or [3, 2], got [2]": lambda: FORMATS["nvfp4"].quantize(
        torch.ones(3, 4, 16), (1, 16), torch.ones(2), parts=2
    ),
    "quantize_weight: weight: expected bfloat16, float16 or float32, got complex64": lambda: formats.quantize_weight(
        torch.ones(3, 4, 4, dtype=torch.complex64), "int8"
    ),
    "quantize_weight: weight: expected bfloat16, float16 or float32, got None": lambda: formats.quantize_weight(
        None, "int8"
    ),
    "quantize_weight: global_scale: expected a tensor, got 1.0": lambda: given_scale(1.0),
    "quantize_weight: global_scale: expected float32 on cpu, got float64 on cpu": lambda: given_scale(
        torch.ones(3).double()
    ),
    "quantize_weight: global_scale: expected positive values, got 0.0": lambda: given_scale(
        torch.tensor([1.0, 0.0, 2.0])
    ),
    "quantize_weight: global_scale: expected one element, [3] or [3, 2], got [2]": lambda: given_scale(torch.ones(2)),
    "quantize_weight: global_scale: expected none for int8, got [3]": lambda: given_scale(torch.ones(3), "int8"),
    "compute_global_scale: x: expected bfloat16, float16 or float32, got int32": lambda: formats.compute_global_scale(
        torch.ones(3, 4).int()
    ),
    "quantize_weight: weight: expected [E, N, K], got [3, 4]": lambda: formats.quantize_weight(
        torch.ones(3, 4), "int8"
    ),
}


def given_scale(global_scale: object, format: str = "nvfp4") -> tuple[torch.Tensor, ...]:
    return formats.quantize_weight(torch.ones(3, 4, 16), format, parts=2, global_scale=global_scale)


def test_a_given_global_scale_is_returned_for_each_part():
    scales = torch.tensor([1.0, 2.0, 4.0])
    for scale in (scales, scales[:, None].expand(3, 2)):
        assert torch.equal(given_scale(scale)[2], scales[:, None].expand(3, 2))
    assert torch.equal(given_scale(torch.tensor(2.0))[2], torch.full((3, 2), 2.0))


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(RuntimeError) as error:
        ERRORS[message]()
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["fp8_block", "nvfp4"])
def test_quantize_weight_makes_no_graph(name):
    weight = torch.nn.Parameter(torch.randn(2, 128, 128))
    assert not any(tensor is not None and tensor.requires_grad for tensor in formats.quantize_weight(weight, name))


def test_int8_without_k():
    values, scale, _ = formats.quantize_weight(torch.empty(2, 3, 0), "int8")
    assert values.shape == (2, 3, 0) and scale.shape == (2, 3, 1)
    x = torch.empty(3, 0, dtype=torch.bfloat16)
    assert [t.shape for t in torch.ops.moe.quantize(x, "int8")] == [
        t.shape for t in torch.ops.moe.quantize(x.to("meta"), "int8")
    ]
