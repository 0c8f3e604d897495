"""The S4D layer, its recurrence, the backbone, named variants, and the authors' weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynakern.checks import check_choice, check_positive
from dynakern.layers.series import SeriesClassification, SeriesForecast
from dynakern.ops import fft_conv
from dynakern.sequence.s4d.kernel import S4DKernel

__all__ = ["S4D", "S4DModel", "S4DRecurrence", "convert_state_dict"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "none": nn.Identity,
}


class TiedDropout(nn.Module):
    """Dropout with one mask a (batch row, feature), shared by all steps of ``(B, H, L)``."""

    def __init__(self, p: float, *, tied: bool = True) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {p!r}.")
        self.p, self.tied = p, tied

    def forward(self, x: Tensor) -> Tensor:
        """Drop features of ``(B, H, L)``."""
        function = nn.functional.dropout1d if self.tied else nn.functional.dropout
        return function(x, self.p, self.training)

    def extra_repr(self) -> str:
        """Return the rate for ``repr``."""
        return f"p={self.p}, tied={self.tied}"


class _Convolution(nn.Module):
    """Kernel and direct path: :math:`y = K * u + D u`, ``(B, H, L) -> (B, C H, L)``."""

    def __init__(self, kernel: S4DKernel, channels: int, bidirectional: bool, **factory: Any) -> None:
        super().__init__()
        self.kernel, self.channels, self.bidirectional = kernel, channels, bidirectional
        self.D = nn.Parameter(torch.randn(channels, kernel.d_model, **factory))

    def forward(self, u: Tensor, state: Tensor | None, rate: float) -> tuple[Tensor, Tensor | None]:
        length = u.shape[-1]
        forced = None
        if state is None:
            k = self.kernel(length, rate=rate)
        else:
            k, forced = self.kernel(length, rate=rate, state=state)
        if self.bidirectional:
            # The reverse kernel's tap j acts at lag -(j + 1), as in the authors' code.
            k = torch.cat([k[: self.channels], k[self.channels :].flip(-1)], -1)
        wide = torch.promote_types(u.dtype, torch.float32)
        y = fft_conv(u.to(wide), k.to(wide), causal=not self.bidirectional, skip=self.D.to(wide))  # (B, C, H, L)
        if forced is not None:
            y = y + forced
        following = None if state is None else self.kernel.next_state(u, state, rate=rate)
        return y.flatten(1, 2).to(u.dtype), following


class S4D(nn.Module):
    r"""A diagonal state-space layer over sequences.

    Kernel and direct path, dropout, activation, dropout, then a linear map over features with a gated linear unit
    :math:`a \cdot \sigma(b)`. O(H N L) to make the kernel, O(B H L log L) to apply it, O(H N) for a recurrent step.

    Args:
        d_model: Number of features H.
        d_state: State size N, even.
        channels: Kernels a feature.
        bidirectional: Two-sided kernel; no recurrence then.
        activation: After the convolution: gelu, relu, silu, tanh, sigmoid, none.
        final_act: ``"glu"``, an activation's name, or ``"none"``.
        dropout: Rate of dropout.
        tie_dropout: One mask for all steps of a sequence.
        transposed: Take and return ``(B, H, L)`` instead of ``(B, L, H)``.
        device: Device of the parameters.
        dtype: Real dtype of the parameters.
        **kernel: Options of :class:`S4DKernel`: init, disc, dt_min, dt_max, n_ssm, l_max, bandlimit, ssm_lr and others.

    Raises:
        ValueError: A size, range or name is wrong.

    Example:
        >>> layer = S4D(d_model=4, d_state=8, init="legs")
        >>> layer(torch.zeros(1, 10, 4)).shape
        torch.Size([1, 10, 4])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        channels: int = 1,
        bidirectional: bool = False,
        activation: str = "gelu",
        final_act: str = "glu",
        dropout: float = 0.0,
        tie_dropout: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kernel: Any,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, tuple(ACTIVATIONS))
        check_choice("final_act", final_act, ("glu", *ACTIVATIONS))
        check_positive("channels", channels, integer=True)
        self.d_model, self.transposed, self.bidirectional = d_model, transposed, bidirectional
        factory = {"device": device, "dtype": dtype}
        made = S4DKernel(d_model, d_state, channels=channels * (2 if bidirectional else 1), **kernel, **factory)
        self.layer = _Convolution(made, channels, bidirectional, **factory)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = TiedDropout(dropout, tied=tie_dropout)
        gated = final_act == "glu"
        self.output_linear = nn.Sequential(
            nn.Linear(channels * d_model, d_model * (2 if gated else 1), **factory),
            nn.GLU(-1) if gated else ACTIVATIONS[final_act](),
        )

    def forward(
        self, x: Tensor, *, state: Tensor | None = None, rate: float = 1.0, lengths: Tensor | None = None
    ) -> Any:
        """Filter a batch of sequences.

        Args:
            x: ``(B, L, H)``, or ``(B, H, L)`` if transposed.
            state: State before the first step, ``(B, H, N/2)``, complex, from :meth:`initial_state` or an earlier call.
            rate: Factor of the step: 2 for an input sampled at half the rate of training.
            lengths: Number of valid steps of each sequence, ``(B,)``; later steps are set to zero before the filter.

        Returns:
            Output of the shape of ``x``; with a state the pair of output and next state.

        Raises:
            ValueError: Shapes do not fit, the sequence is empty, or a state is given to a bidirectional layer.
        """
        if x.ndim != 3 or x.shape[1 if self.transposed else 2] != self.d_model or min(x.shape) == 0:
            layout = "(B, H, L)" if self.transposed else "(B, L, H)"
            raise ValueError(f"`x` must have shape {layout} with H = {self.d_model}, not empty, got {tuple(x.shape)}.")
        if state is not None and self.bidirectional:
            raise ValueError("`state` needs a causal layer, this one is bidirectional.")
        u = x if self.transposed else x.transpose(1, 2)  # (B, H, L)
        if lengths is not None:
            u = u * (torch.arange(u.shape[-1], device=u.device) < lengths[:, None]).unsqueeze(1)
        y, following = self.layer(u, state, rate)
        y = self.dropout(self.activation(self.dropout(y)))
        y = self.output_linear(y.transpose(1, 2))  # (B, L, H)
        y = y.transpose(1, 2) if self.transposed else y
        return y if state is None else (y, following)

    def initial_state(self, batch: int) -> Tensor:
        """Return the zero state ``(B, H, N/2)``, complex."""
        return self.layer.kernel.initial_state(batch)

    def recurrent(self, *, rate: float = 1.0) -> S4DRecurrence:
        """Return the layer as a recurrence with its present weights, for streaming; call again after an update.

        Raises:
            ValueError: The layer is bidirectional, or its discretisation has no recurrent view.
        """
        return S4DRecurrence(self, rate=rate)


