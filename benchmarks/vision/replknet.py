"""RepLKNet merged beside its training form, and beside itself on torch's own depthwise convolutions."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from harness import Case, main
from torch import nn

from dynakern.testing import assert_same
from dynakern.vision import RepLKNet


def _on_torch(network):
    """Return a fused network whose large kernels run on torch.nn.Conv2d."""
    network = copy.deepcopy(network)
    for module in network.modules():
        kernel = getattr(module, "lkb_reparam", None)
        if isinstance(kernel, nn.Conv2d):
            module.forward = kernel.forward
    return network


def _quiet(network, x):
    def run():
        with torch.no_grad():
            return network(x)

    return run


def cases():
    torch.manual_seed(0)
    model = RepLKNet((31, 29, 27, 13), (1, 1, 1, 1), (64, 96, 128, 192)).eval()
    fused = model.fuse()
    for shape in ((1, 3, 128, 128), (1, 3, 224, 224)):
        x = torch.randn(shape)
        plain, last = _on_torch(fused), x.contiguous(memory_format=torch.channels_last)
        plain_last = _on_torch(fused).to(memory_format=torch.channels_last)
        yield Case(
            name=f"one pair a stage, kernels 31, 29, 27, 13, {shape}, eval",
            ours=_quiet(fused, x),
            peers={
                "merged, torch.nn.Conv2d, NCHW": _quiet(plain, x),
                "merged, torch.nn.Conv2d, channels last": _quiet(plain_last, last),
                "the training form": _quiet(model, x),
            },
            check=lambda x=x: assert_same(_quiet(fused, x)(), _quiet(model, x)(), rtol=1e-3),
            at_least=1.0,
            repeats=5,
        )


if __name__ == "__main__":
    main("replknet", "RepLKNet: merged, training form, and torch's depthwise convolutions", cases)
