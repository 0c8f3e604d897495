"""The one training loop, on Accelerate: one device, several GPUs through ``accelerate launch``, mixed precision.

The loop is repeatable: every epoch seeds its own shuffle and dropout from ``(seed, epoch)``, so that a run which was
killed and resumed from its checkpoint ends with exactly the weights of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from dynakern.checks import check_choice, check_positive

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Budget", "EpochRecord", "History", "NonFiniteLossError", "fit", "parameter_groups"]

LossFunction = Callable[[nn.Module, Any], Tensor]


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; training stopped before the weights were touched."""


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of epochs (repeatable) or of seconds (not repeatable).

    Attributes:
        epochs: Passes over the training data, or None.
        seconds: Wall-clock seconds, or None.
    """

    epochs: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.seconds is None):
            raise ValueError("A budget is either `epochs` or `seconds`, exactly one of them.")
        if self.epochs is not None:
            check_positive("epochs", self.epochs, integer=True)
        else:
            check_positive("seconds", self.seconds)  # pyright: ignore[reportArgumentType]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"60s"``, ``"5m"`` or ``"10ep"``.

        Raises:
            ValueError: The text is none of these.

        Example:
            >>> Budget.parse("2m")
            Budget(epochs=None, seconds=120.0)
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ep|epochs?|s|sec|m|min)\s*", text)
        if match is None:
            raise ValueError(f"`budget` must look like '60s', '5m' or '10ep', got {text!r}.")
        number, unit = match.groups()
        if unit.startswith("ep"):
            if "." in number:
                raise ValueError(f"`budget` must be a whole number of epochs, got {text!r}.")
            return cls(epochs=int(number))
        return cls(seconds=float(number) * (60 if unit.startswith("m") else 1))

    def __str__(self) -> str:
        return f"{self.epochs}ep" if self.epochs is not None else f"{self.seconds:g}s"


@dataclass(frozen=True)
class EpochRecord:
    """Losses of one epoch (or of the part of it that fitted into the budget)."""

    epoch: int
    steps: int
    train_loss: float
    validation_loss: float | None
    seconds: float


@dataclass
class History:
    """What happened: one record an epoch, the best epoch, and why training ended."""

    epochs: list[EpochRecord] = field(default_factory=list)
    best_epoch: int | None = None
    stopped: str = ""

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return sum(record.steps for record in self.epochs)

    @property
    def seconds(self) -> float:
        """Seconds spent in training and validation."""
        return sum(record.seconds for record in self.epochs)


def parameter_groups(model: nn.Module, *, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Group parameters by the hints that layers leave on them.

    A parameter may carry a dict ``_optim`` with its own ``lr`` and ``weight_decay`` (state-space layers do, as in their
    papers); all others get the given values. Frozen parameters are left out.

    Returns:
        Groups for a ``torch.optim`` optimiser.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            hints = getattr(parameter, "_optim", {})
            key = (float(hints.get("lr", lr)), float(hints.get("weight_decay", weight_decay)))
            groups.setdefault(key, []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


_accelerators: dict[tuple[str, str], Accelerator] = {}


def _accelerator(device: str | torch.device | None, mixed_precision: str) -> Accelerator:
    """Return the process's Accelerator; a change of device or precision replaces it."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    kind = torch.device(device).type if device is not None else ("cpu" if "RANK" not in os.environ else "auto")
    key = (kind, mixed_precision)
    if key not in _accelerators:
        _accelerators.clear()
        AcceleratorState._reset_state(reset_partial_state=True)
        _accelerators[key] = Accelerator(cpu=kind == "cpu", mixed_precision=mixed_precision)
    return _accelerators[key]