class S4DRecurrence:
    r"""An :class:`S4D` layer step by step.

    .. math:: x_k = \bar A x_{k-1} + \bar B u_k, \qquad y_k = 2\,\mathrm{Re}(C x_k) + D u_k

    Inputs and outputs of a step are ``(B, H)``, the state is ``(B, H, N/2)``, complex.

    Args:
        layer: The layer, in eval mode for a meaningful result.
        rate: Factor of the step.
    """

    def __init__(self, layer: S4D, *, rate: float = 1.0) -> None:
        if layer.bidirectional:
            raise ValueError("A bidirectional layer has no recurrence.")
        self.layer = layer
        with torch.no_grad():
            log_a, self.b, c = layer.layer.kernel.discretise(rate)
            self.a = torch.exp(log_a)
            # 2 Re(C x) as one real sum over (Re, Im) pairs is twice as fast as the complex product.
            self.readout = torch.view_as_real(2 * c.conj().resolve_conj()).contiguous()  # (C, H, M, 2)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step.

        Args:
            x: ``(B, H)``.
            state: ``(B, H, N/2)``, complex.

        Returns:
            Output ``(B, H)`` and the next state.
        """
        layer = self.layer
        state = torch.addcmul(self.b * x.unsqueeze(-1), self.a, state)
        y = (torch.view_as_real(state).unsqueeze(1) * self.readout).sum((-1, -2))  # (B, C, H)
        y = torch.addcmul(y, layer.layer.D, x.unsqueeze(1))
        y = layer.activation(y.flatten(1).to(x.dtype))
        return layer.output_linear(y), state


class S4DModel(nn.Module):
    """Backbone: encoder, layers with residuals and norms, mean over steps, decoder.

    Args:
        d_input: Width of the input; with ``vocab_size`` the input is token numbers instead.
        num_classes: Width of the output.
        d_model: Width of the layers.
        num_layers: Number of layers.
        dropout: Rate of dropout, in the layers and on the residual branches.
        prenorm: Normalise before a layer instead of after its residual.
        norm: ``"layer"`` or ``"batch"``.
        vocab_size: Number of tokens, for token input.
        pool: Average over steps (classification); else an output for every step.
        **layer: Options of :class:`S4D`.
    """

    head_keys = ("decoder.",)

    def __init__(
        self,
        *,
        d_input: int = 1,
        num_classes: int = 10,
        d_model: int = 128,
        num_layers: int = 4,
        dropout: float = 0.1,
        prenorm: bool = False,
        norm: str = "layer",
        vocab_size: int | None = None,
        pool: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **layer: Any,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, ("layer", "batch"))
        check_positive("num_layers", num_layers, integer=True)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.prenorm, self.pool = prenorm, pool
        self.encoder = (
            nn.Linear(d_input, d_model, **factory)
            if vocab_size is None
            else nn.Embedding(vocab_size, d_model, **factory)
        )
        self.s4_layers = nn.ModuleList(
            S4D(d_model, dropout=dropout, transposed=True, **layer, **factory) for _ in range(num_layers)
        )
        make = nn.LayerNorm if norm == "layer" else nn.BatchNorm1d
        self.norms = nn.ModuleList(make(d_model, **factory) for _ in range(num_layers))
        self.dropout = TiedDropout(dropout)
        self.decoder = nn.Linear(d_model, num_classes, **factory)

    def _normalise(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if isinstance(norm, nn.BatchNorm1d) else norm(x.transpose(1, 2)).transpose(1, 2)

    def forward_features(self, x: Tensor, lengths: Tensor | None = None, *, rate: float = 1.0) -> Tensor:
        """Return the features of every step, ``(B, L, d_model)``, of input ``(B, L, d_input)`` or tokens ``(B, L)``."""
        h = self.encoder(x).transpose(1, 2)  # (B, d_model, L)
        for layer, norm in zip(self.s4_layers, self.norms, strict=True):
            z = self._normalise(norm, h) if self.prenorm else h
            h = h + self.dropout(layer(z, rate=rate, lengths=lengths))
            h = h if self.prenorm else self._normalise(norm, h)
        return h.transpose(1, 2)

    def forward(self, x: Tensor, lengths: Tensor | None = None, *, rate: float = 1.0) -> Tensor:
        """Return logits.

        Args:
            x: ``(B, L, d_input)``, or token numbers ``(B, L)``.
            lengths: Number of valid steps of each sequence, ``(B,)``.
            rate: Factor of the step.

        Returns:
            ``(B, num_classes)``, or ``(B, L, num_classes)`` without pooling.
        """
        h = self.forward_features(x, lengths, rate=rate)
        if not self.pool:
            return self.decoder(h)
        if lengths is None:
            return self.decoder(h.mean(1))
        valid = (torch.arange(h.shape[1], device=h.device) < lengths[:, None]).unsqueeze(-1)
        return self.decoder((h * valid).sum(1) / lengths.clamp_min(1)[:, None])


def convert_state_dict(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename and reshape the authors' weights to ours: the full block, the minimal layer, and their backbones.

    The minimal layer stores the step's logarithm, ``log_A_real``, a positive ``A_imag`` and no B (it is 1); version 3
    of the full code named ``inv_dt`` ``log_dt`` and nested the kernel once more (from its release notes; no version 3
    checkpoint was at hand to try). Weights of 1x1 convolutions lose their last axis. Keys that already fit stay.
    """
    own = model.state_dict()
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        prefix, _, name = key.rpartition(".")
        outer = prefix + "." if prefix else ""
        if f"{outer}{name}" not in own:
            for old, new in (("kernel.kernel", "layer.kernel"), ("kernel", "layer.kernel")):
                if prefix.endswith(old) and not prefix.endswith("layer.kernel"):
                    outer = prefix.removesuffix(old) + new + "."
                    break
        if name == "D" and f"{outer}D" not in own:
            outer += "layer."
        minimal = name in ("log_A_real", "log_dt") or (name in ("C", "A_imag") and f"{prefix}.log_A_real" in state)
        if name == "A_imag" and minimal:
            value = -value  # Im A = -A_imag with us
        name = {"log_dt": "inv_dt", "log_A_real": "A_real", "inv_A_real": "A_real"}.get(name, name)
        target = outer + name
        if target in own and own[target].squeeze().shape == value.squeeze().shape:
            value = value.reshape(own[target].shape)  # axes of size 1 only
        renamed[target] = value
        if name == "A_real" and minimal and f"{outer}B" in own:
            ones = torch.zeros_like(own[f"{outer}B"])
            ones[..., 0] = 1
            renamed[f"{outer}B"] = ones
    return renamed


