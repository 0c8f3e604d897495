r"""Dynamic time warping: how far two series are apart when time may be stretched."""

from __future__ import annotations

from torch import Tensor

from dynakern.checks import check_floating, check_same_device, check_shape
from dynakern.ops.dispatch import Backend, resolve_backend

__all__ = ["dtw"]


def dtw(
    x: Tensor,
    y: Tensor,
    *,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    window: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    r"""Return the warping distance of every pair of two sets of series.

    With :math:`d_{ij} = \sum_c (x_{ic} - y_{jc})^2` the cost of the cheapest path from (0, 0) to the last pair,

    .. math:: D_{ij} = d_{ij} + \min(D_{i-1,j}, D_{i,j-1}, D_{i-1,j-1}),

    within a band around the diagonal; the distance is :math:`\sqrt{D}` of the last pair. All channels are warped
    together. O(N M L^2 C) time without a band, O(L) memory a pair. Only the reference gives a gradient.

    Args:
        x: Series, ``(N, L, C)``, padded at the end.
        y: Series, ``(M, K, C)``, padded at the end.
        x_lengths: Valid steps of each series of ``x``, ``(N,)``, integers >= 1; all by default.
        y_lengths: Valid steps of each series of ``y``, ``(M,)``, integers >= 1; all by default.
        window: Half width of the band (Sakoe-Chiba) as a fraction of the longer length, in [0, 1]; never narrower than
            the difference of the two lengths.
        backend: ``"auto"``, ``"reference"`` or ``"cpu"``.

    Returns:
        ``(N, M)``, dtype of ``x``.

    Raises:
        TypeError: ``x`` or ``y`` is not floating point.
        ValueError: Shapes do not fit, or ``window`` is out of range.
        NotImplementedError: The CPU engine is asked for by name where a gradient is needed.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([[[0.0], [1.0], [1.0]]]), torch.tensor([[[0.0], [0.0], [1.0]]])
        >>> float(dtw(a, b))
        0.0

    Source: Sakoe and Chiba, 1978, doi:10.1109/TASSP.1978.1163055.
    """
    dims = check_shape("x", x, "N L C")
    dims = check_shape("y", y, "M K C", dims)
    check_floating("x", x)
    check_floating("y", y)
    if min(dims["L"], dims["K"]) == 0:
        raise ValueError(f"`x` and `y` must not be empty, got shapes {tuple(x.shape)} and {tuple(y.shape)}.")
    if not 0 <= window <= 1:
        raise ValueError(f"`window` must be in [0, 1], got {window!r}.")
    for name, lengths, letter in (("x_lengths", x_lengths, "N"), ("y_lengths", y_lengths, "M")):
        if lengths is not None:
            check_shape(name, lengths, letter, dims)
    check_same_device(x=x, y=y, x_lengths=x_lengths, y_lengths=y_lengths)
    differentiable = x.requires_grad or y.requires_grad
    refusal = "it gives no gradient and an input requires one" if differentiable else None
    engine = resolve_backend("dtw", backend, (x, y), refusals={"cpu": refusal})
    if engine == "cpu":
        from dynakern.ops.dtw.cpu import dtw_cpu

        return dtw_cpu(x, y, x_lengths, y_lengths, window)
    from dynakern.ops.dtw.reference import dtw_reference

    return dtw_reference(x, y, x_lengths, y_lengths, window)