def fit(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    loss: LossFunction,
    budget: Budget,
    validation: Dataset[Any] | None = None,
    batch_size: int = 32,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    schedule: Literal["constant", "halving", "cosine"] = "constant",
    patience: int | None = None,
    clip: float | None = None,
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    device: str | torch.device | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> History:
    """Train ``model`` in place and leave it in eval mode with its best weights.

    Args:
        model: The network; it is moved to the training device.
        dataset: Map-style data. If it has ``__getitems__(indices)``, that must return a whole batch.
        loss: ``loss(model, batch)`` returns a scalar; it also serves validation.
        budget: Epochs or seconds.
        validation: Data whose mean loss chooses the best epoch; the last epoch is kept without it.
        batch_size: Examples a step on each process.
        lr: Learning rate of the parameters without a hint of their own (see :func:`parameter_groups`).
        weight_decay: Weight decay of the parameters without a hint of their own.
        optimizer: Makes the optimiser from parameter groups; Adam (AdamW with weight decay) by default.
        schedule: ``"constant"``; ``"halving"`` after every epoch; ``"cosine"`` to zero over the budget's epochs.
        patience: Stop after this many epochs without a better validation loss; never by default.
        clip: Largest norm of the gradient; not clipped by default.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        device: ``"cpu"`` or ``"cuda"``; the CPU by default, or what ``accelerate launch`` gives.
        seed: Seed of shuffling and dropout.
        checkpoint: File written after every epoch; if it exists, training resumes from it exactly.
        progress: Called with a text and the fraction of the budget used.

    Returns:
        The :class:`History`.

    Raises:
        NonFiniteLossError: The loss became NaN or infinite; names epoch and step. Weights and checkpoint stay as they
            were before that step.
        ValueError: A setting is out of range, or the data is empty.
    """
    check_positive("batch_size", batch_size, integer=True)
    check_positive("lr", lr)
    check_choice("schedule", schedule, ("constant", "halving", "cosine"))
    check_choice("mixed_precision", mixed_precision, ("no", "bf16", "fp16"))
    if schedule == "cosine" and budget.epochs is None:
        raise ValueError("`schedule='cosine'` needs a budget in epochs, got seconds.")
    if len(dataset) == 0 or (validation is not None and len(validation) == 0):  # pyright: ignore[reportArgumentType]
        raise ValueError("`dataset` and `validation` must not be empty.")
    groups = parameter_groups(model, lr=lr, weight_decay=weight_decay)
    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameter.")
    make = optimizer or (torch.optim.AdamW if weight_decay else torch.optim.Adam)
    run = _Run(model, loss, make(groups), _accelerator(device, mixed_precision), schedule, budget, clip, seed)
    return run(dataset, validation, batch_size, patience, None if checkpoint is None else Path(checkpoint), progress)


class _Run:
    """One call of :func:`fit`: the objects that live through it."""

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        schedule: str,
        budget: Budget,
        clip: float | None,
        seed: int,
    ) -> None:
        self.accelerator = accelerator
        self.plain = model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.loss, self.budget, self.clip, self.seed = loss, budget, clip, seed
        epochs = budget.epochs or 1
        factor = {
            "constant": lambda epoch: 1.0,
            "halving": lambda epoch: 0.5**epoch,
            "cosine": lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / epochs)),
        }[schedule]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self.history = History()
        self.best: dict[str, Tensor] | None = None
        self.best_loss = math.inf

    def __call__(
        self,
        dataset: Dataset[Any],
        validation: Dataset[Any] | None,
        batch_size: int,
        patience: int | None,
        checkpoint: Path | None,
        progress: Callable[[str, float], None] | None,
    ) -> History:
        if checkpoint is not None and checkpoint.is_file():
            self._restore(checkpoint)
        if self.budget.seconds is not None:
            self._warm_up(dataset, batch_size)
        deadline = math.inf if self.budget.seconds is None else self.budget.seconds - self.history.seconds
        start, epoch = time.perf_counter(), len(self.history.epochs)
        with _private_random_state():
            while not self._finished(epoch, patience, self._late(time.perf_counter() - start >= deadline)):
                began = time.perf_counter()
                torch.manual_seed(_mix(self.seed, epoch))
                train_loss, steps = self._epoch(dataset, batch_size, epoch, start + deadline, progress)
                validation_loss = None if validation is None else self._validate(validation, batch_size)
                seconds = time.perf_counter() - began
                self.history.epochs.append(EpochRecord(epoch, steps, train_loss, validation_loss, seconds))
                self._keep_best(epoch, validation_loss)
                self.scheduler.step()
                epoch += 1
                if checkpoint is not None:
                    self._save(checkpoint)
        if self.best is not None:
            self.plain.load_state_dict(self.best)
        self.plain.eval()
        return self.history

    def _warm_up(self, dataset: Dataset[Any], batch_size: int) -> None:
        """Take one step without using its gradient, so that compilation does not count as training time."""
        with _private_random_state():
            batch = _to_device(next(iter(self._loader(dataset, batch_size, 0))), self.accelerator.device)
            with self.accelerator.autocast():
                self.accelerator.backward(self.loss(self.model, batch))
        self.optimizer.zero_grad(set_to_none=True)

    def _finished(self, epoch: int, patience: int | None, late: bool) -> bool:
        if self.budget.epochs is not None and epoch >= self.budget.epochs:
            self.history.stopped = "all epochs done"
        elif late:
            self.history.stopped = "out of time"
        elif patience is not None and epoch - 1 - (self.history.best_epoch or 0) >= patience:
            self.history.stopped = f"no better validation loss for {patience} epochs"
        return bool(self.history.stopped)

    def _loader(self, dataset: Dataset[Any], batch_size: int, epoch: int | None) -> DataLoader[Any]:
        whole = _identity if hasattr(dataset, "__getitems__") else None
        sampler = None
        if epoch is not None:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            sampler = RandomSampler(dataset, generator=generator)  # pyright: ignore[reportArgumentType]
        loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=whole)
        return self.accelerator.prepare_data_loader(loader) if self.accelerator.num_processes > 1 else loader

    def _epoch(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        epoch: int,
        deadline: float,
        progress: Callable[[str, float], None] | None,
    ) -> tuple[float, int]:
        self.model.train()
        loader = self._loader(dataset, batch_size, epoch)
        total, steps = 0.0, 0
        for batch in loader:
            batch = _to_device(batch, self.accelerator.device)
            with self.accelerator.autocast():
                value = self.loss(self.model, batch)
            number = float(value.detach())
            if not math.isfinite(number):
                rates = ", ".join(f"{group['lr']:.2g}" for group in self.optimizer.param_groups)
                raise NonFiniteLossError(
                    f"The loss became {number} in epoch {epoch + 1}, step {steps + 1} (learning rates {rates}). "
                    "Lower the learning rate, clip the gradient, or check the data for extreme values."
                )
            self.optimizer.zero_grad(set_to_none=True)
            self.accelerator.backward(value)
            if self.clip is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            total, steps = total + number, steps + 1
            now = time.perf_counter()
            if progress is not None:
                progress(
                    f"epoch {epoch + 1}, loss {number:.4f}", self._fraction(epoch, steps / len(loader), now, deadline)
                )
            if self._late(now >= deadline):
                break
        return total / steps, steps

    def _late(self, late: bool) -> bool:
        if self.accelerator.num_processes == 1 or self.budget.seconds is None:
            return late
        # All processes must leave the epoch at the same step, or the next collective call never returns.
        votes = torch.tensor([float(late)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(votes, reduction="sum").item())  # pyright: ignore[reportAttributeAccessIssue]

    def _fraction(self, epoch: int, part: float, now: float, deadline: float) -> float:
        if self.budget.epochs is not None:
            return (epoch + part) / self.budget.epochs
        assert self.budget.seconds is not None
        return min(1.0, 1 - (deadline - now) / self.budget.seconds)

    def _validate(self, validation: Dataset[Any], batch_size: int) -> float:
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for batch in self._loader(validation, batch_size, None):
                batch = _to_device(batch, self.accelerator.device)
                count = _batch_length(batch)
                with self.accelerator.autocast():
                    sums += torch.tensor([float(self.loss(self.model, batch)) * count, count], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum").cpu()  # pyright: ignore
        return float(sums[0] / sums[1])

    def _keep_best(self, epoch: int, validation_loss: float | None) -> None:
        if validation_loss is None:
            self.history.best_epoch = epoch
        elif validation_loss < self.best_loss:
            self.best_loss, self.history.best_epoch = validation_loss, epoch
            self.best = copy.deepcopy(self.plain.state_dict())

    def _save(self, path: Path) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "model": self.plain.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "best": self.best,
            "best_loss": self.best_loss,
            "best_epoch": self.history.best_epoch,
            "epochs": [asdict(record) for record in self.history.epochs],
            "seed": self.seed,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        torch.save(state, temporary)
        temporary.replace(path)

    def _restore(self, path: Path) -> None:
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        if state["seed"] != self.seed:
            raise ValueError(f"The checkpoint {path} belongs to seed {state['seed']}, this run has seed {self.seed}.")
        self.plain.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history.epochs = [EpochRecord(**record) for record in state["epochs"]]
        self.history.best_epoch = state["best_epoch"]
        self.best, self.best_loss = state["best"], state["best_loss"]
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]


def _identity(batch: Any) -> Any:
    return batch


def _mix(seed: int, epoch: int) -> int:
    """Return one seed from two, different for all small pairs."""
    return (seed * 1_000_003 + epoch * 7919 + 17) % (2**63)


@contextlib.contextmanager
def _private_random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, (tuple, list)):
        return type(batch)(_to_device(part, device) for part in batch)
    return batch


def _batch_length(batch: Any) -> int:
    while not isinstance(batch, Tensor):
        batch = batch[0]
    return len(batch)
