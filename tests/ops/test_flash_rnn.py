"""The multi-head recurrent operator: every engine is the reference, and the reference is torch's own networks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dynakern.measure import count_flops
from dynakern.ops import explain_backend, flash_rnn
from dynakern.ops.flash_rnn import CELLS
from dynakern.testing import assert_same, available_backends, grads, rand, randn, relative_error

SHAPES = [(1, 1, 1, 1), (2, 2, 3, 5), (5, 63, 2, 8), (9, 20, 1, 17)]
FUNCTIONS = list(CELLS)
FAST = [name for name in available_backends() if name != "reference"]


def operands(function, B, T, NH, D, dtype=torch.float64, given=True, device="cpu"):
    cell = CELLS[function]
    Wx = randn(B, T, cell.inputs, NH, D, seed=1, requires_grad=False)
    R = randn(cell.recurrent, NH, D, D, seed=2, requires_grad=False) / D**0.5
    b = randn(cell.gates, NH, D, seed=3, requires_grad=False)
    states = randn(cell.states, B, 1, NH, D, seed=4, requires_grad=False)
    if function == "slstm":  # n, the norm, is positive
        states[2] = 0.5 + rand(B, 1, NH, D, seed=5, requires_grad=False)
    tensors = [Wx, R, b, *([states] if given else [])]
    return [x.to(device=device, dtype=dtype).requires_grad_() for x in tensors]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("given", [False, True], ids=["zero", "given"])
@pytest.mark.parametrize(("B", "T", "NH", "D"), SHAPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_engines_are_the_reference(backend, function, B, T, NH, D, given):
    dtypes = [torch.float64, torch.float32] if backend == "cpu" else [torch.float32]
    for dtype in dtypes:
        inputs = operands(function, B, T, NH, D, dtype, given, "cuda" if backend == "gpu" else "cpu")

        def run(backend, *, return_states, inputs=inputs):
            return flash_rnn(*inputs, function=function, return_states=return_states, backend=backend)

        actual, expected = (run(name, return_states=True) for name in (backend, "reference"))
        assert_same(actual, expected)
        assert_same(grads(actual, inputs), grads(expected, inputs))
        for index in (0, 1):  # h alone, the last states alone
            actual, expected = (run(name, return_states=False)[index] for name in (backend, "reference"))
            assert_same(actual, expected)
            assert_same(grads(actual, inputs), grads(expected, inputs))
        with torch.no_grad():
            assert_same(run(backend, return_states=False), run("reference", return_states=False))


@pytest.mark.parametrize("backend", available_backends()[:2])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_are_those_of_finite_differences(backend, function):
    inputs = operands(function, 2, 4, 2, 3)
    assert torch.autograd.gradcheck(
        lambda *x: flash_rnn(*x, function=function, return_states=True, backend=backend), inputs
    )


@pytest.mark.parametrize("backend", available_backends()[:2])
@pytest.mark.parametrize("options", [{"recurrent_gradient": False}, {"gradient_clip": 0.1}], ids=["cut", "clip"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_options_of_the_recurrent_gradient(backend, function, options):
    inputs = operands(function, 5, 9, 2, 3)
    expected = flash_rnn(*inputs, function=function, backend="reference", **options)
    actual = flash_rnn(*inputs, function=function, backend=backend, **options)
    plain = flash_rnn(*inputs, function=function, backend=backend)
    assert_same(actual, plain)  # the forward pass does not change
    found, free = grads(actual, inputs), grads(plain, inputs)
    assert_same(found, grads(expected, inputs))
    assert relative_error(found[0], free[0]) > 1e-3
    if "gradient_clip" in options:
        wide = flash_rnn(*inputs, function=function, backend=backend, gradient_clip=1e6)
        assert_same(grads(wide, inputs), free)


@pytest.mark.parametrize("backend", available_backends()[:2])
@pytest.mark.parametrize(("function", "module"), [("lstm", nn.LSTM), ("gru", nn.GRU), ("elman", nn.RNN)])
def test_a_head_is_a_network_of_torch(backend, function, module):
    B, T, NH, D = 3, 12, 2, 4
    Wx, R, b, states = operands(function, B, T, NH, D)
    h, _ = flash_rnn(Wx, R, b, states, function=function, backend=backend)
    rows = [1, 2, 0] if function == "gru" else list(range(R.shape[0]))
    for n in range(NH):
        net = module(Wx.shape[2] * D, D, batch_first=True, dtype=torch.float64)
        with torch.no_grad():
            net.weight_ih_l0.copy_(torch.eye(Wx.shape[2] * D))
            net.weight_hh_l0.copy_(R[rows, n].flatten(0, 1))
            inputs, hidden = b[-Wx.shape[2] :, n].clone(), torch.zeros(len(rows), D, dtype=torch.float64)
            if function == "gru":
                hidden[2] = b[0, n]  # the recurrent bias of the candidate
            net.bias_ih_l0.copy_(inputs.flatten())
            net.bias_hh_l0.copy_(hidden.flatten())
            initial = tuple(s[:, 0, n].unsqueeze(0).contiguous() for s in states)
            y, _ = net(Wx[:, :, :, n].flatten(2), initial if function == "lstm" else initial[0])
        assert_same(h[:, :, n], y)


def test_slstm_is_stable_for_large_gates_and_equals_the_plain_exponential_form():
    Wx = randn(2, 6, 4, 1, 3, seed=1, requires_grad=False)
    R, b = randn(4, 1, 3, 3, seed=2, requires_grad=False) / 3, torch.zeros(4, 1, 3, dtype=torch.float64)
    h, _ = flash_rnn(Wx, R, b, function="slstm")
    c = n = y = torch.zeros(2, 3, dtype=torch.float64)
    for t in range(6):  # exponential input gate and logistic forget gate without m; the maximum never acts from zero
        i, f, z, o = (Wx[:, t, :, 0] + torch.einsum("goi,bi->bgo", R[:, 0], y)).unbind(1)
        c = torch.sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
        n = torch.sigmoid(f) * n + torch.exp(i)
        y = torch.sigmoid(o) * c / n
        assert_same(h[:, t, 0], y)
    huge = flash_rnn(Wx * 500, R, b, function="slstm", backend="cpu")[0]
    assert_same(huge, flash_rnn(Wx * 500, R, b, function="slstm", backend="reference")[0])
    assert torch.isfinite(huge).all()


@pytest.mark.parametrize("backend", available_backends()[:2])
def test_extreme_numbers(backend):
    Wx = torch.tensor([0.0, 1e30, -1e30, float("inf"), -float("inf"), 1e-30]).reshape(1, 6, 1, 1, 1)
    zero = torch.zeros(1, 1, 1, 1)
    h = flash_rnn(Wx, zero, function="elman", backend=backend)[0].flatten()
    assert torch.allclose(h, torch.tanh(Wx.flatten()), rtol=1e-6, atol=0)
    spoiled = torch.zeros(2, 3, 4, 1, 5)
    spoiled[0, 1] = float("nan")
    for function in ("lstm", "slstm"):
        h = flash_rnn(spoiled, torch.zeros(4, 1, 5, 5), function=function, backend=backend)[0]
        assert torch.isnan(h[0, 1:]).all()
        assert torch.isfinite(h[1]).all()
        assert torch.isfinite(h[0, 0]).all()


def test_fading_gradients_are_zero_not_subnormal():
    Wx, R, b = operands("lstm", 1, 400, 1, 4, torch.float32, given=False)
    with torch.no_grad():
        b[1] -= 3.0  # forget
    h, _ = flash_rnn(Wx, R, b, backend="cpu")
    (grad,) = torch.autograd.grad(h[:, -1].sum(), Wx)
    assert float(grad[:, -1].abs().max()) > 1e-3
    assert int((grad[:, 0] != 0).sum()) == 0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_results_do_not_depend_on_the_number_of_threads(function):
    inputs = operands(function, 13, 10, 3, 8, torch.float32)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = flash_rnn(*inputs, function=function, backend="cpu")
        found.append([*out, *grads(out, inputs)])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    inputs = [x.detach().to(dtype) for x in operands("slstm", 2, 30, 2, 8)]
    low = flash_rnn(*inputs, function="slstm", backend="cpu")
    high = flash_rnn(*(x.float() for x in inputs), function="slstm", backend="cpu")
    assert low[0].dtype == low[1].dtype == dtype
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(low, high, strict=True))


def test_strided_inputs_and_an_empty_batch():
    Wx, R, b, states = operands("gru", 4, 6, 2, 3)
    strided = Wx.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same(
        flash_rnn(strided, R, b, states, function="gru", backend="cpu"), flash_rnn(Wx, R, b, states, function="gru")
    )
    h, last = flash_rnn(Wx[:0], R, b, function="gru", backend="cpu")
    assert h.shape == (0, 6, 2, 3)
    assert last.shape == (1, 0, 1, 2, 3)
    assert grads(h, (R,))[0].abs().max() == 0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_registration(function):
    Wx, R, b, states = operands(function, 2, 3, 2, 4)
    arguments = (Wx, R, b, states.squeeze(2).detach().requires_grad_(), function, True, 0.0, True, True)
    torch.library.opcheck(torch.ops.dynakern.flash_rnn, arguments)
    torch.library.opcheck(torch.ops.dynakern.flash_rnn, (*arguments[:-2], True, False))
    compiled = torch.compile(
        lambda *x: flash_rnn(*x, function=function, backend="cpu")[0], backend="aot_eager", fullgraph=True
    )
    expected = flash_rnn(Wx, R, b, states, function=function, backend="cpu")[0]
    actual = compiled(Wx, R, b, states)
    assert_same(actual, expected)
    assert_same(grads(actual, (Wx, R, b, states)), grads(expected, (Wx, R, b, states)))


def test_transforms_and_tangents_take_the_reference():
    Wx, R, b, states = (x.detach() for x in operands("slstm", 2, 4, 2, 3))
    tangent = randn(*Wx.shape, seed=9, requires_grad=False)

    def run(Wx, backend="auto"):
        return flash_rnn(Wx, R, b, states, function="slstm", backend=backend, gradient_clip=10.0)[0]

    _, found = torch.func.jvp(run, (Wx,), (tangent,))
    step = 1e-6
    assert_same(found, (run(Wx + step * tangent) - run(Wx - step * tangent)) / (2 * step), rtol=1e-6)
    jacobian = torch.func.jacrev(lambda x: run(x)[:, -1].sum())(Wx)
    leaf = Wx.clone().requires_grad_()
    assert_same(jacobian, torch.autograd.grad(run(leaf, "cpu")[:, -1].sum(), leaf)[0])
    stacked = torch.func.vmap(lambda x: flash_rnn(x, R, b, states, function="slstm")[0])(torch.stack([Wx, 2 * Wx]))
    assert_same(stacked[1], flash_rnn(2 * Wx, R, b, states, function="slstm")[0])
    with pytest.raises(NotImplementedError, match="reverse mode only"):
        torch.func.jvp(lambda x: run(x, "cpu"), (Wx,), (tangent,))


def test_second_derivatives_need_the_reference():
    Wx, R, b = operands("lstm", 1, 3, 1, 2, given=False)
    (grad,) = torch.autograd.grad(flash_rnn(Wx, R, b, backend="cpu")[0].sum(), Wx, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(flash_rnn(Wx, R, b, backend="reference")[0].sum(), Wx, create_graph=True)
    grad.sum().backward()


def test_choice_of_the_engine_and_flops():
    Wx, R, b = operands("lstm", 2, 8, 2, 4, torch.float32, given=False)
    assert explain_backend(flash_rnn, Wx, R, b).engine == "cpu"
    assert explain_backend(flash_rnn, Wx[:, :1], R, b).reason == "the input is small"
    assert count_flops(lambda: flash_rnn(Wx, R, b)) == 2 * 2 * 8 * 2 * 4 * 4 * 4
    with pytest.raises(NotImplementedError, match="the gpu engine cannot run"):
        flash_rnn(Wx, R, b, backend="gpu")


def test_refusals():
    Wx, R, b, states = operands("lstm", 2, 3, 2, 4)
    with pytest.raises(ValueError, match="Did you mean 'lstm'"):
        flash_rnn(Wx, R, b, function="lstn")
    with pytest.raises(ValueError, match="`Wx` must have size 3 on axis 2"):
        flash_rnn(Wx, R, b, function="gru")
    with pytest.raises(ValueError, match="`R` must have NH = 2 on axis 1"):
        flash_rnn(Wx, R[:, :1], b)
    with pytest.raises(ValueError, match="`b` must have shape"):
        flash_rnn(Wx, R, b[0])
    with pytest.raises(ValueError, match="`states` must have size 2 on axis 0"):
        flash_rnn(Wx, R, b, states[:1])
    with pytest.raises(ValueError, match="at least one step"):
        flash_rnn(Wx[:, :0], R, b)
    with pytest.raises(TypeError, match="`Wx` must have a floating-point dtype"):
        flash_rnn(Wx.long(), R, b)
    with pytest.raises(ValueError, match="`gradient_clip` must be a positive number"):
        flash_rnn(Wx, R, b, gradient_clip=-1.0)


INTERPRETED = """
import sys, torch
from dynakern.ops.flash_rnn import _outputs, cpu, gpu
from dynakern.testing import assert_same
from tests.ops.test_flash_rnn import FUNCTIONS, operands

