"""One picture of the kernel that a network applies: what it sees, how that changes with the input, what it costs."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dynakern import measure
from dynakern.checks import check_finite
from dynakern.lens.dynamism import dynamism, effective_kernel, impulse_response
from dynakern.lens.receptive_field import ReceptiveField, effective_receptive_field
from dynakern.lens.tangent_kernel import TangentSpectrum, tangent_spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Look", "load_function", "look", "sample_crops"]


@dataclass(frozen=True)
class Look:
    """What :func:`look` measured.

    Attributes:
        name: Of the network.
        inputs: ``(N, ...)``.
        receptive_field: For networks with feature maps, else None.
        kernels: Effective kernels at the first inputs, each shaped like an input.
        response: What an impulse in the middle of the first input does to the output.
        dynamism: Share of the kernel that changes with the input, 0 to 1.
        spectrum: Of the tangent kernel; None for a network without trainable parameters.
        parameters: Their number.
        flops: Of one input; None where an operator is not known.
        latency_ms: Median time of one input.
        peak_mb: Memory that one input takes.
    """

    name: str
    inputs: Tensor = field(repr=False)
    receptive_field: ReceptiveField | None = field(repr=False)
    kernels: list[Tensor] = field(repr=False)
    response: Tensor = field(repr=False)
    dynamism: float
    spectrum: TangentSpectrum | None = field(repr=False)
    parameters: int
    flops: int | None
    latency_ms: float
    peak_mb: float

    def summary(self) -> dict[str, float | int | str | None]:
        """Return the figures as plain numbers."""
        erf, spectrum = self.receptive_field, self.spectrum
        areas = {f"receptive area {t:g}": None if erf is None else erf.ratio(t) for t in (0.2, 0.5, 0.99)}
        return {
            "network": self.name,
            "input": " x ".join(map(str, self.inputs.shape[1:])),
            **areas,
            "dynamism": self.dynamism,
            "tangent kernel, effective rank": None if spectrum is None else spectrum.effective_rank,
            "inputs": len(self.inputs),
            "parameters": self.parameters,
            "flops": self.flops,
            "latency_ms": self.latency_ms,
            "peak_mb": self.peak_mb,
        }

    def draw(self) -> Figure:
        """Draw input, receptive field, two effective kernels, impulse response and spectrum."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 7.4), layout="constrained")
        axes = figure.subplots(2, 3)
        _draw_signal(axes[0, 0], self.inputs[0], "input")
        if self.receptive_field is None:
            _draw_signal(axes[0, 1], self.response[0], "response to an impulse in its middle")
        else:
            ratio = self.receptive_field.ratio(0.99)
            area = "reaches beyond the image" if ratio is None else f"within {100 * ratio:.1f} % of the area"
            axes[0, 1].imshow(self.receptive_field.map, cmap="viridis")
            axes[0, 1].set_title(f"effective receptive field\n99 % {area}", fontsize=10)
        for axis, kernel, label in zip(axes.flat[2:4], self.kernels, ("first", "second"), strict=False):
            _draw_kernel(axis, kernel[0], f"effective kernel at the {label} input")
        change = self.kernels[0] - torch.stack(self.kernels).mean(0)
        _draw_kernel(axes[1, 1], change[0], f"the first kernel less the mean kernel\ndynamism {self.dynamism:.3f}")
        if self.spectrum is not None:
            values = self.spectrum.eigenvalues / self.spectrum.eigenvalues[0]
            axes[1, 2].semilogy(range(1, len(values) + 1), values.clamp_min(1e-12), "o-")
            rank = f"effective rank {self.spectrum.effective_rank:.2f} of {len(values)}"
            axes[1, 2].set_title(f"tangent kernel's eigenvalues, largest 1\n{rank}", fontsize=10)
            axes[1, 2].grid(alpha=0.3)
        else:
            axes[1, 2].axis("off")
        flops = "-" if self.flops is None else f"{self.flops / 1e6:.1f} MFLOP"
        figure.suptitle(
            f"{self.name}: {self.parameters:,} parameters, {flops}, {self.latency_ms:.1f} ms, {self.peak_mb:.0f} MB"
        )
        return figure

    def save(self, path: str | Path) -> Path:
        """Write the picture (``.png``, ``.svg``, ``.pdf``), or the figures (``.json``); returns the path."""
        path = Path(path)
        temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
        if path.suffix == ".json":
            temporary.write_text(json.dumps(self.summary(), indent=1) + "\n")
        else:
            self.draw().savefig(temporary, dpi=110)
        temporary.replace(path)
        return path


