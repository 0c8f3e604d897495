"""Replacing convolutions: what fits, what stays, which weights are kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynakern.layers.resnet import resnet20
from dynakern.testing import assert_same, randn
from dynakern.vision import FDConv, InceptionDWConv2d, LargeConv2d, LSConv, replace_conv


def count(model, kind):
    return sum(isinstance(m, kind) for m in model.modules())


def plain(model):
    return replace_conv(model, lambda conv: nn.Conv2d(conv.in_channels, conv.out_channels, 1))


def test_larger_kernels_are_the_same_function():
    layer = nn.Conv2d(16, 16, (3, 5), padding=(1, 2), groups=16).double()
    grown = replace_conv(nn.Sequential(layer), "large", kernel_size=7)
    assert grown[0].weight.shape == (16, 1, 7, 7)
    z = randn(1, 16, 9, 8, requires_grad=False)
    assert_same(grown(z), layer(z))


def test_where_and_the_original_is_left_alone():
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1, groups=16) for _ in range(3)))
    assert count(replace_conv(model, "inception", where="[01]"), InceptionDWConv2d) == 2
    assert count(replace_conv(model, "large-small", where=lambda name, conv: name == "2"), LSConv) == 1
    assert count(model, nn.Conv2d) == 3
    replaced = replace_conv(model, "inception", branch_ratio=0.25, band_kernel_size=5)
    assert replaced[0].dwconv_w.weight.shape == (4, 1, 1, 5)
    assert replace_conv(model.eval(), "large-small")[0].bn.training is False
    assert replaced(torch.randn(1, 16, 6, 7)).shape == (1, 16, 6, 7)


def test_frequency_dynamic_layers_start_as_the_convolutions():
    torch.manual_seed(0)
    model, x = resnet20().eval(), torch.randn(2, 3, 16, 16)
    dynamic = replace_conv(model, "frequency-dynamic", kernel_num=4, where="layer3.*").eval()
    assert count(dynamic, FDConv) == 6
    with torch.no_grad():
        assert_same(dynamic(x), model(x), rtol=1e-3)


def test_a_function_may_replace_anything():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert plain(model)[0].kernel_size == (1, 1)
    assert isinstance(replace_conv(nn.Conv2d(8, 8, 3, padding=1, groups=8), "large"), LargeConv2d)


def test_refusals():
    with pytest.raises(ValueError, match="No convolution of Sequential fits kind='inception'"):
        replace_conv(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), "inception")  # not the same size
    with pytest.raises(ValueError, match="Did you mean 'inception'"):
        replace_conv(nn.Conv2d(8, 8, 3), "inceptoin")
    with pytest.raises(TypeError, match="a name or a function, got int"):
        replace_conv(nn.Conv2d(8, 8, 3), 3)
    with pytest.raises(ValueError, match="must be odd, got 6"):
        LargeConv2d(8, 6)
