"""ShiftAddViT: a trained transformer keeps its accuracy when attention becomes additions and weights become shifts.

Claims of You et al., 2023, arXiv:2306.06446: up to 5.18 times less latency on GPUs and 42.9 % less energy at comparable
accuracy, which need ImageNet and purpose-made kernels and are not measured here. Measured, at a laptop's scale: the two
steps of the conversion on handwritten digits (scikit-learn, 8 x 8 pixels) against the same transformer with softmax
attention and products; and that masked additions and integer shifts are exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.claims.digits import divide, read_digits
from dynakern.claims.run import Measurement, Progress
from dynakern.vision.shiftaddvit import (
    LinearAngularAttention,
    ShiftLinear,
    SoftmaxAttention,
    convert_to_shiftadd,
    energy_report,
)
from dynakern.vision.shiftaddvit.network import Block, Mlp

__all__ = ["CLAIMS"]


class _DigitTransformer(nn.Module):
    """16 tokens of 2 x 2 pixels, width 32, three blocks of four heads, MLPs of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(4, 32), nn.Parameter(0.02 * torch.randn(1, 16, 32))
        self.blocks = nn.ModuleList(
            [Block(32, SoftmaxAttention(32, 4), Mlp(32, 64, conv=False), 0.0) for _ in range(3)]
        )
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.unfold(x, 2, stride=2).transpose(1, 2)  # (B, 16, 4)
        x = self.embed(x) + self.positions
        for block in self.blocks:
            x = block(x, 4, 4)
        return self.head(self.norm(x).mean(1))


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 1200 images and labels to train on, and 597 to test; grey values standardised by the former."""
    x, y, x_test, y_test = divide(*read_digits())
    mean, std = x.mean(), x.std()
    return (x - mean) / std, y, (x_test - mean) / std, y_test


def _train(model: nn.Module, epochs: int, data: tuple[Tensor, ...], progress: Progress, label: str, at: float) -> None:
    x, y = data[:2]
    generator = torch.Generator().manual_seed(0)
    steps = epochs * -(-len(x) // 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(32):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        progress(f"{label}, epoch {epoch + 1}", at + epoch / epochs / 3)


def _accuracy(model: nn.Module, data: tuple[Tensor, ...]) -> float:
    with torch.no_grad():
        return float((model.eval()(data[2]).argmax(1) == data[3]).float().mean())


def conversion(progress: Progress) -> Iterator[Measurement]:
    """Digits: multiplying transformer, then additive attention, then shifts, each trained on from the one before."""
    data = _digits()
    torch.manual_seed(0)
    model = _DigitTransformer()
    _train(model, 14, data, progress, "softmax and products", 0.0)
    multiplying = _accuracy(model, data)
    before = energy_report(model, (1, 8, 8))
    additive = convert_to_shiftadd(model, attention="binary", linears=None)
    swapped = _accuracy(additive, data)
    _train(additive, 10, data, progress, "additive attention", 1 / 3)
    added = _accuracy(additive, data)
    shifting = convert_to_shiftadd(additive, attention=None, linears="q", exclude=("embed", "head"))
    untouched = _accuracy(shifting, data)
    _train(shifting, 4, data, progress, "shifts", 2 / 3)
    final = _accuracy(shifting, data)
    yield Measurement(name="softmax and products", value=multiplying, unit="accuracy")
    yield Measurement(name="additive attention, not trained on", value=swapped, unit="accuracy", baseline=multiplying)
    yield Measurement(name="additive attention", value=added, unit="accuracy", baseline=multiplying)
    yield Measurement(
        name="shifts, not trained on", value=untouched, unit="accuracy", at_least=added - 0.10, baseline=added
    )
    yield Measurement(
        name="shifts and additions", value=final, unit="accuracy", at_least=multiplying - 0.015, baseline=multiplying
    )
    after = energy_report(shifting, (1, 8, 8))
    gone = 1 - after.count("multiply", "blocks.") / before.count("multiply", "blocks.")
    yield Measurement(name="multiplications of the blocks gone", value=gone, unit="share", at_least=0.95)
    yield Measurement(
        name="energy of the operations, by the authors' unit costs",
        value=after.operations_mj / before.operations_mj,
        unit="of the multiplying network's",
    )
    exponents = [_largest_exponent(m.decoded_weight()) for m in shifting.modules() if isinstance(m, ShiftLinear)]
    yield Measurement(name="largest p of the weights 0 or ±2^-p", value=max(exponents), unit="bits", at_most=15)


def _largest_exponent(weight: Tensor) -> float:
    """Return the largest p, or infinity if a weight is neither 0 nor plus or minus ``2^-p``."""
    p = -torch.log2(weight[weight != 0].detach().abs())
    return float(p.max()) if bool((p == p.round()).all() and (p >= 0).all()) else float("inf")


def exactness(progress: Progress) -> Iterator[Measurement]:
    """Masked additions equal the matrix product, and integer shifts the float layer to the last bit of each term."""
    torch.manual_seed(0)
    attention = LinearAngularAttention(64, 4, codes="binary").eval()
    with torch.no_grad():
        q, k, v = attention.encode(torch.randn(2, 196, 64))
        product, rows = k.transpose(-2, -1) @ v, torch.zeros(2, 4, 16, 16)
        for bit in range(16):
            for b in range(2):
                for head in range(4):
                    chosen = v[b, head][k[b, head, :, bit] == 1]  # additions only
                    rows[b, head, bit] = chosen.sum(0)
        error = float((rows - product).abs().max() / product.abs().max())
        layer, x = ShiftLinear(256, 128, mode="q").eval(), torch.randn(64, 256)
        gap = float((layer.pack().forward_shift(x) - layer(x).double()).abs().max()) / (256 * 2.0**-16)
    ones = float(torch.cat([q, k]).mean())
    yield Measurement(name="masked additions against the product", value=error, unit="relative", at_most=1e-5)
    yield Measurement(name="share of ones in the codes", value=ones, unit="share")
    yield Measurement(name="integer shifts against the float layer", value=gap, unit="of inputs x 2^-16", at_most=1.0)


CLAIMS = (conversion, exactness)
