"""The conversion of a trained transformer to shifts and additions, and a count of what its operations cost."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynakern.checks import check_choice
from dynakern.vision.shiftaddvit.attention import (
    KernelHash,
    LinearAngularAttention,
    ReducedAttention,
    SoftmaxAttention,
)
from dynakern.vision.shiftaddvit.linear import Experts, PackedShiftLinear, ShiftLinear, shift_add_experts

__all__ = ["UNIT_COSTS", "EnergyReport", "convert_to_shiftadd", "energy_report"]


def convert_to_shiftadd(
    model: nn.Module,
    *,
    attention: Literal["binary", "hash"] | None = "binary",
    linears: Literal["moe", "ps", "q"] | None = "moe",
    weight_bits: int = 5,
    exclude: Sequence[str] = ("head", "classifier", "*patch_embed*"),
    **options: Any,
) -> nn.Module:
    """Return a copy of a transformer that adds and shifts where it multiplied.

    Attention modules with the maps ``qkv`` and ``proj`` and a number ``num_heads``, ``(B, N, C) -> (B, N, C)``, become
    :class:`LinearAngularAttention` with the same projections (a hash takes its one map from the queries); what this
    adds, a convolution of the values, starts at zero. Linear maps become :class:`ShiftLinear`, or :class:`Experts`
    whose first is the map as it was. The result is meant to be trained on.

    Args:
        model: Any network; it is left as it is.
        attention: The codes of the new attention; None leaves attention alone.
        linears: ``"moe"``: experts; ``"ps"`` or ``"q"``: see :class:`ShiftLinear`; None leaves linear maps alone.
        weight_bits: See :class:`ShiftLinear`.
        exclude: Patterns of names of linear maps that stay.
        **options: Further arguments of :class:`LinearAngularAttention`.

    Raises:
        ValueError: An option is unknown.
    """
    if attention is not None:
        check_choice("attention", attention, ("binary", "hash"))
    if linears is not None:
        check_choice("linears", linears, ("moe", "ps", "q"))
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if attention is not None and _is_attention(module):
            model = _replace(model, name, _additive(module, attention, options))
    for name, module in list(model.named_modules()):
        if linears is None or type(module) is not nn.Linear or any(fnmatch.fnmatch(name, p) for p in exclude):
            continue
        if ".experts." in name or ".gate." in name:
            continue
        if linears == "moe":
            at = {"device": module.weight.device, "dtype": module.weight.dtype}
            sizes = module.in_features, module.out_features, module.bias is not None
            new: nn.Module = shift_add_experts(*sizes, weight_bits=weight_bits, **at)  # pyright: ignore
            assert isinstance(new, Experts)
            new.experts[0] = module
            new.experts[1] = ShiftLinear.from_linear(module, weight_bits=weight_bits)
        else:
            new = ShiftLinear.from_linear(module, mode=linears, weight_bits=weight_bits)
        model = _replace(model, name, new)
    return model


def _is_attention(module: nn.Module) -> bool:
    parts = (getattr(module, name, None) for name in ("qkv", "proj"))
    whole = all(isinstance(part, nn.Linear) for part in parts) and isinstance(getattr(module, "num_heads", None), int)
    return whole and not isinstance(module, LinearAngularAttention)


def _replace(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    if not name:
        return new
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
    return model


@torch.no_grad()
def _additive(old: Any, codes: Literal["binary", "hash"], options: dict[str, Any]) -> LinearAngularAttention:
    dim, W, b = old.proj.in_features, old.qkv.weight, old.qkv.bias
    at = {"device": W.device, "dtype": W.dtype}
    new = LinearAngularAttention(dim, old.num_heads, codes=codes, qkv_bias=b is not None, **options, **at)
    copies = {"qkv": slice(None)} if codes == "binary" else {"to_qk": slice(0, dim), "to_v": slice(2 * dim, None)}
    for name, rows in copies.items():
        linear = getattr(new, name)
        linear.weight.copy_(W[rows])
        if b is not None:
            linear.bias.copy_(b[rows])
    new.proj.load_state_dict(old.proj.state_dict(), strict=False)
    nn.init.zeros_(new.dconv.weight)
    return new.train(old.training)


# Picojoules an operation, and to read 16 bits from DRAM, as the official code has them.
UNIT_COSTS: dict[str, dict[str, float]] = {
    "fp32": {"multiply": 3.7, "add": 0.9, "shift": 0.13, "bits": 32, "dram_16_bits": 200.0},
    "int8": {"multiply": 0.2, "add": 0.03, "shift": 0.024, "bits": 8, "dram_16_bits": 200.0},
}


@dataclass
class EnergyReport:
    """Counted operations and what they cost by a table of unit costs: a model, not a measurement.

    Attributes:
        multiply: Multiplications of each module, by name.
        add: Additions of each module.
        shift: Shifts of each module.
        weight_bits: Bits of all weights that are read.
        precision: Key of :data:`UNIT_COSTS`.
    """

    multiply: dict[str, int] = field(default_factory=dict)
    add: dict[str, int] = field(default_factory=dict)
    shift: dict[str, int] = field(default_factory=dict)
    weight_bits: int = 0
    precision: str = "fp32"

    def count(self, kind: Literal["multiply", "add", "shift"], prefix: str = "") -> int:
        """Return how many operations of a kind the modules whose names start with ``prefix`` do."""
        return sum(n for name, n in getattr(self, kind).items() if name.startswith(prefix))

    @property
    def operations_mj(self) -> float:
        """Energy of the operations in millijoules."""
        cost = UNIT_COSTS[self.precision]
        return sum(self.count(kind) * cost[kind] for kind in ("multiply", "add", "shift")) * 1e-9

    @property
    def weights_mj(self) -> float:
        """Energy of reading every weight from memory once, in millijoules."""
        return self.weight_bits / 16 * UNIT_COSTS[self.precision]["dram_16_bits"] * 1e-9

    def __str__(self) -> str:
        kinds = ", ".join(f"{self.count(kind) / 1e6:.2f} M {kind}" for kind in ("multiply", "add", "shift"))
        return f"{kinds}; model: operations {self.operations_mj:.4g} mJ, weights {self.weights_mj:.4g} mJ"


def energy_report(
    model: nn.Module, input_size: Sequence[int], *, precision: Literal["fp32", "int8"] = "fp32"
) -> EnergyReport:
    """Run a network on one random image and count the operations of its linear maps, convolutions and attentions.

    Norms, activations and other elementwise work are not counted. Experts count the tokens that were sent to them.
    Masked sums count an addition for every token and bit.

    Args:
        model: A network for images ``(1, *input_size)``; run in eval mode.
        input_size: Channels, height and width, or any sizes after the batch.
        precision: Whose unit costs are taken.

    Raises:
        ValueError: ``precision`` is unknown.
    """
    check_choice("precision", precision, tuple(UNIT_COSTS))
    report, width = EnergyReport(precision=precision), int(UNIT_COSTS[precision]["bits"])
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, tuple(_COUNTERS)):
            hooks.append(module.register_forward_hook(_hook(report, name, width)))
    parameter = next(model.parameters(), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *input_size, generator=generator).to(parameter.device, parameter.dtype)
    was = model.training
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        model.train(was)
        for hook in hooks:
            hook.remove()
    return report


def _hook(report: EnergyReport, name: str, width: int) -> Any:
    def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        for kind in _COUNTERS:
            if isinstance(module, kind):
                counts = _COUNTERS[kind](module, args[0], output)
                for operation, n in counts.items():
                    target = getattr(report, operation)
                    target[name] = target.get(name, 0) + int(n)
                break
        if isinstance(module, nn.Linear | nn.Conv2d):
            report.weight_bits += module.weight.numel() * width
        elif isinstance(module, ShiftLinear | PackedShiftLinear):
            report.weight_bits += 8 * module.in_features * module.out_features

    return hook


def _linear(module: Any, x: Tensor, y: Tensor) -> dict[str, int]:
    n = y.numel() * module.in_features
    return {"multiply": n, "add": n}


def _shift(module: Any, x: Tensor, y: Tensor) -> dict[str, int]:
    n = y.numel() * module.in_features
    return {"shift": n, "add": n}


def _conv(module: Any, x: Tensor, y: Tensor) -> dict[str, int]:
    n = y.numel() * module.weight[0].numel()
    return {"multiply": n, "add": n}


def _softmax(module: Any, x: Tensor, y: Tensor) -> dict[str, int]:
    n = 2 * x.shape[0] * x.shape[1] ** 2 * module.dim
    return {"multiply": n, "add": n}


def _reduced(module: Any, x: Tensor, y: Tensor) -> dict[str, int]:
    n = 2 * x.shape[0] * x.shape[1] * (x.shape[1] // module.reduction**2) * module.dim
    return {"multiply": n, "add": n}


def _masked(module: LinearAngularAttention, x: Tensor, y: Tensor) -> dict[str, int]:
    per_head = module.dim // module.num_heads
    hashing = module.qk_quant["ksh"] if module.codes == "hash" else None
    bits = hashing.A.shape[1] if isinstance(hashing, KernelHash) else per_head
    convolution = x.numel() * module.dconv.weight.shape[2]
    return {"add": 2 * x.numel() * bits + convolution, "multiply": convolution}


def _hash(module: KernelHash, x: Tensor, y: Tensor) -> dict[str, int]:
    (heads, bits, m), K = module.A.shape, module.anchor.shape[3]
    n = x.shape[0] * heads * x.shape[2] * m * (K + bits)
    return {"multiply": n, "add": n}


_COUNTERS: dict[type[nn.Module], Any] = {
    nn.Linear: _linear,
    ShiftLinear: _shift,
    PackedShiftLinear: _shift,
    nn.Conv2d: _conv,
    SoftmaxAttention: _softmax,
    ReducedAttention: _reduced,
    LinearAngularAttention: _masked,
    KernelHash: _hash,
}
