"""Terminator: every block sees the whole image, and a chain of blocks without residuals trains.

Claims behind Zhang, 2024, arXiv:2401.17948, at a size for a laptop: (1) in one untrained block nearly every pixel of
the input moves a pixel of the output; (2) a five-block network without residuals learns scikit-learn's digits within
four epochs of Kar3, while the slow neural loss vanishes; (3) Kar3 follows its recurrence, and the stopped term of the
local slow nets passes no gradient. CIFAR is not measured here. On digits plain convolutions learn faster and no less
well; no superiority is claimed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.claims.digits import divide, read_digits
from dynakern.claims.run import Measurement, Progress
from dynakern.vision.terminator import Kar3, MAGNet, MAGNetLocal, SFNEBlock, Terminator, warmup_cosine

__all__ = ["CLAIMS"]

_BRANCHES = {
    "local_sizes": (3, 9, 5, 7),
    "global_hidden": 64,
    "global_layers": 2,
    "local_hidden": 32,
    "local_layers": 2,
    "channel_hidden": 32,
    "interact_hidden": (16, 64),
    "trainable_renorm": False,
    "omega_0": 2000.0,
}


def _reached(output: Tensor, x: Tensor) -> float:
    """Return the share of pixels of the first image that move its pixel (8, 8) by over 0.1 % of the largest share."""
    (gradient,) = torch.autograd.grad(output[0, :, 8, 8].sum(), x)
    strength = gradient[0].abs().amax(0)
    return float((strength > 1e-3 * strength.max()).double().mean())


class _Operator(nn.Module):
    """The bare operator: (x * G) times the standardised map of x."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.linear = MAGNet(16, 12, 64, 2), nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.slow()) @ F.instance_norm(self.linear(x))


def full_context(progress: Progress) -> Iterator[Measurement]:
    """Share of input pixels that one output pixel depends on, 16 x 16 pixels, untrained, least of three seeds."""
    shares: dict[str, list[float]] = {"block": [], "bare operator": [], "9x9 convolution": [], "3x3 convolution": []}
    for seed in range(3):
        torch.manual_seed(seed)
        networks = (
            SFNEBlock(12, 24, 16, **_BRANCHES),
            _Operator(),
            nn.Conv2d(12, 24, 9, padding=4),
            nn.Conv2d(12, 24, 3, padding=1),
        )
        for (name, found), network in zip(shares.items(), networks, strict=True):
            x = torch.randn(2, 12, 16, 16, requires_grad=True)
            output = network(x)[0] if name == "block" else network(x)
            found.append(_reached(output, x))
        progress(f"seed {seed}", (seed + 1) / 3)
    for name, found in shares.items():
        bound = 0.9 if name == "block" else None
        yield Measurement(name=f"pixels reached, {name}", value=min(found), unit="share", at_least=bound)


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 1,200 training and 597 test digits, standardised, of 3 x 8 x 8 pixels, with labels."""
    x, y = read_digits()
    return divide(((x - x.mean()) / x.std()).repeat(1, 3, 1, 1), y)


def trains_without_residuals(progress: Progress) -> Iterator[Measurement]:
    """Test accuracy on digits and slow neural loss over four epochs of Kar3."""
    x, y, x_test, y_test = _digits()
    torch.manual_seed(0)
    network = Terminator(
        img_size=8, factors=(4, 1, 2, 1, 2), local_sizes=(3, 7, 5, 5), global_layers=(3, 2, 2, 2, 2), num_classes=10
    )
    optimizer, generator = Kar3(network.parameters(), lr=1e-3), torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step / 24, 4, warmup=0))
    slow, accuracy = [], []
    for epoch in range(4):
        network.train()
        total = 0.0
        for rows in torch.randperm(len(x), generator=generator).split(50):
            logits, loss = network(x[rows], return_slow_loss=True)
            optimizer.zero_grad()
            (F.cross_entropy(logits, y[rows], label_smoothing=0.1) + loss).backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / 24
        slow.append(total)
        network.eval()
        with torch.no_grad():
            found = torch.cat([network(part).argmax(1) for part in x_test.split(199)])
        accuracy.append(float((found == y_test).double().mean()))
        progress(f"epoch {epoch + 1}: accuracy {accuracy[-1]:.3f}", (epoch + 1) / 4)
    for epoch in range(3):
        yield Measurement(name=f"test accuracy, epoch {epoch + 1}", value=accuracy[epoch], unit="accuracy")
    yield Measurement(name="test accuracy, epoch 4", value=accuracy[3], unit="accuracy", at_least=0.96)
    yield Measurement(name="slow neural loss, mean of epoch 1", value=slow[0], unit="loss")
    ratio = slow[3] / slow[0]
    yield Measurement(name="slow neural loss, epoch 4 / epoch 1", value=ratio, unit="ratio", at_most=0.02)
    network.calibrate(x.split(50))
    with torch.no_grad():
        alone = float((network(x_test).argmax(1) == y_test).double().mean())
    yield Measurement(name="test accuracy, running statistics", value=alone, unit="accuracy", baseline=accuracy[3])


def exact_parts(progress: Progress) -> Iterator[Measurement]:
    """Kar3 against its recurrence in plain Python, and the gradient through the stopped term."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5, dtype=torch.float64, generator=generator))
    optimizer, by_hand, averages, worst = Kar3([p], lr=0.01, betas=(0.5, 0.95)), p.tolist(), [[0.0] * 5, [0.0] * 5], 0.0
    for step in range(20):
        gradient = torch.randn(5, dtype=torch.float64, generator=generator)
        gradient[0] = 0.0
        p.grad = gradient
        optimizer.step()
        for i, g in enumerate(gradient.tolist()):
            signs = [(v > 0) - (v < 0) for v in (g, averages[0][i], averages[1][i])]
            by_hand[i] -= 0.01 * sum(signs)
            for average, beta in zip(averages, (0.5, 0.95), strict=True):
                average[i] = beta * average[i] + (1 - beta) * g
        worst = max(worst, float((p.detach() - torch.tensor(by_hand, dtype=torch.float64)).abs().max()))
        progress("Kar3", step / 20)
    yield Measurement(name="Kar3, largest difference after 20 steps", value=worst, unit="absolute", at_most=1e-12)
    torch.manual_seed(0)
    for beta in (0.0, 0.1):
        net = MAGNetLocal(6, 5, 8, 2, beta=beta, omega_0=1.0)
        net(torch.randn(3, 6, 11, 11)).square().sum().backward()
        found = max(float(layer.weight.grad.abs().max()) for layer in net.linears)  # pyright: ignore
        name = f"gradient of the layers' maps, beta {beta:g}"
        bounds = {"at_most": 0.0} if beta == 0 else {}
        yield Measurement(name=name, value=found, unit="absolute", **bounds)


CLAIMS = (full_context, trains_without_residuals, exact_parts)
