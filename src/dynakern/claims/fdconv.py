"""FDConv: kernels of disjoint frequencies stay diverse at the price of one kernel, and bands weighed by place pay off.

Claims of Chen et al., 2025, arXiv:2503.18783. Its detection and segmentation results (Mask R-CNN with ResNet-50 from
39.6 to 42.4 box AP for 3.6 M more parameters) need COCO and many GPUs, and are not measured here. Measured, at a
laptop's scale: the kernels of the groups answer to different frequencies, while parallel kernels of a dynamic
convolution trained beside them answer alike; weighing bands pixel by pixel restores photographs that are noisy on one
side only, better than a direct convolution of the same features; a converted convolution starts as it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dynakern.claims.run import Measurement, Progress
from dynakern.measure import count_parameters
from dynakern.vision.fdconv import BandModulation, FDConv

__all__ = ["CLAIMS"]

SIZE, BATCH, SIGMA = 32, 8, 0.2


def _photographs() -> list[Tensor]:
    """Return scikit-learn's two sample photographs in grey, ``(H, W)`` in [0, 1]."""
    from sklearn.datasets import load_sample_images

    return [torch.from_numpy(image.mean(2) / 255).float() for image in load_sample_images().images]


def _patches(side: str, count: int, generator: torch.Generator) -> Tensor:
    """Draw patches ``(count, 1, 32, 32)`` from the left 70 % ("train") or the right 30 % ("test")."""
    images, patches = _photographs(), []
    for _ in range(count):
        image = images[int(torch.randint(len(images), (), generator=generator))]
        cut = int(0.7 * image.shape[1])
        image = image[:, :cut] if side == "train" else image[:, cut:]
        i, j = (int(torch.randint(n - SIZE + 1, (), generator=generator)) for n in image.shape)
        patches.append(image[i : i + SIZE, j : j + SIZE])
    return torch.stack(patches).unsqueeze(1)


def _noise(patches: Tensor, generator: torch.Generator, *, half: bool) -> Tensor:
    """Add noise of deviation 0.2, or only on one side of a random straight line through each patch."""
    noise = SIGMA * torch.randn(patches.shape, generator=generator)
    if half:
        angle = 2 * torch.pi * torch.rand(len(patches), 1, 1, 1, generator=generator)
        offset = (torch.rand(len(patches), 1, 1, 1, generator=generator) - 0.5) * SIZE / 2
        grid = torch.arange(SIZE) - (SIZE - 1) / 2
        noise = noise * (angle.cos() * grid + angle.sin() * grid[:, None] > offset)
    return patches + noise


