"""Build any network of the library by name, and load the authors' published weights into it."""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynakern.catalog import SYSTEMS
from dynakern.checks import unknown_name

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["create_model", "import_string", "list_models", "load_official", "model_info", "read_state_dict"]


def import_string(string: str) -> Any:
    """Return the object named by ``"module:object"``."""
    module, _, name = string.partition(":")
    return getattr(importlib.import_module(module), name)


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of all model variants that match a shell-style ``pattern``, sorted.

    Example:
        >>> "timesnet" in list_models("times*")
        True
    """
    return sorted(v for s in SYSTEMS for v in s.variants if fnmatch.fnmatch(v, pattern))


def _variant(name: str) -> Any:
    for system in SYSTEMS:
        if name in system.variants:
            return system, getattr(importlib.import_module(system.module), name)
    raise ValueError(unknown_name("model", name, list_models()))


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Build the model variant ``name``; keyword arguments override its hyper-parameters.

    Raises:
        ValueError: No variant has this name; the message suggests the nearest.

    Example:
        >>> model = create_model("s4d_classifier", d_input=1, num_classes=10)
    """
    return _variant(name)[1](**overrides)


def model_info(name: str) -> dict[str, str]:
    """Return what the variant ``name`` is: its system, paper, description and signature.

    Raises:
        ValueError: No variant has this name.
    """
    system, function = _variant(name)
    return {
        "name": name,
        "system": system.slug,
        "title": system.title,
        "paper": system.paper,
        "description": (inspect.getdoc(function) or "").partition("\n")[0],
        "signature": f"{name}{inspect.signature(function)}",
    }


def read_state_dict(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a flat dict of tensors from a mapping, a ``.safetensors`` file or a ``torch.save`` file without pickles.

    A checkpoint that wraps the weights in ``state_dict``, ``model``, ``model_state_dict`` or ``module`` is unwrapped.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file needs pickle, or holds something other than tensors.
    """
    import torch

    if isinstance(source, Mapping):
        state: Any = source
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"No checkpoint at {path}.")
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise ValueError(
                    f"{path} cannot be read without unpickling arbitrary code, which is refused: {error}"
                ) from error
    for key in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    wrong = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise ValueError(f"The checkpoint must map names to tensors; these entries are none: {', '.join(wrong[:5])}.")
    return dict(state)


def load_official(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> nn.Module:
    """Load the authors' published weights into ``model``, strictly.

    The only tolerated difference is a replaced head: parameters under the prefixes that the model's class lists in
    ``head_keys`` keep their initial values, with a warning, when their shapes differ from the checkpoint's.

    Args:
        model: A network of this library.
        source: Path of a ``.safetensors`` or ``torch.save`` file (read with ``weights_only=True``), or a state dict.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A key is missing, left over or of another shape; all are listed.
    """
    state = read_state_dict(source)
    convert = getattr(inspect.getmodule(type(model)), "convert_state_dict", None)
    if convert is not None:
        state = convert(state, model)
    own = model.state_dict()
    heads: tuple[str, ...] = tuple(getattr(type(model), "head_keys", ()))
    replaced = (
        [k for k in own if k.startswith(heads) and k in state and state[k].shape != own[k].shape] if heads else []
    )
    for key in replaced:
        state[key] = own[key]
    shapes = [
        f"{k} is {tuple(state[k].shape)}, needs {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    problems = [f"missing: {k}" for k in own if k not in state] + [f"left over: {k}" for k in state if k not in own]
    if problems or shapes:
        listing = "; ".join((problems + shapes)[:12])
        raise ValueError(f"The checkpoint does not fit {type(model).__name__}: {listing}.")
    model.load_state_dict(state)
    if replaced:
        warnings.warn(f"Head not loaded, its shape differs: {', '.join(replaced)}.", UserWarning, stacklevel=2)
    return model
