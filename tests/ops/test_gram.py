"""Kernel products, solves and features against the whole matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.library import opcheck

from dynakern.measure import peak_memory
from dynakern.ops import explain_backend, gram_product, gram_solve, nystroem, random_features
from dynakern.ops.gram.reference import PROFILES, profile
from dynakern.testing import assert_same, grads, randn

KERNELS = tuple(PROFILES)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("N", "M", "P", "C"), [(1, 1, 1, 1), (2, 63, 5, 2), (300, 1100, 3, 1), (257, 1, 2, 3)])
def test_tiles_match_reference(kernel, dtype, N, M, P, C):
    x, y, v = randn(N, P, dtype=dtype), randn(M, P, seed=1, dtype=dtype), randn(M, C, seed=2, dtype=dtype)
    scale = torch.linspace(0.7, 1.4, P, dtype=dtype).requires_grad_()
    expected = gram_product(kernel, x, v, y, length_scale=scale, backend="reference")
    actual = gram_product(kernel, x, v, y, length_scale=scale, backend="cpu")
    assert actual.dtype == dtype
    # Distances by inner products lose a few digits against differences, most where the slope is steep (matern12).
    rtol = {torch.float64: 1e-12, torch.float32: 2e-4 if kernel == "matern12" else 1e-5}[dtype]
    assert_same(actual, expected, rtol=rtol)
    inputs = (x, y, v, scale)
    assert_same(grads(actual, inputs), grads(expected, inputs), rtol=10 * rtol)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_set_with_itself(kernel):
    x, v = randn(300, 4), randn(300, 2, seed=1)
    expected, actual = (gram_product(kernel, x, v, backend=b) for b in ("reference", "cpu"))
    assert_same(actual, expected)
    assert_same(grads(actual, (x, v)), grads(expected, (x, v)))
    vector = gram_product(kernel, x, v[:, 0])
    assert_same(vector, expected[:, 0])


def test_far_from_the_origin():
    x, v = randn(400, 3, requires_grad=False) + 1e4, randn(400, 1, requires_grad=False)
    assert_same(gram_product("gaussian", x, v, backend="cpu"), profile("gaussian", x, x) @ v, rtol=1e-9)


def test_gradcheck_opcheck_and_higher_derivatives():
    x, v = randn(6, 2), randn(6, 1, seed=1)
    torch.autograd.gradcheck(lambda a, b: gram_product("matern32", a, b, backend="cpu"), (x, v))
    torch.autograd.gradgradcheck(lambda a, b: gram_product("gaussian", a, b, backend="reference"), (x, v))
    opcheck(torch.ops.dynakern.gram_product.default, ("gaussian", x, randn(5, 2, seed=2), randn(5, 3)))
    loss = gram_product("gaussian", x, v, backend="cpu").square().sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(first.sum(), x)


def test_forward_mode_takes_the_reference():
    x, v = randn(400, 2, requires_grad=False), randn(400, 1, requires_grad=False)

    def product(a):
        return gram_product("gaussian", a, v)

    _, tangent = torch.func.jvp(product, (x,), (torch.ones_like(x),))
    assert tangent.abs().max() < 1e-12  # a shift of all points changes nothing
    assert "small" in explain_backend(gram_product, "gaussian", x[:9], v[:9]).reason
    assert explain_backend(gram_product, "gaussian", x, v).engine == "cpu"


def test_compiles():
    x, v = randn(50, 3), randn(50, 2)
    compiled = torch.compile(lambda a, b: gram_product("gaussian", a, b), fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, v), gram_product("gaussian", x, v))


def test_callables_jobs_and_their_gradients():
    x, v = randn(1500, 2), randn(1500, 2, seed=1)

    def kernel(a, b):
        return (1 + a @ b.T) ** 2

    assert_same(gram_product(kernel, x, v), kernel(x, x) @ v)
    assert_same(grads(gram_product(kernel, x, v), (x, v)), grads(kernel(x, x) @ v, (x, v)))
    with torch.no_grad():
        assert_same(gram_product("gaussian", x, v, jobs=2), gram_product("gaussian", x, v))
    with pytest.raises(ValueError, match="`jobs` must be 1 where a gradient"):
        gram_product("gaussian", x, v, jobs=2)


def test_rows_go_to_a_cluster():
    import joblib
    from distributed import Client, LocalCluster

    x, v = randn(500, 2, requires_grad=False), randn(500, 1, requires_grad=False)
    expected = gram_product("gaussian", x, v)
    cluster = LocalCluster(n_workers=1, processes=False, dashboard_address=None)
    with cluster, Client(cluster), joblib.parallel_config(backend="dask"):
        assert_same(gram_product("gaussian", x, v, jobs=2), expected)


def test_threads_change_nothing():
    x, v = randn(3000, 8, requires_grad=False), randn(3000, 1, requires_grad=False)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(gram_product("gaussian", x, v))
    torch.set_num_threads(1)
    assert torch.equal(*results)


def test_memory_is_that_of_a_tile():
    x = randn(30_000, 8, dtype=torch.float32, requires_grad=False)
    v = torch.ones(30_000, 1)
    assert peak_memory(lambda: gram_product("gaussian", x, v)) < 40  # MB; the matrix has 3,600


@pytest.mark.parametrize("kernel", KERNELS)
def test_random_features_are_unbiased(kernel):
    x = randn(6, 3, requires_grad=False)
    generator = torch.Generator().manual_seed(0)
    found = torch.stack(
        [f @ f.T for f in (random_features(kernel, x, 500, length_scale=1.5, generator=generator) for _ in range(60))]
    )
    error = (found.mean(0) - profile(kernel, x / 1.5, x / 1.5)).abs()
    assert (error <= 4 * found.std(0) / 60**0.5 + 1e-12).all()
    assert found.std(0).max() < 0.08


def test_nystroem_is_exact_with_all_points_and_close_with_some():
    x = randn(300, 2, requires_grad=False)
    exact = profile("gaussian", x, x)
    features = nystroem("gaussian", x, x)
    assert_same(features @ features.T, exact, rtol=1e-6)
    some = nystroem("gaussian", x, 60, generator=torch.Generator().manual_seed(0))
    assert_same(some @ some.T, exact, rtol=1e-2)
    assert (torch.linalg.eigvalsh(exact - some @ some.T) > -1e-9).all()  # never more than K


def test_solve_matches_cholesky():
    x, b = randn(400, 3, requires_grad=False), randn(400, 2, seed=1, requires_grad=False)
    expected = torch.linalg.solve(profile("matern52", x / 0.8, x / 0.8) + 0.1 * torch.eye(400).double(), b)
    for landmarks in (None, 0):
        found = gram_solve("matern52", x, b, noise=0.1, length_scale=0.8, tolerance=1e-10, landmarks=landmarks)
        assert_same(found.solution, expected, rtol=1e-8)
        assert found.residual <= 1e-10
    with pytest.warns(RuntimeWarning, match="relative residual is .* after 2 iterations"):
        gram_solve("matern52", x, b, noise=0.1, max_iterations=2, landmarks=0)


@pytest.mark.slow
def test_solve_at_20000_points():
    x = randn(20_000, 3, requires_grad=False)
    b = x.sin().sum(1)
    generator = torch.Generator().manual_seed(0)
    plain = gram_solve("gaussian", x[:2000], b[:2000], noise=0.5, landmarks=0, tolerance=1e-4)
    found = gram_solve("gaussian", x, b, noise=0.5, tolerance=1e-4, landmarks=400, generator=generator)
    back = gram_product("gaussian", x, found.solution) + 0.5 * found.solution
    assert float((back - b).norm() / b.norm()) < 2e-4
    assert found.iterations < plain.iterations  # ten times as many points, fewer steps


def test_refusals():
    x, v = randn(4, 2, requires_grad=False), randn(4, 1, requires_grad=False)
    with pytest.raises(ValueError, match=r"`kernel` must be one of .*'gaussian'.*Did you mean 'gaussian'"):
        gram_product("gausian", x, v)
    with pytest.raises(ValueError, match="`v` must have M = 4"):
        gram_product("gaussian", x, v[:3])
    with pytest.raises(ValueError, match="`length_scale` must be a positive number"):
        gram_product("gaussian", x, v, length_scale=0.0)
    with pytest.raises(ValueError, match=r"`length_scale` must be one number or \(P,\)"):
        gram_product("gaussian", x, v, length_scale=torch.ones(3))
    with pytest.raises(ValueError, match="must not be empty"):
        gram_product("gaussian", x[:0], v[:0])
    with pytest.raises(TypeError, match="`x` must have a floating-point dtype"):
        gram_product("gaussian", torch.zeros(4, 2, dtype=torch.int64), v)
    with pytest.raises(NotImplementedError, match="gpu engine cannot run"):
        gram_product("gaussian", x, v, backend="gpu")
    with pytest.raises(ValueError, match="`noise` must be a positive number, got 0"):
        gram_solve("gaussian", x, v, noise=0.0)
    with pytest.raises(ValueError, match="`landmarks` must be at most the number of points 4, got 5"):
        nystroem("gaussian", x, 5)
    with pytest.raises(ValueError, match="`num_features` must be even, got 3"):
        random_features("gaussian", x, 3)
    assert np.isfinite(gram_product("matern12", torch.zeros(3, 2), torch.ones(3)).numpy()).all()
