"""Linear maps whose weights are powers of two, their packed form, and the mixture of them with ordinary linear maps."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_choice, check_floating, check_positive
from dynakern.layers.vision import cache_key

__all__ = [
    "Experts",
    "NaiveGate",
    "NoisyGate",
    "PackedShiftLinear",
    "Routing",
    "ShiftLinear",
    "shift_add_experts",
    "straight_through",
    "to_fixed_point",
]

Rounding = Literal["deterministic", "stochastic"]


class _StraightThrough(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return ``value``, ``(...)``; its gradient goes to ``x`` of the same shape as it is."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _StraightThrough.apply(x, value)  # pyright: ignore[reportReturnType]
    return value


class _PowerOfTwo(torch.autograd.Function):
    """``2^round(shift) sgn(round(sign))`` with the gradients of DeepShift: that of ``sign`` is not scaled."""

    @staticmethod
    def forward(shift: Tensor, sign: Tensor, weight: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] * weight * math.log(2), grads[0], None


def to_fixed_point(v: Tensor, integer_bits: int = 16, fraction_bits: int = 16) -> Tensor:
    r"""Round towards minus infinity to fixed point.

    Computes :math:`\mathrm{clamp}(\lfloor v\, 2^F \rfloor\, 2^{-F}, -2^{I-1}, 2^{I-1} - 1)`; for I = 1, as in the
    official code, :math:`\mathrm{sgn}(v) - 1`. Gradients pass unchanged.

    Args:
        v: Values, ``(...)``, floating point.
        integer_bits: I.
        fraction_bits: F.

    Returns:
        ``(...)``, dtype of ``v``.

    Example:
        >>> to_fixed_point(torch.tensor([0.3, -0.3, 9.0]), integer_bits=4, fraction_bits=2)
        tensor([ 0.2500, -0.5000,  7.0000])
    """
    with torch.no_grad():
        if integer_bits == 1:
            value = torch.sign(v) - 1
        else:
            wide = v.float() if v.dtype == torch.float16 else v  # 2^F of float16 would overflow
            value = torch.floor(wide * 2.0**fraction_bits).mul_(2.0**-fraction_bits)
            value = value.clamp_(-(2.0 ** (integer_bits - 1)), 2.0 ** (integer_bits - 1) - 1).to(v.dtype)
    return straight_through(v, value)


class ShiftLinear(nn.Module):
    r"""A linear map by shifts, ``(..., I) -> (..., O)``: ``y = fx(x) W^T + fx(b)`` W being 0 or :math:`\pm 2^{-p}`.

    Mode ``"ps"`` (of the experts) trains exponents and signs, :math:`W = 2^{[shift]} \mathrm{sgn}[sign]`, with
    the exponent in :math:`[-(2^{w-1} - 2), 0]` and 0 where :math:`|sign| \le 1/2`. Mode ``"q"`` trains the weight and
    rounds it, :math:`W = \mathrm{sgn}(w)\, 2^{[\log_2 |w|]}` with :math:`|w|` in :math:`[2^{-(2^{w-1} - 1)}, 1]`, zeros
    staying 0. Brackets round half to even; gradients pass roundings unchanged, and that of ``sign`` lacks the factor
    :math:`2^{shift}`, as in DeepShift. fx is :func:`to_fixed_point`.

    In training the parameters are clamped to their range in place at every call, as in the official code; in eval mode
    the range is kept without writing. The weight is decoded once and kept until a parameter changes.

    Args:
        in_features: I.
        out_features: O.
        bias: Whether to add one.
        mode: ``"ps"`` or ``"q"``.
        weight_bits: w, from 2 to 7; sign included.
        act_integer_bits: Of the fixed point of inputs and bias.
        act_fraction_bits: Of the fixed point of inputs and bias.
        rounding: ``"stochastic"`` rounds up with the probability of the fraction, in training.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        TypeError: ``weight_bits`` is no integer.
        ValueError: ``weight_bits`` is below 2, or an option is unknown.

    Source: Elhoushi et al., 2019, arXiv:1905.13298, as used by ShiftAddViT.
    """

    shift: nn.Parameter
    sign: nn.Parameter
    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mode: Literal["ps", "q"] = "ps",
        weight_bits: int = 5,
        act_integer_bits: int = 16,
        act_fraction_bits: int = 16,
        rounding: Rounding = "deterministic",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("ps", "q"))
        check_choice("rounding", rounding, ("deterministic", "stochastic"))
        check_positive("weight_bits", weight_bits, integer=True)
        if not 2 <= weight_bits <= 7:
            raise ValueError(f"`weight_bits` must be from 2 to 7, one of them for the sign, got {weight_bits}.")
        self.in_features, self.out_features, self.mode, self.rounding = in_features, out_features, mode, rounding
        self.weight_bits, self.act_integer_bits, self.act_fraction_bits = (
            weight_bits, act_integer_bits, act_fraction_bits)  # fmt: skip
        self.lowest = -(2 ** (weight_bits - 1) - (2 if mode == "ps" else 1))
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        names = ("shift", "sign") if mode == "ps" else ("weight",)
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.empty(out_features, in_features, **at)))
        self.bias = nn.Parameter(torch.empty(out_features, **at)) if bias else None
        self._kept: tuple[object, Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw exponents over their range and signs in [-1, 1], or the weight as ``torch.nn.Linear`` does."""
        if self.mode == "ps":
            nn.init.uniform_(self.shift, self.lowest, 0)
            nn.init.uniform_(self.sign, -1, 1)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def _round(self, x: Tensor) -> Tensor:
        if self.rounding == "stochastic" and self.training:
            below = torch.floor(x)
            return below + torch.bernoulli(x - below)
        return torch.round(x)

    def _clamp(self, x: Tensor) -> Tensor:
        """Return exponents, or weights, within their range."""
        if self.mode == "ps":
            return x.clamp(self.lowest, 0)
        return torch.sign(x) * x.abs().clamp(2.0**self.lowest, 1)  # sgn(0) keeps zeros

    def decoded_weight(self) -> Tensor:
        """Return the weight in use, ``(O, I)``: 0 or plus or minus a power of two."""
        parameters = (self.shift, self.sign) if self.mode == "ps" else (self.weight,)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                parameters[0].copy_(self._clamp(parameters[0]))
        key = None if self.training else cache_key(*parameters)
        if key is not None and self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        with torch.no_grad():
            if self.mode == "ps":
                W = torch.exp2(self._round(self._clamp(self.shift))) * torch.sign(self._round(self.sign))
            else:
                w = self._clamp(self.weight)
                W = torch.exp2(self._round(torch.log(w.abs()) / math.log(2))) * torch.sign(w)
        if key is not None:
            self._kept = key, W
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in parameters)):
            return W
        if self.mode == "ps":
            return _PowerOfTwo.apply(self.shift, self.sign, W)  # pyright: ignore[reportReturnType]
        return straight_through(self.weight, W)

    def _fixed(self, v: Tensor) -> Tensor:
        return to_fixed_point(v, self.act_integer_bits, self.act_fraction_bits)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., O)`` of ``x``, ``(..., I)``.

        Raises:
            TypeError: ``x`` is not floating point.
            ValueError: The last axis is not I.
        """
        _check_features(x, self.in_features)
        bias = None if self.bias is None else self._fixed(self.bias)
        return F.linear(self._fixed(x), self.decoded_weight(), bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> ShiftLinear:
        """Return the layer whose weights are those of ``linear``, ``(..., I) -> (..., O)``, rounded to powers of two.

        Args:
            linear: The map.
            **options: Keyword arguments of the class.
        """
        at = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, **{**at, **options})
        with torch.no_grad():
            if layer.mode == "ps":
                sign = torch.sign(linear.weight)
                exponent = torch.round(torch.log2(linear.weight.abs()))
                layer.shift.copy_(layer._clamp(exponent))  # of a zero weight: -inf, clamped
                layer.sign.copy_(sign)
            else:
                layer.weight.copy_(linear.weight)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer.train(linear.training)

    def pack(self) -> PackedShiftLinear:
        """Return the same map with one byte a weight."""
        return PackedShiftLinear(self)

    def extra_repr(self) -> str:
        """Say the sizes."""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, mode={self.mode!r}, "
            f"weight_bits={self.weight_bits}"
        )


def _check_features(x: Tensor, features: int) -> None:
    check_floating("x", x)
    if x.ndim < 1 or x.shape[-1] != features:
        raise ValueError(f"`x` must have {features} features on its last axis, got shape {tuple(x.shape)}.")


class PackedShiftLinear(nn.Module):
    """A :class:`ShiftLinear` for inference with one byte a weight, ``(..., I) -> (..., O)``.

    The byte of the weight ``s 2^-p`` is its sign and ``127 - p``, the exponent of a float32; 0 stands for 0.
    ``forward`` puts the bits in place, a block of rows at a time, and multiplies by BLAS, with the results of the
    layer that was packed up to the rounding of its sums; :meth:`forward_shift` shifts integers.

    Args:
        layer: What to pack; its rounding is the deterministic one.
    """

    codes: Tensor
    bias: Tensor | None

    def __init__(self, layer: ShiftLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.act_integer_bits, self.act_fraction_bits = layer.act_integer_bits, layer.act_fraction_bits
        with torch.no_grad():
            was, layer.training = layer.training, False
            W = layer.decoded_weight()
            layer.training = was
            exponent = torch.where(W == 0, torch.full_like(W, -127), torch.log2(W.abs()).round())
            codes = 127 + exponent - 128 * (W < 0)
            bias = None if layer.bias is None else layer._fixed(layer.bias)
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("bias", bias)

    def decoded_weight(self, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> Tensor:
        """Return the weight, ``(O, I)``, or some of its rows."""
        bits = self.codes[rows].int()  # a negative byte fills the upper bits with its sign
        bits = bits.bitwise_left_shift_(23).bitwise_and_(~(1 << 30))  # exponent below bit 30, sign in bit 31
        return bits.view(torch.float32).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., O)`` of ``x``, ``(..., I)``."""
        _check_features(x, self.in_features)
        fixed = to_fixed_point(x, self.act_integer_bits, self.act_fraction_bits)
        step = max(1, 2**17 // self.in_features)  # weights that stay in a cache while they are used
        bias, y = None if self.bias is None else self.bias.to(x.dtype), []
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            y.append(F.linear(fixed, self.decoded_weight(x.dtype, rows), None if bias is None else bias[rows]))
        return y[0] if len(y) == 1 else torch.cat(y, -1)

    def forward_shift(self, x: Tensor) -> Tensor:
        """Return ``(..., O)`` of ``x``, ``(..., I)``, by shifting and adding integers.

        Inputs and bias are integers of ``2^-F``; ``x >> p`` rounds down, so that each term may be up to ``2^-F`` below
        that of ``forward``. The sums are exact: the shifted integers of each p are added up in float64, which holds
        them without rounding.

        Returns:
            float64.
        """
        _check_features(x, self.in_features)
        unit = 2.0**self.act_fraction_bits
        integers = to_fixed_point(x.double(), self.act_integer_bits, self.act_fraction_bits).mul(unit).long()
        total = x.new_zeros(*x.shape[:-1], self.out_features, dtype=torch.float64)
        decoded = self.decoded_weight(torch.float64)
        for p in range(64):
            weight = 2.0**-p
            signs = (decoded == weight).double() - (decoded == -weight).double()
            if bool(signs.any()):
                total = total + (integers >> p).double() @ signs.T
        return (total + (0 if self.bias is None else self.bias.double() * unit)) / unit

    def extra_repr(self) -> str:
        """Say the sizes."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        expert: Number of the expert of each token, ``(T,)``.
        value: What its output is weighed by, ``(T,)``; None for 1.
        loss: The balance loss, 0-d; None where the gate has none.
    """

    expert: Tensor
    value: Tensor | None
    loss: Tensor | None


class NaiveGate(nn.Module):
    """The official code's default gate: the larger of two logits decides, the output is not weighed.

    Nothing then depends on the logits in a differentiable way, so that this gate is never trained.

    Args:
        in_features: Features I of a token.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, in_features: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.gate = nn.Linear(in_features, 2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Routing:
        """Return the :class:`Routing` of tokens ``(T, I)``."""
        return Routing(self.gate(x).argmax(1), None, None)


class NoisyGate(nn.Module):
    r"""The gate of the paper: tokens go to the more probable expert, whose output is weighed by the probability.

    In training N(0, 1/4) is added to the logits, and the balance loss is
    :math:`SCV(\alpha \sum_x p(x)) + SCV(\alpha \sum_x q(x))` with
    :math:`SCV(z) = \mathrm{var}(z) / \mathrm{mean}(z)^2`, p the probabilities without noise and :math:`q_i` the
    probability that fresh noise would choose expert i (in eval mode, whether it is chosen): loads weighed by the
    experts' costs :math:`\alpha` shall be even.

    Args:
        in_features: Features I of a token.
        costs: Relative costs of the two experts, e.g. measured latencies.
        weigh_counts: Weigh the counts of eval mode by the costs too, which the official code omits.
        device: Of the parameters.
        dtype: Of the parameters.

    Source: You et al., 2023, arXiv:2306.06446, eq. 4 and 5; ``NoisyGate_V2`` of the official code, whose comparison of
    logits with thresholds that are probabilities is mended.
    """

    def __init__(
        self,
        in_features: int,
        *,
        costs: tuple[float, float] = (6.0, 4.0),
        weigh_counts: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.w_gate = nn.Parameter(torch.empty(in_features, 2, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.w_gate, a=math.sqrt(5))
        self.costs, self.weigh_counts, self.deviation = costs, weigh_counts, 0.5

    def forward(self, x: Tensor) -> Routing:
        """Return the :class:`Routing` of tokens ``(T, I)``."""
        clean = x @ self.w_gate
        noisy = clean + self.deviation * torch.randn_like(clean) if self.training else clean
        value, expert = noisy.softmax(1).max(1)
        if self.training:
            load = torch.special.ndtr((clean - noisy.flip(1)) / self.deviation).sum(0)
        else:
            load = F.one_hot(expert, 2).to(clean.dtype).sum(0)
        costs = clean.new_tensor(self.costs)
        load = load * costs if self.training or self.weigh_counts else load
        return Routing(expert, value, _variation(costs * clean.softmax(1).sum(0)) + _variation(load))


def _variation(z: Tensor) -> Tensor:
    """Return the squared coefficient of variation of two sums."""
    z = z if z.dtype == torch.float64 else z.float()
    return z.var() / (z.mean().square() + 1e-10)


class Experts(nn.Module):
    """Two experts, of which each token takes one: an ordinary module and one by shifts, ``(..., I) -> (..., O)``.

    Each expert computes the tokens that were sent to it; in a captured graph, where their numbers must be fixed,
    both experts compute all tokens.

    Args:
        gate: :class:`NaiveGate` or :class:`NoisyGate`.
        ordinary: The expert that multiplies, ``(T, I) -> (T, O)``.
        shift: The expert that shifts, ``(T, I) -> (T, O)``.
        combine: ``"product"``: the output is weighed by the gate's value. ``"logexp"``: it is
            ``log(value exp(output) + 2.2e-16)``, as in the official code: the logarithm of the value is added, values
            below about -36 are cut and those above 88 overflow in float32.

    Raises:
        ValueError: ``combine`` is unknown.
    """

    def __init__(
        self,
        gate: NaiveGate | NoisyGate,
        ordinary: nn.Module,
        shift: nn.Module,
        *,
        combine: Literal["product", "logexp"] = "product",
    ) -> None:
        super().__init__()
        check_choice("combine", combine, ("product", "logexp"))
        self.gate, self.experts, self.combine = gate, nn.ModuleList([ordinary, shift]), combine
        self.last_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., O)`` of tokens ``x``, ``(..., I)``; in training the balance loss is kept as ``last_loss``."""
        tokens = x.flatten(0, -2)
        routing = self.gate(tokens)
        if self.training:
            self.last_loss = routing.loss
        first, second = self.experts
        if torch.compiler.is_compiling():
            y = torch.where((routing.expert == 0).unsqueeze(1), first(tokens), second(tokens))
        else:
            rows = [(routing.expert == i).nonzero().squeeze(1) for i in range(2)]
            parts = [expert(tokens.index_select(0, r)) for expert, r in zip(self.experts, rows, strict=True)]
            y = parts[0].new_empty(len(tokens), parts[0].shape[1])
            for r, part in zip(rows, parts, strict=True):
                y.index_copy_(0, r, part)
        if self.combine == "logexp":
            value = 1.0 if routing.value is None else routing.value.unsqueeze(1)
            y = torch.log(value * torch.exp(y) + torch.finfo(torch.float64).eps)
        elif routing.value is not None:
            y = y * routing.value.unsqueeze(1)
        return y.view(*x.shape[:-1], y.shape[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_loss": None}  # it belongs to a graph, which cannot be copied


def shift_add_experts(
    in_features: int,
    out_features: int,
    bias: bool = True,
    *,
    gate: Literal["noisy", "naive"] = "noisy",
    combine: Literal["product", "logexp"] = "product",
    weight_bits: int = 5,
    costs: tuple[float, float] = (6.0, 4.0),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Experts:
    """Return :class:`Experts` of a linear map and a :class:`ShiftLinear`, ``(..., I) -> (..., O)``.

    Args:
        in_features: I.
        out_features: O.
        bias: Whether the experts add one.
        gate: ``"noisy"`` (the paper's) or ``"naive"``.
        combine: See :class:`Experts`.
        weight_bits: See :class:`ShiftLinear`.
        costs: See :class:`NoisyGate`.
        device: Of the parameters.
        dtype: Of the parameters.
    """
    check_choice("gate", gate, ("noisy", "naive"))
    at: dict[str, Any] = {"device": device, "dtype": dtype}
    linear = nn.Linear(in_features, out_features, bias, **at)
    shift = ShiftLinear(in_features, out_features, bias, weight_bits=weight_bits, **at)
    router = NaiveGate(in_features, **at) if gate == "naive" else NoisyGate(in_features, costs=costs, **at)
    return Experts(router, linear, shift, combine=combine)
