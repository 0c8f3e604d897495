"""RepLKNet: large kernels widen the effective receptive field; merging the parallel kernel is exact.

Claims behind Ding et al., 2022, arXiv:2203.06717, and Zhang, Ding and Yue, 2025, arXiv:2410.08049, at a size for a
laptop: (1) two blocks with 13x13 kernels see at least five times the area of 24 blocks with 3x3 kernels; (2) at fixed
depth the area grows with the kernel; (3) merging changes nothing. A larger shape bias was not seen at this size and is
not claimed, nor are the tables on ImageNet.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dynakern.claims.run import Measurement, Progress
from dynakern.claims.unireplknet import block_stack, receptive_area, wide_without_deep
from dynakern.vision.replknet import RepLKNet, sweep_kernels

__all__ = ["CLAIMS"]


def area_grows_with_kernel(progress: Progress) -> Iterator[Measurement]:
    """Receptive area of two blocks with kernels of 3, 7 and 13 pixels: strictly increasing."""
    networks = sweep_kernels(lambda size: block_stack(size, 2, 0), (3, 7, 13))
    areas = {}
    for index, (size, network) in enumerate(networks.items()):
        progress(f"{size} x {size}", index / 3)
        areas[size] = receptive_area(network)
    yield Measurement(name="area at 3 x 3", value=areas[3], unit="share")
    for smaller, larger in ((3, 7), (7, 13)):
        least = areas[smaller] * (1 + 1e-9)
        name = f"area at {larger} x {larger}, baseline {smaller} x {smaller}"
        yield Measurement(name=name, value=areas[larger], unit="share", at_least=least, baseline=areas[smaller])


def merging(progress: Progress) -> Iterator[Measurement]:
    """A network with 13x13 and 5x5 kernels and random norms, merged and fused, is the same function."""
    torch.manual_seed(0)
    network = RepLKNet((13, 13), (1, 1), (16, 24), num_classes=10).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.3)  # pyright: ignore[reportArgumentType]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # pyright: ignore[reportArgumentType]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(x)
        error = float((network.fuse()(x) - expected).abs().max())
    yield Measurement(name="largest difference of the logits", value=error, unit="absolute", at_most=1e-5)
    yield Measurement(name="largest logit", value=float(expected.abs().max()), unit="absolute")


CLAIMS = (wide_without_deep, area_grows_with_kernel, merging)
