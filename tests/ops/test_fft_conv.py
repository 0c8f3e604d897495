"""The long convolution: its definition, its engines, its derivatives, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynakern.measure import count_flops
from dynakern.ops import explain_backend, fft_conv
from dynakern.testing import assert_same, grads, randn

SHAPES = [  # B, C, H, L, T
    (1, 1, 1, 1, 1),
    (1, 1, 1, 1, 3),
    (2, 2, 3, 2, 4),
    (3, 1, 16, 63, 63),
    (1, 2, 17, 100, 30),
    (5, 1, 7, 100, 101),
    (2, 3, 5, 257, 514),
    (1, 1, 40, 1100, 2000),
]
ids = [f"B{b}-C{c}-H{h}-L{length}-T{t}" for b, c, h, length, t in SHAPES]


def by_definition(u, k, causal):
    """Sum over the taps, one shifted product each."""
    length, taps = u.shape[-1], k.shape[-1]
    y = torch.zeros(u.shape[0], *k.shape[:2], length, dtype=u.dtype)
    for j in range(taps):
        lag = j if causal or j < (taps + 1) // 2 else j - taps
        if abs(lag) < length:
            shifted = F.pad(u, (lag, 0))[..., :length] if lag >= 0 else F.pad(u, (0, -lag))[..., -lag:]
            y = y + k[..., j : j + 1] * shifted.unsqueeze(1)
    return y


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("B", "C", "H", "L", "T"), SHAPES[:-1], ids=ids[:-1])
def test_definition(backend, causal, B, C, H, L, T):
    u, k, d = randn(B, H, L), randn(C, H, T, seed=1), randn(C, H, seed=2)
    expected = by_definition(u, k, causal) + d[..., None] * u[:, None]
    actual = fft_conv(u, k, causal=causal, skip=d, backend=backend)
    assert_same(actual, expected)
    assert_same(grads(actual, (u, k, d)), grads(expected, (u, k, d)))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
@pytest.mark.parametrize(("B", "C", "H", "L", "T"), SHAPES, ids=ids)
def test_single_precision_matches_double(causal, B, C, H, L, T):
    u, k = randn(B, H, L), randn(C, H, T, seed=1)
    expected = fft_conv(u, k, causal=causal, backend="reference")
    u32, k32 = (x.detach().float().requires_grad_() for x in (u, k))
    actual = fft_conv(u32, k32, causal=causal, backend="cpu")
    assert_same(actual, expected, rtol=1e-6)
    assert_same(grads(actual, (u32, k32)), grads(expected, (u, k)), rtol=1e-6)


def test_one_kernel_axis_less():
    u, k, d = randn(2, 3, 70), randn(3, 70, seed=1), randn(3, seed=2)
    expected = fft_conv(u, k[None], skip=d[None])[:, 0]
    assert_same(fft_conv(u, k, skip=d), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_authors_circular_kernel_of_twice_the_length(backend):
    length = 75
    u, k = randn(2, 3, length), randn(2, 3, 2 * length, seed=1)
    spectrum = torch.fft.rfft(u, n=2 * length)[:, None] * torch.fft.rfft(k)
    expected = torch.fft.irfft(spectrum, n=2 * length)[..., :length]
    assert_same(fft_conv(u, k, causal=False, backend=backend), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_forward_and_reverse_kernels_as_in_s4(backend):
    length = 75
    u, k0, k1 = randn(2, 3, length), randn(1, 3, length, seed=1), randn(1, 3, length, seed=2)
    padded = F.pad(k0, (0, length)) + F.pad(k1.flip(-1), (length, 0))
    spectrum = torch.fft.rfft(u, n=2 * length)[:, None] * torch.fft.rfft(padded)
    expected = torch.fft.irfft(spectrum, n=2 * length)[..., :length]
    assert_same(fft_conv(u, torch.cat([k0, k1.flip(-1)], -1), causal=False, backend=backend), expected)
    mirrored = fft_conv(u.flip(-1), F.pad(k1, (1, 0))).flip(-1)  # the reverse kernel: lag -(j + 1)
    assert_same(fft_conv(u, k0) + mirrored, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_causal_kernels_longer_than_the_input_leak_nothing(backend):
    u, k = randn(2, 16, 90), randn(16, 400, seed=1)
    changed = u.detach().clone()
    changed[..., 50:] = 100.0
    before = fft_conv(u, k, backend=backend)[..., :50]
    after = fft_conv(changed, k, backend=backend)[..., :50]
    assert (before - after).abs().max() < 1e-11
    assert_same(fft_conv(u, k, backend=backend), fft_conv(u, k[:, :90], backend=backend))


def test_shift_and_linearity():
    u, k = randn(1, 20, 128), randn(20, 128, seed=1)
    delayed = fft_conv(F.pad(u, (5, 0))[..., :128], k, backend="cpu")
    assert_same(delayed[..., 5:], fft_conv(u, k, backend="cpu")[..., :-5])
    assert_same(fft_conv(2 * u + 1, k, backend="cpu") - fft_conv(torch.ones_like(u), k), 2 * fft_conv(u, k))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(backend, causal):
    u, k = randn(2, 3, 9), randn(2, 3, 12, seed=1)
    assert torch.autograd.gradcheck(lambda u, k: fft_conv(u, k, causal=causal, backend=backend), (u, k))


def test_library_checks():
    for causal in (True, False):
        arguments = randn(3, 17, 70, dtype=torch.float32), randn(2, 17, 90, dtype=torch.float32, seed=1), causal
        torch.library.opcheck(torch.ops.dynakern.fft_conv, arguments)
        y = torch.randn(3, 2, 17, 70)
        plain = [x.detach() for x in arguments[:2]]
        torch.library.opcheck(torch.ops.dynakern.fft_conv_backward, (y, *plain, causal))


def test_compile():
    u, k, d = randn(2, 16, 80), randn(1, 16, 80, seed=1), randn(1, 16, seed=2)

    def squared(u, k, d):
        return fft_conv(u.sin(), k, skip=d).square()

    torch._dynamo.reset()
    compiled = torch.compile(squared, backend="aot_eager", fullgraph=True)
    assert_same(grads(compiled(u, k, d), (u, k, d)), grads(squared(u, k, d), (u, k, d)))


def test_other_derivatives_take_the_reference():
    u, k = randn(2, 16, 70), randn(16, 70, seed=1)
    t = randn(2, 16, 70, seed=2)
    expected, tangent = torch.func.jvp(lambda u: fft_conv(u, k, backend="reference"), (u,), (t,))
    actual, ours = torch.func.jvp(lambda u: fft_conv(u, k), (u,), (t,))
    assert_same((actual, ours), (expected, tangent))
    assert float(tangent.detach().norm()) > 1
    small, tap = randn(1, 1, 5), randn(1, 5, seed=1)
    jacobian = torch.func.jacrev(lambda u: fft_conv(u, tap))(small)
    assert_same(jacobian, torch.func.jacrev(lambda u: fft_conv(u, tap, backend="reference"))(small))
    batched = torch.func.vmap(lambda u: fft_conv(u[None], k)[0])(u)
    assert_same(batched, fft_conv(u, k))
    with pytest.raises(NotImplementedError, match="functorch transform"):
        torch.func.vmap(lambda u: fft_conv(u[None], k, backend="cpu")[0])(u)


def test_second_derivatives():
    u, k = randn(2, 16, 70), randn(16, 70, seed=1)
    (du,) = torch.autograd.grad(fft_conv(u, k, backend="cpu").square().sum(), u, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(du.sum(), u)
    (du,) = torch.autograd.grad(fft_conv(u, k, backend="reference").square().sum(), u, create_graph=True)
    torch.autograd.grad(du.sum(), k)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_computed_in_single_precision(backend, dtype):
    u, k = randn(2, 16, 100, dtype=dtype), randn(16, 100, dtype=dtype, seed=1)
    actual = fft_conv(u, k, backend=backend)
    assert actual.dtype == dtype
    assert torch.equal(actual, fft_conv(u.float(), k.float(), backend=backend).to(dtype))
    assert [g.dtype for g in grads(actual, (u, k))] == [dtype, dtype]
    mixed = fft_conv(u, k.detach().double(), backend=backend)
    assert mixed.dtype == dtype


def test_result_does_not_depend_on_threads_or_strides():
    u, k = randn(5, 40, 1500), randn(2, 40, 1500, seed=1)  # large enough for threads
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        y = fft_conv(u, k, backend="cpu")
        results.append([y.detach(), *grads(y, (u, k))])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    turned = u.detach().transpose(1, 2).contiguous().transpose(1, 2)
    copies = turned.clone(), k.detach().clone()
    assert torch.equal(fft_conv(turned, k.detach(), backend="cpu"), results[0][0])
    assert torch.equal(turned, copies[0])
    assert torch.equal(k, copies[1])


def test_rows_do_not_touch_each_other():
    u, k = randn(3, 20, 100, requires_grad=False), randn(20, 100, seed=1, requires_grad=False)
    clean = fft_conv(u, k, backend="cpu")
    u[1, 4, 30] = float("nan")
    y = fft_conv(u, k, backend="cpu")
    assert torch.isnan(y[1, 4]).any()
    y[1, 4] = clean[1, 4]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_empty_batch(backend):
    u, k = randn(0, 16, 70), randn(2, 16, 70)
    y = fft_conv(u, k, backend=backend)
    assert y.shape == (0, 2, 16, 70)
    assert grads(y, (u, k))[1].abs().sum() == 0


def test_engine_choice_is_explained():
    u, k = torch.zeros(2, 16, 100), torch.zeros(16, 100)
    assert explain_backend(fft_conv, u, k).engine == "cpu"
    assert explain_backend(fft_conv, u[..., :20], k).reason == "the input is small"
    assert explain_backend(fft_conv, u[:1, :2], k[:2]).reason == "the input is small"
    with pytest.raises(NotImplementedError, match="no gpu engine"):
        fft_conv(u, k, backend="gpu")


def test_flops_are_those_of_the_reference():
    u, k = torch.zeros(3, 16, 100), torch.zeros(2, 16, 60)
    ours = count_flops(lambda: fft_conv(u, k))
    assert ours == pytest.approx(count_flops(lambda: fft_conv(u, k, backend="reference")), rel=1e-6)
    assert ours == pytest.approx(2.5 * 160 * 7.3219 * 16 * (3 + 2 + 6), rel=1e-3)


@pytest.mark.parametrize(
    ("u", "k", "options", "error", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(5, 3), {}, ValueError, r"`u` must have shape \(B, H, L\)"),
        (torch.zeros(2, 5, 9), torch.zeros(4, 9), {}, ValueError, "`k` must have H = 5 on axis 0"),
        (torch.zeros(2, 5, 9), torch.zeros(1, 1, 5, 9), {}, ValueError, r"`k` must have shape \(C, H, T\)"),
        (torch.zeros(2, 5, 0), torch.zeros(5, 9), {}, ValueError, "must not be empty"),
        (torch.zeros(2, 5, 9), torch.zeros(5, 0), {}, ValueError, "must not be empty"),
        (torch.zeros(2, 5, 9).long(), torch.zeros(5, 9), {}, TypeError, "`u` must have a floating-point dtype"),
        (torch.zeros(2, 5, 9), torch.zeros(5, 9, dtype=torch.cfloat), {}, TypeError, "`k` must have a floating"),
        (
            torch.zeros(2, 5, 9),
            torch.zeros(5, 9),
            {"skip": torch.zeros(1, 5)},
            ValueError,
            r"`skip` must have shape \(H",
        ),
        (torch.zeros(2, 5, 9), torch.zeros(5, 9, device="meta"), {}, ValueError, "must be on one device"),
        (torch.zeros(2, 5, 9), torch.zeros(5, 9), {"backend": "fast"}, ValueError, "`backend` must be one of"),
    ],
    ids=["axes", "features", "kernel-axes", "no-steps", "no-taps", "integers", "complex", "skip", "device", "backend"],
)
def test_refusals(u, k, options, error, message):
    with pytest.raises(error, match=message):
        fft_conv(u, k, **options)
