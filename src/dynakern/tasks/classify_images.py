"""The image classifier: one class for every network that classifies images, in scikit-learn's protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import assert_all_finite, check_is_fitted, column_or_1d, validate_data
from torch import Tensor, nn
from torch.utils.data import Dataset

from dynakern import train
from dynakern.checks import check_choice, check_finite, check_positive
from dynakern.tasks.classification import held_out
from dynakern.tasks.networks import Factory, batches, build_network, seed_from

__all__ = ["ImageClassifier"]

Augment = Literal["none", "shift", "shift-flip"]


class _Images(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices)
        return self.x[rows], self.y[rows]


class ImageClassifier(ClassifierMixin, BaseEstimator):
    """Classify images by any network that classifies images.

    Images are standardised by channel, brought to squares of ``img_size`` pixels (small ones enlarged, others padded
    with the mean at the right and below), and the network is trained by AdamW on the cross-entropy with smoothed
    labels; what its ``auxiliary_loss()`` returns after a forward pass, if it has that method, is added.

    Args:
        system: Slug, or factory ``f(*, in_chans, img_size, num_classes) -> Module`` whose module maps
            ``x (B, C, S, S)`` to logits ``(B, classes)``.
        budget: Training budget: ``"30ep"``, ``"60s"``, ``"5m"``. The learning rate falls to 0 over epochs, by a cosine.
        lr: Learning rate.
        weight_decay: Weight decay.
        batch_size: Images a step.
        augment: ``"none"``; ``"shift"``: by up to an eighth of the side; ``"shift-flip"``: mirrored half of the time
            too.
        label_smoothing: Share of the label that is spread over all classes.
        patience: Epochs without a better validation loss before training stops.
        validation_fraction: Part of the training images held out, stratified; 0 trains on all for the whole budget.
        img_size: Side of the square that images are brought to; by default the larger side rounded up to a multiple of
            8, at least 16.
        width: Multiplies the channels of the network, where its factory takes that argument.
        device: ``"cpu"`` (default) or ``"cuda"``.
        random_state: Seed of weights, shuffling and the held-out part.

    Attributes:
        classes_: The class labels.
        network_: The trained module.
        history_: What happened in training.
    """

    def __init__(
        self,
        system: str | Factory = "inception_next",
        *,
        budget: str = "30ep",
        lr: float = 3e-3,
        weight_decay: float = 0.05,
        batch_size: int = 64,
        augment: Augment = "none",
        label_smoothing: float = 0.1,
        patience: int | None = None,
        validation_fraction: float = 0.1,
        img_size: int | None = None,
        width: float = 1.0,
        device: str | None = None,
        random_state: int | None = None,
    ) -> None:
        self.system = system
        self.budget = budget
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.augment: Augment = augment
        self.label_smoothing = label_smoothing
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.img_size = img_size
        self.width = width
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> ImageClassifier:
        """Train.

        Args:
            X: ``(N, C, H, W)`` or ``(N, H, W, C)`` with C in {1, 3}, ``(N, H, W)``, or ``(N, F)``: squares of F pixels
                if F is a square number, else rows of F pixels.
            y: N labels.

        Raises:
            ValueError: Values are not finite, sizes differ, or there is only one class.
        """
        return self._fit(X, y, None)

    def _prepare(self, X: Any, y: Any) -> tuple[Tensor, Tensor]:
        """Check and scale the training data: images ``(N, C, S, S)`` and class numbers ``(N,)``."""
        check_choice("augment", self.augment, ("none", "shift", "shift-flip"))
        check_positive("width", self.width)
        x = self._images(X, reset=True)
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None.")
        y = column_or_1d(y, warn=True)
        assert_all_finite(y, input_name="y")
        check_classification_targets(y)
        if len(y) != len(x):
            raise ValueError(f"`X` and `y` must have equal lengths, got {len(x)} and {len(y)} samples.")
        self.classes_, targets = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"`y` must hold at least two classes, got one class: {self.classes_[0]!r}.")
        self.mean_, std = x.mean((0, 2, 3), dtype=np.float64), x.std((0, 2, 3), dtype=np.float64)
        self.scale_ = np.where(std > 0, std, 1.0)
        return self._scaled(x), torch.from_numpy(targets.astype(np.int64))

    def _build(self) -> nn.Module:
        sizes = {"in_chans": self._shape[0], "img_size": self._side(), "num_classes": len(self.classes_)}
        scaled = {} if self.width == 1 else {"width": self.width}
        return build_network("classify-images", self.system, **sizes, **scaled)  # pyright: ignore[reportArgumentType]

    def _side(self) -> int:
        """Return the side of the square that the network sees."""
        if self.img_size is not None:
            check_positive("img_size", self.img_size, integer=True)
            return int(self.img_size)
        return max(16, -(-max(self._shape[1:]) // 8) * 8)

    def _fit(self, X: Any, y: Any, progress: Callable[[str, float], None] | None) -> ImageClassifier:
        budget = train.Budget.parse(self.budget)
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must be in [0, 1), got {self.validation_fraction!r}.")
        x, targets = self._prepare(X, y)
        seed = seed_from(self.random_state)
        held = held_out(targets.numpy(), self.validation_fraction, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network_: nn.Module = self._build()

        def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            images = _augmented(batch[0], self.augment, generator) if network.training else batch[0]
            smoothing = self.label_smoothing if network.training else 0.0
            found = F.cross_entropy(network(images), batch[1], label_smoothing=smoothing)
            auxiliary = getattr(network, "auxiliary_loss", None)
            return found + auxiliary() if network.training and auxiliary is not None else found

        kept = int((~held).sum())
        self.history_ = train.fit(
            self.network_,
            _Images(x[~held], targets[~held]),
            loss=loss,
            budget=budget,
            validation=_Images(x[held], targets[held]) if held.any() else None,
            batch_size=self.batch_size + (kept % self.batch_size == 1),  # no last batch of one: batch norms refuse it
            lr=self.lr,
            weight_decay=self.weight_decay,
            schedule="constant" if budget.epochs is None else "cosine",
            patience=self.patience if held.any() else None,
            clip=5.0,
            device=self.device,
            seed=seed,
            progress=progress,
        )
        return self

    def _images(self, X: Any, *, reset: bool) -> np.ndarray:
        """Return images ``(N, C, H, W)``, float32."""
        axes = np.ndim(X) if isinstance(X, list) else getattr(X, "ndim", 2)
        if axes in (3, 4):
            x = np.asarray(X)
            if np.iscomplexobj(x):
                raise ValueError("Complex data not supported.")
            x = x.astype(np.float32)
            if len(x) == 0:
                raise ValueError("`X` must hold at least one image.")
            check_finite("X", x)
            if axes == 3:
                x = x[:, None]
            elif x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
                x = x.transpose(0, 3, 1, 2)
        else:
            rows = np.asarray(validate_data(self, X, dtype=np.float32, reset=reset))  # pyright: ignore
            side = math.isqrt(rows.shape[1])
            x = rows.reshape(len(rows), 1, side, side) if side * side == rows.shape[1] else rows[:, None, None, :]
        if reset:
            self._shape = x.shape[1:]
            self.n_features_in_ = int(np.prod(x.shape[1:]))
        elif x.shape[1:] != self._shape:
            raise ValueError(f"`X` must hold images of shape {self._shape} as in fit, got {x.shape[1:]}.")
        return x

    def _scaled(self, x: np.ndarray) -> Tensor:
        """Standardise the channels and bring the images to squares: ``(N, C, S, S)``."""
        images = torch.from_numpy(x)
        images = (images - torch.tensor(self.mean_).view(-1, 1, 1)) / torch.tensor(self.scale_).view(-1, 1, 1)
        images, side = images.float(), self._side()
        height, width = images.shape[2:]
        larger = max(height, width)
        if larger < 16 or self.img_size is not None:
            size = (max(1, round(height * side / larger)), max(1, round(width * side / larger)))
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return F.pad(images, (0, side - images.shape[3], 0, side - images.shape[2]))

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return class probabilities, ``(N, classes)``."""
        check_is_fitted(self, "network_")
        x = self._scaled(self._images(X, reset=False))
        device = next(self.network_.parameters()).device
        with torch.no_grad():
            parts = [
                self.network_(x[torch.from_numpy(part)].to(device)).double().softmax(-1).cpu().numpy()
                for part in batches(np.arange(len(x)), 4 * self.batch_size)
            ]
        return np.concatenate(parts)

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each image, ``(N,)``."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(1)]


def _augmented(x: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """Return shifted, perhaps mirrored, copies of images ``(B, C, S, S)``; what moves in is 0, the mean."""
    if augment == "none":
        return x
    side = x.shape[-1]
    reach = max(1, side // 8)
    padded = F.pad(x, (reach,) * 4)
    starts = torch.randint(2 * reach + 1, (2, len(x), 1), generator=generator)
    rows, columns = (starts + torch.arange(side)).to(x.device)
    if augment == "shift-flip":
        mirrored = torch.rand(len(x), 1, generator=generator).to(x.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
