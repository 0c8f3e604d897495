"""The selective two-dimensional state space: its definition, its engines, its derivatives, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from dynakern.measure import count_flops
from dynakern.ops import explain_backend, ssm2d
from dynakern.testing import assert_same, grads, rand, randn

NAMES = ("x", "delta", "A", "B", "C", "D")
OPTIONS = [(coupling, rule) for coupling in ("half", "raw", "none") for rule in ("zoh", "euler")]


def arguments(B=2, V=3, T=5, D=4, N=2, dtype=torch.float64, skip=True):
    x = {
        "x": randn(B, V, T, D, seed=0),
        "delta": rand(B, V, T, 2, D, seed=1) * 0.5 + 0.02,
        "A": -2 * rand(4, D, N, seed=2) - 0.1,
        "B": randn(B, V, T, 2, N, seed=3),
        "C": randn(B, V, T, 2, N, seed=4),
        "D": randn(D, seed=5),
    }
    return {k: v.detach().to(dtype).requires_grad_() for k, v in x.items() if skip or k != "D"}


def both(x, backend, **options):
    """Return y and the gradients of a projection of it."""
    y = ssm2d(**x, backend=backend, **options)
    return [y, *grads(y, list(x.values()))]


def by_loops(x, coupling, rule):
    """Write the recurrence out, scalar by scalar."""
    u, delta, A, B, C = (x[k].detach() for k in NAMES[:5])
    y = x["D"].detach() * u
    size = (*u.shape, A.shape[2])
    h1, h2 = torch.zeros(size, dtype=u.dtype), torch.zeros(size, dtype=u.dtype)
    kappa, others = {"half": (0.5, 0.5), "raw": (1, 1), "none": (1, 0)}[coupling]
    for b, v, t, d, n in torch.cartesian_prod(*(torch.arange(s) for s in size)).tolist():
        step = delta[b, v, t, :, d].tolist()
        e = [math.exp(step[k // 2] * A[k, d, n]) for k in range(4)]
        weight = step if rule == "euler" else [(e[k] - 1) / A[k, d, n] for k in (0, 2)]
        h1[b, v, t, d, n] = weight[0] * B[b, v, t, 0, n] * u[b, v, t, d]
        h2[b, v, t, d, n] = weight[1] * B[b, v, t, 1, n] * u[b, v, t, d]
        if t > 0:
            h1[b, v, t, d, n] += kappa * e[0] * h1[b, v, t - 1, d, n] + others * e[1] * h2[b, v, t - 1, d, n]
        if v > 0:
            h2[b, v, t, d, n] += others * (e[2] * h1[b, v - 1, t, d, n] + e[3] * h2[b, v - 1, t, d, n])
        y[b, v, t, d] += C[b, v, t, 0, n] * h1[b, v, t, d, n] + C[b, v, t, 1, n] * h2[b, v, t, d, n]
    return y, h1, h2


@pytest.mark.parametrize(("coupling", "rule"), OPTIONS)
def test_definition(coupling, rule):
    x = arguments()
    y, h1, h2 = by_loops(x, coupling, rule)
    for backend in ("reference", "cpu"):
        assert_same(ssm2d(**x, coupling=coupling, input_rule=rule, backend=backend), y)
        found = ssm2d(**x, coupling=coupling, input_rule=rule, backend=backend, return_state=True)
        assert_same(found, (y, h1, h2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("B", "V", "T", "D", "N"),
    [(1, 1, 1, 1, 1), (2, 3, 1, 5, 2), (3, 1, 17, 33, 1), (1, 4, 33, 16, 3), (40, 2, 5, 70, 2)],
)
def test_engine_is_the_reference(dtype, B, V, T, D, N):
    x = arguments(B, V, T, D, N, dtype=dtype)
    assert_same(both(x, "cpu"), both(x, "reference"))


@pytest.mark.parametrize(("coupling", "rule"), OPTIONS)
def test_every_option(coupling, rule):
    x = arguments(2, 3, 20, 9, 3, skip=False)
    options = {"coupling": coupling, "input_rule": rule}
    assert_same(both(x, "cpu", **options), both(x, "reference", **options))


@pytest.mark.parametrize("scale", [1e-3, 0.03, 100.0])
def test_single_precision_is_accurate_for_short_and_long_steps(scale):
    x = arguments(2, 3, 20, 9, 3, dtype=torch.float32)
    with torch.no_grad():
        x["delta"] *= scale
    exact = {k: v.detach().double().requires_grad_() for k, v in x.items()}
    found = [v.double() for v in both(x, "cpu")]
    # The gradient of the rates is a small difference: of e^s s and e^s - 1, with s = delta A.
    bound = [1e-6 * max(1, 0.5 / scale) if k == "A" else 1e-6 for k in ("y", *NAMES)]
    for value, wanted, rtol in zip(found, both(exact, "reference"), bound, strict=True):
        assert_same(value, wanted, rtol=rtol)


def test_exponential_is_accurate_to_rounding():
    exponent = torch.linspace(-80, 80, 4001)
    one, zero = torch.ones(1, 1, 2, 2, 1), torch.zeros(1, 1, 2, 2, 1)
    A = exponent.reshape(1, -1, 1).expand(4, -1, -1)
    x, delta = torch.ones(1, 1, 2, 4001), torch.ones(1, 1, 2, 2, 4001)
    x[:, :, 1] = 0
    C = one.clone()
    C[..., 1, :] = 0
    y = ssm2d(x, delta, A, one, C, coupling="none", input_rule="euler", backend="cpu")  # h_1 = e^A * 1
    relative = (y[0, 0, 1].double() / exponent.double().exp() - 1).abs()
    assert bool((relative <= torch.finfo(torch.float32).eps * (1.5 + exponent.double().abs())).all())
    y = ssm2d(x, delta, A, one, C, coupling="none", backend="cpu")  # h_0 = (e^A - 1) / A, NaN for A = 0
    wanted = torch.expm1(exponent.double()) / exponent.double()
    relative = (y[0, 0, 0].double() / wanted - 1).abs()
    assert bool((relative <= torch.finfo(torch.float32).eps * (3 + exponent.double().abs()))[exponent != 0].all())
    assert float(ssm2d(x, delta, A, zero, zero, torch.ones(4001), input_rule="euler", backend="cpu").sum()) == 4001


def test_overflow_and_nan_show():
    one, pair = torch.ones(1, 1, 3, 1), torch.ones(1, 1, 3, 2, 1)
    rates = torch.full((4, 1, 1), 200.0)
    assert not bool(ssm2d(one, pair, rates, pair, pair, backend="cpu").isfinite().any())
    hole = torch.tensor([1.0, math.nan, 1.0])
    first = [False, True, True]
    for x, delta in ((hole.view(1, 1, 3, 1), pair), (one, hole.view(1, 1, 3, 1, 1).expand_as(pair))):
        assert ssm2d(x, delta, -rates, pair, pair, backend="cpu").isnan().flatten().tolist() == first
    assert bool(ssm2d(one, pair, rates * math.nan, pair, pair, backend="cpu").isnan().all())


@pytest.mark.parametrize(("coupling", "rule"), [("half", "zoh"), ("none", "euler")])
def test_gradcheck(coupling, rule):
    x = arguments(1, 2, 3, 2, 2)
    run = lambda *v: ssm2d(*v, coupling=coupling, input_rule=rule, backend="cpu")  # noqa: E731
    assert torch.autograd.gradcheck(run, tuple(x.values()))


def test_gradients_of_some_arguments_and_through_the_states():
    x = arguments()
    for k in x:
        x[k].requires_grad_(k in "AC")
    found = [torch.autograd.grad(ssm2d(**x, backend=e).sum(), [x["A"], x["C"]]) for e in ("cpu", "reference")]
    assert_same(*found)
    x = arguments()
    outputs = [ssm2d(**x, return_state=True, backend=e) for e in ("cpu", "reference")]
    assert_same(*(grads(o, list(x.values())) for o in outputs))


def test_registration():
    for skip in (True, False):
        x = arguments(2, 2, 3, 3, 2, skip=skip)
        torch.library.opcheck(torch.ops.dynakern.ssm2d.default, (*(x.get(k) for k in NAMES), "half", False))
    x = arguments()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ssm2d(**x), backend="aot_eager", fullgraph=True)
    assert_same(compiled(x), ssm2d(**x))
    assert_same(grads(compiled(x), list(x.values())), grads(ssm2d(**x), list(x.values())))
    plain = {k: v.detach() for k, v in arguments(2, 3, 5, 4, 2).items()}
    assert count_flops(lambda: ssm2d(**plain)) == 32 * 2 * 3 * 5 * 4 * 2


def test_forward_mode_and_vmap_take_the_reference():
    x = {k: v.detach() for k, v in arguments().items()}

    def run(u, backend="auto"):
        return ssm2d(**(x | {"x": u}), backend=backend)

    tangent = randn(*x["x"].shape, seed=30, requires_grad=False)
    fast, slow = (torch.func.jvp(lambda u, b=b: run(u, b), (x["x"],), (tangent,)) for b in ("auto", "reference"))
    assert_same(fast, slow)
    assert float(fast[1].abs().sum()) > 0
    assert_same(torch.func.jacrev(run)(x["x"]), torch.func.jacrev(lambda u: run(u, "reference"))(x["x"]))
    many = randn(3, *x["x"].shape, seed=31, requires_grad=False)
    assert_same(torch.vmap(run)(many), torch.stack([run(u) for u in many]))


def test_second_derivative_is_refused_by_the_fast_engine_and_given_by_the_reference():
    x = arguments(1, 2, 2, 1, 1)
    for backend in ("cpu", "reference"):
        (g,) = torch.autograd.grad(ssm2d(**x, backend=backend).square().sum(), x["x"], create_graph=True)
        if backend == "cpu":
            with pytest.raises(NotImplementedError, match="ssm2d: the fast engines give first derivatives only"):
                g.sum().backward()
        else:
            assert float(torch.autograd.grad(g.sum(), x["x"])[0].abs().sum()) > 0


def test_16_bit_inputs_are_computed_in_single_precision():
    x = arguments(2, 3, 30, 6, 3, dtype=torch.float32)
    low = {k: v.detach().bfloat16().requires_grad_() if k != "A" else v for k, v in x.items()}
    y = ssm2d(**low, backend="cpu")
    exact = {k: v.detach().double().requires_grad_() for k, v in low.items()}
    wanted = ssm2d(**exact, backend="reference")
    assert y.dtype == torch.bfloat16
    assert_same(y.double(), wanted, rtol=3e-3)
    found = grads(y, list(low.values()))
    assert [g.dtype for g in found] == [v.dtype for v in low.values()]
    assert_same([g.double() for g in found], grads(wanted, list(exact.values())), rtol=1e-2)


def test_strided_inputs_and_arguments_left_alone():
    x = arguments(2, 3, 10, 6, 3)
    strided = {k: v.detach().mT.contiguous().mT if v.ndim > 1 else v.detach() for k, v in x.items()}
    copies = {k: v.clone() for k, v in strided.items()}
    assert_same(ssm2d(**strided, backend="cpu"), ssm2d(**x, backend="cpu"))
    assert all(torch.equal(strided[k], copies[k]) for k in x)
    y = ssm2d(**x, backend="cpu")
    assert_same(torch.autograd.grad(y.sum(), x["x"])[0], torch.autograd.grad(ssm2d(**x).sum(), x["x"])[0])  # expanded


def test_result_does_not_depend_on_threads():
    x = arguments(3, 2, 20, 70, 3, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(both(x, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("B", "D", "N"), [(0, 4, 2), (2, 0, 2), (2, 4, 0)], ids=["no-batch", "no-feature", "no-state"])
def test_empty_axes(B, D, N):
    x = arguments(B, 2, 3, D, N)
    assert_same(both(x, "cpu"), both(x, "reference"))


def test_engine_is_explained():
    x = arguments()
    assert explain_backend(ssm2d, **x).engine == "cpu"
    assert explain_backend(ssm2d, **arguments(T=1, V=2)).reason == "the input is small"
    with pytest.raises(NotImplementedError, match="gpu engine cannot run"):
        ssm2d(**x, backend="gpu")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": torch.zeros(1, 2, 3, 1, 4)}, ValueError, "`delta` must have size 2 on axis 3"),
        ({"A": torch.zeros(4, 5, 2)}, ValueError, "`A` must have D = 4 on axis 1"),
        ({"B": torch.zeros(1, 2, 3, 2, 3)}, ValueError, "`B` must have N = 2 on axis 4"),
        ({"C": torch.zeros(1, 2, 4, 2, 2)}, ValueError, "`C` must have T = 3 on axis 2"),
        ({"D": torch.zeros(5)}, ValueError, "`D` must have D = 4 on axis 0"),
        ({"D": torch.zeros(4, device="meta")}, ValueError, "on one device"),
        ({"x": torch.zeros(1, 2, 3, 4).long()}, TypeError, "`x` must have a floating-point dtype"),
        ({"A": None}, TypeError, "`A` must be a tensor"),
        ({"coupling": "hal"}, ValueError, "Did you mean 'half'"),
        ({"input_rule": "exact"}, ValueError, "`input_rule` must be one of 'zoh', 'euler'"),
        ({"backend": "numba"}, ValueError, "`backend` must be one of"),
    ],
)
def test_refusals(change, error, message):
    x = {k: v.detach() for k, v in arguments(1, 2, 3, 4, 2).items()}
    with pytest.raises(error, match=message):
        ssm2d(**(x | change))


def test_an_empty_grid_is_refused():
    for shape in ((1, 0, 3), (1, 2, 0)):
        x = {k: v.detach() for k, v in arguments(*shape).items()}
        with pytest.raises(ValueError, match="`x` must have V, T >= 1"):
            ssm2d(**x)
