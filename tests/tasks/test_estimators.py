"""The estimators over series: they learn, keep the protocol of scikit-learn, and refuse what cannot work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from dynakern.tasks import AnomalyDetector, Forecaster, Imputer, SeriesClassifier
from dynakern.tasks.forecast_baselines import DecompositionLinear
from dynakern.tasks.networks import build_network


def linear_factory(*, channels, context, horizon, time_features):
    return DecompositionLinear(context=context, horizon=horizon)


class Dense(nn.Module):
    """A window through one hidden layer, for imputing and detecting."""

    def __init__(self, channels, length, bottleneck):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(channels * length, bottleneck), nn.Linear(bottleneck, channels * length))

    def forward(self, x, mask=None):
        shown = 1.0 if mask is None else mask.mean((1, 2))[:, None]
        return (self.net(x.flatten(1)) / shown).view_as(x)


def dense_factory(*, channels, length):
    return Dense(channels, length, 8)


class Pooled(nn.Module):
    def __init__(self, channels, length, classes):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(channels * length, 32), nn.ReLU(), nn.Linear(32, classes))
        self.length = length

    def forward(self, x, lengths=None):
        x = nn.functional.pad(x, (0, 0, 0, self.length - x.shape[1]))
        return self.net(x.flatten(1))


class PooledFactory:
    """A factory whose repr holds no address, so that parallel test workers agree on the names of tests."""

    def __call__(self, *, channels, length, classes):
        return Pooled(channels, length, classes)

    def __repr__(self):
        return "pooled"

    def __eq__(self, other):
        return type(self) is type(other)

    def __hash__(self):
        return 0


pooled_factory = PooledFactory()


def series(rows=700, channels=2, seed=0):
    t, rng = np.arange(rows), np.random.default_rng(seed)
    waves = [np.sin(2 * np.pi * t / 24 + c) for c in range(channels)]
    return 20 + 5 * np.stack(waves, 1) + 0.1 * rng.standard_normal((rows, channels))


def test_forecaster_continues_a_series_in_its_units():
    model = Forecaster(linear_factory, context=48, horizon=12, budget="12ep", lr=3e-3, random_state=0).fit(series())
    truth = 20 + 5 * np.sin(2 * np.pi * np.arange(700, 736) / 24)
    forecast = model.predict(36)  # three times the network's horizon: rolled out
    assert forecast.shape == (36, 2)
    assert np.abs(forecast[:12, 0] - truth[:12]).max() < 0.8
    assert np.abs(forecast[:, 0] - truth).max() < 2
    np.testing.assert_array_equal(model.predict(5), forecast[:5])
    later = model.predict(12, X=series()[:500])
    assert np.abs(later[:, 0] - (20 + 5 * np.sin(2 * np.pi * np.arange(500, 512) / 24))).max() < 0.8


def test_forecaster_takes_and_returns_frames():
    pd = pytest.importorskip("pandas")
    index = pd.date_range("2024-01-31", periods=700, freq="h")
    frame = pd.DataFrame(series(), columns=["a", "b"], index=index)
    model = Forecaster(linear_factory, context=48, horizon=24, budget="1ep", random_state=0).fit(frame)
    forecast = model.predict()
    assert list(forecast.columns) == ["a", "b"]
    assert forecast.index[0] == index[-1] + pd.Timedelta("1h")
    assert len(forecast) == 24
    months = pd.DataFrame({"a": np.arange(400.0)}, index=pd.date_range("1990-01-01", periods=400, freq="MS"))
    model = Forecaster(linear_factory, context=24, horizon=6, budget="1ep", random_state=0).fit(months)
    assert [str(d.date()) for d in model.predict(3).index] == ["2023-05-01", "2023-06-01", "2023-07-01"]


def test_forecaster_repeats_and_clones():
    settings = {"context": 48, "horizon": 12, "budget": "1ep", "random_state": 3}
    one = Forecaster(linear_factory, **settings).fit(series())
    two = clone(one).fit(series())
    np.testing.assert_array_equal(one.predict(), two.predict())
    assert clone(one).get_params()["context"] == 48
    with pytest.raises(NotFittedError):
        clone(one).predict()


@pytest.mark.parametrize(
    ("change", "X", "message"),
    [
        ({"budget": "soon"}, series(), "budget"),
        ({"context": 600}, series(), "too short"),
        ({"system": "s4dd"}, series(), "Did you mean 's4d'"),
        ({"system": "linear"}, series(), "Unknown system"),
        ({}, np.full((700, 1), np.nan), "must be finite"),
    ],
)
def test_forecaster_refuses(change, X, message):
    model = Forecaster(linear_factory, context=48, horizon=12, budget="1ep").set_params(**change)
    with pytest.raises(ValueError, match=message):
        model.fit(X)


def test_forecaster_refuses_other_series():
    model = Forecaster(linear_factory, context=48, horizon=12, budget="1ep").fit(series())
    with pytest.raises(ValueError, match="the 2 fitted series, got 3"):
        model.predict(X=np.zeros((60, 3)))
    with pytest.raises(ValueError, match="at least context = 48 rows, got 10"):
        model.predict(X=np.zeros((10, 2)))
    with pytest.raises(ValueError, match="`horizon` must be a positive integer"):
        model.predict(0)


def test_imputer_restores_hidden_values_and_keeps_the_rest():
    x = series()
    rng = np.random.default_rng(1)
    holes = rng.random(x.shape) < 0.2
    model = Imputer(dense_factory, window=24, budget="30ep", lr=1e-2, random_state=0).fit(np.where(holes, np.nan, x))
    filled = model.transform(np.where(holes, np.nan, x))
    np.testing.assert_array_equal(filled[~holes], x[~holes])
    assert not np.isnan(filled).any()
    error = np.sqrt(np.mean((filled - x)[holes] ** 2))
    assert error < 0.4 * x.std()
    assert model.transform(np.where(holes, np.nan, x)[:31]).shape == (31, 2)


def test_imputer_refuses():
    with pytest.raises(ValueError, match="`mask_rate` must be in"):
        Imputer(dense_factory, mask_rate=1.0).fit(series())
    with pytest.raises(ValueError, match="series 1 has none to learn from"):
        Imputer(dense_factory, window=24).fit(np.stack([series()[:, 0], np.full(700, np.nan)], 1))
    with pytest.raises(ValueError, match="at least 480 rows"):
        Imputer(dense_factory).fit(series(200))
    with pytest.raises(NotFittedError):
        Imputer(dense_factory).transform(series())


def test_detector_finds_a_planted_anomaly():
    model = AnomalyDetector(dense_factory, window=24, budget="30ep", lr=1e-2, random_state=0).fit(series())
    test = series(seed=1)
    test[300:306] += 8
    scores = model.score_samples(test)
    assert scores.shape == (700,)
    assert set(np.argsort(scores)[:4]) <= set(range(295, 312))
    flags = model.predict(test)
    assert (flags[300:306] == -1).mean() >= 0.5
    assert (flags[:250] == 1).mean() > 0.95
    assert (model.predict(series()) == -1).mean() == pytest.approx(0.01, abs=0.005)


def test_detector_refuses():
    with pytest.raises(ValueError, match="`contamination` must be in"):
        AnomalyDetector(dense_factory, contamination=0.7).fit(series())
    model = AnomalyDetector(dense_factory, window=24, budget="1ep").fit(series())
    with pytest.raises(ValueError, match="has 1 features, but this estimator was fitted with 2"):
        model.score_samples(series()[:, 0])
    with pytest.raises(ValueError, match="one window of 24 rows, got 5"):
        model.score_samples(series()[:5])


def test_classifier_on_unequal_lengths_and_channels():
    rng = np.random.default_rng(0)
    lengths, y = rng.integers(20, 30, 80), np.arange(80) % 2
    X = [
        rng.standard_normal((n, 2)) * 0.3 + np.sin(np.arange(n) * (0.3 + 0.9 * c))[:, None]
        for n, c in zip(lengths, y, strict=True)
    ]
    labels = np.array(["slow", "fast"])[y]
    model = SeriesClassifier(pooled_factory, budget="15ep", random_state=0).fit(X[:60], labels[:60])
    assert model.score(X[60:], labels[60:]) > 0.9
    assert model.predict_proba(X[60:]).sum(1) == pytest.approx(np.ones(20))
    assert list(model.classes_) == ["fast", "slow"]
    with pytest.raises(ValueError, match="must have 2 channels"):
        model.predict(np.zeros((3, 20, 1)))
    with pytest.raises(ValueError, match="must not be longer"):
        model.predict([np.zeros((40, 2)), np.zeros((20, 2))])
    with pytest.raises(ValueError, match=r"`X\[1\]` must be finite"):
        model.predict([np.zeros((20, 2)), np.full((21, 2), np.nan)])


# scikit-learn's tables have no time; a table (N, L) is N series of one channel here, and all of its checks apply.
@parametrize_with_checks([SeriesClassifier(pooled_factory, budget="12ep", lr=1e-2, random_state=0)])
def test_classifier_passes_check_estimator(estimator, check):
    check(estimator)


def test_build_network_refuses():
    with pytest.raises(TypeError, match=r"must return a torch\.nn\.Module, got int"):
        build_network("detect", lambda **sizes: 3, channels=1, length=2)
    with pytest.raises(TypeError, match="a name or a factory"):
        build_network("detect", 5, channels=1, length=2)
    with pytest.raises(ValueError, match="'selective_scan' cannot detect"):
        build_network("detect", "selective_scan", channels=1, length=2)
    assert isinstance(build_network("detect", dense_factory, channels=1, length=4), Dense)
    assert torch.is_tensor(Dense(1, 4, 2)(torch.zeros(1, 4, 1)))
