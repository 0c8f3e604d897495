"""The selective scan: its definition, its engines, its derivatives, and what it refuses."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.nn.functional as F

from dynakern.measure import count_flops
from dynakern.ops import explain_backend, selective_scan
from dynakern.testing import assert_same, grads, rand, randn

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def arguments(b=2, D=6, N=4, L=20, B="bGNL", C="bGNL", G=1, dtype=torch.float64, leave_out=(), seed=0):
    """Random operands; ``B`` and ``C`` name the shape of the coefficients."""
    shapes = {"DN": (D, N), "bNL": (b, N, L), "bGNL": (b, G, N, L)}
    x = {
        "u": randn(b, D, L, seed=seed),
        "delta": randn(b, D, L, seed=seed + 1),
        "A": (-3 * rand(D, N, seed=seed + 2)),
        "B": randn(*shapes[B], seed=seed + 3),
        "C": randn(*shapes[C], seed=seed + 4),
        "D": randn(D, seed=seed + 5),
        "z": randn(b, D, L, seed=seed + 6),
        "delta_bias": randn(D, seed=seed + 7),
        "initial_state": randn(b, D, N, seed=seed + 8),
    }
    return {k: v.detach().to(dtype).requires_grad_() for k, v in x.items() if k not in leave_out}


def both(x, backend, **options):
    """Return y, the last state, and the gradients of a projection of both."""
    outputs = selective_scan(**x, return_last_state=True, backend=backend, **options)
    return [*outputs, *grads(outputs, list(x.values()))]


def by_loops(x, softplus):
    """Write the recurrence out, scalar by scalar."""
    u, A, B, C = (x[k].detach() for k in ("u", "A", "B", "C"))
    dt = x["delta"].detach() + x["delta_bias"].detach()[:, None]
    dt = F.softplus(dt) if softplus else dt
    h, y = x["initial_state"].detach().clone(), torch.zeros_like(u)
    b, D, L = u.shape
    for i in range(b):
        for d in range(D):
            group = [0 if k.ndim == 2 else d // (D // k.shape[1]) for k in (B, C)]
            for t in range(L):
                for n in range(A.shape[1]):
                    B_t = B[d, n] if B.ndim == 2 else B[i, group[0], n, t]
                    C_t = C[d, n] if C.ndim == 2 else C[i, group[1], n, t]
                    h[i, d, n] = math.exp(dt[i, d, t] * A[d, n]) * h[i, d, n] + dt[i, d, t] * B_t * u[i, d, t]
                    y[i, d, t] += C_t * h[i, d, n]
    y = (y + x["D"].detach()[:, None] * u) * F.silu(x["z"].detach())
    return y, h


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("softplus", [False, True], ids=["plain", "softplus"])
@pytest.mark.parametrize(("B", "C", "G"), [("bGNL", "bGNL", 3), ("DN", "bGNL", 2), ("bGNL", "DN", 1), ("DN", "DN", 1)])
def test_definition(backend, softplus, B, C, G):
    x = arguments(b=2, D=6, N=3, L=5, B=B, C=C, G=G)
    y, last = selective_scan(**x, delta_softplus=softplus, return_last_state=True, backend=backend)
    assert_same([y, last], by_loops(x, softplus))


SHAPES = [  # b, D, N, L, G
    (1, 1, 1, 1, 1),
    (2, 3, 5, 2, 1),
    (1, 33, 2, 63, 1),
    (2, 8, 16, 64, 4),
    (1, 80, 1, 65, 2),
    (3, 5, 3, 130, 5),
    (1, 200, 2, 20, 1),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("b", "D", "N", "L", "G"), SHAPES, ids=["b{}-D{}-N{}-L{}-G{}".format(*s) for s in SHAPES])
def test_fused_matches_reference(dtype, b, D, N, L, G):
    x = arguments(b, D, N, L, G=G, dtype=dtype)
    assert_same(both(x, "cpu", delta_softplus=True), both(x, "reference", delta_softplus=True))


@pytest.mark.parametrize("leave_out", [("D", "z"), ("z", "delta_bias"), ("D", "initial_state"), NAMES[5:]], ids=str)
@pytest.mark.parametrize(("B", "C"), [("bGNL", "bNL"), ("DN", "bNL"), ("bGNL", "DN"), ("DN", "DN")])
def test_every_mix_of_arguments(leave_out, B, C):
    x = arguments(2, 40, 3, 70, B=B, C=C, G=2, leave_out=leave_out)
    assert_same(both(x, "cpu"), both(x, "reference"))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_groups_of_B_and_C_may_differ(backend):
    x = arguments(2, 12, 3, 9, G=4)
    x["C"] = randn(2, 6, 3, 9, seed=20)
    wide = x | {k: x[k].repeat_interleave(12 // x[k].shape[1], dim=1) for k in "BC"}
    assert_same(selective_scan(**x, backend=backend), selective_scan(**wide, backend="reference"))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_scan_can_be_cut_anywhere(backend):
    x = arguments(2, 5, 3, 150)
    y, last = selective_scan(**x, delta_softplus=True, return_last_state=True, backend=backend)
    state, pieces = x["initial_state"], []
    for a, b in ((0, 1), (1, 77), (77, 150)):
        cut = {k: v[..., a:b] if k in ("u", "delta", "B", "C", "z") else v for k, v in x.items()}
        piece, state = selective_scan(
            **(cut | {"initial_state": state}), delta_softplus=True, return_last_state=True, backend=backend
        )
        pieces.append(piece)
    assert_same([torch.cat(pieces, -1), state], [y, last])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_decay_is_a_running_sum(backend):
    u = randn(2, 3, 100)
    one = torch.ones(3, 1, dtype=torch.float64)
    y = selective_scan(u, torch.ones_like(u), 0 * one, one, one, backend=backend)
    assert_same(y, u.cumsum(-1))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_system_constant_in_time_is_a_convolution(backend):
    x = arguments(2, 4, 3, 60, B="DN", C="DN", leave_out=("delta", *NAMES[5:]))
    y = selective_scan(**x, delta=torch.full((2, 4, 60), 0.1, dtype=torch.float64), backend=backend)
    taps = torch.einsum("dn,dn,dnl->dl", x["B"], x["C"], torch.exp(0.1 * x["A"][..., None] * torch.arange(60))) * 0.1
    expected = F.conv1d(F.pad(x["u"], (59, 0)), taps.flip(-1)[:, None], groups=4)
    assert_same(y, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_extreme_decays_and_steps(dtype):
    x = arguments(1, 40, 2, 80, dtype=dtype, leave_out=("z", "D"))
    scale = torch.logspace(-6, 3, 40, dtype=dtype)[:, None]
    with torch.no_grad():
        x["delta"] *= 30  # to both sides of the softplus threshold
        x["A"] *= scale
    assert_same(both(x, "cpu", delta_softplus=True), both(x, "reference", delta_softplus=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_exponential_is_accurate_to_rounding(dtype):
    exponent = torch.linspace(-80, 80, 4001, dtype=torch.float64).to(dtype)
    D = len(exponent)
    one = torch.ones(D, 1, dtype=dtype)
    _, h = selective_scan(  # h = exp(A) * 1
        torch.zeros(1, D, 1, dtype=dtype), torch.ones(1, D, 1, dtype=dtype), exponent[:, None], one, one,
        return_last_state=True, initial_state=one[None], backend="cpu",
    )  # fmt: skip
    relative = (h[0, :, 0].double() / exponent.double().exp() - 1).abs()
    eps = torch.finfo(dtype).eps
    assert bool((relative <= eps * (1.5 + exponent.double().abs())).all())


def test_overflow_and_nan_show():
    def run(u, delta, A):
        one = torch.ones(1, 1)
        return selective_scan(u, delta, A * one, one, one, initial_state=one[None], backend="cpu")[0, 0]

    u = torch.ones(1, 1, 3)
    hole = torch.tensor([[[1.0, math.nan, 1.0]]])
    assert run(u, u, 200.0).tolist() == [math.inf] * 3
    assert run(u, u, -200.0).tolist() == [1.0] * 3
    assert run(hole, u, -1.0).isnan().tolist() == [False, True, True]
    assert run(u, hole, -1.0).isnan().tolist() == [False, True, True]
    assert run(u, u, math.nan).isnan().all()


@pytest.mark.parametrize(("B", "C"), [("bGNL", "bGNL"), ("DN", "bGNL"), ("bGNL", "DN")])
def test_gradcheck(B, C):
    x = arguments(2, 4, 2, 5, B=B, C=C, G=2)
    assert torch.autograd.gradcheck(
        lambda *v: selective_scan(**dict(zip(x, v, strict=True)), delta_softplus=True, return_last_state=True),
        [*x.values()],
    )


def test_gradient_of_the_last_state_alone_and_of_some_arguments():
    x = arguments(2, 5, 3, 70)
    some = [x["u"], x["B"]]
    for k in x:
        x[k].requires_grad_(k in "uB")
    found = [
        torch.autograd.grad(selective_scan(**x, return_last_state=True, backend=e)[1].sum(), some)
        for e in ("cpu", "reference")
    ]
    assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_inputs_accumulate_in_single_precision(dtype):
    x = arguments(2, 8, 4, 300, dtype=torch.float32)
    low = {k: v.detach().to(dtype).requires_grad_() if k in ("u", "delta", "B", "C", "z") else v for k, v in x.items()}
    y, last = selective_scan(**low, delta_softplus=True, return_last_state=True, backend="cpu")
    assert y.dtype == dtype
    assert last.dtype == torch.float32
    exact = {k: v.detach().double().requires_grad_() for k, v in low.items()}
    expected, state = selective_scan(**exact, delta_softplus=True, return_last_state=True, backend="reference")
    assert_same(y.double(), expected, rtol=3e-3 if dtype == torch.bfloat16 else 4e-4)
    assert_same(last.double(), state, rtol=1e-5)
    found = grads(y, list(low.values()))
    assert [g.dtype for g in found] == [v.dtype for v in low.values()]
    assert_same([g.double() for g in found], grads(expected, list(exact.values())), rtol=1e-2)


def test_strided_inputs_and_arguments_left_alone():
    x = arguments(2, 6, 3, 40)
    strided = {k: v.detach().mT.contiguous().mT if v.ndim > 1 else v.detach() for k, v in x.items()}
    copies = {k: v.clone() for k, v in strided.items()}
    assert_same(selective_scan(**strided, backend="cpu"), selective_scan(**x, backend="cpu"))
    assert all(torch.equal(strided[k], copies[k]) for k in x)


def test_result_does_not_depend_on_threads():
    x = arguments(2, 100, 3, 90, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = both(x, "cpu", delta_softplus=True)
        torch.set_num_threads(2)
        two = both(x, "cpu", delta_softplus=True)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(("b", "D", "N"), [(0, 4, 2), (2, 0, 2), (2, 4, 0)], ids=["no-batch", "no-channel", "no-state"])
def test_empty_axes(b, D, N):
    x = arguments(b, D, N, 5)
    assert_same(both(x, "cpu"), both(x, "reference"))


@pytest.mark.parametrize("leave_out", [(), NAMES[5:]], ids=["all", "least"])
def test_opcheck(leave_out):
    x = arguments(2, 4, 2, 66, B="DN", G=2, leave_out=leave_out)
    for keep in (True, False):
        operands = [x.get(k) for k in NAMES]
        torch.library.opcheck(torch.ops.dynakern.selective_scan.default, (*operands, True, keep))


def test_compiles_whole():
    x = arguments(2, 4, 2, 20)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: selective_scan(**x, delta_softplus=True), backend="aot_eager", fullgraph=True)
    actual, expected = compiled(x), selective_scan(**x, delta_softplus=True)
    assert_same(actual, expected)
    assert_same(grads(actual, list(x.values())), grads(expected, list(x.values())))


def test_forward_mode_and_vmap_take_the_reference():
    x = {k: v.detach() for k, v in arguments(2, 4, 2, 6).items()}

    def run(u, backend="auto"):
        return selective_scan(**(x | {"u": u}), backend=backend)

    tangent = randn(2, 4, 6, seed=30, requires_grad=False)
    assert_same(
        torch.func.jvp(run, (x["u"],), (tangent,)), torch.func.jvp(lambda u: run(u, "reference"), (x["u"],), (tangent,))
    )
    assert torch.func.jvp(run, (x["u"],), (tangent,))[1].abs().sum() > 0
    assert_same(torch.func.jacrev(run)(x["u"]), torch.func.jacrev(lambda u: run(u, "reference"))(x["u"]))
    many = randn(3, 2, 4, 6, seed=31, requires_grad=False)
    assert_same(torch.vmap(run)(many), torch.stack([run(u) for u in many]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x["u"], tangent)
        assert torch.autograd.forward_ad.unpack_dual(run(dual)).tangent is not None
        with pytest.raises(NotImplementedError, match="forward-mode tangent"):
            run(dual, "cpu")


def test_second_derivative_is_refused_by_the_fast_engine_and_given_by_the_reference():
    x = arguments(1, 2, 2, 5)
    for backend in ("cpu", "reference"):
        (g,) = torch.autograd.grad(selective_scan(**x, backend=backend).square().sum(), x["u"], create_graph=True)
        if backend == "cpu":
            with pytest.raises(NotImplementedError, match="backend='reference'"):
                g.sum().backward()
        else:
            assert torch.autograd.grad(g.sum(), x["u"])[0].abs().sum() > 0


def test_engine_is_explained():
    x = arguments(1, 2, 2, 50)
    assert explain_backend(selective_scan, **x).engine == "cpu"
    short = arguments(1, 2, 2, 1)
    assert explain_backend(selective_scan, **short).reason == "the input is small"
    with pytest.raises(NotImplementedError, match="gpu engine cannot run"):
        selective_scan(**x, backend="gpu")


def test_flops_are_counted():
    x = {k: v.detach() for k, v in arguments(2, 8, 4, 30, leave_out=("z", "delta_bias", "initial_state")).items()}
    assert count_flops(lambda: selective_scan(**x)) == 2 * 8 * 30 * (9 * 4 + 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"B": torch.zeros(2, 4, 3, 20)}, ValueError, r"D = 6 must be divisible by the groups of `B`, got G = 4"),
        ({"delta": torch.zeros(2, 6, 19)}, ValueError, r"`delta` must have L = 20 on axis 2"),
        ({"B": torch.zeros(2, 3, 19)}, ValueError, r"`B` must have L = 20 on axis 2"),
        ({"C": torch.zeros(2, 5, 20)}, ValueError, r"`C` must have N = 3 on axis 1"),
        ({"C": torch.zeros(6)}, ValueError, r"`C` must have shape \(D, N\), \(b, N, L\) or \(b, G, N, L\)"),
        ({"A": torch.zeros(6)}, ValueError, r"`A` must have shape \(D, N\), got \(6,\)"),
        ({"A": torch.zeros(6, 3, dtype=torch.complex64)}, TypeError, r"`A` must be real.*complex"),
        ({"u": torch.zeros(2, 6, 20, dtype=torch.int64)}, TypeError, r"`u` must have a floating-point dtype"),
        ({"u": torch.zeros(2, 6, 0)}, ValueError, r"at least one step, got L = 0"),
        ({"u": torch.zeros(6, 20)}, ValueError, r"`u` must have shape \(b, D, L\)"),
        ({"D": torch.zeros(5)}, ValueError, r"`D` must have D = 6 on axis 0"),
        ({"z": torch.zeros(2, 6, 21)}, ValueError, r"`z` must have L = 20"),
        ({"delta_bias": torch.zeros(2, 6)}, ValueError, r"`delta_bias` must have shape \(D\)"),
        ({"initial_state": torch.zeros(2, 6, 2)}, ValueError, r"`initial_state` must have N = 3"),
        ({"D": torch.zeros(6, device="meta")}, ValueError, r"on one device"),
        ({"A": None}, TypeError, r"`A` must be a tensor"),
        ({"backend": "numba"}, ValueError, r"`backend` must be one of"),
    ],
)
def test_refusals(change, error, message):
    x = {"u": torch.zeros(2, 6, 20), "delta": torch.zeros(2, 6, 20), "A": torch.zeros(6, 3)}
    x |= {"B": torch.zeros(2, 3, 20), "C": torch.zeros(2, 3, 20)}
    with pytest.raises(error, match=message):
        selective_scan(**(x | change))


def _gpu_engine():
    pytest.importorskip("triton", reason="Triton is not installed")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is no GPU; set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter")
    from dynakern.ops.selective_scan import gpu

    return gpu


@pytest.mark.parametrize(
    ("B", "C", "G", "leave_out"),
    [("bGNL", "bGNL", 2, ()), ("DN", "bGNL", 1, ("z",)), ("bGNL", "DN", 1, ("D",)), ("DN", "DN", 1, NAMES[5:])],
)
def test_gpu_kernels_match_reference(B, C, G, leave_out):
    engine = _gpu_engine()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = arguments(2, 10, 3, 37, B=B, C=C, G=G, dtype=torch.float32, leave_out=leave_out)
    expected = both(x, "reference", delta_softplus=True)
    operands = tuple(x[k].detach().to(device) if k in x else None for k in NAMES)
    states = torch.empty(2, 3, 10, 3, device=device)
    y, last = engine.scan_forward(operands, True, 16, states)
    outputs = selective_scan(**x, return_last_state=True, backend="reference", delta_softplus=True)
    cotangents = [randn(*o.shape, seed=i, dtype=o.dtype, requires_grad=False) for i, o in enumerate(outputs)]
    found = engine.scan_backward(operands, True, 16, states, *(g.to(device) for g in cotangents))
    found = [g for g, operand in zip(found, operands, strict=True) if operand is not None]
    assert_same([v.cpu() for v in (y, last, *found)], expected)
