"""InceptionNeXt: the split convolution keeps the accuracy of a large one and is several times faster.

Claims behind Yu et al., 2024, arXiv:2303.16900, at a size for a laptop: (1) on digits, the inception mixer is as good
as a 7x7 depthwise convolution and much better than none; (2) its forward and backward pass takes at most half the time
of the 7x7 convolution, each in its better memory layout. Accuracies and throughputs on ImageNet are not measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.claims.digits import divide, read_digits
from dynakern.claims.run import Measurement, Progress
from dynakern.measure import time_interleaved
from dynakern.vision.inception_next import InceptionDWConv2d, InceptionNeXt

__all__ = ["CLAIMS"]


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 1,200 training and 597 test digits, enlarged to 32 x 32 and standardised, and their labels."""
    x, y = read_digits()
    x, y, x_test, y_test = divide(F.interpolate(x, (32, 32), mode="bilinear", align_corners=False), y)
    mean, std = x.mean(), x.std()
    return (x - mean) / std, y, (x_test - mean) / std, y_test


_MIXERS: dict[str, Callable[[int], nn.Module]] = {
    "inception": InceptionDWConv2d,
    "7x7 depthwise": lambda channels: nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
    "none": lambda channels: nn.Identity(),
}


def _accuracy(mixer: str, progress: Progress, done: float) -> float:
    x, y, x_test, y_test = _digits()
    torch.manual_seed(0)
    network = InceptionNeXt((2, 2), (32, 64), in_chans=1, num_classes=10, mlp_ratios=(2, 2), layer_scale=1.0)
    for stage in network.stages:
        for block in stage.blocks:  # pyright: ignore[reportGeneralTypeIssues]
            block.token_mixer = _MIXERS[mixer](block.norm.num_features)
    epochs, batch, generator = 9, 64, torch.Generator().manual_seed(0)
    steps = -(-len(x) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            loss = F.cross_entropy(network(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress(f"{mixer}, epoch {epoch + 1}", done + (epoch + 1) / epochs / len(_MIXERS))
    with torch.no_grad():
        return float((network.eval()(x_test).argmax(1) == y_test).double().mean())


def accuracy(progress: Progress) -> Iterator[Measurement]:
    """Test accuracy on digits with the inception mixer, with a 7x7 depthwise convolution and with no mixer."""
    found = {mixer: _accuracy(mixer, progress, index / len(_MIXERS)) for index, mixer in enumerate(_MIXERS)}
    ours, large, none = found.values()
    name = "accuracy, inception mixer, baseline "
    yield Measurement(name=name + "7x7 depthwise", value=ours, unit="accuracy", at_least=large - 0.02, baseline=large)
    yield Measurement(name=name + "no mixer", value=ours, unit="accuracy", at_least=none + 0.08, baseline=none)


def _both(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    leaf, weight = x.detach().requires_grad_(), torch.randn_like(x)
    return lambda: torch.autograd.grad(layer(leaf), [leaf, *layer.parameters()], weight)


def mixer_speed(progress: Progress) -> Iterator[Measurement]:
    """Forward and backward of the mixer at (2, 96, 56, 56) against a 7x7 depthwise convolution, better layouts."""
    torch.manual_seed(0)
    x = torch.randn(2, 96, 56, 56)
    functions = {}
    for mixer in ("inception", "7x7 depthwise"):
        for label, layout in (("NCHW", torch.contiguous_format), ("channels last", torch.channels_last)):
            layer = _MIXERS[mixer](96).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
            functions[f"{mixer}, {label}"] = _both(layer, x.contiguous(memory_format=layout))
    progress("timing", 0.2)
    times = {name: t.median for name, t in time_interleaved(functions, repeats=7).items()}
    best = {mixer: min(t for name, t in times.items() if name.startswith(mixer)) for mixer in ("inception", "7x7")}
    ratio = best["7x7"] / best["inception"]
    yield Measurement(name="7x7 depthwise / inception, (2, 96, 56, 56)", value=ratio, unit="x", at_least=2)
    for name, t in times.items():
        yield Measurement(name=f"{name} / fastest inception", value=t / best["inception"], unit="x")


CLAIMS = (accuracy, mixer_speed)
