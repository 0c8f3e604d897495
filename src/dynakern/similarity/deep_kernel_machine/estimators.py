"""The sparse machine in scikit-learn's protocol: trained by Adam on mini-batches, with predictive distributions."""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from dynakern.checks import check_positive
from dynakern.similarity.deep_kernel_machine.machine import SparseDKM

__all__ = ["DKMClassifier", "DKMRegressor", "classify", "regress"]


class _Machine(BaseEstimator):
    """What both estimators share: building, training and asking the machine."""

    def __init__(
        self,
        layers: int = 2,
        kernel: str = "relu",
        dof: float = 1.0,
        num_inducing: int = 100,
        epochs: int = 40,
        batch_size: int = 200,
        lr: float = 1e-2,
        taylor: bool = False,
        num_samples: int = 100,
        device: str | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.layers = layers
        self.kernel = kernel
        self.dof = dof
        self.num_inducing = num_inducing
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.taylor = taylor
        self.num_samples = num_samples
        self.device = device
        self.random_state = random_state

    def _train(self, X: NDArray[Any], targets: Tensor, initial: Tensor, chosen: NDArray[Any]) -> None:
        """Fit the machine; ``initial`` ``(P, C)`` are the outputs' first means at the ``chosen`` inducing rows."""
        for name in ("epochs", "batch_size", "num_samples"):
            check_positive(name, getattr(self, name), integer=True)
        check_positive("lr", self.lr)
        rng = check_random_state(self.random_state)
        generator = torch.Generator().manual_seed(int(rng.randint(2**31 - 1)))
        self._scale = float(np.sqrt(np.mean(X**2))) or 1.0
        x = torch.from_numpy(X / self._scale)
        self.machine_ = SparseDKM(
            X.shape[1],
            initial.shape[1],
            num_inducing=len(chosen),
            layers=self.layers,
            kernel=self.kernel,
            dof=self.dof,
            taylor=self.taylor,
            norms=("local", "local", "local", "global"),  # local: rows of a prediction stay independent
            generator=generator,
        ).initialize(x[chosen], initial)
        device = torch.device(self.device or "cpu")
        self.machine_.to(device)
        self._log_noise = torch.zeros((), dtype=x.dtype, device=device, requires_grad=True)
        optimizer = torch.optim.Adam([*self.machine_.parameters(), self._log_noise], self.lr)
        self.objectives_ = []
        for _ in range(self.epochs):
            total = 0.0
            for rows in torch.randperm(len(x), generator=generator).split(self.batch_size):
                mean, variance, divergence = self.machine_(x[rows].to(device))
                fit = self._expected_log_likelihood(mean, variance, targets[rows].to(device), generator)
                objective = fit + divergence / len(x)
                if not bool(objective.isfinite()):
                    raise FloatingPointError(
                        f"The objective is not finite after {len(self.objectives_)} epochs; lower `lr`."
                    )
                optimizer.zero_grad()
                (-objective).backward()
                optimizer.step()
                total += float(objective.detach()) * len(rows) / len(x)
            self.objectives_.append(total)
        self.machine_.eval()

    def _expected_log_likelihood(
        self, mean: Tensor, variance: Tensor, targets: Tensor, generator: torch.Generator
    ) -> Tensor:
        raise NotImplementedError

    def _inducing(self, X: NDArray[Any]) -> NDArray[Any]:
        check_positive("num_inducing", self.num_inducing, integer=True)
        rng = check_random_state(self.random_state)
        _, distinct = np.unique(X, axis=0, return_index=True)  # equal inducing points make singular matrices
        return rng.permutation(distinct)[: self.num_inducing]

    @torch.no_grad()
    def _outputs(self, X: NDArray[Any]) -> tuple[Tensor, Tensor]:
        device = self.machine_.f2g.Xi.device
        parts = [self.machine_(x.to(device))[:2] for x in torch.from_numpy(X / self._scale).split(4096)]
        means, variances = zip(*parts, strict=True)
        return torch.cat(means).cpu(), torch.cat(variances).cpu()

    @property
    def grams_(self) -> list[NDArray[Any]]:
        """The learned Gram matrices of the inducing points, ``(P, P)`` each."""
        check_is_fitted(self, "machine_")
        return [gram.matrix.detach().cpu().numpy() for gram in self.machine_.grams]  # pyright: ignore

    @torch.no_grad()
    def representation(self, X: ArrayLike) -> NDArray[Any]:
        r"""Return Nystroem features of the last kernel, :math:`K_{ti} L^{-\top}`, ``(N, P)``.

        Args:
            X: ``(N, features)``.
        """
        check_is_fitted(self, "machine_")
        X = np.asarray(validate_data(self, X, dtype=np.float64, reset=False))  # pyright: ignore
        x = torch.from_numpy(X / self._scale).to(self.machine_.f2g.Xi.device)
        *_, (_, state, _) = self.machine_.stages(x)
        root = torch.linalg.cholesky(state.ii)
        return torch.linalg.solve_triangular(root, state.ti.T, upper=False).T.cpu().numpy()


_ARGUMENTS = """
    Args:
        layers: Number of Gram layers.
        kernel: ``"relu"``, ``"sqexp"``, ``"linear"``, ``"heaviside"`` or ``"normalized_gaussian"``.
        dof: :math:`\\nu`: small follows the labels, infinite is the fixed kernel (NNGP).
        num_inducing: Number of inducing points, rows of the training data; at most its number of distinct rows.
        epochs: Passes over the data.
        batch_size: Rows of a step.
        lr: Learning rate of Adam.
        taylor: Replace the KL divergences by their Taylor expansions.
        num_samples: Monte-Carlo samples of class probabilities.
        device: Device of the machine; the CPU by default.
        random_state: Seed.
"""


class DKMClassifier(ClassifierMixin, _Machine):
    """Deep kernel machine for classes, ``X`` ``(N, features)``: a softmax of Gaussian outputs."""

    __doc__ = f"{__doc__}\n" + _ARGUMENTS + "\n    Source: Yang et al., 2023, arXiv:2108.13097.\n"

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train on ``X`` ``(N, features)`` and labels ``(N,)``.

        Raises:
            ValueError: An argument is out of range, or there is one class only.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)  # pyright: ignore
        check_classification_targets(y)
        self.classes_, numbers = np.unique(np.asarray(y), return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"`y` must hold at least 2 classes, got {len(self.classes_)}.")
        chosen = self._inducing(np.asarray(X))
        one_hot = torch.nn.functional.one_hot(torch.from_numpy(numbers), len(self.classes_)).double()
        self._train(np.asarray(X), torch.from_numpy(numbers), one_hot[chosen], chosen)
        return self

    def _expected_log_likelihood(
        self, mean: Tensor, variance: Tensor, targets: Tensor, generator: torch.Generator
    ) -> Tensor:
        noise = torch.randn(self.num_samples, *mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
        f = mean + variance.sqrt()[:, None] * noise  # (samples, N, C)
        index = targets.expand(self.num_samples, -1).unsqueeze(-1)
        return f.log_softmax(-1).gather(-1, index).mean()

    def predict_proba(self, X: ArrayLike) -> NDArray[Any]:
        """Return class probabilities, the mean of the softmax over samples, ``(N, classes)``."""
        check_is_fitted(self, "machine_")
        X = np.asarray(validate_data(self, X, dtype=np.float64, reset=False))  # pyright: ignore
        mean, variance = self._outputs(X)
        generator = torch.Generator().manual_seed(0)  # one set of noise for all rows: they stay independent
        noise = torch.randn(max(self.num_samples, 100), 1, mean.shape[1], generator=generator, dtype=mean.dtype)
        total = torch.zeros_like(mean)
        for sample in noise:
            total += (mean + variance.sqrt()[:, None] * sample).softmax(-1)
        return (total / len(noise)).numpy()

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the most probable class of each row, ``(N,)``."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(1)]


class DKMRegressor(RegressorMixin, _Machine):
    """Deep kernel machine for numbers, ``X`` ``(N, features)``: Gaussian outputs and learned noise."""

    __doc__ = f"{__doc__}\n" + _ARGUMENTS + "\n    Source: Yang et al., 2023, arXiv:2108.13097.\n"

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train on ``X`` ``(N, features)`` and numbers ``(N,)``, which are standardised inside.

        Raises:
            ValueError: An argument is out of range.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=2)  # pyright: ignore
        y = np.asarray(y, dtype=np.float64)
        self._mean, self._deviation = float(y.mean()), float(y.std()) or 1.0
        targets = torch.from_numpy((y - self._mean) / self._deviation).unsqueeze(1)
        chosen = self._inducing(np.asarray(X))
        self._train(np.asarray(X), targets, targets[chosen], chosen)
        return self

    def _expected_log_likelihood(
        self, mean: Tensor, variance: Tensor, targets: Tensor, generator: torch.Generator
    ) -> Tensor:
        noise = self._log_noise
        squares = (targets - mean).square() + variance[:, None]
        return -0.5 * (squares / noise.exp() + noise + math.log(2 * math.pi)).sum(1).mean()

    def predict(self, X: ArrayLike, return_std: bool = False) -> Any:
        """Return the mean of each row, ``(N,)``, and with ``return_std`` the deviation of an observation, ``(N,)``."""
        check_is_fitted(self, "machine_")
        X = np.asarray(validate_data(self, X, dtype=np.float64, reset=False))  # pyright: ignore
        mean, variance = self._outputs(X)
        predicted = mean[:, 0].numpy() * self._deviation + self._mean
        if not return_std:
            return predicted
        noise = float(self._log_noise.detach().exp())
        return predicted, (variance + noise).sqrt().numpy() * self._deviation


def classify(*, features: int, random_state: int | None = None) -> DKMClassifier:
    """Return a competitor for tables of ``features`` columns with classes."""
    return DKMClassifier(random_state=random_state)


def regress(*, features: int, random_state: int | None = None) -> DKMRegressor:
    """Return a competitor for tables of ``features`` columns with a number to predict."""
    return DKMRegressor(random_state=random_state)
