"""dynakern: dynamic kernels for Python.

A kernel says how much one place contributes to another, ``y_i = sum_j K(i, j) x_j``; it is *dynamic* when K depends on
the input, the time, the budget or the machine. Three surfaces: networks (``create_model``, ``dynakern.sequence``),
estimators (``dynakern.tasks``) and operators (``dynakern.ops``). Importing this package is cheap: nothing heavy is
loaded before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dynakern import (
        adaptive,
        checks,
        claims,
        compare,
        data,
        layers,
        lens,
        measure,
        ops,
        sequence,
        similarity,
        tasks,
        testing,
        train,
        vision,
    )
    from dynakern.models import create_model, list_models, load_official, model_info

__all__ = [
    "__version__",
    "adaptive",
    "checks",
    "claims",
    "compare",
    "create_model",
    "data",
    "layers",
    "lens",
    "list_models",
    "load_official",
    "measure",
    "model_info",
    "ops",
    "sequence",
    "similarity",
    "tasks",
    "testing",
    "train",
    "vision",
]

_FUNCTIONS = ("create_model", "list_models", "load_official", "model_info")


def __getattr__(name: str) -> object:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module("dynakern.models"), name)
    if name in __all__:
        return importlib.import_module(f"dynakern.{name}")
    raise AttributeError(f"module 'dynakern' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
