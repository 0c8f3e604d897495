"""SS2D: its four directions, its variants, their keys, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynakern.layers import SS2D, cross_merge, cross_scan
from dynakern.models import load_official
from dynakern.testing import assert_same, randn


def layer(forward_type="v05", **options):
    torch.manual_seed(0)
    return SS2D(**{"d_model": 6, "d_state": 3, "dtype": torch.float64, "forward_type": forward_type, **options}).eval()


def test_directions_of_a_small_image():
    x = torch.tensor([[[[0.0, 1, 2], [3, 4, 5]]]])
    rows, columns = [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]
    for scans, expected in {
        "cross2d": [rows, columns, rows[::-1], columns[::-1]],
        "bidi": [rows, rows, rows[::-1], rows[::-1]],
        "unidi": [rows] * 4,
    }.items():
        assert cross_scan(x, scans)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("scans", ["cross2d", "bidi", "unidi"])
@pytest.mark.parametrize(("H", "W"), [(1, 1), (1, 5), (4, 3)])
def test_merge_undoes_and_transposes_the_scan(scans, H, W):
    x, ys = randn(2, 3, H, W), randn(2, 4, 3, H * W, seed=1)
    assert_same(cross_merge(cross_scan(x, scans), H, W, scans), 4 * x)
    assert_same((cross_scan(x, scans) * ys).sum(), (x * cross_merge(ys, H, W, scans)).sum())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_pixel_sees_every_other(backend):
    model, x = layer(d_conv=1, forward_type="v05_onnone", backend=backend), randn(1, 4, 5, 6)
    (g,) = torch.autograd.grad(model(x)[0, 1, 3].sum(), x)
    assert (g.abs().amax(-1) > 0).all()


def test_one_direction_is_causal_along_the_rows():
    model, x = layer("v051d", d_conv=1), randn(1, 4, 5, 6)
    (g,) = torch.autograd.grad(model(x)[0, 1, 3].sum(), x)
    seen = (g.abs().amax(-1) > 0).flatten().tolist()
    assert seen == [True] * 9 + [False] * 11


def test_flipping_the_image_flips_the_output_if_directions_share_parameters():
    model, x = layer(d_conv=1), randn(2, 4, 5, 6, requires_grad=False)
    with torch.no_grad():
        for p in (model.x_proj_weight, model.dt_projs_weight, model.dt_projs_bias):
            p.copy_(p[:1].expand_as(p).clone())
        y = model(x)
        assert_same(model(x.flip(1, 2)), y.flip(1, 2))
        assert_same(model(x.transpose(1, 2)), y.transpose(1, 2))


@pytest.mark.parametrize(
    "suffix", ["", "_noz", "_nozact", "_oact", "_onnone", "_onsoftmax", "_onsigmoid", "_ondwconv3", "_oncnorm"]
)
def test_both_layouts_agree(suffix):
    last, first = layer("v05" + suffix), layer("v05" + suffix, channel_first=True)
    first.load_state_dict(last.state_dict())
    x = randn(2, 4, 5, 6, requires_grad=False)
    assert_same(first(x.permute(0, 3, 1, 2)), last(x).permute(0, 3, 1, 2))


def test_variants_from_their_parts():
    """Each suffix changes its own step and no other."""
    x = randn(2, 4, 5, 6, requires_grad=False)
    base = layer()

    def by_hand(norm=base.out_norm, gate=nn.functional.silu, act=lambda y: y):
        u, z = base.in_proj(x).chunk(2, -1)
        y = base.scan(nn.functional.silu(base.conv2d(u.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
        return base.out_proj(act(norm(y)) * gate(z))

    softmax = lambda y: y.flatten(1, 2).softmax(1).unflatten(1, (4, 5))  # noqa: E731
    cases = {
        "v0": {},
        "v05": {},
        "v3_no32": {},
        "v05_nozact": {"gate": lambda z: z},
        "v05_oact": {"act": nn.functional.gelu},
        "v05_onnone": {"norm": lambda y: y},
        "v05_onsigmoid": {"norm": torch.sigmoid},
        "v05_onsoftmax": {"norm": softmax},
        "v05_onsigmoid_nozact_oact": {"norm": torch.sigmoid, "gate": lambda z: z, "act": nn.functional.gelu},
    }
    for name, parts in cases.items():
        model = layer(name)
        model.load_state_dict(base.state_dict(), strict="on" not in name)
        assert_same(model(x), by_hand(**parts), name=name)


def test_keys_of_the_norms_with_a_convolution():
    names = {k for k in layer("v05_oncnorm").state_dict() if "out_norm" in k}
    assert names == {"out_norm.0.weight", "out_norm.0.bias", "out_norm.2.weight"}
    assert [k for k in layer("v05_ondwconv3").state_dict() if "out_norm" in k] == ["out_norm.1.weight"]


def test_gate_and_convolution_can_be_left_out():
    names = set(layer("v05_noz", d_conv=0).state_dict())
    assert not {k for k in names if k.startswith("conv2d")}
    assert layer("v05_noz").in_proj.weight.shape == (12, 6)


def test_loads_projections_saved_as_convolutions():
    model = layer("v05_noz", channel_first=True)
    state = {k: v[:, :, None, None] if k.endswith("_proj.weight") else v for k, v in model.state_dict().items()}
    other = load_official(layer("v05_noz", channel_first=True), state)
    x = randn(1, 6, 3, 3, requires_grad=False)
    assert torch.equal(other(x), model(x))


def test_activation_and_dropout():
    x = randn(2, 4, 5, 6, requires_grad=False)
    assert not torch.allclose(layer(act_layer=nn.ReLU)(x), layer()(x))
    dropped = layer(dropout=0.5).train()(x)
    assert 0.2 < float((dropped == 0).double().mean()) < 0.8


def test_initial_values():
    model = SS2D(32, d_state=4, dt_rank=5)
    assert model.x_proj_weight.shape == (4, 13, 64)
    assert model.dt_projs_weight.shape == (4, 64, 5)
    assert_same(model.A_logs.exp(), torch.arange(1.0, 5.0).repeat(256, 1))
    assert bool((model.Ds == 1).all())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SS2D(8, forward_type="v06"), "`forward_type` must be one of 'v0'"),
        (lambda: SS2D(8, forward_type="v052dc"), "`forward_type` must be one of"),
        (lambda: SS2D(8, forward_type="v05_nozz"), "`suffix of forward_type` must be one of .* Did you mean 'noz'"),
        (lambda: SS2D(8, forward_type="v05_onnone_onsigmoid"), "may name one norm at most"),
        (lambda: SS2D(8, forward_type="v0", channel_first=True), "v0 has neither suffixes nor channel_first"),
        (lambda: SS2D(8, d_conv=4), "`d_conv` must be odd or below 2, got 4"),
        (lambda: SS2D(0), "`d_model` must be a positive integer"),
        (lambda: SS2D(8)(torch.zeros(1, 8, 5, 5)), "`x` must have size 8 on axis 3"),
        (lambda: cross_scan(torch.zeros(1, 1, 2, 2), "spiral"), "`scans` must be one of"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
