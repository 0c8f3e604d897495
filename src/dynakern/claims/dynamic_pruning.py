"""Dynamic pruning: one number sets the budget, and filters that an image does not need are really left out.

Claims behind Elkerdawy et al., 2022, arXiv:2110.08232, at a size for a laptop: (1) a VGG trained on scikit-learn's
digits and fine-tuned with masks saves at least a quarter of its multiply-adds at mass 0.8 and 70 % at mass 0.6, at a
small loss of accuracy (medians of three seeds, fine-tuned in batches of 10); the saving grows as the mass falls, and
the estimate before training has the same order; (2) computing only the active filters of each image gives the masked
network's numbers, faster than the dense network where 70 % of the multiply-adds are saved. Multiply-adds are counted
as the authors count them. CIFAR-10 and ImageNet are not measured here, and no claim is made that masks that follow the
image beat the same number of filters removed for good: on digits they hardly follow it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.adaptive.dynamic_pruning import VGG, DynamicNetwork, DynamicPruner, ftwt_vgg16_bn
from dynakern.claims.digits import divide, read_digits
from dynakern.claims.run import Measurement, Progress
from dynakern.measure import time_interleaved

__all__ = ["CLAIMS"]

_Data = tuple[Tensor, Tensor]


def _digits() -> tuple[_Data, _Data]:
    """Return 1,200 training and 597 test digits as images of 3 x 16 x 16 pixels, with labels."""
    x, y = read_digits()
    x = F.interpolate(x, (16, 16), mode="bilinear", align_corners=False).repeat(1, 3, 1, 1)
    x, y, x_test, y_test = divide(x, y)
    return (x, y), (x_test, y_test)


def _batches(data: _Data, size: int, generator: torch.Generator) -> Iterator[_Data]:
    for rows in torch.randperm(len(data[0]), generator=generator).split(size):
        yield data[0][rows], data[1][rows]


def _pretrain(train: _Data) -> VGG:
    torch.manual_seed(0)
    network, generator = VGG((32, "M", 48, 48, "M", 64, 64, "M"), masked=False), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5 * 24)
    for _ in range(5):
        for x, y in _batches(train, 50, generator):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def _fine_tune(network: DynamicNetwork, train: _Data, seed: int) -> None:
    epochs, generator = 6, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        [
            {"params": network.backbone_parameters(), "lr": 0.01, "weight_decay": 5e-4},
            {"params": network.predictor_parameters(), "lr": 0.02},
        ],
        momentum=0.9,
    )
    network.train()
    for epoch in range(epochs):
        network.cool_down(epoch, epochs, 0.5)
        for x, y in _batches(train, 10, generator):
            optimizer.zero_grad()
            (F.cross_entropy(network(x), y) + network.auxiliary_loss()).backward()
            optimizer.step()
    network.eval()


def _accuracy(network: nn.Module, test: _Data) -> float:
    with torch.no_grad():
        return float((network(test[0]).argmax(1) == test[1]).double().mean())


def budget(progress: Progress) -> Iterator[Measurement]:
    """Digits after fine-tuning with mass 0.9, 0.8 and 0.6, medians of three seeds, beside the dense network."""
    train, test = _digits()
    dense = _pretrain(train)
    before = _accuracy(dense, test)
    yield Measurement(name="accuracy, dense", value=before, unit="accuracy")
    bounds = {0.9: (None, None), 0.8: (0.25, 0.015), 0.6: (0.70, 0.035)}
    estimated, saved = [], []
    for index, (mass, (least, most)) in enumerate(bounds.items()):
        reports = []
        for seed in range(3):
            torch.manual_seed(seed)
            network = DynamicPruner(dense, mass=mass, softmax=False)
            if seed == 0:
                estimated.append(network.estimate_flops([train[0][:400]]).reduction)
            _fine_tune(network, train, seed)
            reports.append(network.report([test]))
            progress(f"mass {mass}, seed {seed}", (3 * index + seed + 1) / 9)
        saved.append(median(r.flops.reduction for r in reports))
        lost = [before - (r.accuracy or 0.0) for r in reports]
        spread, name = median(r.flops.std / r.flops.macs for r in reports), f"mass {mass}: "
        yield Measurement(name=name + "multiply-adds saved", value=saved[-1], unit="share", at_least=least)
        yield Measurement(name=name + "estimate before training", value=estimated[-1], unit="share")
        yield Measurement(name=name + "accuracy lost", value=median(lost), unit="accuracy", at_most=most)
        yield Measurement(name=name + "accuracy lost, worst seed", value=max(lost), unit="accuracy")
        yield Measurement(name=name + "spread of multiply-adds between images", value=spread, unit="relative")
    for name, values in (("saved", saved), ("estimated", estimated)):
        step = min(b - a for a, b in pairwise(values))
        yield Measurement(
            name=f"least growth of the share {name} as the mass falls", value=step, unit="share", at_least=0
        )


def _with_masks(share: float) -> tuple[VGG, VGG]:
    """Return a VGG-16 that keeps a random share of each layer's filters, and its dense twin."""
    torch.manual_seed(0)
    network = ftwt_vgg16_bn().eval()
    for layer in network.masked_layers().values():
        assert layer.mask is not None
        linear = layer.mask.linear
        kept = torch.randperm(layer.conv.out_channels)[: round(share * layer.conv.out_channels)]
        with torch.no_grad():
            linear.weight.zero_()
            assert linear.bias is not None
            linear.bias.fill_(-1.0)
            linear.bias[kept] = 1.0
    dense = ftwt_vgg16_bn(masked=False).eval()
    dense.load_state_dict({k: v for k, v in network.state_dict().items() if ".mask." not in k})
    return network, dense.fuse()  # pyright: ignore[reportReturnType]


def skipping(progress: Progress) -> Iterator[Measurement]:
    """A VGG-16 at 32 pixels that computes active filters only, beside the masked and the dense network."""
    for index, (share, batch) in enumerate(((0.5, 1), (0.5, 16), (0.3, 1), (0.3, 16))):
        network, dense = _with_masks(share)
        x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(3))
        fast, saved = network.compile(), network.report([x]).flops.reduction
        with torch.no_grad():
            expected = network(x)
            error = float((fast(x) - expected).abs().max() / expected.abs().max())
            progress(f"{saved:.0%} saved, batch {batch}", index / 4)
            times = time_interleaved({"ours": lambda f=fast, x=x: f(x), "dense": lambda d=dense, x=x: d(x)}, repeats=15)
        name = f"{saved:.0%} saved, batch {batch}: "
        yield Measurement(name=name + "largest difference", value=error, unit="relative", at_most=1e-5)
        ratio = times["dense"].median / times["ours"].median
        yield Measurement(name=name + "dense / ours", value=ratio, unit="x", at_least=1 if saved >= 0.7 else None)


CLAIMS = (budget, skipping)
