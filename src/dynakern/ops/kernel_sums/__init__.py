r"""Sums over a kernel: how much a query receives from all points, and how many of them it receives that from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynakern.checks import check_choice, check_floating, check_same_device, check_shape
from dynakern.ops.dispatch import Backend, resolve_backend

__all__ = ["KernelSums", "kernel_sums"]

_KERNELS = ("gaussian", "epanechnikov", "exponential", "tophat")


class KernelSums(NamedTuple):
    r"""What :func:`kernel_sums` gives for Q queries, H bandwidths and L powers, in the dtype of the queries.

    Attributes:
        log_sum: :math:`\ln Z`, ``(H, Q)``; -inf where no point is inside a compact kernel.
        participation: :math:`Y_2`, ``(H, Q)``, in (0, 1]; its inverse is the number of points that contribute. NaN
            where Z = 0.
        entropy: :math:`S_\lambda` in nats, ``(H, L, Q)``; NaN where Z = 0.
        nearest: Distance of the nearest point of positive weight, ``(Q,)``.
    """

    log_sum: Tensor
    participation: Tensor
    entropy: Tensor
    nearest: Tensor


def kernel_sums(
    x: Tensor,
    y: Tensor,
    bandwidth: float | Sequence[float] | np.ndarray | Tensor,
    *,
    kernel: str = "gaussian",
    weights: Tensor | None = None,
    powers: Sequence[float] = (),
    exclude_diagonal: bool = False,
    backend: Backend = "auto",
) -> KernelSums:
    r"""Sum a kernel over all points, for several bandwidths, in one pass over the distances.

    With :math:`w_i = K(|x - y_i| / h)` and weights :math:`v_i` (1 by default) each query x gets

    .. math:: \ln Z = \ln \sum_i v_i w_i, \qquad Y_2 = \frac{\sum_i (v_i w_i)^2}{Z^2}, \qquad
       S_\lambda = -\sum_i p_i \ln p_i, \quad p_i \propto v_i w_i^\lambda,

    where K(u) is :math:`e^{-u^2/2}` (gaussian), :math:`e^{-u}` (exponential), and :math:`1 - u^2` (epanechnikov) or 1
    (tophat) for u < 1. Sums are streamed relative to the largest term, so nothing underflows. The distances cost
    2 Q N P operations once. A bandwidth costs Q N exponentials more; for the gaussian kernel, bandwidths that are
    :math:`\sqrt 2` apart (exponential: 2 apart) share them. Only the reference gives a gradient and holds Q N P
    numbers at a time; the CPU engine computes in float64 and holds tiles. Terms below :math:`e^{-45}/N` of the
    largest are left out by it.

    Args:
        x: Queries, ``(Q, P)``, floating point.
        y: Points, ``(N, P)``.
        bandwidth: h, one or H positive numbers.
        kernel: ``"gaussian"``, ``"epanechnikov"``, ``"exponential"`` or ``"tophat"``.
        weights: :math:`v_i \ge 0`, ``(N,)``; a point of weight 0 is left out.
        powers: The L values of :math:`\lambda \ge 0` whose entropies are wanted.
        exclude_diagonal: Leave out point i for query i, as leave-one-out estimates on ``y = x`` need it.
        backend: ``"auto"``, ``"reference"`` or ``"cpu"``.

    Returns:
        :class:`KernelSums`.

    Raises:
        TypeError: ``x`` or ``y`` is not floating point.
        ValueError: Shapes do not fit, there is no point (two with ``exclude_diagonal``), or a bandwidth or power is out
            of range.
        NotImplementedError: The CPU engine is asked for by name where a gradient is needed.

    Example:
        >>> import torch
        >>> sums = kernel_sums(torch.zeros(1, 2), torch.ones(3, 2), 1.0)
        >>> round(float(sums.log_sum.exp()), 4), round(float(1 / sums.participation), 4)
        (1.1036, 3.0)

    Source: the sums as Biroli and Mézard, 2024, arXiv:2408.05807 define them; the streaming is our own.
    """
    dims = check_shape("x", x, "Q P")
    dims = check_shape("y", y, "N P", dims)
    check_floating("x", x)
    check_floating("y", y)
    check_choice("kernel", kernel, _KERNELS)
    if weights is not None:
        check_shape("weights", weights, "N", dims)
    check_same_device(x=x, y=y, weights=weights)
    if dims["N"] < 1 + exclude_diagonal:
        raise ValueError(f"`y` must hold at least {1 + exclude_diagonal} point(s), got shape {tuple(y.shape)}.")
    h = torch.atleast_1d(torch.as_tensor(bandwidth, dtype=torch.float64)).detach().cpu()
    if h.ndim != 1 or not bool(((h > 0) & h.isfinite()).all()):
        raise ValueError(f"`bandwidth` must be one or several positive numbers, got {bandwidth!r}.")
    lam = torch.tensor([float(p) for p in powers], dtype=torch.float64)
    if not bool(((lam >= 0) & lam.isfinite()).all()):
        raise ValueError(f"`powers` must be non-negative numbers, got {powers!r}.")
    given = [t for t in (x, y, weights) if t is not None]
    refusal = "it gives no gradient and an input requires one" if any(t.requires_grad for t in given) else None
    engine = resolve_backend("kernel_sums", backend, given, refusals={"cpu": refusal})
    if engine == "cpu":
        from dynakern.ops.kernel_sums.cpu import kernel_sums_cpu

        return KernelSums(*kernel_sums_cpu(x, y, h.numpy(), kernel, weights, lam.numpy(), exclude_diagonal))
    from dynakern.ops.kernel_sums.reference import kernel_sums_reference

    options = (h.to(x), kernel, weights, lam.to(x), exclude_diagonal)
    return KernelSums(*kernel_sums_reference(x, y, *options))
