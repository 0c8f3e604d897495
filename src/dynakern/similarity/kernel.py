r"""What every similarity kernel of the library is: a scikit-learn kernel whose values and gradients torch computes.

A kernel is called as ``k(X)`` or ``k(X, Y)`` and gives :math:`K_{nm} = k(x_n, y_m)`, ``(N, M)``; ``k.diag(X)`` gives
:math:`k(x_n, x_n)`. Kernels add, multiply and take powers (``k1 + k2``, ``2.0 * k1 * k2``, ``k1**2``), which is
scikit-learn's own algebra, so that ``GaussianProcessRegressor``, ``SVC(kernel=k)`` and ``KernelRidge`` take them;
:func:`to_gpytorch` hands one to GPyTorch. Source of the protocol: scikit-learn's ``gaussian_process.kernels``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from sklearn.gaussian_process.kernels import ConstantKernel, Exponentiation, Kernel, Product, Sum
from torch import Tensor

from dynakern.checks import check_finite, require

if TYPE_CHECKING:
    import gpytorch

__all__ = ["SimilarityKernel", "to_gpytorch"]


class SimilarityKernel(Kernel):
    r"""Base of the library's kernels: arrays in, arrays out; tensors in, tensors out, differentiable.

    A child has the constructor of a scikit-learn estimator (it only stores its arguments), a property
    ``hyperparameter_<name>`` for each number that may be learned, and two functions in torch:

    - ``_matrix(X, Y, **values)``: ``X`` ``(N, ...)`` and ``Y`` ``(M, ...)`` or None for ``X`` itself, to ``(N, M)``;
    - ``_variances(X, **values)``: :math:`k(x_n, x_n)`, ``(N,)``;

    where ``values`` holds the free hyperparameters as tensors (others are read from ``self``). Gradients by the
    logarithms of the hyperparameters, which scikit-learn's optimiser asks for, are those of ``_matrix``.
    """

    def _matrix(self, X: Tensor, Y: Tensor | None, **values: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} gives no kernel matrix.")

    def _variances(self, X: Tensor, **values: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} gives no variances.")

    def _inputs(self, name: str, X: Any) -> Tensor:
        """Check and convert an input: finite, a float64 tensor unless it is a floating-point tensor already."""
        x = X if isinstance(X, Tensor) else torch.from_numpy(np.ascontiguousarray(np.asarray(X), dtype=np.float64))
        if x.ndim < 2:
            raise ValueError(f"`{name}` must be (N, P), one row a sample, got shape {tuple(x.shape)}.")
        check_finite(name, x)
        return x if x.is_floating_point() else x.double()

    @property
    def _free(self) -> list[str]:
        return [h.name for h in self.hyperparameters if not h.fixed]

    def _values(self, logarithms: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._free, logarithms.exp(), strict=True))

    def _logarithms(self, like: Tensor) -> Tensor:
        return torch.as_tensor(np.asarray(self.theta, dtype=np.float64)).to(like)

    @overload
    def __call__(self, X: Tensor, Y: Tensor | None = None, eval_gradient: bool = False) -> Tensor: ...
    @overload
    def __call__(self, X: Any, Y: Any = None, eval_gradient: bool = False) -> Any: ...
    def __call__(self, X: Any, Y: Any = None, eval_gradient: bool = False) -> Any:
        """Return the kernel matrix.

        Args:
            X: ``(N, P)`` (or ``(N, ...)`` where the kernel says so), array or tensor.
            Y: ``(M, P)``; ``X`` itself by default.
            eval_gradient: Return the gradient by ``theta`` too, ``(N, N, len(theta))``; only without ``Y``.

        Returns:
            ``(N, M)``, an array (float64), or for tensors a tensor of their dtype that carries gradients.

        Raises:
            ValueError: An input is not finite, widths differ, or a gradient is asked for with ``Y``.
        """
        if eval_gradient and Y is not None:
            raise ValueError("`eval_gradient` needs `Y` to be None.")
        x = self._inputs("X", X)
        y = None if Y is None else self._inputs("Y", Y)
        if y is not None and y.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"`X` and `Y` must have rows of one shape, got {tuple(x.shape[1:])} and {tuple(y.shape[1:])}."
            )
        logarithms = self._logarithms(x)
        if isinstance(X, Tensor):
            return self._matrix(x, y, **self._values(logarithms))
        with torch.no_grad():
            matrix = self._matrix(x, y, **self._values(logarithms)).numpy()
        if not eval_gradient:
            return matrix
        return matrix, self._gradient(lambda theta: self._matrix(x, None, **self._values(theta)), logarithms, len(x))

    @staticmethod
    def _gradient(matrix: Callable[[Tensor], Tensor], theta: Tensor, n: int) -> np.ndarray:
        """Return the derivatives of ``matrix(theta)`` by each entry of ``theta`` in turn, ``(N, N, P)``."""
        columns = [torch.func.jvp(matrix, (theta,), (unit,))[1] for unit in torch.eye(len(theta), dtype=theta.dtype)]
        return torch.stack(columns, -1).numpy() if columns else np.empty((n, n, 0))

    def diag(self, X: Any) -> Any:
        """Return :math:`k(x_n, x_n)`, ``(N,)``, an array or, for a tensor, a tensor."""
        x = self._inputs("X", X)
        if isinstance(X, Tensor):
            return self._variances(x, **self._values(self._logarithms(x)))
        with torch.no_grad():
            return self._variances(x, **self._values(self._logarithms(x))).numpy()

    def is_stationary(self) -> bool:
        """Whether the kernel depends on ``x - y`` alone; kernels of networks and states do not."""
        return False


def to_gpytorch(kernel: Kernel) -> gpytorch.kernels.Kernel:
    """Return a GPyTorch kernel that computes ``kernel``; its free hyperparameters become trainable parameters.

    Args:
        kernel: A kernel of this library, or sums, products and whole powers of them and of constants.

    Returns:
        A ``gpytorch.kernels.Kernel`` in float64 whose parameters are called ``raw_<name>``.

    Raises:
        ImportError: GPyTorch is not installed.
        TypeError: Some part of ``kernel`` is no kernel of this library.
    """
    gpytorch = require("gpytorch", extra="gp")
    if isinstance(kernel, Sum):
        return to_gpytorch(kernel.k1) + to_gpytorch(kernel.k2)
    if isinstance(kernel, Product):
        return to_gpytorch(kernel.k1) * to_gpytorch(kernel.k2)
    if isinstance(kernel, Exponentiation) and float(kernel.exponent).is_integer() and kernel.exponent >= 1:
        result = base = to_gpytorch(kernel.kernel)
        for _ in range(int(kernel.exponent) - 1):
            result = result * base
        return result
    if isinstance(kernel, ConstantKernel):
        constant = gpytorch.kernels.ConstantKernel().double()
        constant.initialize(constant=torch.tensor(float(kernel.constant_value), dtype=torch.float64))
        return constant
    if not isinstance(kernel, SimilarityKernel):
        raise TypeError(f"`kernel` must be made of kernels of this library, got {type(kernel).__name__}.")

    class _Kernel(gpytorch.kernels.Kernel):
        def __init__(self) -> None:
            super().__init__()
            positive = gpytorch.constraints.Positive
            for name in kernel._free:
                value = torch.tensor(float(kernel.get_params()[name]), dtype=torch.float64)
                constraint = positive()
                self.register_parameter(f"raw_{name}", torch.nn.Parameter(constraint.inverse_transform(value)))
                self.register_constraint(f"raw_{name}", constraint)

        def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **options: Any) -> Tensor:
            constraints = {name: getattr(self, f"raw_{name}_constraint") for name in kernel._free}
            values = {name: c.transform(getattr(self, f"raw_{name}")).to(x1) for name, c in constraints.items()}
            shape = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
            rows = x1.expand(*shape, *x1.shape[-2:]).reshape(-1, *x1.shape[-2:])
            columns = x2.expand(*shape, *x2.shape[-2:]).reshape(-1, *x2.shape[-2:])
            found = [
                kernel._matrix(a, None if a is b or torch.equal(a, b) else b, **values)
                for a, b in zip(rows, columns, strict=True)
            ]
            matrix = torch.stack(found).reshape(*shape, x1.shape[-2], x2.shape[-2])
            return matrix.diagonal(dim1=-2, dim2=-1) if diag else matrix

    return _Kernel()
