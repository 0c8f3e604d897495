"""The layer of long convolutions beside the same layer on the FFT library, and on other ways to see far back."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from harness import Case, main

from dynakern.sequence import S4D, LongConv
from dynakern.testing import assert_same

H, C = 64, 2


def published_layer(layer, x):
    """The layer as published: spectra of the whole batch at once."""
    u, k = x.transpose(1, 2), layer.kernel()
    length = u.shape[-1]
    n = 2 * length
    spectrum = torch.einsum("bhf,chf->bchf", torch.fft.rfft(u, n=n), torch.fft.rfft(k[..., :length], n=n))
    y = torch.fft.irfft(spectrum, n=n)[..., :length] + torch.einsum("bhl,ch->bchl", u, layer.D)
    y = F.gelu(y.flatten(1, 2)).transpose(1, 2)
    return layer.output_linear(y)


def cases():
    for batch, length in ((16, 256), (8, 1024), (8, 4096), (2, 16384)):
        torch.manual_seed(0)
        layer = LongConv(H, length, C, init="double_exp", squash=0.001, kernel_dropout=0.0)
        s4d, gru = S4D(H, 64, channels=C), torch.nn.GRU(H, H, batch_first=True)
        x = torch.randn(batch, length, H)

        def train(function, modules, x=x):
            def run():
                for module in modules:
                    module.zero_grad(set_to_none=True)
                function(x).square().mean().backward()

            return run

        def check(layer=layer, x=x):
            with torch.no_grad():
                assert_same(layer(x), published_layer(layer, x), rtol=1e-5)

        peers = {
            "as published, torch.fft": train(lambda x, layer=layer: published_layer(layer, x), [layer]),
            "dynakern S4D, N = 64": train(s4d, [s4d]),
        }
        if length <= 1024:
            peers["torch.nn.GRU"] = train(lambda x, gru=gru: gru(x)[0], [gru])
        yield Case(
            name=f"forward and backward, B = {batch}, L = {length}, H = {H}, C = {C}",
            ours=train(layer, [layer]),
            peers=peers,
            check=check,
            repeats=5,
            memory=True,
        )


if __name__ == "__main__":
    main("long_conv", "Layer of long convolutions", cases)
