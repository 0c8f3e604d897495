"""Parts of image networks: folding norms is exact, stochastic depth keeps the mean, norms keep the layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynakern.layers.vision import (
    DropPath,
    LayerNorm2d,
    cache_key,
    check_fusable,
    drop_path_rates,
    fuse_conv_norm,
    fuse_norm_linear,
    init_truncated_normal,
    norm_scale_shift,
)
from dynakern.testing import assert_same, randn


def batch_norm(kind, channels):
    norm = kind(channels).double()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(randn(channels, requires_grad=False))
        norm.running_var.copy_(randn(channels, requires_grad=False).square() + 0.1)
    return norm.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2}], ids=str)
def test_convolution_then_norm_is_one_convolution(bias, options):
    conv, norm, x = nn.Conv2d(4, 6, 3, bias=bias, **options).double(), batch_norm(nn.BatchNorm2d, 6), randn(2, 4, 9, 8)
    assert_same(fuse_conv_norm(conv, norm)(x), norm(conv(x)))


def test_norm_then_map_is_one_map():
    x = randn(2, 4, 8, 8, requires_grad=False)
    norm, conv = batch_norm(nn.BatchNorm2d, 4), nn.Conv2d(4, 6, 2, stride=2).double()
    assert_same(fuse_norm_linear(norm, conv)(x), conv(norm(x)))
    rows, flat, linear = x.flatten(2)[:, :, 0], batch_norm(nn.BatchNorm1d, 4), nn.Linear(4, 3, bias=False).double()
    assert_same(fuse_norm_linear(flat, linear)(rows), linear(flat(rows)))


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(ValueError, match="without padding only"):
        fuse_norm_linear(batch_norm(nn.BatchNorm2d, 4), nn.Conv2d(4, 4, 3, padding=1))
    with pytest.raises(ValueError, match="running statistics"):
        norm_scale_shift(nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(RuntimeError, match=r"call \.eval"):
        check_fusable(nn.Linear(2, 2))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 3, 2)
    y = drop(x)
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    assert abs(float(y.mean()) - 1) < 0.05
    assert drop.eval()(x) is x
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        DropPath(1.0)


def test_rates_grow_from_zero():
    assert drop_path_rates(0.3, (2, 2)) == [[0.0, pytest.approx(0.1)], [pytest.approx(0.2), pytest.approx(0.3)]]
    assert drop_path_rates(0.3, (1,)) == [[0.0]]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layer_norm_over_channels(layout):
    x = randn(2, 5, 3, 4, requires_grad=False).contiguous(memory_format=layout)
    y = LayerNorm2d(5).double()(x)
    assert y.is_contiguous(memory_format=layout)
    expected = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-6)
    assert_same(y, expected)


def test_initialisation_touches_maps_only():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)).apply(init_truncated_normal)
    assert abs(float(network[0].weight.detach().std()) - 0.02) < 0.002
    assert float(network[0].bias.detach().abs().max()) == 0
    assert float(network[1].weight.detach().min()) == 1


def test_what_is_kept_follows_the_parameters():
    p = nn.Parameter(torch.zeros(2))
    assert cache_key(p) is None  # gradients are recorded
    with torch.no_grad():
        key = cache_key(p)
        assert key == cache_key(p)
        p.add_(1)
        assert cache_key(p) != key
        assert cache_key(p.data.clone()) != cache_key(p)
        assert torch.func.vmap(lambda x: x + (cache_key(p) is None))(torch.zeros(2)).tolist() == [1, 1]
    with torch.inference_mode():
        assert cache_key(torch.zeros(2)) is None
        assert cache_key(p) is not None
