"""LSNet fused beside its training form, and its aggregation by unfolding."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from harness import Case, main

import dynakern.vision.lsnet as system
from dynakern.testing import assert_same
from dynakern.vision.lsnet import lsnet_t


def _unfolded(x, w):
    """Aggregate by unfolding all neighbourhoods."""
    batch, channels, height, width = x.shape
    patches = F.unfold(x, 3, padding=1).view(batch, channels // w.shape[1], w.shape[1], 9, height, width)
    return (patches * w.unsqueeze(1)).sum(3).flatten(1, 2)


def _quiet(network, x):
    def run():
        with torch.no_grad():
            return network(x)

    return run


def _by_unfolding(run):
    def inner():
        own, system.ska = system.ska, _unfolded
        try:
            return run()
        finally:
            system.ska = own

    return inner


def cases():
    torch.manual_seed(0)
    model = lsnet_t().eval()
    fused = model.fuse()
    for shape in ((1, 3, 224, 224), (8, 3, 224, 224)):
        x = torch.randn(shape)
        ours = _quiet(fused, x)
        yield Case(
            name=f"LSNet-T fused, {shape}, eval",
            ours=ours,
            peers={"fused, aggregation by unfolding": _by_unfolding(ours), "the training form": _quiet(model, x)},
            check=lambda ours=ours, x=x: assert_same(ours(), _quiet(model, x)(), rtol=1e-3),
            at_least=1.0,
            repeats=5,
        )


if __name__ == "__main__":
    main("lsnet", "LSNet: fused, unfused, and with unfolding", cases)