def run(engine, function, dtype, clip, arguments):
    Wx, R, b, initial = arguments
    Wx, R = Wx.to(dtype), R.to(dtype)
    hidden, cells, kept = _outputs(Wx, initial, function, True, True)
    last = engine.forward(Wx, R, b, initial, function, hidden, cells, kept)
    cotangents = hidden.cos(), cells.cos() if cells.numel() else None, last.sin()
    grads = engine.backward(R, initial, hidden, kept, cotangents, function, True, clip)
    return [x.float() for x in (hidden, cells, last, *grads)]

launch = gpu._launch
for function in FUNCTIONS:
    Wx, R, b, states = (x.detach() for x in operands(function, 17 if function == "gru" else 3, 3, 2, 5, torch.float32))
    arguments = Wx, R, b, states.squeeze(2)
    for stay, clip in ((True, 0.0), (False, 0.2)):
        def forced(*args):
            grid, options = launch(*args)
            return grid, options | {"STAY": stay}
        gpu._launch = forced
        found, expected = (run(engine, function, torch.float32, clip, arguments) for engine in (gpu, cpu))
        assert_same(found, expected)
    low = [x.half().float() for x in arguments[:2]] + list(arguments[2:])
    assert_same(run(gpu, function, torch.float16, 0.0, low), run(cpu, function, torch.float32, 0.0, low), rtol=5e-3)
assert gpu._tiling(64, 4, 64, 4, 7, 2, 132, 220_000) == (16, 4, True)
assert gpu._tiling(16, 4, 128, 4, 9, 4, 132, 220_000)[2] is False
"""


@pytest.mark.slow
def test_gpu_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with Triton")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_bfloat16_on_a_gpu(function):
    inputs = operands(function, 20, 40, 4, 64, torch.bfloat16, device="cuda")
    expected = flash_rnn(*inputs, function=function, backend="reference")
    actual = flash_rnn(*inputs, function=function, backend="gpu")
    assert_same(actual, expected, rtol=2e-2)  # the states of each step are rounded before the product
    assert_same(grads(actual, inputs), grads(expected, inputs), rtol=5e-2)
