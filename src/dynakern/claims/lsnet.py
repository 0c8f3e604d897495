"""LSNet: small kernels that a wide view chooses beat static ones, and applying them is cheap.

Claims behind Wang et al., 2025, arXiv:2503.23135, at a size for a laptop: (1) on digits at random places in noise, the
large-small convolution is at least as good as a static 7x7 depthwise convolution of as many parameters and clearly
better than a 3x3 one; (2) small-kernel aggregation is several times faster than by unfolding; (3) fusing changes
nothing. The tables on ImageNet are not measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.claims.digits import divide, read_digits
from dynakern.claims.run import Measurement, Progress
from dynakern.measure import count_parameters, time_interleaved
from dynakern.ops import ska
from dynakern.testing import relative_error
from dynakern.vision.lsnet import LSConv, LSNet

__all__ = ["CLAIMS"]


def _placed_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 1,200 training and 597 test digits of 12 x 12 pixels at random places of 24 x 24, with noise."""
    generator = torch.Generator().manual_seed(0)
    small, y = read_digits()
    small = F.interpolate(small, (12, 12), mode="bilinear", align_corners=False)
    x = torch.zeros(len(small), 1, 24, 24)
    for image, digit, (top, left) in zip(x, small, torch.randint(13, (len(x), 2), generator=generator), strict=True):
        image[:, top : top + 12, left : left + 12] = digit
    x += 0.15 * torch.randn(x.shape, generator=generator)
    return divide(x, y)


class _Skip(nn.Module):
    """A depthwise convolution with a norm, added to its input."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


class _Mix(nn.Module):
    """A mixer, then a residual pair of 1x1 convolutions with norms."""

    def __init__(self, mixer: nn.Module, channels: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.ffn = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.Conv2d(2 * channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(x)
        return x + self.ffn(x)


_MIXERS: dict[str, Callable[[], nn.Module]] = {
    "large-small": lambda: LSConv(16),
    "7x7 depthwise": lambda: _Skip(16, 7),
    "3x3 depthwise": lambda: _Skip(16, 3),
}


def _network(mixer: str) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        *(_Mix(_MIXERS[mixer](), 16) for _ in range(2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(16),
        nn.Linear(16, 10),
    )


def _accuracy(mixer: str, seed: int, progress: Progress, done: float) -> float:
    x, y, x_test, y_test = _placed_digits()
    torch.manual_seed(seed)
    network, generator = _network(mixer), torch.Generator().manual_seed(seed)
    epochs, batch = 10, 64
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.03)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * -(-len(x) // batch))
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            loss = F.cross_entropy(network(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress(f"{mixer}, seed {seed}, epoch {epoch + 1}", done + (epoch + 1) / epochs / 6)
    with torch.no_grad():
        return float((network.eval()(x_test).argmax(1) == y_test).double().mean())


def dynamic_kernels(progress: Progress) -> Iterator[Measurement]:
    """Test accuracy on placed digits, mean of two seeds: large-small, static 7x7 and static 3x3 convolutions."""
    means = {}
    for index, mixer in enumerate(_MIXERS):
        scores = [_accuracy(mixer, seed, progress, (2 * index + seed) / 6) for seed in range(2)]
        means[mixer] = sum(scores) / 2
    ours, seven, three = means.values()
    name = "accuracy, large-small, baseline "
    yield Measurement(name=name + "7x7 depthwise", value=ours, unit="accuracy", at_least=seven, baseline=seven)
    yield Measurement(name=name + "3x3 depthwise", value=ours, unit="accuracy", at_least=three + 0.05, baseline=three)
    for mixer in _MIXERS:
        yield Measurement(name=f"parameters, {mixer}", value=count_parameters(_network(mixer)), unit="parameters")


def _unfolded(x: Tensor, w: Tensor) -> Tensor:
    """Aggregate by unfolding all neighbourhoods."""
    batch, channels, height, width = x.shape
    patches = F.unfold(x, 3, padding=1).view(batch, channels // w.shape[1], w.shape[1], 9, height, width)
    return (patches * w.unsqueeze(1)).sum(3).flatten(1, 2)


def aggregation_speed(progress: Progress) -> Iterator[Measurement]:
    """Small-kernel aggregation against unfolding: the same numbers, at least 3 times as fast."""
    for index, shape in enumerate(((8, 128, 14, 14), (1, 128, 28, 28))):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator)
        w = torch.randn(shape[0], shape[1] // 8, 9, *shape[2:], generator=generator)
        difference = float((ska(x, w) - _unfolded(x, w)).abs().max())
        yield Measurement(name=f"largest difference, {shape}", value=difference, unit="absolute", at_most=2e-6)
        progress(f"timing {shape}", index / 2)
        times = time_interleaved(
            {"ours": lambda x=x, w=w: ska(x, w), "unfold": lambda x=x, w=w: _unfolded(x, w)}, repeats=15
        )
        ratio = times["unfold"].median / times["ours"].median
        yield Measurement(name=f"unfold / ours, {shape}", value=ratio, unit="x", at_least=3)


def fusing(progress: Progress) -> Iterator[Measurement]:
    """A fused network with random norms is the same function."""
    torch.manual_seed(0)
    network = LSNet((16, 24, 32, 48), (2, 2, 2, 2), (2, 2, 2, 3), (8, 8, 8, 8), img_size=64, num_classes=10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)  # pyright: ignore[reportArgumentType]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # pyright: ignore[reportArgumentType]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        error = relative_error(network.eval().fuse()(x), network(x))
    yield Measurement(name="relative difference of the logits", value=error, unit="relative", at_most=1e-5)


CLAIMS = (dynamic_kernels, aggregation_speed, fusing)
