"""ShiftAddViT's layers beside those that multiply: torch.nn.Linear, softmax attention, the official mixture."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from harness import Case, main
from torch import nn

from dynakern.testing import assert_same
from dynakern.vision import LinearAngularAttention, ShiftLinear
from dynakern.vision.shiftaddvit import SoftmaxAttention, pvt_v2_b0, shift_add_experts


def run(function, *args):
    def call():
        with torch.inference_mode():
            return function(*args)

    return call


def cases():
    torch.manual_seed(0)
    for tokens, I, O in ((1568, 256, 1024), (1, 1024, 4096)):
        layer = ShiftLinear(I, O, mode="q").eval()
        packed, plain, x = layer.pack(), nn.Linear(I, O), torch.randn(tokens, I)
        plain.weight.data.copy_(layer.decoded_weight())
        plain.bias.data.copy_(layer.bias)
        for name, ours in (("shift layer, decoded and kept", layer), ("packed, one byte a weight", packed)):
            yield _case(f"{name}: {tokens} tokens, {I} to {O}", run(ours, x), {"torch.nn.Linear": run(plain, x)}, 1e-3)
    for N, aim in ((196, None), (784, 1), (3136, 2)):
        ours, peer, x = LinearAngularAttention(64, 2), SoftmaxAttention(64, 2), torch.randn(4, N, 64)
        ours.train()(x)  # fits the hash
        binary = LinearAngularAttention(64, 2, codes="binary")
        calls = {"hash": run(ours.eval(), x), "binary": run(binary.eval(), x)}
        peers = {"softmax attention": run(peer.eval(), x)}
        for name, call in calls.items():
            yield _case(f"{name} attention of (4, {N}, 64), 2 heads", call, peers, None, aim)
    yield _experts()
    image = torch.randn(1, 3, 224, 224)
    binary = pvt_v2_b0(attention="binary").eval()
    peers = {"softmax": run(pvt_v2_b0(attention="softmax").eval(), image)}
    peers["reduced (PVTv2)"] = run(pvt_v2_b0(attention="reduced").eval(), image)
    yield _case("PVTv2-B0 with binary attention, one image of 224", run(binary, image), peers, None, 1)


def _case(name, ours, peers, rtol, aim=None):
    peer = next(iter(peers.values()))

    def check():
        a, b = ours(), peer()
        if rtol is None:  # other functions of the same shape: only the time compares
            assert a.shape == b.shape
            assert bool(a.isfinite().all())
        else:
            assert_same(a, b, rtol=rtol)

    return Case(name=name, ours=ours, peers=peers, check=check, at_least=aim, repeats=11)


def _experts():
    torch.manual_seed(0)
    m, x = shift_add_experts(64, 256, combine="logexp").eval(), torch.randn(4, 784, 64)

    def official():
        """Scatter the gate's values, gather each expert's tokens, add up in the space of exponentials."""
        tokens = x.flatten(0, 1)
        routing = m.gate(tokens)
        gates = torch.zeros(len(tokens), 2).scatter(1, routing.expert[:, None], routing.value[:, None])
        rows, column = (gates != 0).T.nonzero().T.flip(0)
        parts = tokens[rows].split((gates > 0).sum(0).tolist())
        y = torch.cat([expert(part) for expert, part in zip(m.experts, parts, strict=True)]).exp()
        y = y * gates[rows].gather(1, column[:, None])
        total = torch.zeros(len(tokens), 256).scatter(0, rows[:, None].expand_as(y), y)
        return (total + 2.220446049250313e-16).log().view(4, 784, 256)

    product = shift_add_experts(64, 256).eval()
    product.load_state_dict(m.state_dict())
    name = "experts, 3136 tokens, 64 to 256"
    peers = {"official formulation": run(official), "torch.nn.Linear": run(product.experts[0], x)}

    def check():
        assert_same(run(m, x)(), run(official)(), rtol=1e-5)

    return Case(name=name, ours=run(product, x), peers=peers, check=check, at_least=2, repeats=11)


if __name__ == "__main__":
    main("shiftaddvit", "ShiftAddViT: layers that shift and add beside layers that multiply", cases)
