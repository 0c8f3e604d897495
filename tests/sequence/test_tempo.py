"""TEMPO: parts sum to the window, predictions are equivariant, prompts and heads do what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynakern import create_model, load_official
from dynakern.ops import stl
from dynakern.sequence import TEMPO
from dynakern.sequence.tempo import (
    PROMPT_TOKENS,
    PromptPool,
    SeriesParts,
    convert_state_dict,
    series_classifier,
    tempo_small,
)
from dynakern.testing import assert_same, randn

SIZES = {
    "seq_len": 40,
    "pred_len": 12,
    "patch_size": 8,
    "stride": 4,
    "d_model": 16,
    "num_heads": 2,
    "max_positions": 80,
}


def small(**options):
    torch.manual_seed(0)
    return tempo_small(**{**SIZES, **options}).eval()


def windows(n=3, length=40):
    return randn(n, length, 1, dtype=torch.float32, requires_grad=False).cumsum(1)


def test_parts_sum_to_the_normalised_window():
    model, x = small(), windows()
    with torch.no_grad():
        parts = model.decompose(x)
        assert_same(
            sum(parts), (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5)
        )


@pytest.mark.parametrize("prompt", ["semi-soft", "pool", "none"])
def test_predict_is_equivariant(prompt):
    model, x = small(prompt=prompt), windows(1)[0, :, 0]
    base = model.predict(x, 30)
    for a, b in ((1.0, 100.0), (3.0, -7.0), (0.2, 0.0)):
        assert_same(model.predict(a * x + b, 30), a * base + b, rtol=1e-4)


def test_predict_shapes_rollout_and_mode():
    model, x = small(), windows(2)
    model.train()
    y = model.predict(x, 30)
    assert model.training
    assert y.shape == (2, 30, 1)
    assert torch.equal(model.predict(x), y[:, :12])
    fed = torch.cat([x, y[:, :12]], 1)[:, -40:]
    assert_same(model.predict(fed), y[:, 12:24])
    table = x[..., 0].T
    assert_same(model.predict(table, 30), y[..., 0].T)
    assert_same(model.predict(torch.cat([torch.zeros(9, 2), table]), 30), y[..., 0].T)


def test_short_context_is_padded_with_a_warning():
    model, x = small(), windows(1)[0, :, 0]
    with pytest.warns(UserWarning, match="10 steps short"):
        y = model.predict(x[10:])
    assert_same(y, model.predict(torch.cat([x[10].expand(10), x[10:]])))


def test_moving_average_and_patches():
    model, x = small(moving_average=5), windows(1)
    padded = np.pad(x[0, :, 0].numpy(), 2, mode="edge")
    np.testing.assert_allclose(
        model.smooth(x)[0, :, 0], np.convolve(padded, np.ones(5) / 5, "valid"), rtol=1e-4, atol=1e-5
    )
    patches = model.patches(x)
    assert patches.shape == (1, model.num_patches, 8)
    assert torch.equal(patches[0, 1], x[0, 4:12, 0])
    assert torch.equal(patches[0, -1, -4:], x[0, -1:, 0].expand(4))


def test_decomposition_loss_is_zero_at_its_target():
    model, x = small().requires_grad_(False), windows()
    parts = model.decompose(x)
    scaled = SeriesParts(
        *(5 * (p - p.mean(1, keepdim=True)) / p.std(1, keepdim=True, unbiased=False) + 3 for p in parts)
    )
    normal = SeriesParts(*((p - p.mean(1, keepdim=True)) / p.std(1, keepdim=True, unbiased=False) for p in parts))
    assert float(model.decomposition_loss(normal, scaled)) == pytest.approx(0, abs=1e-6)
    assert float(model.decomposition_loss(parts, scaled)) > 0.01
    y = windows(length=12)
    assert float(model.loss(x, y, scaled, dec_weight=1.0)) == pytest.approx(
        float(model.loss(x, y) + model.decomposition_loss(parts, scaled)), rel=1e-5
    )


def test_pool_picks_the_most_similar_keys_and_its_keys_learn():
    torch.manual_seed(0)
    pool = PromptPool(6, 5, size=7, length=2, top_k=2)
    z = torch.randn(3, 5, 6)
    prompts, picked, similarity = pool(z)
    query = torch.einsum("bpd,p->bd", z, pool.summary.weight[0]) + pool.summary.bias
    cosine = torch.nn.functional.cosine_similarity(query[:, None], pool.keys[None], dim=-1)
    assert torch.equal(picked, cosine.topk(2).indices)
    assert prompts.shape == (3, 4, 6)
    assert torch.equal(prompts[1, 2:], pool.values[picked[1, 1]])
    assert float(similarity.detach()) == pytest.approx(float(cosine.detach().topk(2).values.sum() / 3), rel=1e-5)
    model = small(prompt="pool", pool_size=5)
    model.loss(windows(), windows(length=12)).backward()
    assert model.pool.keys.grad.abs().sum() > 0


def test_student_t_likelihood_and_quantiles():
    scipy_t = pytest.importorskip("scipy.stats").t
    model, x, y = small(head="student-t").requires_grad_(False), windows(), windows(length=12)
    mu, sigma, nu = model.forecast_distribution(x)
    assert bool((sigma > 0).all())
    assert bool((nu > 2).all())
    want = -scipy_t.logpdf(y.numpy(), nu.detach().numpy(), mu.detach().numpy(), sigma.detach().numpy()).mean()
    assert float(model.loss(x, y)) == pytest.approx(want, rel=1e-4)
    forecast, levels = model.predict(x, 5, quantiles=[0.1, 0.5, 0.9])
    assert levels.shape == (3, 5, 1, 3)
    assert_same(levels[..., 1], forecast, rtol=1e-4)
    assert bool((levels.diff(dim=-1) > 0).all())
    with pytest.raises(ValueError, match="horizon of at most 12"):
        model.predict(x, 13, quantiles=[0.5])


def test_prompts_differ_and_only_their_tokens_are_kept():
    model = small()
    assert len(model.gpt2.wte.weight) == len({t for row in PROMPT_TOKENS.values() for t in row}) == 10
    rows = {part: getattr(model, f"tokens_{part}") for part in PROMPT_TOKENS}
    assert not torch.equal(rows["trend"], rows["season"])
    assert [model.vocabulary[i] for i in rows["trend"]] == list(PROMPT_TOKENS["trend"])


def test_gpt2_weights_are_taken_from_a_checkpoint():
    from dynakern.layers.transformer import GPT2

    donor = GPT2(width=16, num_layers=3, num_heads=2, vocab_size=40000, max_positions=90)
    model = small(lora_rank=2).load_gpt2(donor.state_dict())
    assert torch.equal(model.gpt2.wte.weight, donor.wte.weight[model.vocabulary])
    assert torch.equal(model.gpt2.wpe.weight, donor.wpe.weight[:80])
    attention = model.gpt2.h[0].attn.c_attn
    assert torch.equal(attention.base_layer.weight, donor.h[0].attn.c_attn.weight)
    with pytest.raises(ValueError, match="do not fit this network"):
        small(d_model=8).load_gpt2(donor.state_dict())


def test_old_and_new_names_of_adapters_load():
    model = small(lora_rank=2)
    state = {}
    for key, value in model.state_dict().items():
        key = key.replace("gpt2.", "gpt2_trend.base_model.model.").replace("lora_A.", "lora_A.default.")
        state[key.replace("lora_B.", "lora_B.default.").replace("base_layer.", "")] = value
    assert convert_state_dict(state, model).keys() == model.state_dict().keys()
    load_official(small(lora_rank=2), state)


def test_released_size():
    with torch.device("meta"):
        model = create_model("tempo", lora_rank=None)
    blocks = 6 * (12 * 768**2 + 13 * 768) + 2 * 768
    tables = (1024 + 10) * 768
    patches = (336 - 16) // 8 + 2
    heads = 3 * (patches * 768 * 96 + 96) + 3 * (16 * 768 + 768) + 3 * (768**2 + 768)
    maps = 336**2 + 336 + 336 * 4 * 336 + 4 * 336 + 4 * 336 * 336 + 336 + 2
    assert sum(p.numel() for p in model.parameters()) == blocks + tables + heads + maps


def test_training_with_stl_targets_reduces_the_loss():
    from dynakern.data import sample
    from dynakern.data.series import read_series_csv

    y = torch.from_numpy(read_series_csv(sample("ETTh1.csv")).values[:600, 0])
    parts = stl(y, 24)
    starts = torch.arange(0, 540, 6)
    cut = [torch.stack([p[s : s + 40] for s in starts]).unsqueeze(-1).float() for p in (y, *parts)]
    future = torch.stack([y[s + 40 : s + 52] for s in starts]).unsqueeze(-1).float()
    model = small().train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = model.loss(cut[0], future, SeriesParts(*cut[1:]), dec_weight=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("length", [30, 1100])  # the longer one is averaged over blocks of three steps
def test_classifier_ignores_what_follows_a_series(length):
    torch.manual_seed(0)
    model = series_classifier(channels=2, length=length, classes=3).eval()
    x = randn(2, length, 2, requires_grad=False)
    model = model.double()
    lengths = torch.tensor([length, length // 2])
    other = x.clone()
    other[1, length // 2 :] = 7.0
    with torch.no_grad():
        assert_same(model(other, lengths), model(x, lengths))
        assert_same(model(x[1:, : length // 2]), model(x, lengths)[1:])
        assert float((model(2 * x, lengths) - model(x, lengths)).abs().max()) > 1e-3  # the scale is a feature
    with pytest.raises(ValueError, match=f"at most {length} steps"):
        model(torch.cat([x, x], 1))


def test_refusals():
    for match, options in {
        "at least 12 steps, got 11": {"seq_len": 11},
        "`moving_average` must be odd": {"moving_average": 4},
        "`top_k` must be between 1 and the pool's size 2, got 3": {"prompt": "pool", "pool_size": 2},
        "need 57 positions, the transformer has 30": {"max_positions": 30},
        "`double_pass` is for": {"double_pass": True},
        "Did you mean 'semi-soft'": {"prompt": "semisoft"},
        "multiple of num_heads": {"num_heads": 3},
    }.items():
        with pytest.raises(ValueError, match=match):
            small(**options)
    model = small()
    with pytest.raises(ValueError, match="`x` must have size 40 on axis 1"):
        model(torch.zeros(1, 39, 1))
    with pytest.raises(ValueError, match="`context` must be finite"):
        model.predict(torch.full((40,), float("nan")))
    with pytest.raises(ValueError, match="at least 12 steps, got 5"):
        model.predict(torch.zeros(5))
    with pytest.raises(ValueError, match="needs head='student-t'"):
        model.forecast_distribution(windows())
    with pytest.raises(ValueError, match="`quantiles` need head='student-t'"):
        model.predict(windows(), quantiles=[0.5])
    assert bool(torch.isfinite(model(torch.ones(1, 40, 1))).all())  # a constant window
    assert isinstance(create_model("tempo_small", **SIZES), TEMPO)
