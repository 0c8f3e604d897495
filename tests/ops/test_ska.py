"""Small-kernel aggregation: every engine is the shifted products, and those are an unfolded product."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dynakern.measure import count_flops
from dynakern.ops import explain_backend, ska
from dynakern.testing import assert_same, available_backends, grads, randn

FAST = [name for name in available_backends() if name != "reference"]
SHAPES = [  # N, kernels, channels of a kernel, size, H, W
    (2, 2, 8, 3, 14, 14),
    (1, 1, 1, 1, 1, 1),
    (1, 2, 3, 3, 5, 7),
    (2, 2, 5, 5, 3, 40),
    (2, 1, 17, 3, 1, 17),  # a single row
    (1, 3, 1, 9, 33, 2),  # wider kernel than image
    (1, 4, 8, 3, 28, 19),
    (1, 5, 2, 11, 4, 4),
]


def operands(N, kernels, channels, size, H, W, *, dtype=torch.float64, device="cpu"):
    x = randn(N, kernels * channels, H, W, seed=1, dtype=dtype, requires_grad=False)
    w = randn(N, kernels, size * size, H, W, seed=2, dtype=dtype, requires_grad=False)
    return [t.to(device).requires_grad_() for t in (x, w)]


def unfolded(x, w):
    (N, C, H, W), (kernels, taps) = x.shape, w.shape[1:3]
    size = round(taps**0.5)
    patches = F.unfold(x, size, padding=size // 2).view(N, C // kernels, kernels, taps, H, W)
    return (patches * w[:, None]).sum(3).flatten(1, 2)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_engines_are_the_reference(backend, shape):
    for dtype in (torch.float64, torch.float32):
        inputs = operands(*shape, dtype=dtype, device="cuda" if backend == "gpu" else "cpu")
        actual, expected = ska(*inputs, backend=backend), ska(*inputs, backend="reference")
        assert_same(actual, expected)
        assert_same(grads(actual, inputs), grads(expected, inputs))
        for i in range(2):  # one gradient alone
            only = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
            found = (ska(*only, backend=name) for name in (backend, "reference"))
            assert_same(*(grads(y, only[i : i + 1]) for y in found))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_unfolded_product(shape):
    inputs = operands(*shape)
    assert_same(ska(*inputs, backend="reference"), unfolded(*inputs))


@pytest.mark.parametrize("backend", available_backends()[:2])
def test_gradients_are_those_of_finite_differences(backend):
    inputs = operands(2, 2, 3, 3, 4, 5)
    assert torch.autograd.gradcheck(lambda *x: ska(*x, backend=backend), inputs)


@pytest.mark.parametrize("backend", available_backends()[:2])
def test_channels_share_kernels_in_an_interleaved_way_and_a_constant_kernel_is_a_convolution(backend):
    x, _ = operands(2, 3, 2, 3, 6, 5)
    kernels = randn(3, 9, seed=5)
    y = ska(x, kernels[None, :, :, None, None].expand(2, 3, 9, 6, 5), backend=backend)
    weight = kernels.view(3, 1, 3, 3).repeat(2, 1, 1, 1)  # channel c has kernel c mod 3
    assert_same(y, F.conv2d(x, weight, padding=1, groups=6))


@pytest.mark.parametrize("backend", available_backends()[:2])
def test_a_pixel_reaches_its_neighbourhood_only(backend):
    x, w = (t.detach().clone() for t in operands(1, 1, 2, 3, 7, 20))
    x[0, 0, 3, 17] = float("nan")
    y = ska(x, w, backend=backend)
    assert y[0, 0, 2:5, 16:19].isnan().all()
    assert y.isnan().sum() == 9


def test_strided_inputs_and_an_empty_batch():
    x, w = operands(2, 2, 4, 3, 6, 5)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    strided = w.detach().permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2).requires_grad_()
    for name in ("cpu", "reference"):
        actual, expected = ska(last, strided, backend=name), ska(x, w, backend="reference")
        assert_same(actual, expected)
        assert_same(grads(actual, (last, strided)), grads(expected, (x, w)))
        empty = ska(x[:0], w[:0], backend=name)
        assert empty.shape == (0, 8, 6, 5)
        assert all(g.abs().sum() == 0 for g in grads(empty, (x, w)))


def test_results_do_not_depend_on_the_number_of_threads():
    inputs = operands(3, 8, 8, 3, 90, 70, dtype=torch.float32)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = ska(*inputs, backend="cpu")
        found.append([y, *grads(y, inputs)])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    inputs = [t.detach().to(dtype) for t in operands(2, 2, 4, 3, 6, 5)]
    for name in ("cpu", "reference"):
        low = ska(*inputs, backend=name)
        assert low.dtype == dtype
        assert torch.equal(low, ska(*(t.float() for t in inputs), backend=name).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ska(inputs[0], inputs[1].float(), backend="cpu")
    assert torch.equal(mixed, ska(*inputs, backend="cpu"))


def test_registration():
    x, w = operands(2, 2, 3, 3, 6, 5)
    last = x.detach().contiguous(memory_format=torch.channels_last)
    for arguments in ((x, w), (last, w)):
        torch.library.opcheck(torch.ops.dynakern.ska, arguments)
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(torch.ops.dynakern.ska_backward, (last, x.detach(), w.detach(), *needs))
    compiled = torch.compile(lambda x, w: ska(x, w).sin(), backend="aot_eager", fullgraph=True)
    actual, expected = compiled(x, w), ska(x, w, backend="reference").sin()
    assert_same(actual, expected)
    assert_same(grads(actual, (x, w)), grads(expected, (x, w)))


def test_transforms_and_tangents_take_the_reference():
    x, w = (t.detach() for t in operands(2, 2, 8, 3, 14, 14))
    tangents = tuple(randn(*t.shape, seed=9, requires_grad=False) for t in (x, w))
    _, found = torch.func.jvp(ska, (x, w), tangents)
    assert_same(found, ska(tangents[0], w) + ska(x, tangents[1]))
    jacobian = torch.func.jacrev(lambda w: ska(x, w)[0, 1, 2, 3])(w)
    leaf = w.clone().requires_grad_()
    assert_same(jacobian, torch.autograd.grad(ska(x, leaf, backend="cpu")[0, 1, 2, 3], leaf)[0])
    stacked = torch.func.vmap(lambda x: ska(x, w))(torch.stack([x, 2 * x]))
    assert_same(stacked[1], ska(2 * x, w))
    with pytest.raises(NotImplementedError, match="reverse mode only"):
        torch.func.jvp(lambda x: ska(x, w, backend="cpu"), (x,), tangents[:1])


def test_second_derivatives_need_the_reference():
    x, w = operands(1, 1, 2, 3, 4, 4)
    (grad,) = torch.autograd.grad(ska(x, w, backend="cpu").sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(ska(x, w, backend="reference").sum(), x, create_graph=True)
    grad.sum().backward()


def test_choice_of_the_engine_and_flops():
    x, w = operands(2, 2, 8, 3, 14, 14)
    assert explain_backend(ska, x, w).engine == "cpu"
    small = operands(1, 2, 2, 3, 4, 4)
    assert explain_backend(ska, *small).reason == "the input is small"
    assert count_flops(lambda: ska(*small)) == 2 * 4 * 16 * 9
    with pytest.raises(NotImplementedError, match="the gpu engine cannot run"):
        ska(x, w, backend="gpu")


def test_refusals():
    x, w = operands(2, 2, 3, 3, 6, 5)
    with pytest.raises(ValueError, match=r"`x` must have shape \(N, C, H, W\)"):
        ska(x[0], w)
    with pytest.raises(ValueError, match="`w` must have W = 5 on axis 4"):
        ska(x, w[..., 1:])
    with pytest.raises(ValueError, match="C = 5 must be divisible by the kernels C_w = 2"):
        ska(x[:, :5], w)
    for taps in (4, 8):
        with pytest.raises(ValueError, match=f"odd square number of taps on axis 2 .*, got {taps}"):
            ska(x, w[:, :, :taps])
    with pytest.raises(ValueError, match="No axis but N may be empty"):
        ska(x, w[:, :0])
    with pytest.raises(TypeError, match="`w` must have a floating-point dtype"):
        ska(x, w.int())
    with pytest.raises(ValueError, match="on one device"):
        ska(x, w.to("meta"))


INTERPRETED = """
import torch
from dynakern.ops.ska import cpu, gpu
from dynakern.testing import assert_same
from tests.ops.test_ska import operands

gpu._MAX_CHANNELS, gpu._TILE = 8, 512  # several blocks of channels and pixels
for shape in ((1, 2, 3, 3, 5, 7), (2, 1, 17, 3, 1, 17), (1, 1, 2, 5, 11, 9)):
    for dtype in (torch.float32, torch.float64, torch.float16) if shape[1] == 2 else (torch.float32,):
        x, w = (t.detach() for t in operands(*shape, dtype=dtype))
        dy = x.cos()
        wide = [t.to(torch.promote_types(dtype, torch.float32)) for t in (x, w, dy)]
        found, expected = (
            [e.forward(a, b), e.backward_input(c, b), e.backward_kernels(c, a, *b.shape[1:3])]
            for e, (a, b, c) in ((gpu, (x, w, dy)), (cpu, wide))
        )
        assert found[0].dtype == dtype
        assert_same(found, expected)
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
def test_bfloat16_on_a_gpu():
    inputs = operands(4, 8, 8, 3, 28, 28, dtype=torch.bfloat16, device="cuda")
    actual, expected = ska(*inputs, backend="gpu"), ska(*inputs, backend="reference")
    assert_same(actual, expected)
    assert_same(grads(actual, inputs), grads(expected, inputs))
