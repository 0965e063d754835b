"""The experts of one MoE layer as a module:

    forward(hidden_states [T, H], topk_weights f32 [T, K], topk_ids i32 [T, K]) -> output [T, H]   (moe::fused_moe)

It holds the weights w13 [E, 2I, H/pack] (gate over up) and w2 [E, H, I/pack] with their scales, and nothing else:
routing happens outside, and nothing is cached or changed after construction (`packed` makes another module).
`Experts.from_weights` quantises bf16 weights; the constructor takes the tensors of a checkpoint that is quantised
already.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .activations import LAYOUTS, get_activation
from .formats import quantize_weight
from .meta_kernels._check import INT32, expect_choice, expect_range, expect_sizes, refuse
from .meta_kernels.act_mul import check_activation
from .meta_kernels.grouped_gemm import check_formats, check_weight
from .meta_kernels.quantize import check_global_scale
from .packed_weights import PACKABLE, PACKED_DTYPES, is_packed, pack_weight, weight_sizes
from .reference._values import expect_ids

TENSORS = (
    "w13",
    "w2",
    "w13_scale",
    "w2_scale",
    "w13_global_scale",
    "w2_global_scale",
    "a13_global_scale",
    "a2_global_scale",
    "w13_bias",
    "w2_bias",
    "expert_map",
)
SETTINGS = {  # and what moe::fused_moe takes where they are left out
    "format": "bf16",
    "act_format": "",
    "activation": "silu",
    "alpha": 1.0,
    "beta": 0.0,
    "limit": None,
    "routed_scaling_factor": 1.0,
    "apply_router_weight_on_input": False,
}


def to_gate_up(tensor: Tensor, layout: str, *, group: int = 1) -> Tensor:
    """Reorders [E, 2R, ...] so that R gate rows come before R up rows: w13, its per-row scale, its bias alike.

    "gate_up" returns the tensor itself. "up_gate" swaps the halves; scale blocks and global scales [E, 2] are counted
    within each half, so they are swapped the same way. "interleaved" alternates `group` gate rows with `group` up rows.

    Args:
        tensor: [E, 2R, ...] of any dtype, rows as `layout` says.
        layout: gate_up, up_gate or interleaved.
        group: neighbouring rows of a kind where they are interleaved, a divisor of R; else unused.
    Returns:
        [E, 2R, ...] of the same dtype, gate over up; a copy, but for gate_up.
    Raises:
        RuntimeError: ``to_gate_up: argument: expected ..., got ...``.
    """
    _expect_rows("to_gate_up", tensor, layout, group)
    if layout == "gate_up":
        return tensor
    period = 2 if layout == "up_gate" else 2 * group
    data = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # few ops know the 8-bit floats
    if layout == "up_gate":
        up, gate = data.chunk(2, dim=1)
    else:
        groups = data.unflatten(1, (data.shape[1] // period, 2, group))  # [E, R / group, gate or up, group, ...]
        gate, up = (half.flatten(1, 2) for half in groups.unbind(2))
    return torch.cat([gate, up], dim=1).view(tensor.dtype)


def from_gate_up(tensor: Tensor, layout: str, *, group: int = 1) -> Tensor:
    """The inverse of `to_gate_up`: gate over up [E, 2R, ...] in the order of another system.

    Args:
        tensor: [E, 2R, ...] of any dtype, R gate rows before R up rows.
        layout, group: as `to_gate_up` takes them.
    Returns:
        [E, 2R, ...] of the same dtype, rows as `layout` says; a copy, but for gate_up.
    Raises:
        RuntimeError: ``from_gate_up: argument: expected ..., got ...``.
    """
    _expect_rows("from_gate_up", tensor, layout, group)
    if layout != "interleaved":
        return to_gate_up(tensor, layout)  # a swap is its own inverse
    return tensor.unflatten(1, (2, -1, group)).transpose(1, 2).flatten(1, 3)  # [E, R / group, gate or up, group, ...]


def _expect_rows(function: str, tensor: Tensor, layout: str, group: int) -> None:
    expect_choice(function, "layout", layout, LAYOUTS)
    expect_range(function, "group", group, 1)
    period = {"gate_up": 1, "up_gate": 2, "interleaved": 2 * group}[layout]
    if tensor.dim() < 2 or tensor.shape[1] % period:
        refuse(function, "tensor", f"[E, rows, ...], rows a multiple of {period}", list(tensor.shape))


def local_expert_map(num_experts: int, num_router_experts: int, device: torch.device | str | None = None) -> Tensor:
    """An `expert_map` for ids that are local already, -1 for the experts of other ranks: int32 [num_router_experts].

        map[id] = id if id < num_experts else -1

    It changes no id. Its size says how many experts the router chooses from, so that a kernel can expect this rank to
    get num_experts / num_router_experts of the slots when it decides how to divide its work.

    Args:
        num_experts: of this rank, E.
        num_router_experts: that the router chooses from, on all ranks.
        device: of the map (default: torch's).
    Returns:
        int32 [num_router_experts].
    Raises:
        RuntimeError: ``local_expert_map: num_experts: expected ..., got ...``.
    """
    if not 0 < num_experts <= num_router_experts:
        refuse("local_expert_map", "num_experts", f"1 to num_router_experts ({num_router_experts})", num_experts)
    ids = torch.arange(num_router_experts, dtype=torch.int32, device=device)
    return ids.masked_fill_(ids >= num_experts, -1)


class Experts(nn.Module):
    """The experts of one MoE layer: forward(...) = moe::fused_moe with what is held here.

    All tensors are buffers, under their names in moe::fused_moe. Their dtypes are the format's: `.to(dtype)`, `.half()`
    and the like leave them as they are.

    Args:
        w13, w2 and the others: as moe::fused_moe takes them, w13 gate over up; detached, not copied.
    Raises:
        RuntimeError: ``Experts: argument: expected ..., got ...`` for what moe::fused_moe would refuse of them.
    """

    def __init__(
        self,
        w13: Tensor,
        w2: Tensor,
        *,
        w13_scale: Tensor | None = None,
        w2_scale: Tensor | None = None,
        w13_global_scale: Tensor | None = None,
        w2_global_scale: Tensor | None = None,
        a13_global_scale: Tensor | None = None,
        a2_global_scale: Tensor | None = None,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        expert_map: Tensor | None = None,
        format: str = "bf16",
        act_format: str = "",
        activation: str = "silu",
        alpha: float = 1.0,
        beta: float = 0.0,
        limit: float | None = None,
        routed_scaling_factor: float = 1.0,
        apply_router_weight_on_input: bool = False,
    ) -> None:
        super().__init__()
        arguments = locals()
        for name in TENSORS:
            tensor = arguments[name]
            self.register_buffer(name, None if tensor is None else tensor.detach())
        for name in SETTINGS:
            setattr(self, name, arguments[name])
        self._check()

    @classmethod
    def from_weights(
        cls,
        w13: Tensor,
        w2: Tensor,
        *,
        format: str = "bf16",
        w13_layout: str = "gate_up",
        w13_group: int = 1,
        w13_bias: Tensor | None = None,
        activation: str = "silu",
        **options: object,
    ) -> Experts:
        """bf16, fp16 or float32 weights w13 [E, 2I, H] and w2 [E, H, I], quantised to `format`, expert by expert.

        `w13_layout` is the order of the rows of w13 and w13_bias as given, "interleaved" by groups of `w13_group` rows;
        they are stored gate over up. The other `options` are the constructor's. For a checkpoint that is quantised
        already, call the constructor.

        Raises:
            RuntimeError: as the constructor, `to_gate_up` and `quantize_weight` do.
        """
        parts = 2 if get_activation("Experts", activation).gated else 1
        if parts == 1 and w13_layout != "gate_up":
            refuse("Experts", "w13_layout", f"gate_up for {activation}, which is not gated", w13_layout)
        else:
            w13 = to_gate_up(w13, w13_layout, group=w13_group)
            w13_bias = None if w13_bias is None else to_gate_up(w13_bias, w13_layout, group=w13_group)
        w13, w13_scale, w13_global_scale = quantize_weight(w13, format, parts=parts)
        w2, w2_scale, w2_global_scale = quantize_weight(w2, format)
        return cls(
            w13.contiguous(),
            w2.contiguous(),
            w13_scale=w13_scale,
            w2_scale=w2_scale,
            w13_global_scale=w13_global_scale,
            w2_global_scale=w2_global_scale,
            w13_bias=w13_bias,
            format=format,
            activation=activation,
            **options,
        )

    def packed(self) -> Experts:
        """The same experts with their weights and scales as the SM90 kernels read them: see `pack_weight`.

        Packed for activations of `act_format` if there is a layout for them, else for bf16 ones.
        """
        act_format = self.act_format if self.act_format in PACKED_DTYPES.get(self.format, ()) else "bf16"
        tensors = {name: getattr(self, name) for name in TENSORS}
        for name in ("w13", "w2"):
            if not is_packed(tensors[name]):
                scale, tensors[f"{name}_scale"] = tensors[f"{name}_scale"], None
                tensors[name] = pack_weight(tensors[name], scale, self.format, act_format=act_format)
        return Experts(
            tensors.pop("w13"), tensors.pop("w2"), **tensors, **{name: getattr(self, name) for name in SETTINGS}
        )

    def forward(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """hidden_states [T, H] bf16 or fp16, topk_weights f32 [T, K], topk_ids i32 [T, K] (-1: not here) -> [T, H]."""
        return torch.ops.moe.fused_moe(hidden_states, self.w13, self.w2, topk_weights, topk_ids, **self.options())

    def options(self) -> dict[str, object]:
        """The keyword arguments of moe::fused_moe, without those at their defaults: each costs the host time."""
        tensors = {name: tensor for name in TENSORS[2:] if (tensor := self._buffers[name]) is not None}
        settings = {name: getattr(self, name) for name in SETTINGS}
        return tensors | {name: value for name, value in settings.items() if value != SETTINGS[name]}

    @property
    def num_experts(self) -> int:
        return self.w2.shape[0]

    @property
    def hidden_size(self) -> int:
        return weight_sizes(self.w2, self.format)[1]

    @property
    def intermediate_size(self) -> int:
        return weight_sizes(self.w2, self.format)[2]

    def extra_repr(self) -> str:
        formats = self.format if self.act_format in ("", self.format) else f"{self.format} x {self.act_format}"
        sizes = f"num_experts={self.num_experts}, hidden_size={self.hidden_size}"
        return f"{sizes}, intermediate_size={self.intermediate_size}, {formats}, {self.activation}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _check(self) -> None:
        """Refuses at load time what moe::fused_moe would refuse at the first call."""
        for name in ("w13", "w2"):
            if getattr(self, name) is None:
                refuse("Experts", name, "a tensor", None)
        for name in ("alpha", "beta", "limit", "routed_scaling_factor"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) and (name, value) != ("limit", None):
                refuse("Experts", name, "a number", repr(value))
        weights, acts = check_formats("Experts", self.format, self.act_format)
        check_activation("Experts", self.activation, self.alpha, self.beta, self.limit)
        if self.w2.dim() != 3 and not (is_packed(self.w2) and self.format in PACKABLE):
            refuse("Experts", "w2", "[E, H, I]", list(self.w2.shape))
        if self.num_experts == 0:
            refuse("Experts", "w2", "at least one expert", list(self.w2.shape))
        if is_packed(self.w13) != is_packed(self.w2):
            refuse("Experts", "w13", "packed or not as w2 is", list(self.w13.shape))
        parts = 2 if get_activation("Experts", self.activation).gated else 1
        for name, n, k, name_parts in (
            ("w13", parts * self.intermediate_size, self.hidden_size, parts),
            ("w2", self.hidden_size, self.intermediate_size, 1),
        ):
            weight, *others = (getattr(self, name + suffix) for suffix in ("", "_scale", "_global_scale", "_bias"))
            sizes = (self.num_experts, n, k)
            check_weight("Experts", name, weights, acts, weight, *others, sizes, name_parts, self.w2.device)
            global_scale = f"a{name.removeprefix('w')}_global_scale"
            check_global_scale(
                "Experts", global_scale, acts, getattr(self, global_scale), self.num_experts, self.w2.device
            )
        if self.expert_map is not None:
            expect_sizes("Experts", "expert_map", self.expert_map, INT32, ("Eg",), self.w2.device)
            expect_ids("Experts", "expert_map", self.expert_map, self.num_experts)
