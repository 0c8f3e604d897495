"""Long convolutions: the kernel's formulas, causality, the learned transform, the options, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dynakern import create_model, list_models, load_official
from dynakern.sequence import H3Conv, LongConv, LongConvModel
from dynakern.sequence.long_conv import (
    ButterflyFFT,
    LongConvKernel,
    classify_series,
    forecast,
    smooth_frequency,
    smooth_time,
    squash,
)
from dynakern.testing import assert_same, randn
from dynakern.train import parameter_groups


def small(**options):
    """A layer without randomness, in double precision."""
    options = {"init_std": 0.1, "squash": 0.01, "kernel_dropout": 0.0, "dtype": torch.float64, **options}
    return LongConv(options.pop("d_model", 4), options.pop("l_max", 32), **options)


# The kernel


def test_squash_is_the_soft_threshold():
    k = randn(2, 3, 50)
    expected = torch.sign(k) * torch.clamp(k.abs() - 0.7, min=0)
    assert_same(squash(k, 0.7), expected)
    (gradient,) = torch.autograd.grad(squash(k, 0.7).sum(), k)
    assert torch.equal(gradient, (k.abs() > 0.7).double())
    assert torch.equal(squash(k, 0.0), k)
    with pytest.raises(ValueError, match=r"`threshold` must not be negative, got -0\.1"):
        squash(k, -0.1)


@pytest.mark.parametrize(("threshold", "alive"), [(0.001, 0.62), (0.003, 0.134), (0.004, 0.046)])
def test_fraction_of_taps_alive_at_the_default_scale(threshold, alive):
    kernel = LongConvKernel(32, 1000, squash=threshold)
    assert kernel.alive() == pytest.approx(math.erfc(threshold / 0.002 / math.sqrt(2)), abs=0.01)
    assert kernel.alive() == pytest.approx(alive, abs=0.015)


def test_smoothing_in_time_divides_by_the_width_at_the_ends_too():
    k = randn(2, 3, 20)
    expected = sum(F.pad(k, (2, 2))[..., i : i + 20] for i in range(5)) / 5
    assert_same(smooth_time(k, 5), expected)
    assert_same(smooth_time(k, 1), k)
    assert_same(smooth_time(torch.ones(1, 1, 9), 3)[0, 0, 0], torch.tensor(2 / 3))


@pytest.mark.parametrize("taps", [20, 21])
def test_smoothing_in_frequency_correlates_with_a_bell(taps):
    k = randn(2, 3, taps)
    spectrum = torch.fft.rfft(k)
    padded = F.pad(spectrum, (2, 2))
    bell = [math.exp(-0.5 * (j - 2) ** 2) for j in range(5)]
    expected = sum(g * padded[..., j : j + spectrum.shape[-1]] for j, g in enumerate(bell))
    assert_same(smooth_frequency(k, 5), torch.fft.irfft(expected, n=taps))
    lossy = smooth_frequency(k, 5, keep_length=False)
    assert lossy.shape[-1] == 20
    assert_same(lossy, torch.fft.irfft(expected))


def test_smoothing_in_frequency_is_a_window_in_time():
    impulse = torch.zeros(1, 1, 256, dtype=torch.float64)
    impulse[..., 3] = 1.0
    early = smooth_frequency(impulse, 9)[0, 0]
    late = smooth_frequency(impulse.roll(97), 9)[0, 0]
    assert early.abs().max() > 10 * late.abs().max()


@pytest.mark.parametrize("smooth", [smooth_time, smooth_frequency])
@pytest.mark.parametrize("width", [4, 0, -3])
def test_smoothing_needs_an_odd_width(smooth, width):
    with pytest.raises(ValueError, match="`width`"):
        smooth(torch.zeros(1, 1, 9), width)


def test_double_exponential_initialisation():
    torch.manual_seed(0)
    kernel = LongConvKernel(9, 500, 40, init="double_exp", squash=0.0).kernel.detach()
    features, taps = torch.arange(9.0), torch.arange(500.0)
    std = 0.02 * torch.exp(-(4.0 ** (features / 9))[:, None] * taps / 500)
    measured = kernel.square().mean(0).sqrt()
    assert (measured / std).mean() == pytest.approx(1.0, abs=0.02)
    assert ((measured / std)[:, :100].mean() / (measured / std)[:, -100:].mean()) == pytest.approx(1.0, abs=0.05)


def test_kernel_is_dropped_out_in_training_only():
    kernel = LongConvKernel(4, 100, squash=0.0, dropout=0.5)
    assert (kernel.train()() == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(kernel.eval()(), kernel.kernel)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"squash": 0.1}, "0.00% of the taps survive `squash` = 0.1"),
        ({"squash": 0.003, "smooth": 15}, "after smoothing over 15.*raise `init_std`"),
        ({"squash": -0.1}, "`squash` must be a non-negative"),
        ({"smooth": 4}, "must be odd, got 4"),
        ({"smooth_in": "space"}, "`smooth_in` must be one of"),
        ({"init": "zeros"}, "`init` must be one of"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\)"),
        ({"l_max": 0}, "`l_max` must be a positive"),
    ],
)
def test_kernel_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        LongConvKernel(8, **{"l_max": 64, **options})


# The layer


def test_layer_is_the_stated_formula():
    layer, x = small(d_model=3, channels=2).eval(), randn(2, 32, 3)
    k, d = layer.kernel(), layer.D
    z = torch.zeros(2, 2, 3, 32, dtype=torch.float64)
    for j in range(32):
        z = z + k[..., j : j + 1] * F.pad(x.transpose(1, 2), (j, 0))[:, None, :, :32]
    z = F.gelu(z + d[..., None] * x.transpose(1, 2)[:, None])
    w, b = layer.output_linear[0].weight, layer.output_linear[0].bias
    expected = F.glu(z.flatten(1, 2).transpose(1, 2) @ w.T + b, -1)
    assert_same(layer(x), expected)


@pytest.mark.parametrize("length", [20, 32, 50])
@pytest.mark.parametrize("options", [{}, {"smooth": 5}, {"smooth": 5, "smooth_in": "frequency", "init_std": 0.5}])
def test_causal_layer_sees_no_future(length, options):
    layer, x = small(**options).eval(), randn(1, length, 4, requires_grad=False)
    y = layer(x)
    x[:, 12:] += 10.0
    assert_same(layer(x)[:, :12], y[:, :12])
    assert (layer(x)[:, 12:] - y[:, 12:]).abs().min() > 0


def test_the_authors_causal_layer_sees_the_future_of_short_inputs():
    layer, x = small(compat=True).eval(), randn(1, 20, 4, requires_grad=False)
    y = layer(x)
    x[:, 12:] += 10.0
    assert (layer(x)[:, :12] - y[:, :12]).abs().max() > 1e-3
    fixed = small().eval()
    fixed.load_state_dict(layer.state_dict())
    full = randn(1, 32, 4, seed=1)
    assert_same(layer(full), fixed(full))  # at full length there is nothing to wrap


def test_bidirectional_layer_is_a_forward_and_a_mirrored_backward_one():
    layer, u = small(channels=1, bidirectional=True), randn(2, 4, 32)
    k0, k1 = layer.kernel().chunk(2)
    expected = torch.zeros(2, 1, 4, 32, dtype=torch.float64)
    for j in range(32):
        expected = expected + k0[..., j : j + 1] * F.pad(u, (j, 0))[:, None, :, :32]
        future = F.pad(u, (0, j + 1))[..., j + 1 :]  # reverse tap j acts at lag -(j + 1)
        expected = expected + k1[..., j : j + 1] * future[:, None]
    assert_same(layer.convolve(u), expected + layer.D[..., None] * u[:, None])


def test_two_sided_layer_mirrors():
    layer, u = small(causal=False, channels=1), randn(1, 4, 32)
    with torch.no_grad():  # an even kernel: lag j and lag -j alike
        k = layer.kernel.kernel
        k[..., 32] = 0
        k[..., 33:] = k[..., 1:32].flip(-1)
    assert_same(layer.convolve(u.flip(-1)).flip(-1), layer.convolve(u))


def test_layouts_lengths_and_shapes():
    layer = small(transposed=True).eval()
    other = small().eval()
    other.load_state_dict(layer.state_dict())
    x = randn(2, 32, 4)
    assert_same(other(x), layer(x.transpose(1, 2)).transpose(1, 2))
    masked = other(x, torch.tensor([32, 10]))
    assert_same(masked[0], other(x)[0])
    assert_same(masked[1], other(torch.cat([x[1:, :10], torch.zeros(1, 22, 4, dtype=x.dtype)], 1))[0])
    assert small(postact=None, channels=3)(x).shape == (2, 32, 12)
    assert small(postact="tanh", activation="relu", tie_dropout=True, dropout=0.5)(x).shape == (2, 32, 4)
    with pytest.raises(ValueError, match="`x` must have size 4 on axis 2"):
        other(randn(2, 32, 5))


def test_optimiser_hints():
    layer = small(kernel_lr=5e-4, butterfly="replace")
    groups = parameter_groups(layer, lr=0.01, weight_decay=0.05)
    rates = {(g["lr"], g["weight_decay"]): sum(p.numel() for p in g["params"]) for g in groups}
    assert rates[(5e-4, 0.0)] == layer.kernel.kernel.numel()
    assert rates[(1e-3, 0.0)] == 2 * 2 * (4 + 16 + 64 + 256)
    assert set(rates) == {(5e-4, 0.0), (1e-3, 0.0), (0.01, 0.05)}
    assert small().kernel.kernel._optim == {"weight_decay": 0.0}


def test_seed_reproduces():
    torch.manual_seed(3)
    first = small().state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), small().state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bidirectional": True, "causal": False}, "do not pass causal=False too"),
        ({"butterfly": "replace", "l_max": 48}, "power of two with `butterfly`, got 48"),
        ({"butterfly": "other"}, "`mode` must be one of"),
        ({"activation": "selu"}, "`activation` must be one of"),
        ({"postact": "selu"}, "`postact` must be one of"),
    ],
)
def test_layer_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


# The learned transform


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"causal": False}, {"butterfly_shared": False}])
@pytest.mark.parametrize("length", [20, 32])
def test_learned_transform_starts_as_the_convolution(options, length):
    learned = small(butterfly="replace", **options).eval()
    plain = small(**{k: v for k, v in options.items() if k != "butterfly_shared"}).eval()
    plain.load_state_dict({k: v for k, v in learned.state_dict().items() if "mat_" not in k})
    u = randn(2, 4, length)
    assert_same(learned.convolve(u), plain.convolve(u), rtol=1e-9)


def test_additive_matrices_are_added_to_the_dft():
    additive = ButterflyFFT(3, mode="additive", dtype=torch.float64)
    replace = ButterflyFFT(3, dtype=torch.float64)
    with torch.no_grad():
        for size in (2, 4, 8, 16):
            replace.get_parameter(f"mat_{size}").add_(additive.get_parameter(f"mat_{size}"))
    x = randn(2, 3, 100)
    assert_same(additive(x, 128), replace(x, 128))
    assert_same(additive(x, 128, inverse=True), replace(x, 128, inverse=True))
    assert (additive(x, 128) - torch.fft.fft(x, n=128)).abs().max() > 0.01


def test_learned_transform_can_break_shift_invariance():
    layer = small(butterfly="replace", channels=1)
    with torch.no_grad():
        layer.block_fft_u.mat_16.add_(0.3 * torch.randn_like(layer.block_fft_u.mat_16))
    u = randn(1, 4, 24)
    before, after = layer.convolve(F.pad(u, (0, 8))), layer.convolve(F.pad(u, (8, 0)))
    assert (after[..., 8:] - before[..., :24]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="at most l_max = 32 steps, got 40"):
        layer(randn(1, 40, 4))


def test_matrices_are_dropped_out_in_training_only():
    fft = ButterflyFFT(mode="additive", dropout=0.5)
    x = randn(1, 64, dtype=torch.float32)
    assert torch.equal(fft.eval()(x, 64), fft(x, 64))
    assert not torch.equal(fft.train()(x, 64), fft(x, 64))


# The H3 layer, the backbone, the authors' weights


def test_h3_layer_is_causal_and_gated():
    layer, x = H3Conv(4, 32, init_std=0.1, dtype=torch.float64).eval(), randn(1, 20, 4, requires_grad=False)
    y = layer(x)
    x[:, 12:] += 10.0
    assert_same(layer(x)[:, :12], y[:, :12])
    leaky = H3Conv(4, 32, init_std=0.1, dtype=torch.float64, compat=True)
    leaky.load_state_dict(layer.state_dict())
    assert (leaky(x)[:, :12] - y[:, :12]).abs().max() > 1e-4
    with torch.no_grad():
        layer.q_proj.weight.zero_()
        layer.q_proj.bias.zero_()
    assert_same(layer(x), layer.output_linear.bias.expand(1, 20, 4))


def test_authors_keys_are_renamed():
    layer = small(butterfly="replace")
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    state["kernel"] = state.pop("kernel.kernel") + 1  # the stand-alone layer's name
    for index, size in enumerate((2, 4, 8, 16)):
        for name in ("u", "k"):
            state[f"block_fft_{name}.dft_matrices.{index}"] = state[f"block_fft_{name}.mat_{size}"]
    load_official(layer, state)
    assert torch.equal(layer.kernel.kernel, state["kernel"])
    with pytest.raises(ValueError, match=r"left over: block_fft_u\.mat_2"):
        load_official(small(), state)


def test_backbone_options():
    x = randn(2, 20, 3, dtype=torch.float32, requires_grad=False)
    options = {"d_input": 3, "num_classes": 5, "d_model": 8, "num_layers": 2, "l_max": 20, "init_std": 0.1}
    model = LongConvModel(**options, norm="batch", prenorm=True).eval()
    assert model(x).shape == (2, 5)
    assert model.forward_features(x).shape == (2, 20, 8)
    assert LongConvModel(**options, pool=False).eval()(x).shape == (2, 20, 5)
    short = model(x, torch.tensor([20, 7]))
    assert_same(short[0], model(x)[0], rtol=1e-4)
    x[1, 7:] = 9.0  # past the end; causal layers
    assert_same(model(x, torch.tensor([20, 7]))[1], short[1], rtol=1e-4)


# Sizes from the published widths: encoder, layers of C H T + C H + 2 H (C H + 1), norms, decoder.
VARIANTS = {
    "long_conv_classifier": 512 * 2 + 6 * (2 * 512 * 2048 + 1024 + 1024 * 1025 + 1024) + 512 * 10 + 10,
    "long_conv_lra_listops": 18 * 128 + 8 * (2 * 128 * 2048 + 256 + 256 * 257 + 256) + 128 * 10 + 10,
    "long_conv_lra_text": 135 * 256 + 6 * (2 * 256 * 4096 + 512 + 512 * 513 + 512) + 256 * 2 + 2,
    "long_conv_lra_image": 512 * 2 + 6 * (2 * 512 * 1024 + 1024 + 1024 * 1025 + 1024) + 512 * 10 + 10,
    "long_conv_lra_pathfinder": 256 * 2 + 6 * (4 * 256 * 1024 + 512 + 512 * 513 + 512) + 256 * 2 + 2,
    "long_conv_lra_pathx": 256 * 2 + 6 * (4 * 256 * 16384 + 512 + 512 * 513 + 512) + 256 * 2 + 2,
    "long_conv_scifar": 512 * 4 + 6 * (2 * 512 * 1024 + 1024 + 1024 * 1025 + 1024) + 512 * 10 + 10,
}


def test_all_variants_are_listed():
    assert set(list_models("long_conv*")) == set(VARIANTS)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_variants_have_the_published_size(name):
    model = create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == VARIANTS[name]


@pytest.mark.parametrize("marks", [0, 4])
def test_competitors(marks):
    x = randn(2, 48, 7, dtype=torch.float32, requires_grad=False)
    calendar = torch.zeros(2, 48 + 12, marks) if marks else None
    assert forecast(channels=7, context=48, horizon=12, time_features=marks)(x, calendar).shape == (2, 12, 7)
    model = classify_series(channels=7, length=48, classes=3)
    assert model(x, torch.tensor([48, 20])).shape == (2, 3)
    assert classify_series(channels=7, length=1, classes=3)(x[:, :1]).shape == (2, 3)
