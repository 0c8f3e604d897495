"""The lens on filters whose kernels are known, and on what a user may bring."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from dynakern.lens import (
    dynamism,
    effective_kernel,
    effective_receptive_field,
    impulse_response,
    look,
    tangent_spectrum,
)
from dynakern.lens.look import load_function, sample_crops
from dynakern.ops import tangent_kernel
from dynakern.testing import assert_same, randn
from tests.test_cli import run


def conv(size=5, channels=1):
    torch.manual_seed(0)
    return nn.Conv2d(channels, channels, size, padding=size // 2, bias=False).double()


class Gated(nn.Module):
    """A filter whose strength depends on the input's mean."""

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        return self.conv(x) * x.mean().detach()


def test_effective_kernel_of_a_convolution_is_its_weight():
    layer, x = conv(), randn(1, 1, 9, 9, requires_grad=False)
    kernel = effective_kernel(layer, x, channel=0)
    assert_same(kernel[0, 0, 2:7, 2:7], layer.weight[0, 0])
    assert float(kernel.abs().sum()) == pytest.approx(float(layer.weight.detach().abs().sum()))
    response = impulse_response(layer, torch.zeros_like(x))
    assert_same(response[0, 0, 2:7, 2:7], layer.weight[0, 0].flip(0, 1))
    moved = effective_kernel(layer, x, place=(3, 6), channel=0)
    assert_same(moved[0, 0, 1:6, 4:9], layer.weight[0, 0])


def test_effective_kernel_of_a_series_and_of_a_vector():
    taps, x = randn(6, 6, requires_grad=False), randn(1, 6, 2, requires_grad=False)
    kernel = effective_kernel(lambda x: torch.einsum("lm,bmd->bld", taps, x), x, channel=1)
    assert_same(kernel[0, :, 1], taps[3])
    assert float(kernel[0, :, 0].abs().max()) == 0
    weights = randn(4, 3, requires_grad=False)
    assert_same(effective_kernel(lambda x: x @ weights.T, x[:, :3, 0], channel=2)[0], weights[2])
    assert float(effective_kernel(lambda x: torch.ones(1, 4), x).abs().max()) == 0


def test_dynamism_is_zero_for_a_static_filter_and_known_for_a_gated_one():
    inputs = randn(5, 1, 9, 9, requires_grad=False)
    assert dynamism(conv(), inputs) == pytest.approx(0, abs=1e-20)
    gates = inputs.mean((1, 2, 3)).numpy()
    assert dynamism(Gated(), inputs) == pytest.approx(gates.var() / (gates**2).mean())


def test_receptive_field_of_a_box_filter():
    layer = nn.Conv2d(1, 1, 5, padding=2, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    field = effective_receptive_field(layer, torch.ones(2, 1, 16, 16), batch_size=2)
    assert field.map.shape == (16, 16)
    assert field.side(0.99) == 5
    assert field.side(0.3) == 3  # 9 of 25 pixels are more than 30 %
    assert field.ratio(0.99) == pytest.approx(25 / 256)
    assert float(field.map.max()) == 1
    wide = effective_receptive_field(nn.AdaptiveAvgPool2d(1), torch.ones(1, 1, 8, 8))
    assert wide.side(0.99) is None
    assert wide.ratio(0.99) is None


def test_receptive_field_follows_its_definition():
    torch.manual_seed(0)
    net, images = (
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3)).double(),
        randn(3, 2, 8, 9),
    )
    rows = []
    for image in images.detach().split(1):
        x = image.clone().requires_grad_()
        y = net(x)
        y[0, :, y.shape[2] // 2, y.shape[3] // 2].relu().sum().backward()
        rows.append(x.grad.relu().sum(1)[0])
    scaled = torch.log10(torch.stack(rows).mean(0) + 1)
    for batch in (1, 3):
        assert_same(effective_receptive_field(net, images, batch_size=batch).map, scaled / scaled.max())


def test_images_without_finite_gradients_are_skipped():
    images = torch.ones(2, 1, 8, 8)
    images[1] = float("inf")
    field = effective_receptive_field(lambda x: (x * x).cumsum(-1), images)
    assert field.skipped == 1


def test_spectrum_of_a_linear_model():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1, bias=False).double(), randn(5, 3, requires_grad=False)
    spectrum = tangent_spectrum(model.train(), x)
    assert_same(spectrum.kernel, x @ x.T)
    values = torch.linalg.svdvals(x) ** 2
    assert_same(spectrum.eigenvalues[:3], values)
    assert spectrum.effective_rank == pytest.approx(float(values.sum() ** 2 / (values**2).sum()))
    assert spectrum.largest_step == pytest.approx(10 / float(values[0]))
    assert model.training


