"""Terminator beside its published formulation, which writes the row of all branches, and a ResNet of its size."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from harness import Case, main

from dynakern.layers.resnet import ResNet
from dynakern.testing import assert_same
from dynakern.vision.terminator import SlowNet, terminator_cifar10


def concatenating(network):
    """Return a copy that repeats and concatenates all branches and writes its global kernels anew in each pass."""
    peer = copy.deepcopy(network)

    def mix(branch):
        def run(parts, channels):
            row = torch.cat([part.repeat(1, channels // part.shape[1], 1, 1) for part in parts], dim=1)
            return F.conv2d(row, branch.bottleneck_layer.weight, branch.bottleneck_layer.bias)

        return run

    for module in peer.modules():
        if isinstance(module, SlowNet):
            module.forward = module.Kernel.forward
    for block in peer.blocks:
        block.fast_multi_branch._mix = mix(block.fast_multi_branch)
    return peer


def _run(network, x):
    network.eval()

    def run():
        with torch.no_grad():
            return network(x)

    return run


def _train_step(network, x):
    network.train()

    def step():
        network.zero_grad(set_to_none=True)
        network(x).square().mean().backward()

    return step


def cases():
    for mode, make, batch in (("eval", _run, 4), ("eval", _run, 32), ("training step", _train_step, 8)):
        torch.manual_seed(0)
        ours, x = terminator_cifar10(dropout=0.0), torch.randn(batch, 3, 32, 32)
        peer = concatenating(ours)
        residual = ResNet("basic", (3, 3, 3), widths=(36, 71, 142), num_classes=10, stem="cifar", shortcut="subsample")

        def check(ours=ours, peer=peer, x=x):
            with torch.no_grad():
                assert_same(copy.deepcopy(ours).eval()(x), copy.deepcopy(peer).eval()(x), rtol=1e-4)

        yield Case(
            name=f"{mode}, ({batch}, 3, 32, 32)",
            ours=make(ours, x),
            peers={
                "branches in one row, kernels written anew": make(peer, x),
                "ResNet-20 of as many parameters": make(residual, x),
            },
            check=check,
            at_least=1.0,
            repeats=5,
        )


if __name__ == "__main__":
    main("terminator", "Terminator, its published formulation, and a ResNet of its size", cases)
