"""UniRepLKNet's deployed form beside its training form, and beside a ConvNeXt of similar cost."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from harness import Case, main

from dynakern.layers.convnext import ConvNeXt
from dynakern.testing import assert_same
from dynakern.vision import UniRepLKNet
from dynakern.vision.unireplknet import DilatedReparamBlock


def _quiet(function):
    def run():
        with torch.no_grad():
            return function()

    return run


def _branches(block, x):
    """The training form: all branches on torch's own convolutions."""
    y = block.origin_bn(F.conv2d(x, block.lk_origin.weight, padding=block.kernel_size // 2, groups=x.shape[1]))
    for k, r in block.branches:
        y = y + block.get_submodule(f"dil_bn_k{k}_{r}")(block.get_submodule(f"dil_conv_k{k}_{r}")(x))
    return y


def cases():
    torch.manual_seed(0)
    for shape in ((1, 64, 28, 28), (4, 96, 28, 28)):
        block, x = DilatedReparamBlock(shape[1], 13).eval(), torch.randn(shape)
        yield Case(
            name=f"dilated reparam block in eval mode, K = 13, {shape}",
            ours=_quiet(lambda block=block, x=x: block(x)),
            peers={"its branches on torch.nn.Conv2d": _quiet(lambda block=block, x=x: _branches(block, x))},
            check=_quiet(lambda block=block, x=x: assert_same(block(x), _branches(block, x), rtol=1e-4)),
            at_least=1.3,
        )
    depths, dims = (2, 2, 6, 2), (40, 80, 160, 320)
    model, x = UniRepLKNet(depths, dims).eval(), torch.randn(1, 3, 224, 224)
    fused, last = model.fuse(), x.contiguous(memory_format=torch.channels_last)
    peer = ConvNeXt(depths, dims).eval().to(memory_format=torch.channels_last)
    yield Case(
        name="UniRepLKNet-A fused, (1, 3, 224, 224), eval",
        ours=_quiet(lambda: fused(last)),
        peers={
            "the training form": _quiet(lambda: model(x)),
            "ConvNeXt of its depths and widths, torch.nn.Conv2d": _quiet(lambda: peer(last)),
        },
        check=_quiet(lambda: assert_same(fused(last), model(x), rtol=1e-3)),
        repeats=5,
    )


if __name__ == "__main__":
    main("unireplknet", "UniRepLKNet: deployed and training form, and ConvNeXt", cases)
