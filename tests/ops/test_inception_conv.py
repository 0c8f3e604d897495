"""The inception convolution: the CPU engine is split, convolve and join of PyTorch, in both memory formats."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dynakern.measure import count_flops
from dynakern.ops import explain_backend, inception_conv
from dynakern.testing import assert_same, grads, randn

FORMATS = {"planes": torch.contiguous_format, "last": torch.channels_last}
SHAPES = [  # N, C, H, W, g, s, b
    (1, 3, 1, 1, 1, 3, 5),
    (2, 8, 5, 7, 1, 3, 11),  # the band is longer than the image
    (1, 9, 1, 20, 3, 3, 5),  # a single row, all channels convolved
    (1, 12, 21, 1, 3, 5, 7),  # a single column
    (2, 60, 4, 18, 17, 3, 9),
    (1, 52, 19, 34, 17, 1, 11),
    (3, 110, 14, 14, 33, 3, 11),
    (1, 5, 3, 40, 1, 7, 31),
]


def operands(N, C, H, W, g, s, b, *, dtype=torch.float64, form="planes", biases=True):
    """Return the arguments of the operator."""
    x = randn(N, C, H, W, seed=1, dtype=dtype, requires_grad=False).contiguous(memory_format=FORMATS[form])
    found = [x]
    for i, (kh, kw) in enumerate(((s, s), (1, b), (b, 1))):
        found.append(randn(g, 1, kh, kw, seed=2 + i, dtype=dtype, requires_grad=False))
        found.append(randn(g, seed=5 + i, dtype=dtype, requires_grad=False) if biases else None)
    return [None if t is None else t.requires_grad_() for t in found]


def leaves(arguments):
    return [t for t in arguments if t is not None]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_cpu_engine_is_the_reference(shape, form):
    for dtype in (torch.float64, torch.float32):
        inputs = operands(*shape, dtype=dtype, form=form)
        actual, expected = (inception_conv(*inputs, backend=name) for name in ("cpu", "reference"))
        assert_same(actual, expected)
        assert_same(grads(actual, inputs), grads(expected, inputs))
        passing = shape[1] - 3 * shape[4]
        assert torch.equal(actual[:, :passing], inputs[0][:, :passing])
        assert actual.is_contiguous(memory_format=FORMATS[form])
        for i in range(7):  # one gradient alone
            only = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
            found = (inception_conv(*only, backend=name) for name in ("cpu", "reference"))
            assert_same(*(grads(y, only[i : i + 1]) for y in found))


@pytest.mark.parametrize("form", FORMATS)
def test_biases_may_be_none(form):
    inputs = operands(2, 20, 9, 8, 5, 3, 7, form=form)
    for none in ((2, 4, 6), (4,), (2, 6)):
        arguments = [None if i in none else t for i, t in enumerate(inputs)]
        actual, expected = (inception_conv(*arguments, backend=name) for name in ("cpu", "reference"))
        assert_same(actual, expected)
        assert_same(grads(actual, leaves(arguments)), grads(expected, leaves(arguments)))


@pytest.mark.parametrize("form", FORMATS)
def test_gradients_are_those_of_finite_differences(form):
    inputs = operands(2, 4, 3, 5, 1, 3, 5, form=form)
    assert torch.autograd.gradcheck(lambda *x: inception_conv(*x, backend="cpu"), inputs)


def test_strided_inputs_and_slices_of_channels():
    x, *parameters = operands(2, 40, 9, 10, 5, 3, 7)
    for form in FORMATS.values():
        wide = x.detach().contiguous(memory_format=form)
        views = [wide[:, 3:29], wide[:, :, 1:, 2:], wide[:, ::2], wide[:, :, ::2, ::2], wide.transpose(2, 3), wide[::2]]
        for view in [*views, wide[:1].expand(3, -1, -1, -1), wide[:, :1].expand(-1, 16, -1, -1)]:
            cotangent = torch.randn_like(view).transpose(2, 3).contiguous().transpose(2, 3)
            found = []
            for backend in ("cpu", "reference"):
                leaf = view.detach().requires_grad_()
                y = inception_conv(leaf, *parameters, backend=backend)
                found.append([y, *torch.autograd.grad(y, (leaf, *parameters), cotangent)])
            assert_same(*found)
    before = x.detach().clone()
    found = []
    for backend in ("cpu", "reference"):  # the gradient of a sum has no memory of its own
        y = inception_conv(x, *parameters, backend=backend)
        found.append(torch.autograd.grad(y.sum(), [x, *parameters]))
    assert_same(*found)
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("form", FORMATS)
def test_an_empty_batch(form):
    x, *parameters = operands(1, 10, 5, 4, 3, 3, 5, form=form)
    y = inception_conv(x[:0], *parameters, backend="cpu")
    assert y.shape == (0, 10, 5, 4)
    assert all(g.abs().sum() == 0 for g in grads(y, (x, *parameters)))


@pytest.mark.parametrize("form", FORMATS)
def test_a_pixel_reaches_as_far_as_its_stencil_and_channels_are_apart(form):
    x, *parameters = (t.detach() for t in operands(1, 60, 13, 20, 18, 3, 5))
    for channel, rows, columns in ((2, 1, 1), (10, 3, 3), (30, 1, 5), (59, 5, 1)):
        spoiled = x.clone()
        spoiled[0, channel, 6, 16] = float("nan")
        y = inception_conv(spoiled.contiguous(memory_format=FORMATS[form]), *parameters, backend="cpu")
        top, left = 6 - rows // 2, 16 - columns // 2
        assert y[0, channel, top : top + rows, left : left + columns].isnan().all()
        assert y.isnan().sum() == rows * columns


@pytest.mark.parametrize("form", FORMATS)
def test_results_do_not_depend_on_the_number_of_threads(form):
    inputs = operands(5, 60, 64, 66, 18, 3, 11, dtype=torch.float32, form=form)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = inception_conv(*inputs, backend="cpu")
        found.append([y, *grads(y, inputs)])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert_same(found[0][0], inception_conv(*inputs, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    inputs = [t.detach().to(dtype) for t in operands(2, 12, 9, 8, 3, 3, 7)]
    for backend in ("cpu", "reference"):
        low = inception_conv(*inputs, backend=backend)
        assert low.dtype == dtype
        assert_same(low, inception_conv(*(t.float() for t in inputs), backend=backend).to(dtype), rtol=1e-3)
    mixed = inception_conv(inputs[0], *(t.float() for t in inputs[1:]), backend="cpu")
    assert_same(mixed, inception_conv(*inputs, backend="cpu"))
    assert mixed.dtype == dtype


@pytest.mark.parametrize("form", FORMATS)
def test_registration(form):
    inputs = operands(2, 14, 6, 7, 3, 3, 5, form=form)
    sliced = [inputs[0].detach()[:, 1:12], *(t.detach() for t in inputs[1:])]
    for arguments in (inputs, [None if i == 4 else t for i, t in enumerate(inputs)], sliced):
        torch.library.opcheck(torch.ops.dynakern.inception_conv, arguments)
    x, *weights = (t.detach() for t in (inputs[0], *inputs[1::2]))
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(torch.ops.dynakern.inception_conv_backward, (torch.randn_like(x), x, *weights, *needs))
    compiled = torch.compile(lambda *x: inception_conv(*x).sin(), backend="aot_eager", fullgraph=True)
    actual, expected = compiled(*inputs), inception_conv(*inputs, backend="reference").sin()
    assert_same(actual, expected)
    assert actual.stride() == expected.stride()
    assert_same(grads(actual, inputs), grads(expected, inputs))
    meta = inception_conv(*(t.to("meta") for t in inputs), backend="cpu")
    assert meta.stride() == inputs[0].stride()


def test_transforms_and_tangents_take_the_reference():
    x, *parameters = (t.detach() for t in operands(2, 7, 5, 6, 2, 3, 5))
    tangent = randn(*x.shape, seed=9, requires_grad=False)
    linear = [*parameters[0::2]]
    no_bias = [t for w in linear for t in (w, None)]
    _, found = torch.func.jvp(lambda x: inception_conv(x, *parameters), (x,), (tangent,))
    assert_same(found, inception_conv(tangent, *no_bias, backend="reference"))
    square = parameters[0]
    jacobian = torch.func.jacrev(lambda w: inception_conv(x, w, *parameters[1:])[0, 2, 2, 3])(square)
    leaf = square.clone().requires_grad_()
    y = inception_conv(x, leaf, *parameters[1:], backend="cpu")
    assert_same(jacobian, torch.autograd.grad(y[0, 2, 2, 3], leaf)[0])
    stacked = torch.func.vmap(lambda x: inception_conv(x, *parameters))(torch.stack([x, 2 * x]))
    assert_same(stacked[1], inception_conv(2 * x, *parameters, backend="cpu"))
    with pytest.raises(NotImplementedError, match="reverse mode only"):
        torch.func.jvp(lambda x: inception_conv(x, *parameters, backend="cpu"), (x,), (tangent,))


def test_second_derivatives_need_the_reference():
    x, *parameters = operands(1, 6, 4, 4, 1, 3, 5)
    for backend in ("cpu", "reference"):
        y = inception_conv(x, *parameters, backend=backend)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        if backend == "reference":
            grad.sum().backward()
        else:
            with pytest.raises(NotImplementedError, match="first derivatives only"):
                grad.sum().backward()


def test_choice_of_the_engine_and_flops():
    inputs = operands(2, 20, 5, 6, 5, 3, 7)
    assert explain_backend(inception_conv, *inputs).engine == "cpu"
    products = 2 * 5 * 30 * (9 + 7 + 7)
    assert count_flops(lambda: inception_conv(*inputs)) == 2 * products
    with FlopCounterMode(display=False) as counter:
        inception_conv(*inputs).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * products
    assert count_flops(lambda: inception_conv(*inputs, backend="reference")) == 2 * products
    with pytest.raises(NotImplementedError, match="has no gpu engine"):
        inception_conv(*inputs, backend="gpu")


def test_refusals():
    x, square, b0, wide, b1, tall, b2 = operands(2, 12, 5, 6, 3, 3, 5)
    with pytest.raises(ValueError, match=r"`x` must have shape \(N, C, H, W\)"):
        inception_conv(x[0], square, b0, wide, b1, tall, b2)
    with pytest.raises(ValueError, match="`weight_w` must have g = 3 on axis 0"):
        inception_conv(x, square, b0, wide[:2], b1, tall, b2)
    with pytest.raises(ValueError, match="`weight_h` must have size 1 on axis 3"):
        inception_conv(x, square, b0, wide, b1, tall.expand(3, 1, 5, 2), b2)
    with pytest.raises(ValueError, match="`weight_h` must have B = 5 on axis 2"):
        inception_conv(x, square, b0, wide, b1, tall[:, :, :3], b2)
    with pytest.raises(ValueError, match="`weight_hw` must have S = 3 on axis 3"):
        inception_conv(x, square[..., :2], b0, wide, b1, tall, b2)
    with pytest.raises(ValueError, match="`weight_hw` must have an odd size"):
        inception_conv(x, square[:, :, :2, :2], b0, wide, b1, tall, b2)
    with pytest.raises(ValueError, match="`weight_w` must have an odd size"):
        inception_conv(x, square, b0, wide[..., :4], b1, tall[:, :, :4], b2)
    with pytest.raises(ValueError, match="`bias_w` must have g = 3"):
        inception_conv(x, square, b0, wide, b1[:1], tall, b2)
    with pytest.raises(ValueError, match="at least 3 g = 9 channels"):
        inception_conv(x[:, :8], square, b0, wide, b1, tall, b2)
    with pytest.raises(ValueError, match="a row and a column and each stencil a channel"):
        inception_conv(x[:, :, :0], square, b0, wide, b1, tall, b2)
    with pytest.raises(TypeError, match="`x` must have a floating-point dtype"):
        inception_conv(x.long(), square, b0, wide, b1, tall, b2)
    with pytest.raises(TypeError, match="`bias_h` must have a floating-point dtype"):
        inception_conv(x, square, b0, wide, b1, tall, b2.long())
    with pytest.raises(TypeError, match="`x` must be a tensor, got list"):
        inception_conv([1.0], square, b0, wide, b1, tall, b2)
    with pytest.raises(TypeError, match="`weight_w` must be a tensor, got NoneType"):
        inception_conv(x, square, b0, None, b1, tall, b2)
    with pytest.raises(ValueError, match="on one device"):
        inception_conv(x, square, b0, wide.to("meta"), b1, tall, b2)


OTHER_PROCESSOR = """
import torch
from dynakern.ops.inception_conv import kernels
from tests.ops.test_inception_conv import FORMATS, SHAPES, operands
from dynakern.ops import inception_conv
from dynakern.testing import assert_same, grads

assert kernels.VECTOR_BYTES == 32
for shape in SHAPES:
    for form in FORMATS:
        inputs = operands(*shape, dtype=torch.float32, form=form)
        actual, expected = (inception_conv(*inputs, backend=name) for name in ("cpu", "reference"))
        assert_same([actual, *grads(actual, inputs)], [expected, *grads(expected, inputs)])
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
