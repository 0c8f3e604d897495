"""Dynamic time warping: the fast engine is the definition, and known distances come out."""

from __future__ import annotations

import pytest
import torch

from dynakern.ops import dtw, explain_backend
from dynakern.testing import assert_same, randn


def series(n, length, channels, seed):
    return randn(n, length, channels, seed=seed, requires_grad=False)


@pytest.mark.parametrize("window", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize(
    ("N", "M", "L", "K", "C"), [(1, 1, 1, 1, 1), (2, 3, 9, 9, 2), (3, 2, 12, 7, 3), (2, 2, 1, 8, 1)]
)
def test_cpu_is_the_reference(N, M, L, K, C, window):
    x, y = series(N, L, C, 0), series(M, K, C, 1)
    assert_same(dtw(x, y, window=window, backend="cpu"), dtw(x, y, window=window, backend="reference"))


def test_lengths_are_as_if_cut():
    x, y = series(3, 10, 2, 0), series(2, 8, 2, 1)
    a, b = torch.tensor([10, 4, 1]), torch.tensor([3, 8])
    got = dtw(x, y, x_lengths=a, y_lengths=b, window=0.2)
    assert_same(got, dtw(x, y, x_lengths=a, y_lengths=b, window=0.2, backend="reference"))
    assert_same(got[1, 0], dtw(x[1:2, :4], y[:1, :3], window=0.2)[0, 0])


def test_known_distances():
    x = series(3, 20, 2, 0)
    assert torch.equal(dtw(x, x).diagonal(), torch.zeros(3, dtype=torch.float64))
    assert_same(dtw(x, x, window=0.0), torch.cdist(x.flatten(1), x.flatten(1)), rtol=1e-7)  # a band of 0 is Euclidean
    shifted = torch.cat([x[:, :1], x[:, :-1]], 1)
    assert bool((dtw(x, shifted, window=0.1).diagonal() < torch.linalg.norm((x - shifted).flatten(1), dim=1)).all())
    assert_same(dtw(x, x.flip(0)), dtw(x.flip(0), x).T)
    assert dtw(x[:0], x).shape == (0, 3)
    assert dtw(x.float(), x.float()).dtype == torch.float32


def test_reference_has_a_gradient_and_auto_takes_it():
    x, y = randn(1, 5, 2), series(1, 4, 2, 1)
    assert explain_backend(dtw, x, y).engine == "reference"
    assert torch.autograd.gradcheck(lambda v: dtw(v, y), (x,))
    with pytest.raises(NotImplementedError, match="gives no gradient"):
        dtw(x, y, backend="cpu")


def test_refusals():
    x = torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match="`y` must have C = 3 on axis 2"):
        dtw(x, torch.zeros(2, 5, 2))
    with pytest.raises(ValueError, match=r"`window` must be in \[0, 1\], got 2"):
        dtw(x, x, window=2)
    with pytest.raises(ValueError, match="must not be empty"):
        dtw(x, torch.zeros(2, 0, 3))
    with pytest.raises(TypeError, match="floating-point"):
        dtw(x.long(), x)
    with pytest.raises(ValueError, match="`x_lengths` must have N = 2"):
        dtw(x, x, x_lengths=torch.tensor([1]))
