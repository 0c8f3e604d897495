"""Chimera: special cases, both views of the data-independent layer, causality, order of variates, refusals."""

from __future__ import annotations

import pytest
import torch

from dynakern.ops import selective_scan
from dynakern.sequence import SSM2D, Chimera, ClosedLoop, ssm2d
from dynakern.sequence.chimera import lti_conv2d, lti_kernel2d
from dynakern.testing import assert_same, rand, randn


def maps(B=2, V=3, T=6, D=4, N=2):
    delta = rand(B, V, T, 2, D, seed=1, requires_grad=False) * 0.5 + 0.05
    a = -rand(4, D, N, seed=2, requires_grad=False) - 0.1
    parts = [randn(B, V, T, 2, N, seed=s, requires_grad=False) for s in (3, 4)]
    return randn(B, V, T, D, requires_grad=False), delta, a, *parts, randn(D, seed=5, requires_grad=False)


def test_without_coupling_it_is_mamba_s_scan_on_every_variate():
    x, delta, a, b, c, d = maps()
    c = torch.stack([c[..., 0, :], torch.zeros_like(c[..., 1, :])], -2)
    y = ssm2d(x, delta, a, b, c, d, coupling="none", input_rule="euler")
    rows = lambda v: v.flatten(0, 1).transpose(1, 2)  # noqa: E731
    want = selective_scan(rows(x), rows(delta[..., 0, :]), a[0], rows(b[..., 0, :]), rows(c[..., 0, :]), d)
    assert_same(y, want.transpose(1, 2).reshape(y.shape))


def test_one_rate_for_all_states_is_mamba_2():
    x, delta, a, b, c, d = maps(V=1)
    a = a[..., :1].expand(-1, -1, 2)
    c = torch.stack([c[..., 0, :], torch.zeros_like(c[..., 1, :])], -2)
    y = ssm2d(x, delta, a, b, c, d, coupling="none", input_rule="euler")[:, 0]
    step = delta[:, 0, :, 0]  # (B, T, D)
    decay = torch.exp(torch.cumsum(step * a[0, :, 0], 1))
    mask = torch.tril(torch.ones(6, 6, dtype=torch.float64))
    weights = torch.einsum("btn,bsn->bts", c[:, 0, :, 0], b[:, 0, :, 0])
    attention = weights[..., None] * decay[:, :, None] / decay[:, None] * step[:, None] * mask[..., None]
    assert_same(y, torch.einsum("btsd,bsd->btd", attention, x[:, 0]) + d * x[:, 0])


def test_constant_coefficients_are_a_convolution():
    x, delta, a, b, c, _ = maps()
    constant = [v[:1, :1, :1].expand_as(v) for v in (delta, b, c)]
    y = ssm2d(x, constant[0], a, constant[1], constant[2], None)
    d1, d2 = delta[0, 0, 0].unsqueeze(-1)
    e = [torch.exp(s * r) for s, r in zip((d1, d1, d2, d2), a, strict=True)]
    inputs = [(e[0] - 1) / a[0] * b[0, 0, 0, 0], (e[2] - 1) / a[2] * b[0, 0, 0, 1]]
    outputs = [c[0, 0, 0, i].expand_as(e[0]) for i in range(2)]
    kernel = lti_kernel2d(*(0.5 * v for v in e), *inputs, *outputs, size=(3, 6))
    assert_same(y, lti_conv2d(x, kernel))


def test_gradients():
    tensors = tuple(v.requires_grad_() for v in maps(B=1, V=2, T=3, D=2, N=2))
    assert torch.autograd.gradcheck(lambda *v: ssm2d(*v), tensors)


def test_causal_in_time_and_reaching_across_variates():
    torch.manual_seed(0)
    layer = SSM2D(4, 2).double().eval()
    x = randn(1, 3, 8, 4, requires_grad=False)
    later = x.clone()
    later[:, 1, 5:] += 1
    with torch.no_grad():
        change = (layer(later) - layer(x)).abs().sum((0, 3))  # (V, T)
    assert float(change[:, :5].max()) == 0
    assert float(change[0, 5:].min()) > 0  # backward over variates
    assert float(change[2, 5:].min()) > 0
    alone = SSM2D(4, 2, coupling="none").double().eval()
    with torch.no_grad():
        change = (alone(later) - alone(x)).abs().sum((0, 3))
    assert float(change[[0, 2]].max()) == 0