def test_spectrum_of_many_outputs_is_estimated_and_of_few_exact():
    torch.manual_seed(0)
    x = randn(4, 3, requires_grad=False)
    few = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    assert_same(tangent_spectrum(few, x, probes=3).kernel, tangent_kernel(few, x))
    estimate = tangent_spectrum(few, x, probes=2).kernel
    assert 0 < float((estimate - tangent_kernel(few, x)).abs().max()) < float(tangent_kernel(few, x).max())
    linear = nn.Linear(3, 50, bias=False).double()  # all of whose kernels are equal, with nothing between outputs
    assert_same(tangent_spectrum(linear, x).kernel, x @ x.T)


@pytest.mark.parametrize("kind", ["image", "series", "vector"])
def test_look_draws_any_module(kind, tmp_path):
    torch.manual_seed(0)
    model, x = {
        "image": (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), torch.randn(3, 3, 12, 12)),
        "series": (nn.LSTM(2, 5, batch_first=True), torch.randn(3, 10, 2)),
        "vector": (nn.Sequential(nn.Linear(6, 4), nn.Tanh()), torch.randn(3, 6)),
    }[kind]
    if kind == "series":
        model = nn.Sequential(model, _Output())
    found = look(model, x)
    assert (found.receptive_field is None) == (kind != "image")
    assert found.save(tmp_path / "a.png").stat().st_size > 10_000
    figures = json.loads(found.save(tmp_path / "a.json").read_text())
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())
    assert 0 < figures["dynamism"] < 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.png"]


class _Output(nn.Module):
    def forward(self, x):
        return x[0]


def test_crops_come_from_the_picture():
    crops = sample_crops(32, 4)
    assert crops.shape == (4, 3, 32, 32)
    assert torch.equal(crops, sample_crops(32, 4))
    grey = sample_crops(4, 2, picture=np.full((3, 8, 8), 0.5))
    assert torch.equal(grey[0, 0], grey[0, 0, :1, :1].expand(4, 4))
    with pytest.raises(ValueError, match="fewer than a crop of 9"):
        sample_crops(9, picture=np.zeros((3, 8, 8)))


def test_command_on_a_network_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef network():\n    return torch.nn.Conv2d(3, 2, 3, padding=1)\nvalue = 3\n"
    )
    model = f"{tmp_path / 'mine.py'}:network"
    result = run("lens", "--model", model, "--size", "16", "--out", str(tmp_path / "a.svg"), "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["dynamism"] == pytest.approx(0, abs=1e-9)
    assert figures["parameters"] == 56
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1
    with pytest.raises(ValueError, match="has no 'nothing'"):
        load_function(f"{tmp_path / 'mine.py'}:nothing")
    with pytest.raises(ValueError, match=r"given as file.py:function"):
        load_function("mine")
    with pytest.raises(FileNotFoundError, match=r"No file none.py"):
        load_function("none.py:f")


def test_refusals():
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"must return maps \(B, C, H, W\), got shape \(1, 64\)"):
        effective_receptive_field(nn.Flatten(), x)
    with pytest.raises(ValueError, match="at least 4 x 4"):
        effective_receptive_field(conv(), torch.zeros(1, 1, 3, 8))
    with pytest.raises(ValueError, match=r"N >= 1, got \(1, 8, 8\)"):
        effective_receptive_field(conv(), x[0])
    with pytest.raises(ValueError, match="does not increase with any pixel"):
        effective_receptive_field(lambda y: 0 * y, x)
    with pytest.raises(ValueError, match=r"in \(0, 1\), got 1.0"):
        effective_receptive_field(nn.Identity(), x + 1).side(1.0)
    with pytest.raises(ValueError, match="at least two"):
        dynamism(conv(), x[:1])
    with pytest.raises(ValueError, match="does not depend on any"):
        dynamism(lambda y: 0 * y, x)
    with pytest.raises(ValueError, match=r"must be one sample, \(1, ...\), got shape \(2, 1, 8, 8\)"):
        effective_kernel(conv(), x)
    with pytest.raises(ValueError, match=r"2 indices within \(8, 8\), got \(9, 0\)"):
        effective_kernel(nn.Identity(), x[:1], place=(9, 0))
    with pytest.raises(ValueError, match="`amplitude` must be"):
        impulse_response(nn.Identity(), x[:1], amplitude=0)
    with pytest.raises(ValueError, match="at least two inputs"):
        look(nn.Identity(), x[:1])
