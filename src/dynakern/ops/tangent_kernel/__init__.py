r"""The empirical tangent kernel of a network: inner products of the gradients of its outputs by its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from dynakern.checks import check_choice, check_positive, check_shape

__all__ = ["tangent_kernel"]


def tangent_kernel(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    outputs: Literal["mean", "full"] = "mean",
    method: Literal["vmap", "loop"] = "vmap",
    chunk_size: int = 16,
) -> Tensor:
    r"""Return the empirical neural tangent kernel of ``model`` at its present parameters.

    .. math:: \Theta_{ij}(x, x') = \sum_p \partial_{\theta_p} f_i(x)\, \partial_{\theta_p} f_j(x')

    over all parameters with ``requires_grad``. The network must treat samples alone (eval mode for batch norms).
    O((N + M) O) backward passes; memory for the Jacobians of ``x2`` whole and of ``chunk_size`` samples of ``x1``.

    Args:
        model: Maps ``(B, ...)`` to ``(B, O)`` (or ``(B,)``, or ``(B, ...)``, whose other axes are flattened to O).
        x1: Inputs, ``(N, ...)``.
        x2: Inputs, ``(M, ...)``; ``x1`` by default.
        outputs: ``"mean"``: :math:`\frac1O\sum_i\Theta_{ii}`; ``"full"``: all pairs of outputs.
        method: ``"vmap"``: Jacobians of a whole chunk at once, by ``torch.func``; operators of this library then take
            their reference engines. ``"loop"``: one backward pass an output and sample, which works for any module.
        chunk_size: Samples of a chunk.

    Returns:
        ``(N, M)``, or ``(N, M, O, O)`` with ``outputs="full"``; dtype of the outputs.

    Raises:
        ValueError: The model has no trainable parameters, ``x1`` is empty, or ``x2`` has another shape.

    Example:
        >>> linear = torch.nn.Linear(3, 1, bias=False)
        >>> x = torch.randn(4, 3)
        >>> torch.allclose(tangent_kernel(linear, x), x @ x.T, atol=1e-6)
        True

    Source: Jacot, Gabriel and Hongler, 2018, arXiv:1806.07572.
    """
    check_choice("outputs", outputs, ("mean", "full"))
    check_choice("method", method, ("vmap", "loop"))
    check_positive("chunk_size", chunk_size, integer=True)
    if x1.ndim < 1 or len(x1) == 0:
        raise ValueError(f"`x1` must hold at least one sample, got shape {tuple(x1.shape)}.")
    if x2 is not None:
        letters = " ".join(["M", *(str(size) for size in x1.shape[1:])])
        check_shape("x2", x2, letters)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"`model` ({type(model).__name__}) has no trainable parameters.")
    jacobian = _vmapped(model) if method == "vmap" else _looped(model)
    columns = list(_chunks(x1 if x2 is None else x2, chunk_size, jacobian))
    rows = columns if x2 is None else _chunks(x1, chunk_size, jacobian)
    equation = "nop,mop->nm" if outputs == "mean" else "nip,mjp->nmij"
    blocks = []
    for row in rows:
        line = [sum(torch.einsum(equation, a, b) for a, b in zip(row, column, strict=True)) for column in columns]
        blocks.append(torch.cat(line, 1))  # pyright: ignore[reportArgumentType]
    kernel = torch.cat(blocks)
    return kernel / columns[0][0].shape[1] if outputs == "mean" else kernel


Jacobian = Callable[[Tensor], list[Tensor]]


def _chunks(x: Tensor, size: int, jacobian: Jacobian) -> Iterator[list[Tensor]]:
    for chunk in x.split(size):
        yield jacobian(chunk)


def _vmapped(model: nn.Module) -> Jacobian:
    """Return a function from samples to the Jacobians of all parameters, ``(B, O, P)`` each."""
    free = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    fixed |= dict(model.named_buffers())

    def output(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, (parameters, fixed), (x.unsqueeze(0),)).reshape(-1)

    batched = torch.func.vmap(torch.func.jacrev(output), in_dims=(None, 0), randomness="different")

    def jacobian(x: Tensor) -> list[Tensor]:
        return [j.flatten(2) for j in batched(free, x).values()]

    return jacobian


def _looped(model: nn.Module) -> Jacobian:
    parameters = [p for p in model.parameters() if p.requires_grad]

    def jacobian(x: Tensor) -> list[Tensor]:
        rows: list[list[Tensor]] = []
        with torch.enable_grad():
            for sample in x.split(1):
                y = model(sample).reshape(-1)
                for index, value in enumerate(y):
                    last = index + 1 == len(y)
                    found = torch.autograd.grad(value, parameters, retain_graph=not last, materialize_grads=True)
                    rows.append([g.reshape(-1) for g in found])
        per_sample = len(rows) // len(x)
        return [torch.stack(column).unflatten(0, (-1, per_sample)) for column in zip(*rows, strict=True)]

    return jacobian
