"""The Mamba block: its recurrent form, its initial values, causality, selectivity, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynakern.layers import Mamba, MambaStack
from dynakern.layers.mamba import classify_series, forecast, init_step_bias, init_step_weight
from dynakern.models import load_official
from dynakern.testing import assert_same, randn


def block(**options):
    torch.manual_seed(0)
    return Mamba(**{"d_model": 6, "d_state": 4, "dtype": torch.float64, **options}).eval()


@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_steps_and_pieces_equal_the_whole(d_conv):
    model, x = block(d_conv=d_conv), randn(3, 20, 6, requires_grad=False)
    with torch.no_grad():
        y, state, outputs = model(x), model.init_state(3), []
        for t in range(5):
            y_t, state = model.step(x[:, t], state)
            outputs.append(y_t[:, None])
        for piece in (x[:, 5:6], x[:, 6:17], x[:, 17:]):
            y_piece, state = model.extend(piece, state)
            outputs.append(y_piece)
    assert_same(torch.cat(outputs, 1), y)


def test_a_step_leaves_its_state_alone():
    model, x = block(), randn(1, 6, requires_grad=False)
    _, state = model.step(x, model.init_state(1))
    copies = [s.clone() for s in state]
    model.step(x, state)
    assert all(torch.equal(a, b) for a, b in zip(state, copies, strict=True))


def test_state_remembers_the_last_inputs_of_the_convolution():
    model, x = block(d_conv=3), randn(2, 7, 6, requires_grad=False)
    with torch.no_grad():
        _, state = model.extend(x, model.init_state(2))
        expected = model.in_proj(x)[..., : model.d_inner].mT[..., -3:]
    assert_same(state.conv, expected)


def test_output_depends_on_the_past_only():
    model, x = block(), randn(1, 12, 6)
    (g,) = torch.autograd.grad(model(x)[:, 7].sum(), x)
    assert g[:, 8:].abs().max() == 0
    assert (g[:, :8].abs().amax(-1) > 0).all()


def test_written_out_with_plain_torch():
    model, x = block(bias=True, dt_rank=2), randn(2, 9, 6, requires_grad=False)
    p = dict(model.named_parameters())
    v, z = (x @ p["in_proj.weight"].T + p["in_proj.bias"]).split(12, -1)
    v = F.conv1d(F.pad(v.mT, (3, 0)), p["conv1d.weight"], p["conv1d.bias"], groups=12).mT
    v = v * v.sigmoid()
    r, B, C = (v @ p["x_proj.weight"].T).split([2, 4, 4], -1)
    dt = F.softplus(r @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    h, ys = torch.zeros(2, 12, 4, dtype=torch.float64), []
    for t in range(9):
        h = torch.exp(-dt[:, t, :, None] * p["A_log"].exp()) * h + (dt * v)[:, t, :, None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1) + p["D"] * v[:, t])
    y = (torch.stack(ys, 1) * z * z.sigmoid()) @ p["out_proj.weight"].T + p["out_proj.bias"]
    assert_same(model(x), y)


def test_initial_values():
    model = Mamba(40, d_state=5, dt_min=0.01, dt_max=0.2)
    assert model.dt_rank == 3
    assert model.d_inner == 80
    assert_same(model.A_log.exp(), torch.arange(1.0, 6.0).repeat(80, 1))
    assert bool((model.D == 1).all())
    dt = F.softplus(model.dt_proj.bias)
    assert 0.01 * 0.999 <= float(dt.detach().min()) < 0.02
    assert 0.1 < float(dt.detach().max()) <= 0.2 * 1.001
    bound = 3**-0.5
    assert 0.8 * bound < float(model.dt_proj.weight.detach().abs().max()) <= bound
    weight, bias = torch.empty(8, 4), torch.empty(1000)
    init_step_weight(weight, dt_init="constant", dt_scale=2.0)
    assert bool((weight == 1.0).all())
    init_step_bias(bias, dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-4)
    assert_same(F.softplus(bias), torch.full((1000,), 1e-4), rtol=1e-4)


def test_keeps_the_state_space_in_single_precision():
    model = Mamba(8, dtype=torch.bfloat16)
    assert model.A_log.dtype == model.D.dtype == torch.float32
    x = randn(2, 50, 8, dtype=torch.bfloat16, requires_grad=False)
    y = model(x)
    assert y.dtype == torch.bfloat16
    assert model.init_state(1).ssm.dtype == torch.float32
    exact = Mamba(8, dtype=torch.float64)
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    assert_same(y.double(), exact(x.double()), rtol=3e-2)  # the projections round too, not the scan alone


def test_trains_under_autocast():
    model, x = block(dtype=torch.float32), randn(2, 30, 6, dtype=torch.float32, requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    assert_same(y.float(), model(x), rtol=3e-2)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_loads_official_keys_and_stack_has_the_backbones():
    keys = {"in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"}
    keys |= {"A_log", "D", "out_proj.weight"}
    model = block()
    assert set(model.state_dict()) == keys
    other = load_official(Mamba(6, d_state=4, dtype=torch.float64), model.state_dict())
    x = randn(1, 5, 6, requires_grad=False)
    assert torch.equal(other(x), model(x))
    stack = {k for k in MambaStack(6, 1).state_dict() if "mixer" not in k}
    assert stack == {"layers.0.norm.weight", "norm_f.weight"}


def test_factories_of_the_tasks():
    model = forecast(channels=3, context=24, horizon=7, time_features=4)
    assert model(torch.randn(2, 24, 3), torch.randn(2, 31, 4)).shape == (2, 7, 3)
    model = classify_series(channels=3, length=20, classes=5)
    assert model(torch.randn(2, 20, 3), torch.tensor([20, 9])).shape == (2, 5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Mamba(0), "`d_model` must be a positive integer"),
        (lambda: Mamba(4, d_state=-1), "`d_state` must be a positive integer"),
        (lambda: Mamba(4, dt_init="zeros"), "`dt_init` must be one of 'random', 'constant'"),
        (lambda: Mamba(4)(torch.zeros(2, 5, 3)), "`x` must have size 4 on axis 2"),
        (lambda: Mamba(4).step(torch.zeros(2, 1, 4), None), r"`x_t` must have shape \(B, 4\)"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