def s4d_classifier(**overrides: Any) -> S4DModel:
    """S4D backbone of the authors' minimal example: 4 layers of width 128, post-norm."""
    return S4DModel(**{"d_model": 128, "num_layers": 4, "dropout": 0.1, **overrides})


def s4d_scifar(**overrides: Any) -> S4DModel:
    """S4D for sequential CIFAR: 6 layers of width 512, bidirectional, two shared (A, B)."""
    settings = {"d_input": 3, "d_model": 512, "num_layers": 6, "dropout": 0.1, "bidirectional": True, "n_ssm": 2}
    return S4DModel(**{**settings, **overrides})


def _long_range_arena(**settings: Any) -> S4DModel:
    return S4DModel(**{"d_model": 256, "num_layers": 6, "norm": "batch", "dropout": 0.0, "n_ssm": 1, **settings})


def s4d_lra_listops(**overrides: Any) -> S4DModel:
    """S4D for ListOps of the Long Range Arena: 6 layers of width 256, N = 4, post-norm, tokens."""
    return _long_range_arena(**{"d_state": 4, "vocab_size": 18, "bidirectional": True, **overrides})


def s4d_lra_text(**overrides: Any) -> S4DModel:
    """S4D for Text and Retrieval of the Long Range Arena: 6 layers of width 256, N = 4, pre-norm, tokens."""
    settings = {"d_state": 4, "vocab_size": 135, "num_classes": 2, "prenorm": True, "bidirectional": True}
    return _long_range_arena(**{**settings, **overrides})


