"""S4D: both views agree, the fast kernel is the naive one, and each option does what the equations say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dynakern import create_model, load_official
from dynakern.sequence import S4D, S4DModel
from dynakern.sequence.s4d import (
    S4DKernel,
    convert_state_dict,
    hippo,
    hippo_diagonal,
    ssm_init,
    vandermonde,
    vandermonde_naive,
)
from dynakern.sequence.s4d.kernel import vandermonde_transpose
from dynakern.testing import assert_same, grads, randn
from dynakern.train import parameter_groups


def exponents(*shape, dtype=torch.complex128):
    real, imag = (
        -randn(*shape, seed=3, requires_grad=False).abs() * 0.05,
        randn(*shape, seed=4, requires_grad=False) * 2,
    )
    return torch.complex(real, imag).to(dtype).requires_grad_()


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 100, 1000])
@pytest.mark.parametrize(("C", "H", "M"), [(1, 1, 1), (3, 4, 5)])
def test_fast_vandermonde_is_the_naive_one(length, C, H, M):
    w, a = randn(C, H, M, dtype=torch.complex128), exponents(H, M)
    fast, naive = vandermonde(w, a, length), vandermonde_naive(w, a, length)
    assert_same(fast, naive)
    assert_same(grads(fast, (w, a)), grads(naive, (w, a)))


def test_float32_keeps_its_digits_over_long_sequences():
    torch.manual_seed(0)
    kernel = S4DKernel(8, 64, init="lin")
    with torch.no_grad():
        fast = kernel(16384)
        exact = kernel.double()(16384)
    # The largest phase here is about 1e5 radians; computed in float32 it would be wrong in the second digit.
    assert_same(fast.double(), exact, rtol=2e-5)


@pytest.mark.parametrize("length", [1, 2, 63, 100])
def test_transposed_product(length):
    u, a = randn(2, 3, length), exponents(3, 4)
    powers = torch.exp(a.unsqueeze(-1) * torch.arange(length - 1, -1, -1, dtype=torch.float64))
    want = torch.einsum("bhl,hml->bhm", u.to(torch.complex128), powers)
    got = vandermonde_transpose(u, a)
    assert_same(got, want)
    assert_same(grads(torch.view_as_real(got), (u, a)), grads(torch.view_as_real(want), (u, a)))


def test_kernel_gradcheck():
    torch.manual_seed(0)
    kernel = S4DKernel(2, 4, channels=2, n_ssm=1, dtype=torch.float64)
    names = [name for name, _ in kernel.named_parameters()]

    def function(*values):
        return torch.func.functional_call(kernel, dict(zip(names, values, strict=True)), (7,))

    values = tuple(p.detach().clone().requires_grad_() for p in kernel.parameters())
    assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize("init", ["lin", "inv", "inv2", "quad", "legs", "real", "rand"])
@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_convolution_recurrence_and_chunks_agree(init, disc):
    torch.manual_seed(0)
    layer = S4D(5, 8, init=init, disc=disc, channels=2, dtype=torch.float64).eval()
    x = randn(3, 40, 5, requires_grad=False)
    with torch.no_grad():
        whole = layer(x)
        first, state = layer(x[:, :17], state=layer.initial_state(3))
        second, state = layer(x[:, 17:], state=state)
        assert_same(torch.cat([first, second], 1), whole)
        recurrence, s, outputs = layer.recurrent(), layer.initial_state(3), []
        for step in x.unbind(1):
            y, s = recurrence.step(step, s)
            outputs.append(y)
        assert_same(torch.stack(outputs, 1), whole)
        assert_same(s, state)


def test_zoh_is_the_exact_response_to_a_held_input():
    torch.manual_seed(0)
    kernel = S4DKernel(1, 2, init="lin", dtype=torch.float64, dt_min=0.09, dt_max=0.1)
    with torch.no_grad():
        dt, a, b, c = (part.detach() for part in kernel.continuous())
    u, grid = [1.0, -2.0, 0.5], 20000
    t = (torch.arange(3 * grid, dtype=torch.float64) + 0.5) / grid * dt[0, 0]  # midpoint rule on each step
    held = torch.tensor(u, dtype=torch.float64).repeat_interleave(grid)
    end = 3 * dt[0, 0]
    integral = (torch.exp(a[0, 0] * (end - t)) * b[0, 0] * held).sum() * dt[0, 0] / grid
    with torch.no_grad():
        k = kernel(3)[0, 0]
    want = 2 * (c[0, 0, 0] * integral).real
    assert float(k[0] * u[2] + k[1] * u[1] + k[2] * u[0]) == pytest.approx(float(want), rel=1e-6)


def test_rate_resamples_a_smooth_signal():
    torch.manual_seed(0)
    kernel = S4DKernel(1, 16, init="lin", dtype=torch.float64, dt_min=0.004, dt_max=0.005)
    fine = torch.linspace(0, 1, 801, dtype=torch.float64)[:-1]
    with torch.no_grad():
        slow, fast = kernel(400, rate=2.0)[0, 0], kernel(800)[0, 0]
    signal = torch.sin(2 * math.pi * 3 * fine)
    y = torch.stack([(fast[: l + 1].flip(0) * signal[: l + 1]).sum() for l in range(799)])
    half = signal[::2]
    z = torch.stack([(slow[: l + 1].flip(0) * half[: l + 1]).sum() for l in range(399)])
    assert float((y[1::2][:399] - z).norm() / z.norm()) < 0.05


def test_bandlimit_removes_fast_states():
    torch.manual_seed(0)
    free, limited = (
        S4DKernel(1, 64, dt_min=0.05, dt_max=0.051),
        S4DKernel(1, 64, dt_min=0.05, dt_max=0.051, bandlimit=0.5),
    )
    limited.load_state_dict(free.state_dict())
    c = limited.continuous()[3][0, 0]
    frequency = free.continuous()[0][0, 0] * free.continuous()[1][0].imag.abs() / (2 * math.pi)
    assert torch.equal(c != 0, frequency < 0.25)
    assert 0 < int((c == 0).sum()) < 32


def test_bidirectional_sees_the_future_and_its_offset():
    torch.manual_seed(0)
    layer = S4D(1, 4, bidirectional=True, activation="none", final_act="none", dtype=torch.float64).eval()
    with torch.no_grad():
        layer.output_linear[0].weight.fill_(1.0)
        layer.output_linear[0].bias.zero_()
        x = torch.zeros(1, 9, 1, dtype=torch.float64)
        x[0, 4] = 1.0
        y = layer(x)[0, :, 0]
        k = layer.layer.kernel(9)[:, 0]
    assert_same(y[4:], torch.cat([k[0, :1] + layer.layer.D.detach()[0], k[0, 1:5]]))
    assert_same(y[:4], k[1, :4].flip(0))  # tap 0 of the reverse kernel acts one step back


def test_lengths_mask_the_padding():
    torch.manual_seed(0)
    layer = S4D(4, 8, bidirectional=True).eval()
    x = randn(2, 30, 4, dtype=torch.float32, requires_grad=False)
    lengths = torch.tensor([20, 30])
    other = x.clone()
    other[0, 20:] = 99.0
    with torch.no_grad():
        assert torch.equal(layer(x, lengths=lengths), layer(other, lengths=lengths))
        alone = layer(x[:1, :20])
        np.testing.assert_allclose(layer(x, lengths=lengths)[:1, :20], alone, atol=1e-5)


def test_shared_systems_and_tied_steps():
    kernel = S4DKernel(6, 4, n_ssm=2)
    assert kernel.A_real.shape == (2, 2)
    a = kernel.continuous()[1]
    assert torch.equal(a[0], a[2])
    assert torch.equal(a[1], a[5])
    assert S4DKernel(6, 4, dt_tie=False).inv_dt.shape == (6, 2)


def test_tied_dropout_uses_one_mask_for_all_steps():
    torch.manual_seed(0)
    tied, free = S4D(64, 2, dropout=0.5).dropout, S4D(64, 2, dropout=0.5, tie_dropout=False).dropout
    x = torch.ones(2, 64, 30)
    zeros = tied(x) == 0
    assert torch.equal(zeros.any(-1), zeros.all(-1))
    assert 0.3 < zeros.float().mean() < 0.7
    assert not torch.equal((free(x) == 0).any(-1), (free(x) == 0).all(-1))


def test_kernel_parameters_ask_for_their_own_rate():
    layer = S4D(4, 8, ssm_lr={"dt": 1e-4, "A": 2e-4, "B": 0})
    groups = parameter_groups(layer, lr=1e-2, weight_decay=0.05)
    found = {(g["lr"], g["weight_decay"]): {id(p) for p in g["params"]} for g in groups}
    kernel = layer.layer.kernel
    assert found[1e-4, 0.0] == {id(kernel.inv_dt)}
    assert found[2e-4, 0.0] == {id(kernel.A_real), id(kernel.A_imag)}
    assert not kernel.B.requires_grad
    assert id(kernel.C) in found[1e-2, 0.05]
    assert not hasattr(S4D(4, 8, ssm_lr=None).layer.kernel.A_real, "_optim")


@pytest.mark.parametrize("transform", ["exp", "softplus", "relu", "sigmoid", "none"])
def test_transforms_start_at_the_asked_values(transform):
    real = "none" if transform == "none" else transform
    kernel = S4DKernel(1, 8, init="lin", real_transform=real, dt_transform="softplus", dtype=torch.float64)
    a = kernel.continuous()[1][0]
    slack = 1e-4 if transform == "relu" else 1e-6
    np.testing.assert_allclose(a.real.detach(), -0.5, atol=slack + 1e-9)
    np.testing.assert_allclose(a.imag.detach(), -np.pi * np.array([1e-4 / np.pi, 1, 2, 3]), rtol=1e-6)


@pytest.mark.parametrize("size", [4, 16, 64])
def test_hippo_normal_part_is_normal_and_diagonalised(size):
    for measure in ("legs", "legt"):
        a, b, p = hippo(measure, size)
        normal = a + p @ p.T
        real = normal[0, 0]
        np.testing.assert_allclose(normal - real * np.eye(size), -(normal - real * np.eye(size)).T, atol=1e-9)
        values, vb, _ = hippo_diagonal(measure, size)
        np.testing.assert_allclose(
            np.sort(values.imag), np.sort(np.linalg.eigvals(normal).imag)[: size // 2], atol=1e-8 * size
        )
        assert 2 * np.sum(abs(vb) ** 2) == pytest.approx(b @ b)
    assert ssm_init("legs", size)[0].real.numpy() == pytest.approx(-0.5)


def test_growing_states_of_dss_stay_finite():
    kernel = S4DKernel(2, 8, disc="dss", real_transform="none")
    with torch.no_grad():
        kernel.A_real.copy_(torch.linspace(-3, 3, 4).expand(2, 4))
        assert torch.isfinite(kernel(5000)).all()


def test_minimal_weights_become_the_same_function():
    torch.manual_seed(0)
    h, m, length = 3, 4, 20
    state = {
        "D": torch.randn(h),
        "kernel.C": torch.randn(h, m, 2),
        "kernel.log_dt": torch.rand(h) * 2 - 4,
        "kernel.log_A_real": torch.randn(h, m),
        "kernel.A_imag": torch.rand(h, m) * 9,
        "output_linear.0.weight": torch.randn(2 * h, h, 1),
        "output_linear.0.bias": torch.randn(2 * h),
    }
    layer = load_official(S4D(h, 2 * m, transposed=True).eval(), state)
    dt = state["kernel.log_dt"].exp()[:, None]
    a = torch.complex(-state["kernel.log_A_real"].exp(), state["kernel.A_imag"])
    c = torch.view_as_complex(state["kernel.C"])
    want = vandermonde_naive(c * (torch.exp(dt * a) - 1) / a, dt * a, length)
    with torch.no_grad():
        assert_same(layer.layer.kernel(length)[0], want, rtol=1e-4)
    backbone = S4DModel(d_model=h, d_state=2 * m, num_layers=1, d_input=1, num_classes=2)
    ours = {k: v for k, v in backbone.state_dict().items() if not k.startswith("s4_layers")}
    load_official(backbone, {**ours, **{f"s4_layers.0.{k}": v for k, v in state.items()}})
    older = {"kernel.kernel.log_dt": torch.zeros(h), "kernel.kernel.inv_A_real": torch.zeros(h, m)}
    assert set(convert_state_dict(older, S4D(h, 2 * m))) == {"layer.kernel.inv_dt", "layer.kernel.A_real"}


def test_replaced_head_is_kept_with_a_warning():
    donor, model = (
        create_model("s4d_classifier", d_model=4, d_state=4),
        create_model("s4d_classifier", d_model=4, d_state=4, num_classes=3),
    )
    with pytest.warns(UserWarning, match="Head not loaded"):
        load_official(model, donor.state_dict())
    assert torch.equal(model.encoder.weight, donor.encoder.weight)


@pytest.mark.parametrize(
    ("variant", "width", "depth", "half_state", "directions", "systems", "encoder", "classes"),
    [
        ("s4d_classifier", 128, 4, 32, 1, 128, 128 * 2, 10),
        ("s4d_scifar", 512, 6, 32, 2, 2, 512 * 4, 10),
        ("s4d_lra_listops", 256, 6, 2, 2, 1, 256 * 18, 10),
        ("s4d_lra_text", 256, 6, 2, 2, 1, 256 * 135, 2),
        ("s4d_lra_image", 512, 6, 32, 2, 1, 512 * 2, 10),
        ("s4d_lra_pathfinder", 256, 6, 32, 2, 1, 256 * 2, 2),
        ("s4d_lra_pathx", 256, 6, 32, 2, 1, 256 * 2, 2),
        ("s4d_sc35", 128, 6, 32, 2, 1, 128 * 2, 35),
        ("s4d_bidmc", 128, 6, 128, 1, 1, 128 * 3, 1),
    ],
)
def test_variants_have_the_parameters_of_their_settings(
    variant, width, depth, half_state, directions, systems, encoder, classes
):
    with torch.device("meta"):
        model = create_model(variant)
    kernel = width + 2 * directions * width * half_state + 4 * systems * half_state  # dt, C, and A and B
    layer = kernel + width + 2 * width * width + 2 * width  # D and the gated linear map
    want = encoder + depth * (layer + 2 * width) + (width + 1) * classes
    assert sum(p.numel() for p in model.parameters()) == want


def test_low_precision_input_keeps_its_dtype():
    layer = S4D(4, 8).to(torch.bfloat16).eval()
    x = randn(2, 50, 4, dtype=torch.float32, requires_grad=False)
    with torch.no_grad():
        low = layer(x.to(torch.bfloat16))
        assert low.dtype == torch.bfloat16
        assert_same(low.float(), layer.float()(x), rtol=0.05)


def test_refusals():
    for match, options in {
        "`d_state` must be even": {"d_state": 7},
        "0 < dt_min < dt_max": {"dt_min": 0.2},
        "`n_ssm` must divide d_model = 6, got 4": {"n_ssm": 4},
        "Did you mean 'legs'": {"init": "leg"},
        "Did you mean 'bilinear'": {"disc": "bilinaer"},
        "`dropout` must be in": {"dropout": 1.0},
        "`ssm_lr` takes the keys": {"ssm_lr": {"C": 1e-3}},
        "Did you mean 'softplus'": {"dt_transform": "softpluss"},
        "Did you mean 'gelu'": {"activation": "gelo"},
    }.items():
        with pytest.raises(ValueError, match=match):
            S4D(6, **options)
    layer = S4D(6, 4, bidirectional=True)
    with pytest.raises(ValueError, match="this one is bidirectional"):
        layer(torch.zeros(1, 5, 6), state=layer.initial_state(1))
    with pytest.raises(ValueError, match="no recurrence"):
        layer.recurrent()
    with pytest.raises(ValueError, match=r"shape \(B, L, H\) with H = 6"):
        layer(torch.zeros(1, 6, 5))
    with pytest.raises(ValueError, match="not empty"):
        layer(torch.zeros(1, 0, 6))
    with pytest.raises(ValueError, match="`rate` must be a positive"):
        layer(torch.zeros(1, 5, 6), rate=0.0)
    with pytest.raises(ValueError, match="no recurrent view"):
        S4D(6, 4, disc="dss").recurrent()
    with pytest.raises(ValueError, match="must be even"):
        hippo_diagonal("legs", 3)
    with pytest.raises(ValueError, match=r"missing: layer\.D"):
        load_official(S4D(6, 4), {})