def look(model: nn.Module, inputs: Tensor, *, name: str | None = None) -> Look:
    """Measure what kernel a network applies.

    The maps come from ``model.forward_features`` where there is such a method, from the model itself otherwise. The
    model is run in eval mode, and put back.

    Args:
        model: Any torch module that maps ``(B, ...)`` to outputs whose first axis is the batch.
        inputs: At least two inputs of one shape, ``(N, C, H, W)``, ``(N, L, D)`` or ``(N, P)``; finite.
        name: For the title; the class by default.

    Raises:
        ValueError: Inputs are too few or not finite, or the output does not depend on them.

    Example:
        >>> result = look(torch.nn.Conv2d(3, 4, 5, padding=2), torch.randn(3, 3, 16, 16))
        >>> result.receptive_field.side(0.99), round(result.dynamism, 6)
        (5, 0.0)
    """
    if inputs.ndim < 2 or len(inputs) < 2:
        raise ValueError(f"`inputs` must hold at least two inputs, (N, ...), got shape {tuple(inputs.shape)}.")
    check_finite("inputs", inputs)
    training = model.training
    model.eval()
    try:
        maps: Any = getattr(model, "forward_features", model)
        one = inputs[:1]
        with torch.no_grad():
            y = maps(one)
        has_maps = isinstance(y, Tensor) and y.ndim == 4 and inputs.ndim == 4
        kernels = [effective_kernel(maps, x) for x in inputs.split(1)]

        def run() -> Any:
            with torch.no_grad():
                return model(one)

        return Look(
            name=name or type(model).__name__,
            inputs=inputs,
            receptive_field=effective_receptive_field(maps, inputs) if has_maps else None,
            kernels=kernels,
            response=impulse_response(maps, one),
            dynamism=dynamism(maps, inputs),
            spectrum=tangent_spectrum(model, inputs) if any(p.requires_grad for p in model.parameters()) else None,
            parameters=measure.count_parameters(model),
            flops=measure.count_flops(run),
            latency_ms=measure.time_interleaved({"run": run}, repeats=5)["run"].median * 1e3,
            peak_mb=measure.peak_memory(run),
        )
    finally:
        model.train(training)


def _draw_signal(axis: Axes, x: Tensor, title: str) -> None:
    """Draw an image, a series or a vector."""
    values = x.detach().float().cpu().numpy()
    if values.ndim == 3:
        low, high = values.min(), values.max()
        picture = (values - low) / max(high - low, 1e-12)
        axis.imshow(picture[:3].transpose(1, 2, 0) if len(picture) >= 3 else picture[0], cmap="gray")
    else:
        axis.plot(values if values.ndim == 1 else values[:, :8], lw=1)
    axis.set_title(title, fontsize=10)


def _draw_kernel(axis: Axes, kernel: Tensor, title: str) -> None:
    values = kernel.detach().float().cpu().numpy()
    if values.ndim == 3:  # the colours together
        values = values.sum(0)
    limit = max(float(np.abs(values).max()), 1e-12)
    if values.ndim == 2 and kernel.ndim == 3:
        axis.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit)
    else:
        axis.plot(values if values.ndim == 1 else values[:, :8], lw=1)
    axis.set_title(title, fontsize=10)


def sample_crops(size: int, number: int = 6, *, picture: np.ndarray | None = None, seed: int = 0) -> Tensor:
    """Return square crops of a picture, normalised as for ImageNet, ``(number, 3, size, size)``.

    Args:
        size: Side of a crop.
        number: How many, at random places.
        picture: ``(3, H, W)`` in [0, 1]; by default the two photographs that come with scikit-learn, in turn.
        seed: Of the places.

    Raises:
        ValueError: The picture is smaller than a crop.
    """
    if picture is None:
        from sklearn.datasets import load_sample_images

        pictures = [p.transpose(2, 0, 1).astype(np.float32) / 255 for p in load_sample_images().images]
    else:
        pictures = [picture.astype(np.float32)]
    if any(min(p.shape[1:]) < size for p in pictures):
        raise ValueError(
            f"The picture has {pictures[0].shape[1:]} pixels, fewer than a crop of {size}: take a smaller size."
        )
    rng, crops = np.random.default_rng(seed), []
    for index in range(number):
        p = pictures[index % len(pictures)]
        top, left = (int(rng.integers(0, n - size + 1)) for n in p.shape[1:])
        crops.append(p[:, top : top + size, left : left + size])
    mean, std = (np.array(v, np.float32)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return torch.from_numpy((np.stack(crops) - mean) / std)


def load_function(text: str) -> Any:
    """Return the object that ``"file.py:name"`` names, running that file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The text is malformed, or the file has no such name.
    """
    file, separator, name = text.rpartition(":")
    if not separator or not file.endswith(".py"):
        raise ValueError(f"A model is given as file.py:function, got {text!r}.")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"No file {path}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ValueError(f"{path} has no {name!r}.")
    return getattr(module, name)
