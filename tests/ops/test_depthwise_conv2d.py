"""The depthwise convolution: every engine is PyTorch's own, in both memory formats."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynakern.measure import count_flops
from dynakern.ops import depthwise_conv2d, explain_backend
from dynakern.testing import assert_same, grads, randn, relative_error

FORMATS = {"planes": torch.contiguous_format, "last": torch.channels_last}
SHAPES = [
    (1, 1, 1, 1, 3, 3),
    (2, 3, 5, 7, 3, 5),
    (1, 5, 9, 30, 13, 7),
    (3, 17, 4, 6, 11, 31),  # taller and wider than the image
    (2, 16, 12, 20, 7, 7),
    (1, 24, 1, 40, 3, 9),  # a single row
    (2, 8, 33, 1, 5, 5),  # a single column
    (1, 32, 14, 14, 1, 11),
    (2, 12, 15, 13, 11, 1),
    (4, 2, 8, 3, 1, 1),
    (1, 16, 50, 37, 3, 3),  # several strips
]


def operands(N, C, H, W, kh, kw, *, dtype=torch.float64, form="planes"):
    x = randn(N, C, H, W, seed=1, dtype=dtype, requires_grad=False).contiguous(memory_format=FORMATS[form])
    weight = randn(C, 1, kh, kw, seed=2, dtype=dtype, requires_grad=False) / (kh * kw) ** 0.5
    return [t.requires_grad_() for t in (x, weight, randn(C, seed=3, dtype=dtype, requires_grad=False))]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_cpu_engine_is_the_reference(shape, form):
    for dtype in (torch.float64, torch.float32):
        inputs = operands(*shape, dtype=dtype, form=form)
        actual = depthwise_conv2d(*inputs, backend="cpu")
        expected = depthwise_conv2d(*inputs, backend="reference")
        assert_same(actual, expected)
        assert_same(grads(actual, inputs), grads(expected, inputs))
        assert actual.is_contiguous(memory_format=FORMATS[form])
        for i in range(3):  # one gradient alone
            only = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
            found = depthwise_conv2d(*only, backend="cpu"), depthwise_conv2d(*only, backend="reference")
            assert_same(*(grads(y, only[i : i + 1]) for y in found))
        with torch.no_grad():
            assert_same(depthwise_conv2d(*inputs[:2], backend="cpu"), depthwise_conv2d(*inputs[:2]))


@pytest.mark.parametrize("form", FORMATS)
def test_the_largest_kernels_go_through_the_fft(form):
    from dynakern.ops.depthwise_conv2d import cpu

    shape = (2, 17, 40, 36, 35, 31)
    x, weight, bias = operands(*shape, form=form)
    assert cpu._fft_pays(cpu._geometry(x, weight), 1, 1)
    actual, expected = (depthwise_conv2d(x, weight, bias, backend=name) for name in ("cpu", "reference"))
    assert_same(actual, expected)
    assert_same(grads(actual, (x, weight, bias)), grads(expected, (x, weight, bias)))
    frozen = weight.detach()
    actual, expected = (depthwise_conv2d(x, frozen, backend=name) for name in ("cpu", "reference"))
    assert_same(grads(actual, (x,)), grads(expected, (x,)))
    single = [t.detach().float() for t in (x, weight, bias)]
    error = relative_error(depthwise_conv2d(*single, backend="cpu"), depthwise_conv2d(x, weight, bias))
    assert error < 2e-6
    assert not cpu._fft_pays((2, 17, 40, 36, 7, 7, 7, 7), 1, 1)


@pytest.mark.parametrize("form", FORMATS)
def test_gradients_are_those_of_finite_differences(form):
    inputs = operands(2, 3, 4, 5, 3, 5, form=form)
    assert torch.autograd.gradcheck(lambda *x: depthwise_conv2d(*x, backend="cpu"), inputs)


def test_strided_inputs_and_slices_of_channels():
    x, weight, bias = operands(2, 20, 9, 8, 5, 3)
    for form in FORMATS.values():
        wide = x.detach().contiguous(memory_format=form)
        for view in (wide[:, 3:19], wide[:, :, 1:, 2:], wide[:, ::2], wide[:, :, ::2, ::2], wide.transpose(2, 3)):
            w, b = weight[: view.shape[1]], bias[: view.shape[1]]
            cotangent = torch.randn_like(view).transpose(2, 3).contiguous().transpose(2, 3)
            found = []
            for backend in ("cpu", "reference"):
                leaf = view.detach().requires_grad_()
                y = depthwise_conv2d(leaf, w, b, backend=backend)
                found.append([y, *torch.autograd.grad(y, (leaf, weight, bias), cotangent)])
            assert_same(*found)
    for form, other in (FORMATS.values(), list(FORMATS.values())[::-1]):  # a gradient in the other format
        wide, cotangent = x[:, :16].contiguous(memory_format=form), x[:, 4:].cos().contiguous(memory_format=other)
        found = []
        for backend in ("cpu", "reference"):
            leaf = wide.detach().requires_grad_()
            y = depthwise_conv2d(leaf, weight[:16], backend=backend)
            found.append(torch.autograd.grad(y, (leaf, weight), cotangent.detach()))
        assert_same(*found)
    ones = torch.ones(1, dtype=x.dtype).expand(2, 20, 9, 8)
    assert_same(depthwise_conv2d(ones, weight, backend="cpu"), depthwise_conv2d(ones, weight, backend="reference"))
    before = x.detach().clone()
    depthwise_conv2d(x, weight, backend="cpu").sum().backward()  # the gradient of a sum has no memory of its own
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("form", FORMATS)
def test_an_empty_batch(form):
    x, weight, bias = operands(1, 3, 5, 4, 3, 3, form=form)
    y = depthwise_conv2d(x[:0], weight, bias, backend="cpu")
    assert y.shape == (0, 3, 5, 4)
    assert all(g.abs().sum() == 0 for g in grads(y, (x, weight, bias)))


def test_a_pixel_reaches_as_far_as_the_kernel_and_channels_are_apart():
    x, weight, _ = operands(1, 18, 11, 12, 5, 3)
    spoiled = x.detach().clone()
    spoiled[0, 4, 6, 5] = float("nan")
    for form in FORMATS.values():
        y = depthwise_conv2d(spoiled.contiguous(memory_format=form), weight, backend="cpu")
        assert y[0, 4, 4:9, 4:7].isnan().all()
        assert y.isnan().sum() == 15


@pytest.mark.parametrize("form", FORMATS)
def test_results_do_not_depend_on_the_number_of_threads(form):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results = []
        for shape in ((4, 24, 40, 40, 13, 13), (4, 32, 40, 36, 35, 35), (1, 16, 90, 20, 5, 9)):
            inputs = operands(*shape, dtype=torch.float32, form=form)
            y = depthwise_conv2d(*inputs, backend="cpu")
            results += [y, *grads(y, inputs)]
        found.append(results)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    inputs = [x.detach().to(dtype) for x in operands(2, 5, 9, 8, 7, 7)]
    for backend in ("cpu", "reference"):
        low = depthwise_conv2d(*inputs, backend=backend)
        assert low.dtype == dtype
        assert_same(low, depthwise_conv2d(*(x.float() for x in inputs), backend=backend).to(dtype), rtol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = depthwise_conv2d(inputs[0], inputs[1].float(), backend="cpu")
    assert_same(mixed, depthwise_conv2d(*inputs[:2], backend="cpu"))


@pytest.mark.parametrize("form", FORMATS)
def test_registration(form):
    x, weight, bias = operands(2, 5, 6, 7, 3, 5, form=form)
    for arguments in ((x, weight, bias), (x, weight, None), (x.detach()[:, 1:4], weight.detach()[1:4], None)):
        torch.library.opcheck(torch.ops.dynakern.depthwise_conv2d, arguments)
    dy = torch.randn_like(x)
    for needs in ((True, True, True), (False, True, False), (True, False, True)):
        torch.library.opcheck(torch.ops.dynakern.depthwise_conv2d_backward, (dy, x.detach(), weight.detach(), *needs))
    compiled = torch.compile(lambda *x: depthwise_conv2d(*x).sin(), backend="aot_eager", fullgraph=True)
    actual, expected = compiled(x, weight, bias), depthwise_conv2d(x, weight, bias, backend="reference").sin()
    assert_same(actual, expected)
    assert actual.stride() == expected.stride()
    assert_same(grads(actual, (x, weight, bias)), grads(expected, (x, weight, bias)))
    meta = depthwise_conv2d(x.to("meta"), weight.to("meta"), backend="cpu")
    assert meta.stride() == x.stride()


def test_transforms_and_tangents_take_the_reference():
    x, weight, bias = (t.detach() for t in operands(2, 3, 5, 6, 3, 3))
    tangent = randn(*x.shape, seed=9, requires_grad=False)
    _, found = torch.func.jvp(lambda x: depthwise_conv2d(x, weight, bias), (x,), (tangent,))
    assert_same(found, depthwise_conv2d(tangent, weight, backend="reference"))
    jacobian = torch.func.jacrev(lambda w: depthwise_conv2d(x, w)[0, 1, 2, 3])(weight)
    leaf = weight.clone().requires_grad_()
    assert_same(jacobian, torch.autograd.grad(depthwise_conv2d(x, leaf, backend="cpu")[0, 1, 2, 3], leaf)[0])
    stacked = torch.func.vmap(lambda x: depthwise_conv2d(x, weight, bias))(torch.stack([x, 2 * x]))
    assert_same(stacked[1], depthwise_conv2d(2 * x, weight, bias))
    with pytest.raises(NotImplementedError, match="reverse mode only"):
        torch.func.jvp(lambda x: depthwise_conv2d(x, weight, backend="cpu"), (x,), (tangent,))


def test_second_derivatives_need_the_reference():
    x, weight, _ = operands(1, 2, 4, 4, 3, 3)
    for backend in ("cpu", "reference"):
        (grad,) = torch.autograd.grad(depthwise_conv2d(x, weight, backend=backend).square().sum(), x, create_graph=True)
        if backend == "reference":
            grad.sum().backward()
        else:
            with pytest.raises(NotImplementedError, match="first derivatives only"):
                grad.sum().backward()


def test_choice_of_the_engine_and_flops():
    def choice(N, C, H, K, form, *, train):
        x, w, _ = operands(N, C, H, H, K, K, dtype=torch.float32, form=form)
        return explain_backend(depthwise_conv2d, x, w.requires_grad_(train)).engine

    assert choice(2, 96, 56, 3, "last", train=True) == "reference"
    assert choice(2, 96, 56, 7, "last", train=True) == "cpu"
    assert choice(2, 96, 56, 7, "last", train=False) == "reference"
    assert choice(2, 96, 56, 7, "planes", train=False) == "cpu"
    assert choice(2, 96, 56, 13, "last", train=False) == "cpu"
    assert choice(1, 2, 8, 13, "planes", train=True) == "reference"
    x, weight, bias = operands(2, 3, 5, 6, 3, 7)
    assert count_flops(lambda: depthwise_conv2d(x, weight, bias)) == 2 * 2 * 3 * 5 * 6 * 21
    assert explain_backend(depthwise_conv2d, x, weight).engine == "cpu"  # float64
    with pytest.raises(NotImplementedError, match="has no gpu engine"):
        depthwise_conv2d(x, weight, backend="gpu")


def test_refusals():
    x, weight, bias = operands(2, 3, 5, 6, 3, 3)
    with pytest.raises(ValueError, match=r"`x` must have shape \(N, C, H, W\)"):
        depthwise_conv2d(x[0], weight)
    with pytest.raises(ValueError, match="`weight` must have C = 3 on axis 0"):
        depthwise_conv2d(x, weight[:2])
    with pytest.raises(ValueError, match="`weight` must have size 1 on axis 1"):
        depthwise_conv2d(x, weight.expand(3, 2, 3, 3))
    with pytest.raises(ValueError, match="kernels of odd sizes, got 2 x 3"):
        depthwise_conv2d(x, weight[:, :, :2])
    with pytest.raises(ValueError, match="`bias` must have C = 3"):
        depthwise_conv2d(x, weight, bias[:1])
    with pytest.raises(ValueError, match="at least one channel, row and column"):
        depthwise_conv2d(x[:, :, :0], weight)
    with pytest.raises(TypeError, match="`x` must have a floating-point dtype"):
        depthwise_conv2d(x.long(), weight)
    with pytest.raises(ValueError, match="on one device"):
        depthwise_conv2d(x, weight.to("meta"))


OTHER_PROCESSOR = """
import torch
from dynakern.ops.depthwise_conv2d import kernels
from tests.ops.test_depthwise_conv2d import FORMATS, SHAPES, operands
from dynakern.ops import depthwise_conv2d
from dynakern.testing import assert_same, grads

assert kernels.VECTOR_BYTES == 32
for shape in SHAPES:
    for form in FORMATS:
        x, weight, bias = operands(*shape, dtype=torch.float32, form=form)
        weight, bias = weight.detach(), bias.detach()
        actual, expected = (depthwise_conv2d(x, weight, bias, backend=name) for name in ("cpu", "reference"))
        assert_same([actual, *grads(actual, [x])], [expected, *grads(expected, [x])])
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names an x86 processor")
def test_a_processor_with_narrower_vectors():
    run = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESSOR],
        env=os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