def test_states_are_returned_and_half_coupling_is_stable():
    layer = SSM2D(4, 2, dt_range=(1e-3, 1e-2))
    y, (h1, h2) = layer(torch.randn(2, 3, 5, 4), return_state=True)
    assert y.shape == (2, 3, 5, 4)
    assert h1.shape == h2.shape == (2, 3, 5, 4, 2)
    one = torch.ones(1, 1, dtype=torch.float64)
    small = torch.full_like(one, 0.999)
    half = lti_kernel2d(*(0.5 * small for _ in range(4)), one, one, one, one, size=(20, 40))
    raw = lti_kernel2d(*(small for _ in range(4)), one, one, one, one, size=(20, 40))
    assert float(half.max()) <= 2
    assert float(raw.max()) > 1e12


def test_closed_loop_continues_an_autoregression_and_reads_its_window():
    loop = ClosedLoop(2, 3, normalise=False).double().requires_grad_(False)
    phi = torch.tensor([[0.5, -0.3, 0.2], [0.9, 0.0, 0.0]], dtype=torch.float64)
    loop.a.zero_()
    loop.b.copy_(torch.eye(3, dtype=torch.float64)[0].expand(2, -1))
    loop.c.copy_(phi)
    loop.k.copy_(phi)
    u = randn(1, 9, 2, requires_grad=False)
    y, following = loop(u, 4)
    assert_same(y, following)
    want = sum(phi[:, i] * u[0, -1 - i] for i in range(3))
    assert_same(y[0, 0], want)
    inside, _ = loop.open_loop(u)
    assert_same(inside[0, 5], sum(phi[:, i] * u[0, 5 - i] for i in range(3)))
    assert_same(loop.companion()[0], torch.diag(torch.ones(2, dtype=torch.float64), -1))


@pytest.mark.parametrize("decoder", ["linear", "closed-loop"])
def test_forecasts_follow_the_scale_of_the_window(decoder):
    torch.manual_seed(0)
    model = (
        Chimera(channels=3, lookback=12, horizon=5, d_model=4, d_state=2, num_layers=1, decoder=decoder).double().eval()
    )
    x = randn(2, 12, 3, requires_grad=False) * 3
    with torch.no_grad():
        assert_same(model(5 * x + 7), 5 * model(x) + 7, rtol=1e-5)
        assert model(x).shape == (2, 5, 3)


def test_lengths_leave_padding_out():
    torch.manual_seed(0)
    model = Chimera("classify", channels=2, lookback=9, classes=3, d_model=4, d_state=2, num_layers=1).eval()
    x = torch.randn(2, 9, 2)
    lengths = torch.tensor([5, 9])
    other = x.clone()
    other[0, 5:] = 50
    with torch.no_grad():
        assert_same(model(x, lengths), model(other, lengths))
        assert_same(model(x[:1, :5]), model(x, lengths)[:1], rtol=1e-4)


def test_refusals():
    x, delta, a, b, c, _ = maps()
    with pytest.raises(ValueError, match="`delta` must have size 2 on axis 3"):
        ssm2d(x, delta[..., :1, :], a, b, c)
    with pytest.raises(ValueError, match="`C` must have N = 2"):
        ssm2d(x, delta, a, b, c[..., :1])
    with pytest.raises(ValueError, match="Did you mean 'half'"):
        ssm2d(x, delta, a, b, c, coupling="hal")
    with pytest.raises(ValueError, match="`dt_range` must be positive and increasing"):
        SSM2D(4, 2, dt_range=(0.0, 1.0))
    with pytest.raises(ValueError, match="`horizon` must be positive to forecast"):
        Chimera(channels=3, lookback=12)
    with pytest.raises(ValueError, match="must not be empty"):
        SSM2D(4, 2)(torch.zeros(1, 0, 3, 4))
    with pytest.raises(ValueError, match="`x` must have size 12 on axis 1"):
        Chimera(channels=3, lookback=12, horizon=5, d_model=4)(torch.zeros(1, 11, 3))
    with pytest.raises(ValueError, match="`horizon` must be a positive integer"):
        ClosedLoop(2, 3)(torch.zeros(1, 4, 2), 0)
