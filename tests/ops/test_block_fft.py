"""The block FFT and the three-pass convolution: against torch.fft, and what they refuse."""

from __future__ import annotations

import cmath

import pytest
import torch

from dynakern.ops import block_fft, dft_matrix, fft_conv, three_pass_conv
from dynakern.testing import assert_same, grads, randn


def matrices_of(features=None, *, noise=0.0):
    result = {}
    for seed, size in enumerate((2, 4, 8, 16)):
        matrix = dft_matrix(size, dtype=torch.complex128)
        matrix = matrix if features is None else matrix.repeat(features, 1, 1)
        result[size] = matrix + noise * randn(*matrix.shape, seed=seed, dtype=torch.complex128, requires_grad=False)
    return result


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 4096])
def test_exact_transform(n):
    x = randn(2, 3, n, dtype=torch.complex128)
    assert_same(block_fft(x), torch.fft.fft(x))
    assert_same(block_fft(x, inverse=True), torch.fft.ifft(x))
    assert_same(block_fft(x, matrices=matrices_of()), torch.fft.fft(x))
    assert_same(block_fft(x, matrices=matrices_of(3)), torch.fft.fft(x))
    assert_same(block_fft(x[0, 0], matrices=matrices_of()), torch.fft.fft(x[0, 0]))


def test_padding_and_dtypes():
    x = randn(2, 100)
    assert_same(block_fft(x, n=128), torch.fft.fft(x, n=128))
    assert block_fft(x, n=128).dtype == torch.complex128
    single = block_fft(x.float(), n=128)
    assert single.dtype == torch.complex64
    assert_same(single, torch.fft.fft(x, n=128), rtol=1e-6)
    assert block_fft(x.to(torch.bfloat16), n=128).dtype == torch.complex64


def test_other_matrices_are_the_stated_sum():
    matrices = matrices_of(noise=0.3)
    x = randn(64, dtype=torch.complex128)
    expected = torch.zeros(64, dtype=torch.complex128)
    for i2 in range(16):
        for j2 in range(4):
            for i in range(16):
                for j in range(4):
                    weight = matrices[4][j2, j] * cmath.exp(-2j * cmath.pi * j * i2 / 64) * matrices[16][i2, i]
                    expected[16 * j2 + i2] += (weight * x[4 * i + j]).detach()
    assert_same(block_fft(x, matrices=matrices), expected)


def test_features_have_their_own_matrices():
    matrices = matrices_of(3, noise=0.3)
    x = randn(2, 3, 256, dtype=torch.complex128)
    expected = [block_fft(x[:, h], matrices={size: m[h] for size, m in matrices.items()}) for h in range(3)]
    assert_same(block_fft(x, matrices=matrices), torch.stack(expected, 1))


def test_inverse_is_the_conjugate_recipe():
    matrices = matrices_of(noise=0.3)
    x = randn(2, 128, dtype=torch.complex128)
    assert_same(block_fft(x, matrices=matrices, inverse=True), block_fft(x.conj(), matrices=matrices).conj() / 128)


def test_gradients_reach_the_matrices():
    matrix = {16: randn(16, 16, dtype=torch.complex128), 2: randn(2, 2, dtype=torch.complex128)}
    assert torch.autograd.gradcheck(
        lambda a, b: block_fft(torch.ones(32).double(), matrices={16: a, 2: b}), tuple(matrix.values())
    )


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.zeros(12), {}, ValueError, "power of two and at least the signal's length 12, got 12; .* n=16"),
        (torch.zeros(64), {"n": 32}, ValueError, "got 32"),
        (torch.zeros(64).long(), {}, TypeError, "`x` must have a floating-point dtype"),
        (torch.zeros(32), {"matrices": {16: torch.zeros(16, 16)}}, ValueError, r"`matrices\[2\]` must have shape"),
        (torch.zeros(16), {"matrices": {16: torch.zeros(8, 8)}}, ValueError, r"got \(8, 8\)"),
        (torch.zeros(2, 16), {"matrices": {16: torch.zeros(3, 16, 16)}}, ValueError, "has H = 3, which does not fit"),
    ],
    ids=["power", "short", "integers", "missing", "shape", "features"],
)
def test_refusals(x, options, error, message):
    with pytest.raises(error, match=message):
        block_fft(x, **options)


@pytest.mark.parametrize(
    ("L", "T", "block"), [(1000, 1000, 64), (1000, 37, 16), (700, 5000, 256), (65, 65, 2), (9, 3, 64)]
)
def test_three_passes_match_the_convolution(L, T, block):
    u, k = randn(2, 3, L), randn(2, 3, T, seed=1)
    expected = fft_conv(u, k, backend="reference")
    actual = three_pass_conv(u, k, block=block)
    assert_same(actual, expected)
    assert_same(grads(actual, (u, k)), grads(expected, (u, k)))
    assert_same(three_pass_conv(u, k[0], block=block), expected[:, 0])


def test_the_identity_behind_the_three_passes():
    m, l = 8, 64
    x = randn(m * l, dtype=torch.complex128)
    q = torch.arange(m)[:, None]
    z = torch.fft.fft(x.reshape(m, l), dim=0) * torch.exp(-2j * torch.pi * q * torch.arange(l) / (m * l)).to(x.dtype)
    assert_same(torch.fft.fft(z), torch.fft.fft(x).reshape(l, m).T, rtol=1e-6)  # angles above are in single precision


def test_three_pass_single_precision_and_refusals():
    u, k = randn(1, 2, 5000), randn(2, 5000, seed=1)
    single = three_pass_conv(u.detach().float(), k.detach().float(), block=512)
    assert_same(single, fft_conv(u, k), rtol=1e-6)
    half = three_pass_conv(u.detach().to(torch.bfloat16), k.detach(), block=512)
    assert half.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`block` must be a power of two, at least 2, got 96"):
        three_pass_conv(u, k, block=96)
    with pytest.raises(ValueError, match="`k` must have H = 2"):
        three_pass_conv(u, k[:1])
