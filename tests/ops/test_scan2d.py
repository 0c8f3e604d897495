"""The two-dimensional recurrence: engines, gradients, known responses, refusals."""

from __future__ import annotations

import math
import os
import sys

import pytest
import torch

from dynakern.ops import explain_backend, scan2d
from dynakern.testing import assert_same, grads, randn


def coefficients(*shape, dtype=torch.float64):
    return [randn(*shape, seed=i, dtype=dtype).mul(0.5).detach().requires_grad_() for i in range(6)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7, 3), (4, 1, 2), (3, 5, 2, 3), (2, 3, 300)])
def test_cpu_is_the_reference(shape):
    c = coefficients(*shape)
    fast, slow = scan2d(*c, backend="cpu"), scan2d(*c, backend="reference")
    assert_same(fast, slow)
    assert_same(grads(fast, c), grads(slow, c))


def test_derivatives_and_registration():
    c = coefficients(2, 3, 2)
    assert torch.autograd.gradcheck(lambda *x: scan2d(*x, backend="cpu"), c)
    torch.library.opcheck(torch.ops.dynakern.scan2d, tuple(c))
    tangents = tuple(torch.ones_like(x) for x in c)
    plain = tuple(x.detach() for x in c)
    (_, forward) = torch.func.jvp(lambda *x: scan2d(*x)[0], plain, tangents)
    (_, reference) = torch.func.jvp(lambda *x: scan2d(*x, backend="reference")[0], plain, tangents)
    assert_same(forward, reference)
    assert float(forward.abs().max()) > 0
    h = scan2d(*c)[0].sum()
    (g,) = torch.autograd.grad(h, c[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(g.sum(), c[0])
    compiled = torch.compile(lambda *x: scan2d(*x), backend="aot_eager", fullgraph=True)
    assert_same(compiled(*plain), scan2d(*plain))


def test_response_counts_the_paths():
    ones = torch.ones(5, 6, dtype=torch.float64)
    impulse = torch.zeros(5, 6, dtype=torch.float64)
    impulse[0, 0] = 1
    zero = torch.zeros_like(ones)
    h1, h2 = scan2d(ones, ones, ones, ones, impulse, zero)
    # Paths of unit steps that arrive along time or across variates, all with weight 1.
    total = [[math.comb(v + t - 1, v) if t else 0 for t in range(6)] for v in range(5)]
    total[0][0] = 1
    assert h1.tolist() == [[float(x) for x in row] for row in total]
    assert float(h2[1, 0]) == 1


def test_variates_are_separate_without_coupling():
    c = [x.detach() for x in coefficients(3, 8, 2)]
    zero = torch.zeros_like(c[0])
    whole = scan2d(c[0], zero, zero, zero, c[4], c[5])[0]
    alone = scan2d(*(x[1:2] for x in (c[0], zero, zero, zero, c[4], c[5])))[0]
    assert_same(whole[1:2], alone)


def test_low_precision_and_strides():
    c = [x.detach() for x in coefficients(3, 4, 6)]
    half = scan2d(*(x.bfloat16() for x in c))[0]
    assert half.dtype == torch.bfloat16
    assert_same(half.double(), scan2d(*c)[0], rtol=0.05)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in c]
    assert_same(scan2d(*turned)[0], scan2d(*c)[0])


def test_refusals():
    c = coefficients(2, 3)
    with pytest.raises(ValueError, match="`a3` must have size 3 on axis 1"):
        scan2d(c[0], c[1], torch.zeros(2, 4, dtype=torch.float64), *c[3:])
    with pytest.raises(ValueError, match=r"V, T >= 1, got \(0, 3\)"):
        scan2d(*(x[:0] for x in c))
    with pytest.raises(TypeError, match="`b2` must have a floating-point"):
        scan2d(*c[:5], torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="gpu engine cannot run: it does not take tensors on 'cpu'"):
        scan2d(*c, backend="gpu")


def test_no_lanes():
    c = coefficients(2, 3, 0)
    assert_same(scan2d(*c, backend="cpu"), scan2d(*c, backend="reference"))


def test_a_gpu_without_triton_takes_the_reference(monkeypatch):
    monkeypatch.setattr(sys.modules["dynakern.ops.scan2d"], "_HAS_TRITON", False)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    choice = explain_backend(scan2d, *coefficients(2, 3))
    assert choice.engine == "reference"
    assert "Triton is not installed" in choice.reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (4, 1, 40), (3, 6, 70), (2, 2, 0)], ids=str)
def test_gpu_kernels_match_the_cpu_s(shape, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is no GPU; set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter")
    from dynakern.ops.scan2d import cpu, gpu

    device = "cuda" if torch.cuda.is_available() else "cpu"
    c = [x.detach() for x in coefficients(*shape, dtype=dtype)]
    h = cpu.forward(*c)
    assert_same([x.cpu() for x in gpu.forward(*(x.to(device) for x in c))], h)
    given = [randn(*shape, seed=9 + i, dtype=dtype, requires_grad=False) for i in range(2)] + c[:4] + list(h)
    assert_same([x.cpu() for x in gpu.backward(*(x.to(device) for x in given))], cpu.backward(*given))
