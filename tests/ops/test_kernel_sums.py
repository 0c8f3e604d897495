"""Kernel sums in tiles against the definition."""

from __future__ import annotations

import pytest
import torch

from dynakern.ops import explain_backend, kernel_sums
from dynakern.testing import assert_same, rand, randn

KERNELS = ("gaussian", "epanechnikov", "exponential", "tophat")
POWERS = (0.25, 1.0, 2.0)


def compare(actual, expected, rtol=1e-10):
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        assert torch.equal(a.isfinite(), e.isfinite()), name
        seen = e.isfinite()
        assert_same(a[seen], e[seen], rtol=rtol, name=name)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weights"])
@pytest.mark.parametrize(("Q", "N", "P"), [(1, 1, 1), (3, 2, 7), (70, 300, 3), (65, 2100, 16)])
def test_tiles_match_reference(kernel, weighted, Q, N, P):
    x, y = randn(Q, P, requires_grad=False), randn(N, P, seed=1, requires_grad=False)
    weights = rand(N, seed=2, requires_grad=False) if weighted else None
    if weighted and N > 2:
        weights[1] = 0.0
    bandwidths = [0.1, 0.7, 1.3, 0.7 * 2**0.5, 2.0 * P**0.5]
    options = {"kernel": kernel, "weights": weights, "powers": POWERS}
    expected = kernel_sums(x, y, bandwidths, backend="reference", **options)
    actual = kernel_sums(x, y, bandwidths, backend="cpu", **options)
    compare(actual, expected, rtol=1e-9)
    assert actual.log_sum.shape == (5, Q)
    assert actual.entropy.shape == (5, 3, Q)


@pytest.mark.parametrize("kernel", KERNELS)
def test_leave_one_out(kernel):
    y = randn(150, 4, requires_grad=False)
    options = {"kernel": kernel, "exclude_diagonal": True}
    actual = kernel_sums(y, y, [0.9, 2.0], backend="cpu", **options)
    compare(actual, kernel_sums(y, y, [0.9, 2.0], backend="reference", **options))
    alone = kernel_sums(y[:1], y[1:], [0.9, 2.0], kernel=kernel)
    assert_same(actual.log_sum[1, :1], alone.log_sum[1])


def test_nothing_underflows_and_far_data_lose_nothing():
    x, y = randn(20, 300, requires_grad=False), randn(50, 300, seed=1, requires_grad=False)
    sums = kernel_sums(x, y, 0.05, backend="cpu")
    assert sums.log_sum.max() < -50_000  # e^(-50,000) is no float
    compare(sums, kernel_sums(x, y, 0.05, backend="reference"), rtol=1e-11)
    shift = 1e6
    compare(
        kernel_sums(x + shift, y + shift, 5.0, backend="cpu"),
        kernel_sums(x + shift, y + shift, 5.0, backend="reference"),
        rtol=1e-7,  # the shifted inputs are rounded to 1e-10
    )


def test_copies_of_a_point():
    y = randn(5, 3, requires_grad=False)
    sums = kernel_sums(y[:1], y[:1].repeat(7, 1), 0.3, powers=(1.0,))
    assert float(sums.log_sum.exp()) == pytest.approx(7)
    assert float(1 / sums.participation) == pytest.approx(7)
    assert float(sums.entropy.exp()) == pytest.approx(7)
    assert float(sums.nearest) == 0.0


def test_threads_change_nothing_and_the_reference_is_differentiable():
    x, y = randn(300, 20, requires_grad=False), randn(3000, 20, seed=1, requires_grad=False)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(kernel_sums(x, y, [0.8, 1.6]))
    torch.set_num_threads(1)
    assert torch.equal(found[0].log_sum, found[1].log_sum)
    a, b = randn(3, 2), randn(4, 2, seed=1)
    torch.autograd.gradcheck(lambda p, q: kernel_sums(p, q, 0.8).log_sum, (a, b))
    assert explain_backend(kernel_sums, a, b, 1.0).engine == "reference"
    assert kernel_sums(x.float(), y.float(), 1.0).log_sum.dtype == torch.float32


def test_refusals():
    x, y = randn(3, 2, requires_grad=False), randn(4, 2, seed=1, requires_grad=False)
    for bad in (0.0, -1.0, float("nan"), [[1.0]]):
        with pytest.raises(ValueError, match="`bandwidth` must be one or several positive numbers"):
            kernel_sums(x, y, bad)
    with pytest.raises(ValueError, match="`powers` must be non-negative"):
        kernel_sums(x, y, 1.0, powers=(-1.0,))
    with pytest.raises(ValueError, match=r"`y` must hold at least 2 point\(s\)"):
        kernel_sums(x, y[:1], 1.0, exclude_diagonal=True)
    with pytest.raises(ValueError, match=r"`kernel` must be one of .*Did you mean 'tophat'"):
        kernel_sums(x, y, 1.0, kernel="top-hat")
    with pytest.raises(ValueError, match="`weights` must have N = 4"):
        kernel_sums(x, y, 1.0, weights=torch.ones(3))
    with pytest.raises(NotImplementedError, match="it gives no gradient"):
        kernel_sums(x.clone().requires_grad_(), y, 1.0, backend="cpu")
