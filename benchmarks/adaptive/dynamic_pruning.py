"""Networks that skip filters beside their dense twins, both with folded norms, at three shares of filters kept."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from harness import Case, main

from dynakern import create_model
from dynakern.testing import assert_same

NETWORKS = ("ftwt_vgg16_bn", "ftwt_resnet56", "ftwt_mobilenetv1")


def _with_masks(name, share):
    """Return a network that keeps a random share of each layer's filters for all images, and its dense twin."""
    torch.manual_seed(0)
    network = create_model(name).eval()
    for layer in network.masked_layers().values():
        linear, filters = layer.mask.model["1Conv2dMask"], layer.conv.out_channels
        with torch.no_grad():
            linear.weight.zero_()
            linear.bias.fill_(-1.0)
            linear.bias[torch.randperm(filters)[: round(share * filters)]] = 1.0
    dense = create_model(name, masked=False).eval()
    dense.load_state_dict({k: v for k, v in network.state_dict().items() if ".mask." not in k})
    return network, dense.fuse()


def _run(network, x):
    def run():
        with torch.no_grad():
            return network(x)

    return run


def cases():
    for name in NETWORKS:
        for share in (0.75, 0.5, 0.3):
            network, dense = _with_masks(name, share)
            fast, masked = network.compile(), network.fuse()
            for batch in (1, 16):
                x = torch.randn(batch, 3, 32, 32)
                saved = network.report([x], flops="exact").flops.reduction

                def check(fast=fast, masked=masked, x=x):
                    with torch.no_grad():
                        assert_same(fast(x), masked(x), rtol=1e-4)

                yield Case(
                    name=f"{name}, {saved:.0%} saved, ({batch}, 3, 32, 32)",
                    ours=_run(fast, x),
                    peers={"dense": _run(dense, x), "masks on dense outputs": _run(masked, x)},
                    check=check,
                    at_least=1.0 if saved >= 0.7 else None,
                )


if __name__ == "__main__":
    main("dynamic_pruning", "Skipping filters beside computing all of them", cases)
