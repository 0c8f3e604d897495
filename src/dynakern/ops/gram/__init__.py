r"""Kernel matrices that are never written down: products, solves and features of :math:`K_{ij} = k(x_i, y_j)`.

A kernel matrix of N points has N\ :sup:`2` entries; at 200,000 points that is 160 GB. All that most methods want of it
is ``K @ v``, which :func:`gram_product` computes tile by tile; :func:`gram_solve` solves ``(K + noise I) a = b`` with
it by preconditioned conjugate gradients, and :func:`nystroem` and :func:`random_features` replace K by a product of
thin matrices.

Sources: Charlier et al., 2021, "KeOps", arXiv:2004.11127 (products); Frangella, Tropp and Udell, 2023, arXiv:2110.02820
(preconditioner); Rahimi and Recht, 2007, "Random features" (doi:10.5555/2981562.2981710).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from dynakern.checks import check_choice, check_floating, check_positive, check_same_device, check_shape
from dynakern.ops.dispatch import Backend, refuse_double_backward, resolve_backend
from dynakern.ops.gram.features import nystroem, random_features
from dynakern.ops.gram.reference import PROFILES, gram_reference
from dynakern.ops.gram.solve import GramSolution, gram_solve

__all__ = ["GramSolution", "gram_product", "gram_solve", "nystroem", "random_features"]

_ROWS = 1024  # rows of a block where the kernel is somebody else's function


def gram_product(
    kernel: str | Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    v: Tensor,
    y: Tensor | None = None,
    *,
    length_scale: float | Tensor = 1.0,
    jobs: int = 1,
    backend: Backend = "auto",
) -> Tensor:
    r"""Return :math:`K v` with :math:`K_{ij} = k(x_i, y_j)`, without writing K down.

    With :math:`d = \lVert (x - y) / \ell \rVert` the named kernels are ``"gaussian"`` :math:`e^{-d^2/2}`,
    ``"matern12"`` :math:`e^{-d}`, ``"matern32"`` :math:`(1 + \sqrt3 d) e^{-\sqrt3 d}`, ``"matern52"``
    :math:`(1 + \sqrt5 d + \tfrac53 d^2) e^{-\sqrt5 d}` and ``"cauchy"`` :math:`1 / (1 + d^2)`.
    O(N M (P + C)) time, O(N + M) memory beside a tile.

    Args:
        kernel: A name, or a function of two blocks ``(n, P)``, ``(m, P)`` that returns ``(n, m)``, such as any kernel
            of ``dynakern.similarity``.
        x: Points, ``(N, P)``.
        v: Vectors, ``(M, C)`` or ``(M,)``.
        y: Points, ``(M, P)``; ``x`` by default.
        length_scale: :math:`\ell`, one number or ``(P,)``; of named kernels only.
        jobs: Processes that share the rows, through joblib; -1 for one a core. Inside of a ``joblib.parallel_config``
            of a Dask or Ray cluster the rows go there. Gives no gradient unless 1.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"gpu"``; of named kernels only.

    Returns:
        ``(N, C)`` or ``(N,)``, dtype of ``x``; differentiable by ``x``, ``y``, ``v`` and ``length_scale``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Shapes do not fit, a kernel's name is unknown, ``length_scale`` is not positive, or a gradient is
            asked for with several ``jobs``.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        >>> gram_product("gaussian", x, torch.ones(2, dtype=torch.float64))
        tensor([1.6065, 1.6065], dtype=torch.float64)
    """
    check_floating("x", x)
    check_floating("v", v)
    dims = check_shape("x", x, "N P")
    points = x if y is None else y
    dims = check_shape("y", points, "M P", dims)
    columns = v.unsqueeze(1) if v.ndim == 1 else v
    check_shape("v", columns, "M C", dims)
    check_same_device(x=x, y=y, v=v)
    if 0 in (dims["N"], dims["M"], dims["P"]):
        raise ValueError(f"`x` and `y` must not be empty, got shapes {tuple(x.shape)} and {tuple(points.shape)}.")
    if jobs != 1:
        out = _shared_among(jobs, kernel, x, columns, y, length_scale, backend)
    elif callable(kernel):
        out = _rows_of_callable(kernel, x, points, columns.to(x.dtype))
    else:
        check_choice("kernel", kernel, tuple(PROFILES))
        x, points = _scaled(x, y, length_scale)
        small = dims["N"] * dims["M"] < 100_000
        refusals = {"cpu": None, "gpu": None}
        engine = resolve_backend("gram_product", backend, (x, points, columns), refusals=refusals, small=small)
        if engine == "reference":
            out = gram_reference(kernel, x, points, columns.to(x.dtype))
        else:
            wide = torch.promote_types(x.dtype, torch.float32)
            wide_x = x.to(wide)
            wide_points = wide_x if points is x else points.to(wide)
            out = _gram_product(kernel, wide_x, wide_points, columns.to(wide)).to(x.dtype)
    return out.squeeze(1) if v.ndim == 1 else out


def _scaled(x: Tensor, y: Tensor | None, length_scale: float | Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(length_scale, Tensor):
        if length_scale.ndim > 1 or length_scale.numel() not in (1, x.shape[1]):
            raise ValueError(f"`length_scale` must be one number or (P,), got shape {tuple(length_scale.shape)}.")
    else:
        check_positive("length_scale", length_scale)
        if length_scale == 1.0:
            return x, x if y is None else y
    scaled = x / length_scale
    return scaled, scaled if y is None else y / length_scale


def _rows_of_callable(kernel: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    def block(rows: Tensor) -> Tensor:
        return (
            torch.cat([kernel(rows, part) @ v[i : i + len(part)] for i, part in _cut(y)], 1)
            .unflatten(1, (-1, v.shape[1]))
            .sum(1)
        )

    if not torch.is_grad_enabled():
        return torch.cat([block(rows) for _, rows in _cut(x)])
    # The blocks are computed again in the backward pass: kept, they would be the whole matrix.
    return torch.cat([checkpoint(block, rows, use_reentrant=False) for _, rows in _cut(x)])  # pyright: ignore


def _cut(x: Tensor) -> list[tuple[int, Tensor]]:
    return [(begin, x[begin : begin + _ROWS]) for begin in range(0, len(x), _ROWS)]


def _shared_among(
    jobs: int,
    kernel: str | Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    v: Tensor,
    y: Tensor | None,
    length_scale: float | Tensor,
    backend: Backend,
) -> Tensor:
    import joblib

    if jobs != -1:
        check_positive("jobs", jobs, integer=True)
    tensors = [t for t in (x, v, y, length_scale) if isinstance(t, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError("`jobs` must be 1 where a gradient is needed: other processes give none.")
    parallel: Any = joblib.Parallel(n_jobs=jobs)
    parts = x.detach().chunk(max(1, 2 * joblib.effective_n_jobs(jobs)))
    whole = (x if y is None else y).detach()
    options = {"length_scale": length_scale, "backend": backend}
    return torch.cat(
        parallel(joblib.delayed(gram_product)(kernel, part, v.detach(), whole, **options) for part in parts)
    )


@torch.library.custom_op("dynakern::gram_product", mutates_args=())
def _gram_product(kernel: str, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    from dynakern.ops.gram import cpu

    return cpu.forward(kernel, x, y, v)


@_gram_product.register_fake
def _(kernel, x, y, v):
    return x.new_empty(x.shape[0], v.shape[1])


@torch.library.custom_op("dynakern::gram_product_backward", mutates_args=())
def _gram_product_backward(
    kernel: str, gradient: Tensor, x: Tensor, y: Tensor, v: Tensor, needs_points: bool, needs_v: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from dynakern.ops.gram import cpu

    return cpu.backward(kernel, gradient, x, y, v, needs_points, needs_v)


@_gram_product_backward.register_fake
def _(kernel, gradient, x, y, v, needs_points, needs_v):
    needed = needs_points, needs_points, needs_v
    like = (torch.empty_like(t) if n else t.new_empty(0) for t, n in zip((x, y, v), needed, strict=True))
    return tuple(like)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.kernel = inputs[0]
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    _, needs_x, needs_y, needs_v = ctx.needs_input_grad
    found = _gram_product_backward(ctx.kernel, gradient, *ctx.saved_tensors, needs_x or needs_y, needs_v)
    needed = needs_x, needs_y, needs_v
    return None, *(g if n else None for g, n in zip(found, needed, strict=True))


_gram_product.register_autograd(_backward, setup_context=_setup_context)
_gram_product_backward.register_autograd(lambda ctx, *grads: refuse_double_backward("gram_product"))


@register_flop_formula(torch.ops.dynakern.gram_product)
def _(kernel, x_shape, y_shape, v_shape, *args, **kwargs) -> int:
    """Count two operations for each multiplication of the two matrix products."""
    return 2 * x_shape[0] * y_shape[0] * (x_shape[1] + v_shape[1])


@register_flop_formula(torch.ops.dynakern.gram_product_backward)
def _(kernel, gradient_shape, x_shape, y_shape, v_shape, needs_points, needs_v, **kwargs) -> int:
    pairs, features, columns = x_shape[0] * y_shape[0], x_shape[1], v_shape[1]
    return 2 * pairs * (needs_points * (3 * features + columns) + needs_v * (features + columns))
