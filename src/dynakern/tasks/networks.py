"""Build the network that a task needs, from a slug of the catalogue or from a factory of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch import nn

from dynakern.catalog import SYSTEMS, find_system
from dynakern.models import import_string

__all__ = ["Factory", "batches", "build_network", "seed_from", "systems_for"]

Factory = Callable[..., nn.Module]


def systems_for(task: str) -> list[str]:
    """Return the slugs of the systems that can do a task."""
    return [s.slug for s in SYSTEMS if task in s.tasks]


def build_network(task: str, system: str | Factory, **sizes: int) -> nn.Module:
    """Build a network for a task.

    Args:
        task: ``"forecast"``, ``"impute"``, ``"detect"`` or ``"classify-series"``.
        system: A slug, or a factory that takes ``sizes`` as keyword arguments and returns the module.
        **sizes: What the task fixes: for ``"forecast"`` channels, context, horizon, time_features; for ``"impute"`` and
            ``"detect"`` channels, length; for ``"classify-series"`` channels, length, classes.

    Raises:
        TypeError: ``system`` is neither a name nor callable, or the factory returns no module.
        ValueError: The system is unknown or cannot do the task.
    """
    if isinstance(system, str):
        row = find_system(system)
        if task not in row.tasks:
            raise ValueError(f"{system!r} cannot {task}. Systems that can: {', '.join(systems_for(task)) or 'none'}.")
        factory: Factory = import_string(row.tasks[task])
    elif callable(system):
        factory = system
    else:
        raise TypeError(f"`system` must be a name or a factory, got {type(system).__name__}.")
    network = factory(**sizes)
    if not isinstance(network, nn.Module):
        raise TypeError(f"The factory of {task!r} must return a torch.nn.Module, got {type(network).__name__}.")
    return network


def batches(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Cut ``indices`` into consecutive parts of at most ``size``."""
    for begin in range(0, len(indices), size):
        yield indices[begin : begin + size]


def seed_from(random_state: int | None) -> int:
    """Return ``random_state`` as a seed, or a fresh one from the system where it is None."""
    return int(np.random.default_rng().integers(2**31)) if random_state is None else int(random_state)
