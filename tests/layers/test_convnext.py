"""ConvNeXt: published sizes, partial convolutions, refusals."""

from __future__ import annotations

import pytest
import torch

from dynakern.layers.convnext import ConvNeXt, PartialConv2d, convnext_base, convnext_small, convnext_tiny
from dynakern.measure import count_parameters
from dynakern.testing import assert_same, randn


@pytest.mark.parametrize(
    ("build", "millions"), [(convnext_tiny, 28.589), (convnext_small, 50.224), (convnext_base, 88.591)]
)
def test_published_sizes(build, millions):
    with torch.device("meta"):
        assert count_parameters(build()) / 1e6 == pytest.approx(millions, abs=1e-3)


def test_partial_convolution_passes_the_first_channels():
    torch.manual_seed(0)
    layer, x = PartialConv2d(8, 3, ratio=3 / 8).double(), randn(2, 8, 5, 6, requires_grad=False)
    y = layer(x)
    assert torch.equal(y[:, :5], x[:, :5])
    single = torch.nn.functional.conv2d(x[:, 5:], layer.weight, layer.bias, padding=1, groups=3)
    assert_same(y[:, 5:], single)


def test_maps_and_head():
    model = ConvNeXt((1, 1), (8, 16), num_classes=0, in_chans=1, patch_size=2).eval()
    maps = model.forward_intermediates(torch.zeros(2, 1, 16, 12))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 6), (2, 16, 4, 3)]
    assert model(torch.zeros(2, 1, 16, 12)).shape == (2, 16)


def test_refusals():
    with pytest.raises(ValueError, match="one entry a stage"):
        ConvNeXt((1,), (8, 16))
    with pytest.raises(ValueError, match="must be odd"):
        PartialConv2d(8, 4)
    with pytest.raises(ValueError, match="1 to 8 channels"):
        PartialConv2d(8, 3, ratio=0.1)
    with pytest.raises(ValueError, match="size 3 on axis 1"):
        ConvNeXt((1,), (8,))(torch.zeros(1, 1, 8, 8))
