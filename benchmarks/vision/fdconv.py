"""FDConv beside its published formulation (scattered groups, transforms, grouped convolution) and torch.nn.Conv2d."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from harness import Case, main

from dynakern.testing import assert_same
from dynakern.vision import FDConv
from dynakern.vision.fdconv import frequency_order


class Published:
    """The layer as its equations stand: groups are scattered one array a step, bands are cut by transforms."""

    def __init__(self, layer: FDConv) -> None:
        self.layer, (rows, columns) = layer, layer._matrix()
        self.half = columns // 2 + 1
        order = frequency_order(rows, columns).long().view(layer.kernel_num, -1)
        self.indices = order // self.half, order % self.half
        f = torch.meshgrid(torch.fft.fftfreq(64), torch.fft.rfftfreq(64), indexing="ij")
        distance = torch.stack(f).abs().amax(0)
        self.masks = torch.stack([distance < 0.5 / k + 1e-8 for k in (2, 4, 8)]).float()[:, None]

    def mix(self, a):
        """Return the kernels of the groups, weighed by the attention."""
        layer, (i, j) = self.layer, self.indices
        rows, columns = layer._matrix()
        S = torch.zeros(len(a), rows, self.half, 2)
        w = layer.dft_weight[0][i, j][None] * layer.alpha
        S[:, i, j] += torch.stack([w[..., 0] * a[..., None], w[..., 1] * a[..., None]], -1)
        W = torch.fft.irfft2(torch.view_as_complex(S), s=(rows, columns))
        k = layer.kernel_size[0]
        return W.view(len(a), layer.out_channels, k, layer.in_channels, k)

    def bands(self, x):
        """Return the map with its bands weighed."""
        fbm, (H, W) = self.layer.FBM, x.shape[2:]
        X, before, y = torch.fft.rfft2(x, norm="ortho"), x, 0
        masks = F.interpolate(self.masks, size=(H, W // 2 + 1), mode="nearest")
        for mask, conv in zip(masks, fbm.freq_weight_conv_list, strict=True):
            low = torch.fft.irfft2(X * mask, s=(H, W), norm="ortho")
            y, before = y + 2 * conv(x).sigmoid() * (before - low), low
        return y + before

    def __call__(self, x):
        """Return the layer's output."""
        layer, k = self.layer, self.layer.kernel_size[0]
        B, (I, O) = len(x), (layer.in_channels, layer.out_channels)
        g = F.adaptive_avg_pool2d(x, 1)
        gate = layer.KSM_Global(g)
        z = layer.KSM_Local.conv(layer.KSM_Local.norm(g.flatten(1))[:, None])
        K = self.mix(gate.kernel).permute(0, 1, 3, 2, 4) * 2
        K = K * z.view(B, O, k, k, I).permute(0, 1, 4, 2, 3).sigmoid()
        K = K * gate.channel[:, None, :, None, None] * gate.filter[:, :, None, None, None]
        K = K if gate.spatial is None else K * gate.spatial[:, None, None]
        x = self.bands(x) if hasattr(layer, "FBM") else x
        y = F.conv2d(x.reshape(1, B * I, *x.shape[2:]), K.reshape(B * O, I, k, k), None, layer.stride,
                     layer.padding, layer.dilation, B)  # fmt: skip
        return y.view(B, O, *y.shape[2:]) + layer.bias[:, None, None]


def cases():
    for B, C, k, size in ((2, 64, 3, 32), (2, 256, 3, 14), (2, 256, 1, 28)):
        torch.manual_seed(0)
        layer = FDConv(C, C, k, padding=k // 2, kernel_num=64).eval()
        published, conv, x = Published(layer), torch.nn.Conv2d(C, C, k, padding=k // 2), torch.randn(B, C, size, size)
        if k == 3:
            name = f"kernels of {B} images from 64 groups, {C} to {C}, 3x3"
            yield _case(name, torch.rand(B, 64) / 64, layer._mix, {"scatter of groups, irfft2": published.mix}, 4)
            yield _case(f"bands of a map ({B}, {C}, {size}, {size})", x, layer.FBM, {"transforms": published.bands})
        name = f"layer {C} to {C}, {k}x{k}, forward ({B}, {C}, {size}, {size})"
        yield _case(name, x, layer, {"published formulation": published, "torch.nn.Conv2d": conv})
    yield _training_case()


def _case(name, x, ours, peers, aim=None):
    def run(function):
        def call():
            with torch.no_grad():
                return function(x)

        return call

    mine, theirs = run(ours), {label: run(peer) for label, peer in peers.items()}
    first = next(iter(theirs.values()))
    return Case(
        name=name,
        ours=mine,
        peers=theirs,
        check=lambda: assert_same(mine(), first(), rtol=1e-4),
        at_least=aim,
        repeats=15,
    )


def _training_case():
    torch.manual_seed(0)
    layer, x = FDConv(64, 64, 3, padding=1, kernel_num=64).train(), torch.randn(2, 64, 32, 32, requires_grad=True)
    published, conv = Published(layer), torch.nn.Conv2d(64, 64, 3, padding=1)

    def gradients(function, module):
        return lambda: torch.autograd.grad(function(x).square().sum(), [x, *module.parameters()])

    ours, theirs = gradients(layer, layer), gradients(published, layer)
    return Case(
        name="layer 64 to 64, 3x3, forward and backward (2, 64, 32, 32)",
        ours=ours,
        peers={"published formulation": theirs, "torch.nn.Conv2d": gradients(conv, conv)},
        check=lambda: assert_same(ours()[0], theirs()[0], rtol=1e-3),
        repeats=15,
    )


if __name__ == "__main__":
    main("fdconv", "FDConv: kernels, bands and the whole layer", cases)
