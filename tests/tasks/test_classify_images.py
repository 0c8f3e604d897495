"""Classifying images: the estimator's preparation, the task's splits and sizes, the comparison from end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from dynakern.compare import run_comparison, write_report
from dynakern.data.images import LabelledImages, load_digits
from dynakern.layers.convnext import ConvNeXt
from dynakern.measure import count_flops, count_parameters
from dynakern.tasks import ImageClassifier
from dynakern.tasks.classify_images import _augmented
from dynakern.tasks.classify_images_baselines import BASELINES
from dynakern.tasks.classify_images_task import ClassifyImagesTask, Match, matched_width
from dynakern.train import Budget
from tests.test_cli import run, run_here


def small(*, in_chans, img_size, num_classes, width=1.0):
    channels = tuple(max(1, round(c * width)) for c in (8, 16))
    options = {"in_chans": in_chans, "num_classes": num_classes, "patch_size": 2, "layer_scale": None}
    return ConvNeXt((1, 1), channels, **options)


def toy(n=80, seed=0, test=20, channels=1):
    """Stripes that stand or lie, in noise."""
    rng = np.random.default_rng(seed)
    images = 0.3 * rng.standard_normal((n, channels, 12, 12)).astype(np.float32)
    labels = np.array(["lying", "upright"])[np.arange(n) % 2]
    stripes = (np.arange(12) % 4 < 2).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image += stripes if label == "upright" else stripes[:, None]
    is_test = None if test is None else np.arange(n) >= n - test
    return LabelledImages(images, labels, is_test, "toy")


def test_estimator_learns_and_takes_every_layout():
    data = toy(channels=3)
    model = ImageClassifier(small, budget="12ep", random_state=0, batch_size=16).fit(data.images, data.labels)
    assert model.score(data.images, data.labels) > 0.9
    assert model.classes_.tolist() == ["lying", "upright"]
    last = data.images.transpose(0, 2, 3, 1)
    np.testing.assert_allclose(model.predict_proba(last), model.predict_proba(data.images), rtol=1e-5)
    grey, flat = data.images[:, 0], data.images[:, 0].reshape(80, 144)
    one, two = (ImageClassifier(small, budget="1ep", random_state=0).fit(x, data.labels) for x in (grey, flat))
    np.testing.assert_allclose(one.predict_proba(grey), two.predict_proba(flat), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "img_size", "side"), [((8, 8), None, 16), ((12, 20), None, 24), ((32, 32), None, 32), ((9, 18), 36, 36)]
)
def test_images_become_squares(shape, img_size, side):
    x = np.random.default_rng(0).standard_normal((4, 1, *shape)).astype(np.float32)
    model = ImageClassifier(small, img_size=img_size)
    prepared, _ = model._prepare(x, [0, 1, 0, 1])
    assert prepared.shape == (4, 1, side, side)
    if shape == (12, 20):  # padded, not resized
        torch.testing.assert_close(prepared[:, :, :12, :20].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
        assert float(prepared[:, :, 12:].abs().max()) == 0
    if img_size == 36:
        assert float(prepared[:, :, 18:].abs().max()) == 0
        assert float(prepared[:, :, :18].abs().min()) > 0


def test_augmentation_moves_and_mirrors_whole_images():
    x = torch.arange(1.0, 1 + 2 * 64).reshape(2, 1, 8, 8)
    assert _augmented(x, "none", torch.Generator()) is x
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(40):
        moved = _augmented(x, "shift-flip", generator)[0, 0]
        options = {}
        for mirrored in (False, True):
            padded = nn.functional.pad(x[0], (1,) * 4)[0]
            for i in range(3):
                for j in range(3):
                    crop = padded[i : i + 8, j : j + 8]
                    options[i, j, mirrored] = crop.flip(1) if mirrored else crop
        seen |= {key for key, option in options.items() if torch.equal(option, moved)}
    assert {key[2] for key in seen} == {False, True}
    assert {key[:2] for key in seen} >= {(0, 0), (1, 1), (2, 2)}


class Extra(nn.Module):
    """A network that reports a loss of its own."""

    def __init__(self, **sizes):
        super().__init__()
        self.inner, self.calls = small(**sizes), 0

    def forward(self, x):
        return self.inner(x)

    def auxiliary_loss(self):
        self.calls += 1
        return torch.zeros(())


def test_auxiliary_loss_is_asked_for_in_training_only():
    data = toy(40)
    model = ImageClassifier(Extra, budget="2ep", random_state=0, batch_size=18).fit(data.images, data.labels)
    assert model.network_.calls == 2 * 2  # 36 images left for training, in batches of 18


def test_no_batch_of_one_is_left():
    data = toy(39)
    ImageClassifier(
        lambda **sizes: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(256), nn.Linear(256, 2)),
        budget="1ep",
        batch_size=19,
        validation_fraction=0.0,
    ).fit(data.images, data.labels)


def test_refusals_of_the_estimator():
    data = toy(20)
    model = ImageClassifier(small, budget="1ep")
    with pytest.raises(ValueError, match="at least two classes"):
        model.fit(data.images, ["a"] * 20)
    with pytest.raises(ValueError, match="equal lengths, got 20 and 19"):
        model.fit(data.images, data.labels[:19])
    with pytest.raises(ValueError, match="`X` must be finite"):
        model.fit(np.full((20, 4, 4), np.nan), data.labels)
    with pytest.raises(ValueError, match="Did you mean 'shift'"):
        ImageClassifier(small, augment="shifted").fit(data.images, data.labels)
    with pytest.raises(ValueError, match="`validation_fraction` must be"):
        ImageClassifier(small, validation_fraction=1.0).fit(data.images, data.labels)
    model.fit(data.images, data.labels)
    with pytest.raises(ValueError, match=r"shape \(1, 12, 12\) as in fit, got \(1, 5, 5\)"):
        model.predict(np.zeros((2, 5, 5)))


def test_published_and_stratified_split():
    task = ClassifyImagesTask(toy())
    assert task.classes == ["lying", "upright"]
    assert [len(task.part(test=t)[0]) for t in (False, True)] == [60, 20]
    assert np.bincount(ClassifyImagesTask(toy(test=None)).part(test=True)[1]).tolist() == [10, 10]
    assert ClassifyImagesTask(load_digits()).describe().startswith("10 classes of images of 8 x 8 pixels")


@pytest.mark.parametrize("quantity", ["parameters", "flops"])
@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_networks_are_brought_to_one_size(quantity, name):
    sizes = {"in_chans": 1, "img_size": 16, "num_classes": 4}
    target = {"parameters": 100_000, "flops": 10_000_000}[quantity]
    width = matched_width(BASELINES[name], Match(quantity, target), **sizes)
    network = BASELINES[name](**sizes, width=width).eval()
    with torch.no_grad():
        flops = count_flops(lambda: network(torch.zeros(1, 1, 16, 16)))
    assert {"parameters": count_parameters(network), "flops": flops}[quantity] == pytest.approx(target, rel=0.1)


def test_match_is_read_from_text():
    assert Match.parse("parameters:300k") == Match("parameters", 300_000)
    assert Match.parse("flops:1.5G") == Match("flops", 1.5e9)
    for text in ("300k", "parameters:", "flops:0", "weights:3"):
        with pytest.raises(ValueError, match="`match` must"):
            Match.parse(text)
    with pytest.raises(ValueError, match="has no width"):
        matched_width(
            lambda *, in_chans, img_size, num_classes: None, Match("flops", 1), in_chans=1, img_size=8, num_classes=2
        )


@pytest.mark.parametrize("name", list(BASELINES))
def test_every_baseline_beats_chance_on_the_toy(name):
    outcome = ClassifyImagesTask(toy(320, test=60)).run(name, seed=0, budget=Budget(epochs=8))
    assert outcome.metrics["error"] <= 0.3
    assert outcome.drawn.shape == (60,)


def test_weights_travel_to_the_cost_measurement():
    task = ClassifyImagesTask(toy(), match=Match("parameters", 20_000))
    outcome = task.run("convnext", seed=0, budget=Budget(epochs=1))
    cost = task.cost("convnext", seed=0, weights=outcome.weights)
    assert cost.parameters == pytest.approx(20_000, rel=0.2)
    assert cost.flops > 0
    assert task.cost("logistic", seed=0, weights=None).flops is None


def test_comparison_report_and_command(tmp_path, monkeypatch, capsys):
    comparison = run_comparison(
        ClassifyImagesTask(toy()), out=tmp_path / "a", systems=[], seeds=1, budget=Budget(epochs=1)
    )
    assert {s.competitor for s in comparison.summaries} == set(BASELINES)
    assert write_report(comparison, tmp_path / "report.html", command="x").read_text().count("<svg") == 2
    data = toy()
    np.savez(tmp_path / "bars.npz", X=data.images, y=data.labels)
    argv = (
        "compare",
        "classify-images",
        tmp_path / "bars.npz",
        "--systems",
        "convnext",
        "--seeds",
        1,
        "--budget",
        "1ep",
    )
    result = run(*argv, "--match", "parameters:20k", "--augment", "shift", "--out", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["settings"]["match"] == "parameters 20000"
    networks = [row for row in found["results"] if row["competitor"] == "convnext"]
    assert networks[0]["parameters"] == pytest.approx(20_000, rel=0.2)
    code, error = run_here("compare", "classify-images", tmp_path / "none", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert "No file or folder" in error
    code, error = run_here("compare", "classify-images", "--match", "3", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert "parameters:300k" in error


class Pixels:
    """Builds a linear map of all pixels, which learns the checks' tiny problems; named without an address in memory."""

    def __call__(self, *, in_chans, img_size, num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * img_size**2, num_classes))

    def __repr__(self):
        return "pixels"

    def __eq__(self, other):
        return type(self) is type(other)

    def __hash__(self):
        return 0


EXPECTED = {"check_methods_subset_invariance": "float32 products differ with the size of the batch, by some 1e-7"}


@parametrize_with_checks(
    [ImageClassifier(Pixels(), budget="40ep", lr=1e-2, weight_decay=1e-4, random_state=0)],
    expected_failed_checks=lambda estimator: EXPECTED,
)
def test_classifier_passes_check_estimator(estimator, check):
    check(estimator)
