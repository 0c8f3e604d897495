"""S4D: a diagonal state matrix does what S4's dense one does, if it starts from the right place.

Claims of Gu et al., 2022, arXiv:2206.11893: (1) Theorem 3, the diagonal part of HiPPO-LegS has the kernels of the
dense system in the limit of large N, and HiPPO-LegT has no such limit; (2) the initialisation of A decides, with a
read-out of frozen states; (3) and in training. The Long Range Arena tables are out of reach here and not claimed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from dynakern.claims.digits import read_digits
from dynakern.claims.run import Measurement, Progress
from dynakern.sequence.s4d import S4DKernel, S4DModel, hippo
from dynakern.train import Budget, fit

__all__ = ["CLAIMS"]


def _transfer_error(measure: str, size: int, *, rescale: bool) -> float:
    r"""Return the relative error of the first 8 basis kernels over frequencies 0 .. 20.

    The dense system's are :math:`(i \omega - A)^{-1} B`; the diagonal one's, mapped back by the eigenvectors,
    :math:`(i \omega - A - P P^T)^{-1} B / 2`. With ``rescale`` the latter is first multiplied by the best scalar.
    """
    a, b, p = hippo(measure, size)
    eye, frequencies = np.eye(size), np.linspace(0.0, 20.0, 81)
    dense = np.stack([np.linalg.solve(1j * w * eye - a, b)[:8] for w in frequencies])
    normal = np.stack([np.linalg.solve(1j * w * eye - (a + p @ p.T), b)[:8] for w in frequencies]) / 2
    if rescale:
        normal = normal * (np.vdot(normal, dense) / np.vdot(normal, normal))
    return float(np.linalg.norm(normal - dense) / np.linalg.norm(dense))


def theorem_three(progress: Progress) -> Iterator[Measurement]:
    """The diagonal part of HiPPO-LegS converges to the dense kernels; that of HiPPO-LegT does not."""
    sizes = (16, 64, 256, 512)
    errors = {}
    for index, size in enumerate(sizes):
        progress(f"LegS, N = {size}", index / 7)
        errors[size] = _transfer_error("legs", size, rescale=False)
        yield Measurement(
            name=f"LegS error at N = {size}", value=errors[size], unit="relative", at_most=0.05 if size == 256 else None
        )
    for small, large in ((16, 64), (64, 256)):
        yield Measurement(
            name=f"fall of the error from N = {small} to {large}",
            value=errors[small] / errors[large],
            unit="x",
            at_least=3,
        )
    for index, size in enumerate((16, 64, 256)):
        progress(f"LegT, N = {size}", (4 + index) / 7)
        error = _transfer_error("legt", size, rescale=True)
        yield Measurement(name=f"LegT best-scaled error at N = {size}", value=error, unit="relative", at_least=0.9)


def _digit_sequences() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's 8x8 digits as sequences of 64 pixels in [0, 1], and their labels."""
    x, y = read_digits()
    return x.flatten(1).numpy(), y.numpy()


def _final_states(kernel: S4DKernel, sequences: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        u = torch.from_numpy(sequences).float().unsqueeze(1)  # (B, 1, L)
        state = kernel.next_state(u, kernel.initial_state(len(u)))
    return torch.view_as_real(state).flatten(1).numpy()


def frozen_states(progress: Progress) -> Iterator[Measurement]:
    """With A and B frozen, final states of structured initialisations are read out well, unstructured ones badly."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sequences, labels = _digit_sequences()
    length = sequences.shape[1]
    for index, init in enumerate(("lin", "inv", "legs", "real", "rand")):
        scores = []
        for seed in range(3):
            progress(f"{init}, seed {seed}", (3 * index + seed) / 15)
            torch.manual_seed(seed)
            kernel = S4DKernel(1, 64, init=init)
            with torch.no_grad():
                kernel.inv_dt.fill_(float(np.log(2.0 / length)))
            states = _final_states(kernel, sequences)
            split = train_test_split(states, labels, test_size=0.25, stratify=labels, random_state=seed)
            x_train, x_test, y_train, y_test = split
            model = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(-3, 3, 7))).fit(x_train, y_train)
            scores.append(model.score(x_test, y_test))
        good = init in ("lin", "inv", "legs")
        yield Measurement(
            name=f"accuracy from frozen states, {init}, {'worst' if good else 'best'} of 3 seeds",
            value=min(scores) if good else max(scores),
            unit="accuracy",
            at_least=0.90 if good else None,
            at_most=None if good else 0.72,
        )


def _trained_accuracy(init: str, data: tuple[Tensor, Tensor, Tensor, Tensor], progress: Progress, done: float) -> float:
    torch.manual_seed(0)
    x_train, x_test, y_train, y_test = data
    model = S4DModel(d_input=1, num_classes=10, d_model=32, num_layers=2, d_state=16, init=init, dropout=0.0)
    fit(
        model,
        torch.utils.data.TensorDataset(x_train, y_train),
        loss=lambda network, batch: nn.functional.cross_entropy(network(batch[0]), batch[1]),
        budget=Budget(epochs=10),
        lr=1e-2,
        weight_decay=0.01,
        schedule="cosine",
        progress=lambda text, fraction: progress(f"{init}, {text}", done + fraction / 5),
    )
    with torch.no_grad():
        return float((model(x_test).argmax(1) == y_test).float().mean())


def trained(progress: Progress) -> Iterator[Measurement]:
    """Trained end to end, LegS and Lin stay ahead of the real initialisation."""
    from sklearn.model_selection import train_test_split

    sequences, labels = _digit_sequences()
    parts = train_test_split(sequences, labels, test_size=0.25, stratify=labels, random_state=0)
    x_train, x_test = (torch.from_numpy(part).float().unsqueeze(-1) for part in parts[:2])
    y_train, y_test = (torch.from_numpy(part) for part in parts[2:])
    accuracy = {}
    for index, init in enumerate(("real", "legs", "lin", "inv", "rand")):
        accuracy[init] = _trained_accuracy(init, (x_train, x_test, y_train, y_test), progress, index / 5)
        yield Measurement(name=f"accuracy trained, {init}", value=accuracy[init], unit="accuracy")
    for init in ("legs", "lin"):
        yield Measurement(
            name=f"lead of {init} over real",
            value=accuracy[init] - accuracy["real"],
            unit="accuracy",
            at_least=0.15,
            baseline=accuracy["real"],
        )


CLAIMS = (theorem_three, frozen_states, trained)
