"""InceptionNeXt beside a ConvNeXt of the same size on torch's own convolutions, each in its better memory layout."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from harness import Case, main

from dynakern.layers.convnext import ConvNeXt
from dynakern.measure import time_interleaved
from dynakern.testing import assert_same
from dynakern.vision import InceptionNeXt

LAYOUTS = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}
SIZES = {  # depths, dims, mixer, batch, side
    "atto size": ((2, 2, 6, 2), (40, 80, 160, 320), {"band_kernel_size": 9, "branch_ratio": 0.25}, 2, 128),
    "tiny size": ((3, 3, 9, 3), (96, 192, 384, 768), {}, 1, 128),
}


def _train_step(network, x):
    network.train()

    def step():
        network.zero_grad(set_to_none=True)
        network(x).square().mean().backward()

    return step


def _run(network, x):
    network.eval()

    def run():
        with torch.no_grad():
            return network(x)

    return run


def _better(functions):
    """Return the label of the fastest."""
    times = time_interleaved(functions, repeats=3, warmup=1)
    return min(times, key=lambda label: times[label].median)


def cases():
    for label, (depths, dims, mixer, batch, side) in SIZES.items():
        torch.manual_seed(0)
        ours = InceptionNeXt(depths, dims, layer_scale=1.0, **mixer)
        peer, x = ConvNeXt(depths, dims, layer_scale=1.0), torch.randn(batch, 3, side, side)
        for mode, make in (("eval", _run), ("training step", _train_step)):
            found = {}
            for name, network in (("dynakern", ours.eval().fuse() if mode == "eval" else ours), ("ConvNeXt", peer)):
                functions = {}
                for layout, memory in LAYOUTS.items():
                    twin = copy.deepcopy(network).to(memory_format=memory)
                    functions[layout] = make(twin, x.contiguous(memory_format=memory))
                best = _better(functions)
                found[name] = (best, functions[best])

            def check(ours=ours, x=x):
                with torch.no_grad():
                    assert_same(ours.eval().fuse()(x), ours(x), rtol=1e-4)

            yield Case(
                name=f"{mode}, {label}, ({batch}, 3, {side}, {side}), {found['dynakern'][0]}",
                ours=found["dynakern"][1],
                peers={f"ConvNeXt on torch.nn.Conv2d, {found['ConvNeXt'][0]}": found["ConvNeXt"][1]},
                check=check,
                at_least=1.0,
            )


if __name__ == "__main__":
    main("inception_next", "InceptionNeXt and ConvNeXt of the same size", cases)