def s4d_lra_image(**overrides: Any) -> S4DModel:
    """S4D for Image of the Long Range Arena: 6 layers of width 512, N = 64, dropout 0.1."""
    settings = {"d_model": 512, "dropout": 0.1, "norm": "layer", "bidirectional": True}
    return _long_range_arena(**{**settings, **overrides})


def s4d_lra_pathfinder(**overrides: Any) -> S4DModel:
    """S4D for Pathfinder of the Long Range Arena: 6 layers of width 256, N = 64, pre-norm."""
    return _long_range_arena(**{"num_classes": 2, "prenorm": True, "bidirectional": True, **overrides})


def s4d_lra_pathx(**overrides: Any) -> S4DModel:
    """S4D for Path-X of the Long Range Arena: as Pathfinder, with steps from 1e-4."""
    return s4d_lra_pathfinder(**{"dt_min": 1e-4, **overrides})


def s4d_sc35(**overrides: Any) -> S4DModel:
    """S4D for 35 spoken commands at 16 kHz: 6 layers of width 128, N = 64, pre-norm."""
    settings = {"d_model": 128, "num_classes": 35, "prenorm": True, "bidirectional": True}
    return _long_range_arena(**{**settings, **overrides})


def s4d_bidmc(**overrides: Any) -> S4DModel:
    """S4D for vital signs from waveforms (BIDMC, two channels, one output): 6 layers of width 128, N = 256."""
    settings = {"d_input": 2, "num_classes": 1, "d_model": 128, "d_state": 256, "norm": "layer", "prenorm": True}
    return _long_range_arena(**{**settings, **overrides})


class _Stack(nn.Module):
    """Residual post-norm S4D layers ``(B, L, d_model) -> (B, L, d_model)``."""

    def __init__(self, d_model: int, num_layers: int, **layer: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(S4D(d_model, **layer) for _ in range(num_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(x + layer(x))
        return x


def forecast(*, channels: int, context: int, horizon: int, time_features: int) -> SeriesForecast:
    """Build the competitor of ``dynakern compare forecast``: two S4D layers of width 32, N = 32.

    The module maps ``x (B, context, C)`` and ``marks (B, context + horizon, F) | None`` to ``(B, horizon, C)``.
    """
    body = _Stack(32, 2, d_state=32, dropout=0.1)
    return SeriesForecast(
        body, channels=channels, context=context, horizon=horizon, d_model=32, time_features=time_features
    )


def classify_series(*, channels: int, length: int, classes: int) -> SeriesClassification:
    """Build a classifier of series: three bidirectional S4D layers of width 64, N = 64.

    The module maps ``x (B, L, C)`` and ``lengths (B,) | None`` to logits ``(B, classes)``.
    """
    # Steps of about 1/L, so that the kernels reach over the whole series from the start.
    steps = {"dt_min": min(1e-3, 0.5 / length), "dt_max": 0.1}
    body = _Stack(64, 3, d_state=64, dropout=0.1, bidirectional=True, **steps)
    return SeriesClassification(body, channels=channels, classes=classes, d_model=64)
