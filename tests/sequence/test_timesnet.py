from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynakern import create_model, load_official
from dynakern.sequence import timesnet as module
from dynakern.sequence.timesnet import InceptionConv2d, TimesBlock, TimesNet, dominant_periods
from dynakern.testing import assert_same, grads, rand, randn

TINY = {"d_model": 6, "d_ff": 5, "num_kernels": 3, "e_layers": 2, "top_k": 2, "dropout": 0.0}


def tiny(task="forecast", **options):
    torch.manual_seed(0)
    window = {"seq_len": 20, "pred_len": 10 if task == "forecast" else 0, "n_channels": 3}
    return TimesNet(task, **{**window, **TINY, "dtype": torch.float64, **options}).eval()


def wave(length, *periods, amplitude=1.0):
    t = torch.arange(length, dtype=torch.float64)
    return torch.stack([amplitude * torch.cos(2 * torch.pi * t / p) for p in periods]).sum(0)


def block(**options):
    torch.manual_seed(1)
    made = TimesBlock(4, 5, **{"top_k": 3, "num_kernels": 3, "dtype": torch.float64, **options})
    for conv in (made.conv[0], made.conv[2]):
        for kernel in conv.kernels:
            torch.nn.init.normal_(kernel.bias)
    return made


def paper_block(made, x, k):
    """Equations 1 to 6 of the paper, one period at a time, with the separate kernels."""
    length = x.shape[1]
    amplitude = torch.fft.rfft(x, dim=1).abs()
    score = amplitude.mean((0, 2))
    score[0] = 0
    frequencies = score.topk(k).indices
    share = amplitude.mean(-1)[:, frequencies].softmax(1)
    y = x
    for i, f in enumerate(frequencies.tolist()):
        p = length // f
        rows = -(-length // p)
        picture = torch.zeros(len(x), rows * p, x.shape[2], dtype=x.dtype)
        picture[:, :length] = x
        picture = picture.reshape(len(x), rows, p, -1).permute(0, 3, 1, 2)
        for conv in made.conv:
            is_conv = isinstance(conv, InceptionConv2d)
            picture = (
                sum(kernel(picture) for kernel in conv.kernels) / len(conv.kernels) if is_conv else F.gelu(picture)
            )
        mixed = picture.permute(0, 2, 3, 1).reshape(len(x), rows * p, -1)[:, :length]
        y = y + share[:, i, None, None] * mixed
    return y


# Periods


def test_periods_of_two_cosines_strongest_first():
    x = (2 * wave(96, 24) + wave(96, 8) + 5)[None, :, None]
    periods, strength = dominant_periods(x, 2)
    assert periods.tolist() == [24, 8]
    # The spectrum of a cosine of height h over L steps is h L / 2.
    assert_same(strength, torch.tensor([[96.0, 48.0]], dtype=torch.float64))


def test_periods_shared_or_of_each_sample():
    x = torch.stack((3 * wave(48, 12), wave(48, 6)))[..., None]
    shared, strength = dominant_periods(x, 1)
    assert shared.tolist() == [12]
    assert strength.shape == (2, 1)
    assert strength[1].item() < 1e-9
    assert dominant_periods(x, 1, shared=False)[0].tolist() == [[12], [6]]


def test_several_frequencies_can_give_one_period():
    periods, _ = dominant_periods(wave(36, 36 / 13, 36 / 14)[None, :, None], 2)
    assert periods.tolist() == [2, 2]


def test_periods_of_half_precision_are_found_in_float32():
    periods, strength = dominant_periods(wave(96, 24)[None, :, None].bfloat16(), 1)
    assert periods.tolist() == [24]
    assert strength.dtype == torch.float32


# Convolution


@pytest.mark.parametrize("shape", [(7, 9), (2, 11), (1, 13), (13, 2), (1, 1)], ids=str)
def test_merged_and_cropped_convolution_equals_the_mean_of_convolutions(shape):
    torch.manual_seed(0)
    merged = InceptionConv2d(3, 4, 4, dtype=torch.float64)
    separate = InceptionConv2d(3, 4, 4, merged=False, dtype=torch.float64)
    separate.load_state_dict(merged.state_dict())
    x = randn(2, 3, *shape)
    actual, expected = merged(x), separate(x)
    assert_same(actual, expected)
    assert_same(grads(actual, (x, *merged.parameters())), grads(expected, (x, *separate.parameters())))


def test_merged_kernel_of_three():
    conv = InceptionConv2d(1, 1, 3, dtype=torch.float64)
    for j, kernel in enumerate(conv.kernels):
        torch.nn.init.constant_(kernel.weight, 3.0**j)
        torch.nn.init.constant_(kernel.bias, float(j))
    weight, bias = conv.merge()
    assert_same(3 * weight[0, 0, 2], torch.tensor([9.0, 12, 13, 12, 9], dtype=torch.float64))
    assert bias.item() == 1


# Block


@pytest.mark.parametrize("inception", ["merged", "separate"])
@pytest.mark.parametrize(("B", "L", "k"), [(1, 8, 4), (3, 36, 3), (2, 25, 5)])
def test_block_matches_the_equations(B, L, k, inception):
    made, x = block(top_k=k, inception=inception), randn(B, L, 4, seed=2)
    actual, expected = made(x), paper_block(made, x, k)
    assert_same(actual, expected)
    assert_same(grads(actual, (x, *made.parameters())), grads(expected, (x, *made.parameters())))


def test_block_with_equal_periods_matches_the_equations():
    x = randn(2, 36, 4, seed=3) * 0.05 + 0.3 * wave(36, 36 / 13, 36 / 14, 36 / 17)[None, :, None]
    assert dominant_periods(x, 3)[0].tolist() == [2, 2, 2]
    made = block()
    calls = []
    made.conv[0].register_forward_hook(lambda *_: calls.append(1))
    actual = made(x)
    assert len(calls) == 1
    assert_same(actual, paper_block(made, x, 3))


def test_block_of_each_sample_equals_the_block_on_each_sample_alone():
    made, x = block(period="sample"), randn(5, 24, 4, seed=4)
    assert len({tuple(p) for p in dominant_periods(x, 3, shared=False)[0].tolist()}) > 1
    alone = torch.cat([paper_block(made, row[None], 3) for row in x])
    assert_same(made(x), alone)
    parameters = (x, *made.parameters())
    assert_same(grads(made(x), parameters), grads(alone, parameters))


def test_block_of_the_batch_couples_its_rows():
    made, x = block(top_k=1), torch.stack((wave(24, 12), 9 * wave(24, 4)))[..., None].expand(-1, -1, 4)
    assert not torch.allclose(made(x)[:1], made(x[:1]))


def test_weak_periods_are_skipped_without_a_trace():
    x = 0.05 * randn(3, 48, 4, seed=5) + torch.stack((9 * wave(48, 12), 9 * wave(48, 12), wave(48, 8)))[..., None]
    made, rows = block(), []
    made.conv[0].register_forward_hook(lambda conv, inputs, output: rows.append(len(output)))
    actual, expected = made(x), paper_block(made, x, 3)
    assert sorted(rows) == [1, 1, 3]  # only the third sample gives a share to what is not its neighbours' period
    assert_same(actual, expected)
    assert_same(grads(actual, (x, *made.parameters())), grads(expected, (x, *made.parameters())))


def test_given_period_of_the_whole_length_is_a_convolution_in_time():
    made, x = block(period=(20,)), randn(2, 20, 4)
    h = x.transpose(1, 2)
    for i in (0, 2):
        weight, bias = made.conv[i].merge()
        h = F.conv1d(h, weight[:, :, 2], bias, padding=2)
        h = F.gelu(h) if i == 0 else h
    assert_same(made(x), x + h.transpose(1, 2))


def test_given_periods_equal_found_ones():
    x = 0.1 * randn(2, 48, 4, seed=6) + 0.05 * wave(48, 12, 8)[None, :, None]
    assert sorted(dominant_periods(x, 2)[0].tolist()) == [8, 12]
    assert_same(block(period=(8, 12))(x), block(top_k=2)(x))


@pytest.mark.parametrize("period", ["batch", "sample", (4, 5)], ids=str)
def test_block_gradcheck(period):
    made = TimesBlock(2, 2, top_k=2, num_kernels=2, period=period, dtype=torch.float64)
    assert torch.autograd.gradcheck(made, (0.5 * randn(2, 8, 2, seed=7).detach()).requires_grad_())


def test_block_in_bfloat16_follows_float32():
    made, x = block(dtype=torch.float32), 0.3 * randn(2, 36, 4, dtype=torch.float32, seed=8)
    expected = made(x)
    assert_same(made.bfloat16()(x.bfloat16()).float(), expected, rtol=2e-2)


# Network


def test_forecast_and_reconstruction_follow_the_units_of_the_data():
    x = 5 * randn(2, 20, 3, requires_grad=False)
    scale, shift = torch.tensor([2.0, 50.0, 0.5]), torch.tensor([-3.0, 100.0, 0.0])
    for task in ("forecast", "anomaly"):
        model = tiny(task)
        # The floor 1e-5 in the standard deviation breaks the equivariance by about 1e-6.
        assert_same(model(x * scale + shift), model(x) * scale + shift, rtol=1e-5)


def test_constant_channels_are_finite():
    for task in ("forecast", "anomaly"):
        assert tiny(task)(torch.full((2, 20, 3), 7.0, dtype=torch.float64)).isfinite().all()


def test_marks_matter_and_those_of_the_horizon_do_not():
    model, x, marks = tiny(), randn(2, 20, 3), rand(2, 30, 4) - 0.5
    assert_same(model(x, marks), model(x, marks[:, :20]))
    assert not torch.allclose(model(x, marks), model(x))


def test_imputation_ignores_what_is_under_the_mask():
    model, x = tiny("impute"), randn(2, 20, 3, requires_grad=False)
    mask = (rand(2, 20, 3, seed=1, requires_grad=False) > 0.3).double()
    expected = model(x * mask, mask=mask)
    assert_same(model(torch.where(mask > 0, x, torch.nan), mask=mask), expected)
    assert not torch.allclose(model(x * mask, mask=torch.ones_like(mask)), expected)


def test_imputation_normalises_by_observed_entries():
    model, x = tiny("impute"), 3 * randn(2, 20, 3, requires_grad=False)
    mask = (rand(2, 20, 3, seed=1, requires_grad=False) > 0.3).double()
    assert_same(model((10 * x + 4) * mask, mask=mask), 10 * model(x * mask, mask=mask) + 4, rtol=1e-5)


def test_imputation_of_a_channel_without_observed_entries_is_finite():
    mask = torch.ones(2, 20, 3, dtype=torch.float64)
    mask[0, :, 1] = 0
    y = tiny("impute")(randn(2, 20, 3) * mask, mask=mask)
    assert y.isfinite().all()
    assert y[0, :, 1].abs().max() < 0.1  # mean 0, standard deviation sqrt(1e-5)


def test_classification_sees_only_steps_under_the_mask():
    model, x = tiny("classify", num_class=4), randn(2, 20, 3)
    assert_same(model(x, mask=torch.zeros(2, 20)), model.projection.bias.expand(2, 4))
    assert_same(model(x, mask=torch.ones(2, 20, dtype=torch.bool)), model(x))


def test_rows_are_independent_with_periods_of_each_sample():
    model, x = tiny(period="sample"), randn(4, 20, 3)
    assert_same(model(x), torch.cat([model(row[None]) for row in x]))


def test_separate_and_merged_networks_agree():
    merged, separate = tiny(), tiny(inception="separate")
    x, marks = randn(2, 20, 3), rand(2, 20, 4)
    assert_same(
        grads(merged(x, marks), list(merged.parameters())), grads(separate(x, marks), list(separate.parameters()))
    )


def test_state_dict_has_the_official_keys():
    inception = [f"{i}.kernels.{j}.{name}" for i in (0, 2) for j in range(3) for name in ("weight", "bias")]
    expected = {f"model.{e}.conv.{name}" for e in range(2) for name in inception}
    expected |= {
        f"{name}.{part}" for name in ("layer_norm", "predict_linear", "projection") for part in ("weight", "bias")
    }
    expected |= {
        "enc_embedding.value_embedding.tokenConv.weight",
        "enc_embedding.position_embedding.pe",
        "enc_embedding.temporal_embedding.embed.weight",
    }
    assert set(tiny().state_dict()) == expected
    fixed, learned = tiny(embed="fixed", freq="15min").state_dict(), tiny(embed="learned").state_dict()
    assert fixed["enc_embedding.temporal_embedding.minute_embed.emb.weight"].shape == (4, 6)
    assert learned["enc_embedding.temporal_embedding.month_embed.weight"].shape == (13, 6)


@pytest.mark.parametrize("with_constants", [True, False])
def test_official_weights_load_with_or_without_sinusoidal_tables(with_constants):
    source, target = tiny(embed="fixed"), TimesNet(seq_len=20, pred_len=10, n_channels=3, embed="fixed", **TINY)
    state = {k: v for k, v in source.state_dict().items() if with_constants or not k.endswith((".pe", "emb.weight"))}
    load_official(target.double(), state)
    x, marks = randn(2, 20, 3), torch.ones(2, 20, 4)
    assert_same(target.eval()(x, marks), source(x, marks), rtol=1e-6)  # the target's own tables were made in float32


def test_checkpoint_of_another_kernel_count_is_refused():
    with pytest.raises(ValueError, match=r"missing: model\.0\.conv\.0\.kernels\.3\.weight"):
        load_official(tiny(num_kernels=4), tiny().state_dict())


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "predict"}, "`task` must be one of"),
        ({"pred_len": 0}, "`pred_len` must be positive to forecast and 0 otherwise, got 0"),
        ({"task": "impute", "pred_len": 5}, "`pred_len` must be positive to forecast and 0 otherwise, got 5"),
        ({"top_k": 16}, "`top_k` must be at most 15, half the length 30, got 16"),
        ({"top_k": 0}, "`top_k` must be a positive integer"),
        ({"period": "window"}, "`period` must be one of 'batch', 'sample'"),
        ({"period": (31,)}, r"`period` must be at most seq_len \+ pred_len = 30, got \(31,\)"),
        ({"period": (4, 4)}, r"`period` must hold distinct integers of at least 2, got \(4, 4\)"),
        ({"period": ()}, r"`period` must hold distinct integers of at least 2, got \(\)"),
        ({"inception": "fused"}, "`inception` must be one of 'merged', 'separate'"),
        ({"num_kernels": 0}, "`num_kernels` must be a positive integer"),
        ({"embed": "time"}, "`embed` must be one of"),
        ({"freq": "fortnight"}, "Unknown frequency 'fortnight'"),
        ({"embed": "learned", "num_marks": 3}, "`num_marks` must be 4 or 5 for embedding tables, got 3"),
    ],
)
def test_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options) if "pred_len" in options else tiny(options.pop("task", "forecast"), **options)


