"""The heads that turn a sequence layer into a forecaster or a classifier."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynakern.layers import SeriesClassification, SeriesForecast
from dynakern.testing import assert_same, randn


class Mix(nn.Module):
    """A causal stand-in for a sequence layer: a running mean."""

    def forward(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]


def forecaster(time_features=0, **options):
    torch.manual_seed(0)
    sizes = {"channels": 3, "context": 12, "horizon": 5, "d_model": 8}
    return SeriesForecast(Mix(), **(sizes | options), time_features=time_features).double()


def test_forecast_follows_the_level_and_scale_of_the_window():
    model, x = forecaster(), randn(4, 12, 3)
    scale, shift = torch.tensor([2.0, 10.0, 0.5]), torch.tensor([-3.0, 100.0, 0.0])
    assert_same(model(x * scale + shift), model(x) * scale + shift, rtol=1e-4)  # the variance has a floor of 1e-5


def test_forecast_of_a_constant_window_is_finite_and_stays():
    model = forecaster()
    y = model(torch.full((1, 12, 3), 7.0, dtype=torch.float64))
    assert_same(y, torch.full_like(y, 7.0), rtol=1e-2)  # the scale is sqrt(1e-5), not 0


def test_marks_are_optional_and_those_of_the_horizon_unused():
    model, x, marks = forecaster(time_features=2), randn(2, 12, 3), randn(2, 17, 2, seed=1)
    assert model(x).shape == (2, 5, 3)
    changed = marks.detach().clone()
    changed[:, 12:] = 0
    assert torch.equal(model(x, marks), model(x, changed))
    changed[:, 3] += 1
    assert not torch.equal(model(x, marks), model(x, changed))


def test_every_parameter_gets_a_gradient():
    model = forecaster(time_features=2)
    model(randn(2, 12, 3), randn(2, 17, 2, seed=1)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return SeriesClassification(Mix(), channels=3, classes=4, d_model=8).double()


def test_classification_ignores_what_comes_after_the_end(classifier):
    x, lengths = randn(3, 10, 3, requires_grad=False), torch.tensor([10, 4, 1])
    alone = torch.cat([classifier(x[i : i + 1, :n]) for i, n in enumerate(lengths)])
    assert_same(classifier(x, lengths), alone)
    assert_same(classifier(x, torch.tensor([10, 10, 10])), classifier(x))


def test_an_empty_series_gives_finite_logits(classifier):
    assert classifier(randn(1, 5, 3), torch.tensor([0])).isfinite().all()
