r"""Effective receptive field: how far the pixels lie that really move the centre of a feature map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["ReceptiveField", "effective_receptive_field"]


@dataclass(frozen=True)
class ReceptiveField:
    """Contribution of every input pixel to the centre of a feature map.

    Attributes:
        map: Contributions on a logarithmic scale, largest 1, ``(H, W)``.
        contributions: Their mean over images before the logarithm, ``(H, W)``.
        skipped: Images left out because a gradient was not finite.
    """

    map: Tensor
    contributions: Tensor
    skipped: int = 0

    def side(self, threshold: float = 0.99) -> int | None:
        """Return the side of the smallest centred square with more than ``threshold`` of the whole; None if none has.

        Raises:
            ValueError: ``threshold`` is outside (0, 1).
        """
        if not 0 < threshold < 1:
            raise ValueError(f"`threshold` must be in (0, 1), got {threshold!r}.")
        height, width = self.map.shape
        cy, cx, total = height // 2, width // 2, float(self.map.sum())
        for i in range(1, height // 2):
            inside = self.map[max(0, cy - i) : cy + i + 1, max(0, cx - i) : cx + i + 1]
            if float(inside.sum()) > threshold * total:
                return 2 * i + 1
        return None

    def ratio(self, threshold: float = 0.99) -> float | None:
        """Return the area of that square as a fraction of the image: the high-contribution area ratio.

        Raises:
            ValueError: ``threshold`` is outside (0, 1).
        """
        side = self.side(threshold)
        return None if side is None else side**2 / self.map.numel()


def effective_receptive_field(
    network: nn.Module | Callable[[Tensor], Tensor], images: Tensor, *, batch_size: int = 1
) -> ReceptiveField:
    r"""Measure the effective receptive field of a network that maps images to feature maps.

    With f(x) the map, :math:`S = \sum_c \mathrm{relu}\, f(x)_{c, \lfloor H'/2\rfloor, \lfloor W'/2\rfloor}` and
    :math:`G = \mathrm{relu}\, \partial S/\partial x` summed over the input channels and averaged over images, the map
    is :math:`D = \log_{10}(G + 1)` divided by its maximum. Costs a forward and a backward pass to the input an image. A
    module is run in eval mode, and put back.

    Args:
        network: Maps ``(B, C, H, W)`` to ``(B, C', H', W')``, for instance ``model.forward_features``.
        images: ``(N, C, H, W)``, H and W at least 4.
        batch_size: Images a pass; samples must not depend on each other, as in eval mode.

    Returns:
        The :class:`ReceptiveField`; ``.ratio(0.99)`` is the published figure.

    Raises:
        ValueError: Shapes are wrong, the network's output is no map, or all gradients vanish or are not finite.

    Source: Ding et al., 2022, arXiv:2203.06717, and Zhang, Ding and Yue, 2025, arXiv:2410.08049; the measure of Luo et
    al., 2016, arXiv:1701.04128.
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"`images` must have shape (N, C, H, W) with N >= 1, got {tuple(images.shape)}.")
    if min(images.shape[2:]) < 4:
        raise ValueError(f"`images` must have at least 4 x 4 pixels, got shape {tuple(images.shape)}.")
    module = network if isinstance(network, nn.Module) else getattr(network, "__self__", None)
    training = isinstance(module, nn.Module) and module.training
    if isinstance(module, nn.Module):
        module.eval()
    try:
        gradients = torch.cat([_gradients(network, chunk) for chunk in images.split(batch_size)])
    finally:
        if isinstance(module, nn.Module):
            module.train(training)
    finite = torch.isfinite(gradients).all((1, 2))
    if not bool(finite.any()):
        raise ValueError("`network` has no finite gradient at any of the images.")
    contributions = gradients[finite].mean(0)
    scaled = torch.log10(contributions + 1)
    if float(scaled.max()) == 0:
        raise ValueError("The centre of the network's map does not increase with any pixel of these images.")
    return ReceptiveField(scaled / scaled.max(), contributions, int((~finite).sum()))


def _gradients(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the positive gradients of the centre, summed over channels, ``(B, H, W)``."""
    x = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = network(x)
        if y.ndim != 4:
            raise ValueError(f"`network` must return maps (B, C, H, W), got shape {tuple(y.shape)}.")
        centre = y[:, :, y.shape[2] // 2, y.shape[3] // 2]
        (gradient,) = torch.autograd.grad(centre.relu().sum(), x)
    return gradient.relu().sum(1)