@pytest.mark.parametrize(
    ("task", "shape", "options", "message"),
    [
        ("forecast", (2, 21, 3), {}, "`x` must have size 20 on axis 1"),
        ("forecast", (2, 20, 4), {}, "`x` must have size 3 on axis 2"),
        ("forecast", (2, 20, 3), {"mask": torch.ones(2, 20, 3)}, "task='forecast' takes no `mask`"),
        ("forecast", (2, 20, 3), {"marks": torch.ones(2, 25, 4)}, "`marks` must have size 20 on axis 1"),
        ("forecast", (2, 20, 3), {"marks": torch.ones(2, 20, 5)}, "`marks` must have size 4 on axis 2"),
        ("anomaly", (2, 20, 3), {"mask": torch.ones(2, 20, 3)}, "task='anomaly' takes no `mask`"),
        ("impute", (2, 20, 3), {}, "task='impute' needs `mask`"),
        ("impute", (2, 20, 3), {"mask": torch.ones(2, 20)}, r"`mask` must have shape \(2, 20, 3\)"),
        ("classify", (2, 20, 3), {"mask": torch.ones(2, 20, 3)}, r"`mask` must have shape \(2, 20\)"),
        ("classify", (2, 20, 3), {"marks": torch.ones(2, 20, 4)}, "`marks` are not used to classify"),
    ],
)
def test_forward_refuses(task, shape, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(task)(torch.zeros(shape, dtype=torch.float64), **options)


def test_other_refusals():
    with pytest.raises(TypeError, match="`x` must have a floating-point dtype"):
        tiny()(torch.zeros(2, 20, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="`marks` were given, but the network was built with num_marks=0"):
        tiny(num_marks=0)(torch.zeros(2, 20, 3, dtype=torch.float64), torch.zeros(2, 20, 4))
    with pytest.raises(ValueError, match=r"`period` must be at most the length 8, got \(12,\)"):
        block(period=(12,))(randn(1, 8, 4))
    with pytest.raises(ValueError, match="`top_k` must be at most 4, half the length 8, got 5"):
        dominant_periods(randn(1, 8, 2), 5)


# Variants and factories


@pytest.mark.parametrize("name", [name for name in module.__all__ if name.startswith("timesnet")])
def test_variants_build(name):
    model = create_model(name, device="meta")
    assert all(p.device.type == "meta" for p in model.parameters())
    assert model.model[0].conv[0].kernels[-1].kernel_size == (11, 11)


def test_variants_take_the_published_sizes():
    def size(model):
        first = model.model[0].conv[0].kernels[0]
        return model.pred_len, first.in_channels, first.out_channels, len(model.model)

    assert size(create_model("timesnet_etth1")) == (96, 16, 32, 2)
    assert size(create_model("timesnet_ettm1", pred_len=192, device="meta")) == (192, 64, 64, 2)
    assert size(create_model("timesnet_ettm1", pred_len=336, device="meta")) == (336, 16, 32, 2)
    assert size(create_model("timesnet_smap", device="meta")) == (0, 128, 128, 3)
    assert size(create_model("timesnet_m4", frequency="hourly", device="meta")) == (48, 32, 32, 2)


@pytest.mark.parametrize(("features", "length"), [(0, 3), (4, 24)])
def test_task_factories(features, length):
    x, marks = torch.randn(2, length, 3), torch.rand(2, length + 2, features)
    forecaster = module.forecaster(channels=3, context=length, horizon=2, time_features=features)
    assert forecaster(x, marks if features else None).shape == (2, 2, 3)
    imputer = module.imputer(channels=3, length=length).eval()
    mask = (torch.rand(2, length, 3) > 0.3).float()
    assert imputer(x * mask, mask).shape == (2, length, 3)
    assert_same(imputer(x * mask, mask), imputer.net(x * mask, mask=mask))
    assert module.detector(channels=3, length=length)(x).shape == (2, length, 3)
    classifier = module.series_classifier(channels=3, length=length, classes=4).eval()
    steps = torch.tensor([2, length])
    mask = torch.arange(length) < steps[:, None]
    assert_same(classifier(x, steps), classifier.net(x, mask=mask))
    assert classifier(x).shape == (2, 4)