def _train(
    network: nn.Module, steps: int, seed: int, *, half: bool, report: Callable[[float], None]
) -> Callable[[Tensor], Tensor]:
    """Train to denoise: AdamW with one cycle up to 5e-3, mean squared error."""
    generator = torch.Generator().manual_seed(seed)
    clean = _patches("train", steps * BATCH, generator)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    network.train()
    for step, batch in enumerate(clean.split(BATCH)):
        loss = (network(_noise(batch, generator, half=half)) - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 10 == 0:
            report(step / steps)
    return network.eval()


class _DynamicConv(nn.Module):
    """Parallel kernels mixed by a softmax attention of the image (Chen et al., 2020, arXiv:1912.03458)."""

    def __init__(self, channels: int, count: int = 4, temperature: float = 30.0) -> None:
        super().__init__()
        kernels = [nn.Conv2d(channels, channels, 3) for _ in range(count)]
        self.weight = nn.Parameter(torch.stack([conv.weight.detach() for conv in kernels]))
        self.bias = nn.Parameter(torch.zeros(count, channels))
        self.attention = nn.Sequential(nn.Linear(channels, channels // 4), nn.ReLU(), nn.Linear(channels // 4, count))
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        a = (self.attention(x.mean((2, 3))) / self.temperature).softmax(1)
        weight, bias = torch.einsum("bk,koihw->boihw", a, self.weight), a @ self.bias
        y = [nn.functional.conv2d(x_[None], w, b, padding=1) for x_, w, b in zip(x, weight, bias, strict=True)]
        return torch.cat(y)


def _similarity(kernels: Tensor) -> float:
    """Return the mean cosine between the kernels' mean 8 x 8 frequency responses; kernels ``(K, O, I, 3, 3)``."""
    response = nn.functional.normalize(torch.fft.fft2(kernels, s=(8, 8)).abs().mean((1, 2)).flatten(1), dim=1)
    cosine = response @ response.T
    return float(cosine[~torch.eye(len(cosine), dtype=torch.bool)].mean())


def _group_kernels(layer: FDConv) -> Tensor:
    """Return the kernel of each frequency group alone, ``(K, O, I, 3, 3)``."""
    with torch.no_grad():
        return layer._mix(torch.eye(layer.kernel_num)).permute(0, 1, 3, 2, 4)


def diversity(progress: Progress) -> Iterator[Measurement]:
    """Kernels of frequency groups answer differently, parallel kernels alike, after the same training."""
    layers: dict[str, nn.Module] = {}
    for index, name in enumerate(("FDConv", "dynamic convolution")):
        torch.manual_seed(0)
        layer = FDConv(32, 32, 3, padding=1, kernel_num=16) if index == 0 else _DynamicConv(32)
        body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(32, 1, 3, padding=1)
        )
        _train(body, 150, 0, half=False, report=lambda f, name=name, i=index: progress(f"training {name}", (i + f) / 2))
        layers[name] = layer
    ours, theirs = layers["FDConv"], layers["dynamic convolution"]
    assert isinstance(ours, FDConv)
    kernels = _group_kernels(ours)
    joint = torch.fft.fft2(kernels.transpose(2, 3).reshape(16, 96, 96)).abs().flatten(1)
    joint = nn.functional.normalize(joint, dim=1)
    overlap = float((joint @ joint.T - torch.eye(16)).abs().max())
    similar = _similarity(theirs.weight.detach())  # pyright: ignore[reportArgumentType, reportCallIssue]
    yield Measurement(
        name="largest overlap of groups in the joint spectrum", value=overlap, unit="cosine", at_most=1e-5
    )
    yield Measurement(
        name="likeness of groups", value=_similarity(kernels), unit="cosine", at_most=0.95, baseline=similar
    )
    yield Measurement(name="likeness of parallel kernels", value=similar, unit="cosine", at_least=0.95)


def parameters(progress: Progress) -> Iterator[Measurement]:
    """64 groups cost less than a third of a convolution more; four parallel kernels cost four convolutions."""
    conv = count_parameters(nn.Conv2d(64, 64, 3))
    ours, theirs = count_parameters(FDConv(64, 64, 3, kernel_num=64)), count_parameters(_DynamicConv(64))
    yield Measurement(name="FDConv of 64 groups", value=ours / conv, unit="x", at_most=1.3, baseline=theirs / conv)
    yield Measurement(name="four parallel kernels", value=theirs / conv, unit="x", at_least=3.8, at_most=4.2)


class _Restorer(nn.Module):
    """Three convolutions, and what they steer: gates of bands, a residual, or nothing (gates that are constant)."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.head = head
        self.bands = BandModulation(12)
        if head == "static":
            self.logits = nn.Parameter(torch.zeros(4))
            self.bands.requires_grad_(False)
            return
        widths = (1, 12, 12, 12)
        self.trunk = nn.Sequential(*(m for i in range(3) for m in (nn.Conv2d(widths[i], 12, 3, padding=1), nn.ReLU())))
        if head == "residual":
            self.out = nn.Conv2d(12, 1, 3, padding=1)
            del self.bands

    def forward(self, x: Tensor) -> Tensor:
        if self.head == "bands":
            return self.bands(x, self.trunk(x))
        if self.head == "residual":
            return x + self.out(self.trunk(x))
        return torch.einsum("j,jbchw->bchw", 2 * torch.sigmoid(self.logits), _split(self.bands, x))


def _split(bands: BandModulation, x: Tensor) -> Tensor:
    """Return the four bands of maps, ``(4, B, C, H, W)``; they sum to ``x``."""
    edges = [x, *bands.low_passes(x), torch.zeros_like(x)]
    return torch.stack([a - b for a, b in itertools.pairwise(edges)])


def _best_constant(noisy: Tensor, clean: Tensor) -> float:
    """Return the error of the constant gains that fit these very patches best."""
    parts = _split(BandModulation(1), noisy).flatten(1).T.double()
    gains = torch.linalg.lstsq(parts, clean.flatten()[:, None].double()).solution
    return float((parts @ gains - clean.flatten()[:, None]).square().mean())


def bands_by_place(progress: Progress) -> Iterator[Measurement]:
    """Photographs noisy on one side: gates of bands beat a residual convolution and constant gates."""
    for seed in range(2):
        generator = torch.Generator().manual_seed(1000 + seed)
        clean = _patches("test", 128, generator)
        noisy, error = _noise(clean, generator, half=True), {}
        for index, head in enumerate(("static", "residual", "bands")):
            torch.manual_seed(seed)
            network = _Restorer(head)
            done = 3 * seed + index
            _train(network, 250, seed, half=True, report=lambda f, h=head, d=done: progress(f"{h}", (d + f) / 6))
            with torch.no_grad():
                error[head] = float((network(noisy) - clean).square().mean())
        before, best = float((noisy - clean).square().mean()), _best_constant(noisy, clean)
        yield Measurement(name=f"constant gates, seed {seed}", value=error["static"], unit="MSE", baseline=before)
        yield Measurement(
            name=f"best constant gains in hindsight, seed {seed}", value=best, unit="MSE", baseline=before
        )
        yield Measurement(
            name=f"residual convolution, seed {seed}", value=error["residual"], unit="MSE", baseline=before
        )
        yield Measurement(
            name=f"gates of bands, seed {seed}",
            value=error["bands"],
            unit="MSE",
            at_most=min(0.9 * error["residual"], 0.4 * error["static"]),
            baseline=error["residual"],
        )


def conversion(progress: Progress) -> Iterator[Measurement]:
    """A converted convolution starts as it was."""
    worst = 0.0
    for seed in range(5):
        torch.manual_seed(seed)
        conv, x = nn.Conv2d(32, 48, 3, padding=1), torch.randn(2, 32, 20, 20)
        with torch.no_grad():
            y = conv(x)
            difference = FDConv.from_conv(conv, kernel_num=16).eval()(x) - y
        worst = max(worst, float(difference.abs().max() / y.abs().max()))
    yield Measurement(name="largest deviation from the convolution", value=worst, unit="relative", at_most=1e-4)


CLAIMS = (diversity, parameters, bands_by_place, conversion)
