"""Targets, predictors and the masked layer of dynamic pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_choice, check_floating, check_positive, check_shape
from dynakern.layers.vision import fuse_conv_norm

__all__ = ["LayerRecord", "MaskPredictor", "MaskedConv", "filter_response", "mask_bce", "mass_mask", "uniform_mask"]

Mode = Literal["decoupled", "joint"]
Target = Literal["mass", "uniform"]
Pool = Literal["avg", "max"]
Source = Literal["predictor", "target", "none"]

_DELTA = 1e-5  # slack of the authors' comparisons


def filter_response(y: Tensor) -> Tensor:
    """Return the response of each filter, the largest absolute value over space: ``(B, C)`` of ``(B, C, H, W)``."""
    check_shape("y", y, "B C H W")
    return y.abs().amax((2, 3))


def _check_share(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:  # NaN fails too
        raise ValueError(f"`{name}` must be in [0, 1], or None to keep all filters, got {value!r}.")


def mass_mask(response: Tensor, mass: float | None) -> Tensor:
    r"""Keep the strongest filters of each image up to a share of their summed responses.

    With :math:`n = a / \sum_c a` in descending order and s its cumulative sum, a filter is dropped where
    :math:`s - r > 10^{-5}`: the filter that crosses r is dropped too, so that the number kept differs from image to
    image, and is 0 where one filter carries more than r. With r = 1 the filters with :math:`n \le 10^{-5}` are dropped.

    Args:
        response: Non-negative responses a, ``(B, C)``; see :func:`filter_response`.
        mass: Share r in [0, 1]; None keeps all.

    Returns:
        ``(B, C)`` of zeros and ones in the dtype of ``response``; a row of zeros is kept whole.

    Raises:
        ValueError: ``mass`` is out of range, or ``response`` is not 2-d.

    Example:
        >>> mass_mask(torch.tensor([[5.0, 1.0, 3.0, 1.0]]), 0.8)
        tensor([[1., 0., 1., 0.]])
    """
    check_shape("response", response, "B C")
    _check_share("mass", mass)
    if mass is None:
        return torch.ones_like(response)
    total = response.sum(1, keepdim=True)
    share = response / torch.where(total > 0, total, torch.ones_like(total))
    if mass == 1:
        drop = share <= _DELTA
    else:
        ordered, order = share.sort(dim=1, descending=True, stable=True)
        drop = torch.zeros_like(share, dtype=torch.bool).scatter(1, order, ordered.cumsum(1) - mass > _DELTA)
    return (~(drop & (total > 0))).to(response.dtype)


def uniform_mask(response: Tensor, ratio: float | None) -> Tensor:
    """Drop the same number of filters, the weakest, for each image.

    Args:
        response: Non-negative responses, ``(B, C)``; see :func:`filter_response`.
        ratio: Share p in [0, 1]: the ``int(p * C)`` weakest filters are dropped, and all with a response of at most
            1e-5. None keeps all.

    Returns:
        ``(B, C)`` of zeros and ones in the dtype of ``response``.

    Raises:
        ValueError: ``ratio`` is out of range, or ``response`` is not 2-d.
    """
    check_shape("response", response, "B C")
    _check_share("ratio", ratio)
    if ratio is None:
        return torch.ones_like(response)
    weakest = response.argsort(dim=1, stable=True)[:, : int(ratio * response.shape[1])]
    drop = (response <= _DELTA).scatter(1, weakest, True)
    return (~drop).to(response.dtype)


def mask_bce(logits: Tensor, target: Tensor) -> Tensor:
    """Return the binary cross-entropy of ``(B, C, 1, 1)`` logits: mean over the batch, sum over filters, 0-d."""
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(0).sum()


class MaskPredictor(nn.Module):
    """Guess from a layer's input which of its filters will respond.

    Pools the map to ``dim x dim``, flattens it channel by channel, takes the softmax if asked, and applies a linear
    map, ``model.1Conv2dMask``. ``dim`` is 1, or ``round(sqrt(embedding / in_channels))``.

    Args:
        in_channels: Channels of the layer's input.
        out_channels: Filters of the layer.
        embedding: About how many numbers the linear map sees; None for one a channel.
        softmax: Take the softmax over these numbers.
        pool: ``"avg"`` as in the authors' code, or ``"max"`` as in the paper's text.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: ``embedding`` is too small for the number of channels, or an option is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding: int | None = None,
        softmax: bool = True,
        pool: Pool = "avg",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("pool", pool, ("avg", "max"))
        if embedding is not None:
            check_positive("embedding", embedding, integer=True)
        self.dim = 1 if embedding is None else round((embedding / in_channels) ** 0.5)
        if self.dim == 0:
            raise ValueError(f"`embedding` = {embedding} leaves no input for a predictor of {in_channels} channels.")
        self.softmax, self.pool = softmax, pool
        linear = nn.Conv2d(in_channels * self.dim**2, out_channels, 1, device=device, dtype=dtype)
        self.model = nn.ModuleDict({"1Conv2dMask": linear})

    @property
    def linear(self) -> nn.Conv2d:
        """The linear map, stored as a 1x1 convolution."""
        found = self.model["1Conv2dMask"]
        assert isinstance(found, nn.Conv2d)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, out_channels, 1, 1)`` of a map ``(B, in_channels, H, W)``."""
        if 0 in x.shape[1:]:
            raise ValueError(f"A mask predictor needs pixels to look at, got a map of shape {tuple(x.shape)}.")
        pool = F.adaptive_avg_pool2d if self.pool == "avg" else F.adaptive_max_pool2d
        z = pool(x, self.dim).flatten(1)
        z = z.softmax(1) if self.softmax else z
        linear = self.linear
        return F.linear(z, linear.weight.flatten(1), linear.bias)[:, :, None, None]  # faster than a 1x1 convolution

    def extra_repr(self) -> str:
        """Say the options."""
        return f"dim={self.dim}, softmax={self.softmax}, pool={self.pool!r}"


@dataclass(frozen=True)
class LayerRecord:
    """What one masked layer did in a forward pass.

    Attributes:
        logits: The predictor's logits, ``(B, C, 1, 1)``.
        target: Which filters to keep, from the layer's own responses, ``(B, C, 1, 1)``.
        mask: Which filters were kept, ``(B, C, 1, 1)``.
        pixels: Pixels of the output map.
    """

    logits: Tensor
    target: Tensor
    mask: Tensor
    pixels: int


class MaskedConv(nn.Module):
    """A convolution, its batch norm and its activation, whose filters are switched off image by image.

    The output is ``y * m`` with ``y = activation(bn(conv(x)) + residual)``, and m = 1 where the predictor's sigmoid
    exceeds 1/2; no gradient passes through m. The predictor's target is :func:`mass_mask` or :func:`uniform_mask` of
    y's responses.

    Args:
        conv: The convolution.
        bn: Its batch norm (the identity once folded).
        activation: The activation, with value 0 at 0; None for none.
        masked: Whether there is a predictor; without, the layer is dense.
        mass: Share r of responses that :func:`mass_mask` keeps, or p that :func:`uniform_mask` drops; None keeps all.
        target: ``"mass"`` or ``"uniform"``.
        mode: ``"decoupled"``: the predictor's loss does not reach the layer's input; ``"joint"``: it does.
        embedding: See :class:`MaskPredictor`.
        softmax: See :class:`MaskPredictor`.
        pool: See :class:`MaskPredictor`.
        safe: Keep at least the filter of the highest logit, and of the highest response in the target.
        activates: Apply the activation; False where the surrounding network applies it after this layer.

    Raises:
        ValueError: An option is unknown or out of range.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        bn: nn.Module,
        activation: nn.Module | None = None,
        *,
        masked: bool = True,
        mass: float | None = 0.9,
        target: Target = "mass",
        mode: Mode = "decoupled",
        embedding: int | None = None,
        softmax: bool = True,
        pool: Pool = "avg",
        safe: bool = False,
        activates: bool = True,
    ) -> None:
        super().__init__()
        _check_share("mass", mass)
        check_choice("target", target, ("mass", "uniform"))
        check_choice("mode", mode, ("decoupled", "joint"))
        self.conv, self.bn = conv, bn
        self.activation = activation if activation is not None else nn.Identity()
        self.mass, self.target, self.mode, self.safe, self.activates = mass, target, mode, safe, activates
        self.predictor_options = {"embedding": embedding, "softmax": softmax, "pool": pool}
        self.mask: MaskPredictor | None = None
        self.feeder: str | None = None  # the layer whose mask leaves zeros in this one's input, by name in the network
        self.source: Source = "predictor"  # of the masks that are applied
        self.recording = False  # outside training too
        self.record: LayerRecord | None = None
        if masked:
            self.add_predictor()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the record of the last pass out of copies: it belongs to that pass's graph."""
        return {**self.__dict__, "record": None}

    def add_predictor(self) -> None:
        """Give the layer a freshly drawn predictor."""
        weight = self.conv.weight
        at = {"device": weight.device, "dtype": weight.dtype}
        self.mask = MaskPredictor(self.conv.in_channels, self.conv.out_channels, **self.predictor_options, **at)

    def make_target(self, y: Tensor) -> Tensor:
        """Return the target ``(B, C, 1, 1)`` of activations ``(B, C, H, W)``."""
        response = filter_response(y.detach())
        found = (mass_mask if self.target == "mass" else uniform_mask)(response, self.mass)
        return (_keep_best(found, response) if self.safe else found)[:, :, None, None]

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the mask, both ``(B, C, 1, 1)``, for an input ``(B, C_in, H, W)``."""
        assert self.mask is not None
        logits = self.mask(x.detach() if self.mode == "decoupled" else x)
        return logits, self.decide(logits.detach().flatten(1)).to(logits.dtype)[:, :, None, None]

    def decide(self, logits: Tensor) -> Tensor:
        """Return which filters logits ``(B, C)`` switch on, ``(B, C)`` of booleans."""
        mask = logits.sigmoid() > 0.5
        return _keep_best(mask, logits) if self.safe else mask

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the masked map ``(B, C, H', W')`` of ``(B, C_in, H, W)`` and perhaps a ``residual`` of the result."""
        check_floating("x", x)
        z = self.bn(self.conv(x))
        z = z if residual is None else z + residual
        y = self.activation(z) if self.activates else z
        if self.mask is None or self.source == "none":
            return y
        logits, mask = self.choose(x)
        if self.training or self.recording:
            target = self.make_target(y if self.activates else self.activation(z.detach()))
            mask = target if self.source == "target" else mask
            self.record = LayerRecord(logits, target, mask, y.shape[2] * y.shape[3])
        return y * mask

    def fold(self) -> None:
        """Fold the batch norm into the convolution, in place (eval mode)."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.conv, self.bn = fuse_conv_norm(self.conv, self.bn), nn.Identity()

    def extra_repr(self) -> str:
        """Say the options."""
        return f"mass={self.mass}, target={self.target!r}, mode={self.mode!r}, safe={self.safe}"


def _keep_best(mask: Tensor, score: Tensor) -> Tensor:
    """Return a mask ``(B, C)`` with the entry of the highest score switched on."""
    return mask.scatter(1, score.argmax(1, keepdim=True), 1)
