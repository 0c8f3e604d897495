"""The forecaster of many stations: lags, order, equivariance to units, refusals."""

from __future__ import annotations

import pytest
import torch

from dynakern.testing import assert_same, randn
from dynakern.vision.unireplknet import StationForecaster
from dynakern.vision.unireplknet.series import _correlation, _decompose, _NormedConv1d, _rolled


def small(**options):
    torch.manual_seed(0)
    sizes = {"seq_len": 16, "label_len": 4, "pred_len": 4, "d_model": 8, "n_heads": 2, "map_hw": (8, 16)}
    sizes |= {"depths": (1, 1), "dims": (4, 8), "kernel_sizes": ((3,), (5,)), "moving_avg": 5}
    return StationForecaster((2, 3), 2, **{**sizes, **options}).double().eval()


def inputs(batch=2):
    x, marks = randn(batch, 16, 12, requires_grad=False).cumsum(1), randn(batch, 16, 4, requires_grad=False)
    return x, marks, randn(batch, 8, 4, requires_grad=False), randn(12, 3, requires_grad=False)


def test_shapes_and_gradients():
    model = small().train()
    y = model(*inputs())
    assert y.shape == (2, 4, 12)
    y.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None and "norm0" not in n] == []


def test_forecasts_keep_the_units():
    model, (x, *rest) = small(), inputs()
    with torch.no_grad():
        assert_same(model(3 * x + 7, *rest), 3 * model(x, *rest) + 7, rtol=1e-4)  # but for the 1e-5 in the scale


def test_rolling_and_correlation_find_a_lag():
    v = randn(2, 3, 10, requires_grad=False)
    lag = torch.tensor([4, 7])[:, None]
    rolled = _rolled(v, lag)
    assert_same(rolled[0], torch.roll(v[0], -4, -1))
    assert _correlation(v, rolled).argmax(-1)[:, 0].tolist() == [4, 7]
    expected = torch.stack([(v * torch.roll(rolled, lag, -1)).sum(-1) for lag in range(10)], -1)
    assert_same(_correlation(v, rolled), expected)


def test_stations_that_do_not_lead_do_not_matter_to_those_before():
    """The convolution along the order of lags looks back only."""
    layer, x = _NormedConv1d(3, 3, 3).double(), randn(1, 3, 9, requires_grad=False)
    changed = x.clone()
    changed[..., 5:] = 0
    assert_same(layer(changed)[..., :5], layer(x)[..., :5])
    weight = layer.weight_g * layer.weight_v / layer.weight_v.flatten(1).norm(dim=1)[:, None, None]
    manual = torch.nn.functional.conv1d(torch.nn.functional.pad(x, (6, 0)), weight, layer.bias, dilation=3)
    assert_same(layer(x), manual)


def test_parts_of_a_series_add_up():
    x = randn(2, 11, 3, requires_grad=False)
    rest, trend = _decompose(x, 5)
    assert_same(rest + trend, x)
    assert_same(trend[:, 4], x[:, 2:7].mean(1))


def test_groups_of_another_batch_row_do_not_matter():
    model, (x, x_mark, y_mark, stations) = small(), inputs()
    with torch.no_grad():
        whole = model(x, x_mark, y_mark, stations)
        assert_same(model(x[:1], x_mark[:1], y_mark[:1], stations), whole[:1], rtol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="must hold seq_len d_model = 128 numbers"):
        small(map_hw=(8, 15))
    with pytest.raises(ValueError, match="multiple of `n_heads` and the last of `dims`, got 8, 3, 8"):
        small(n_heads=3)
    with pytest.raises(ValueError, match="`label_len` must be 0 to 16"):
        small(label_len=17)
    model, (x, x_mark, y_mark, stations) = small(), inputs()
    with pytest.raises(ValueError, match="size 12 on axis 2"):
        model(x[..., :11], x_mark, y_mark, stations)
    with pytest.raises(ValueError, match="size 8 on axis 1"):
        model(x, x_mark, y_mark[:, :7], stations)
    with pytest.raises(ValueError, match="size 12 on axis 0"):
        model(x, x_mark, y_mark, stations[:5])
