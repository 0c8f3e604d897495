r"""Recurrent networks with heads, under the arguments of ``torch.nn.LSTM``: Elman, LSTM, GRU and sLSTM.

For tasks that need a state to be tracked (parity, brackets, games), where attention and linear recurrences fail, and as
a baseline for any series. The hidden state is split into heads, each with a recurrent matrix of its own, so that the
matrices stay in caches or registers through all steps (Pöppel, Beck & Hochreiter, 2024, arXiv:2412.07752); the sLSTM
cell is that of Beck et al., 2024, arXiv:2405.04517. The recurrence is :func:`dynakern.ops.flash_rnn`.

Implemented: layers, both directions, dropout, packed sequences, initial states, weights of ``torch.nn.LSTM``,
``GRU`` and ``RNN``. Not implemented: projections (``proj_size``) and the xLSTM block around the sLSTM cell.

Example:
    >>> import torch
    >>> from dynakern.sequence import FlashRNN
    >>> rnn = FlashRNN(16, 32, num_layers=2, batch_first=True, num_heads=4, cell="slstm")
    >>> y, state = rnn(torch.randn(3, 50, 16))
    >>> y.shape, len(state), state[0].shape
    (torch.Size([3, 50, 32]), 4, torch.Size([2, 3, 32]))
    >>> more, state = rnn(torch.randn(3, 10, 16), state)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from dynakern.checks import check_choice, check_positive, check_shape
from dynakern.layers import SeriesClassification, SeriesForecast
from dynakern.ops import Backend, flash_rnn
from dynakern.ops.flash_rnn import CELLS

__all__ = ["FlashRNN", "flash_elman", "flash_gru", "flash_lstm", "flash_slstm"]

State = Tensor | tuple[Tensor, ...]


class FlashRNN(nn.Module):
    r"""Recurrent network with block-diagonal recurrent matrices.

    Arguments, layouts and outputs are those of ``torch.nn.LSTM`` and ``torch.nn.GRU``. A layer has the parameters
    ``weight_ih`` ``(Gw H, input)``, ``weight_hh`` ``(Gr, NH, D, D)`` and ``bias`` ``(Gt, NH, D)``, D = H / NH, with the
    gates of :func:`dynakern.ops.flash_rnn`. With one head it computes what ``torch.nn.LSTM``, ``GRU`` and ``RNN`` do,
    and :func:`dynakern.load_official` reads their weights.

    Args:
        input_size: Width of the input.
        hidden_size: Width H of the state and of the output of one direction.
        num_layers: Layers, each on the output of the one before.
        bias: Whether gates have a bias.
        batch_first: Whether batched inputs and outputs are ``(B, T, ...)`` instead of ``(T, B, ...)``.
        dropout: Rate of dropout between layers.
        bidirectional: Run a second network from the end of the sequence, and join the outputs.
        proj_size: Must be 0.
        num_heads: Heads NH; divides ``hidden_size``.
        cell: ``"lstm"``, ``"gru"``, ``"elman"`` or ``"slstm"``.
        recurrent_gradient: As for :func:`dynakern.ops.flash_rnn`.
        gradient_clip: As for :func:`dynakern.ops.flash_rnn`.
        backend: As for :func:`dynakern.ops.flash_rnn`.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        NotImplementedError: ``proj_size`` is not 0.
        ValueError: An argument is out of range, or ``hidden_size`` is not divisible by ``num_heads``.

    Source: arXiv:2412.07752; interface of ``torch.nn.LSTM``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        num_heads: int = 1,
        cell: str = "lstm",
        recurrent_gradient: bool = True,
        gradient_clip: float | None = None,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("cell", cell, tuple(CELLS))
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads}
        for name, value in sizes.items():
            check_positive(name, value, integer=True)
        if proj_size != 0:
            raise NotImplementedError(f"`proj_size` must be 0, got {proj_size}: add a linear layer after the network.")
        if hidden_size % num_heads:
            raise ValueError(f"`hidden_size` must be divisible by `num_heads`, got {hidden_size} and {num_heads}.")
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"`dropout` must be a rate in [0, 1], got {dropout!r}.")
        if dropout and num_layers == 1:
            warnings.warn("`dropout` acts between layers and there is only one.", UserWarning, stacklevel=2)
        self.input_size, self.hidden_size, self.num_layers, self.num_heads = sizes.values()
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, float(dropout), bidirectional
        self.cell, self.recurrent_gradient, self.gradient_clip = cell, recurrent_gradient, gradient_clip
        self.backend: Backend = backend
        gates, width = CELLS[cell], hidden_size // num_heads
        made = {"device": device, "dtype": dtype}
        for suffix, inputs in self._suffixes():
            for name, shape in (
                ("weight_ih", (gates.inputs * hidden_size, inputs)),
                ("weight_hh", (gates.recurrent, num_heads, width, width)),
                *([("bias", (gates.gates, num_heads, width))] if bias else []),
            ):
                self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape, **made)))
        self.reset_parameters()

    def _suffixes(self) -> list[tuple[str, int]]:
        """Return the suffix of the parameters and the input width of each direction of each layer."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [
            (f"_l{layer}{direction}", self.input_size if layer == 0 else len(directions) * self.hidden_size)
            for layer in range(self.num_layers)
            for direction in directions
        ]

    def reset_parameters(self) -> None:
        """Draw all parameters evenly from ``[-1, 1] / sqrt(H / NH)``, torch's rule for each head."""
        bound = 1 / math.sqrt(self.hidden_size // self.num_heads)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> tuple[Tensor | PackedSequence, State]:
        """Return the output of the last layer and the states after the last step.

        Args:
            input: ``(T, B, input_size)``, ``(B, T, input_size)`` with ``batch_first``, ``(T, input_size)``, or packed.
            hx: States before the first step, zero by default: ``(num_layers * num_directions, B, H)``, or without B for
                an input without batch. One tensor for ``"gru"`` and ``"elman"``, else a tuple: (h, c) for ``"lstm"``,
                (h, c, n, m) for ``"slstm"``.

        Returns:
            The output, ``(T, B, num_directions * H)``, laid out or packed like the input, and the states, like ``hx``.

        Raises:
            TypeError: ``hx`` is not of the kind that the cell needs.
            ValueError: A shape does not fit.
        """
        if isinstance(input, PackedSequence):
            x, lengths = pad_packed_sequence(input, batch_first=True)
            y, states = self._run(x, self._unpack(hx, len(x)), lengths.to(x.device))
            packed = pack_padded_sequence(y, lengths, batch_first=True, enforce_sorted=input.sorted_indices is None)
            return packed, self._pack(states)
        if input.ndim == 2:
            y, states = self._run(input.unsqueeze(0), self._unpack(hx, None), None)
            return y.squeeze(0), self._pack(states.squeeze(2))
        check_shape("input", input, "B T F" if self.batch_first else "T B F")
        x = input if self.batch_first else input.transpose(0, 1)
        y, states = self._run(x, self._unpack(hx, len(x)), None)
        return (y if self.batch_first else y.transpose(0, 1)), self._pack(states)

    def _unpack(self, hx: State | None, batch: int | None) -> Tensor | None:
        """Return initial states as ``(S, layers * directions, B, H)``."""
        if hx is None:
            return None
        count = CELLS[self.cell].states
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if len(states) != count or (isinstance(hx, Tensor) != (count == 1)):
            kind = "one tensor" if count == 1 else f"a tuple of {count} tensors"
            raise TypeError(f"`hx` must be {kind} for cell={self.cell!r}, got {type(hx).__name__} of {len(states)}.")
        rows, pattern = len(self._suffixes()), "" if batch is None else f" {batch}"
        for state in states:
            check_shape("hx", state, f"{rows}{pattern} {self.hidden_size}")
        stacked = torch.stack(states)
        return stacked.unsqueeze(2) if batch is None else stacked

    def _pack(self, states: Tensor) -> State:
        return states[0] if len(states) == 1 else tuple(states.unbind(0))

    def _run(self, x: Tensor, initial: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run all layers on ``(B, T, input_size)``; return outputs and states ``(S, layers * directions, B, H)``."""
        if x.shape[-1] != self.input_size:
            raise ValueError(f"`input` must have {self.input_size} features, got shape {tuple(x.shape)}.")
        last, outputs = [], []
        for index, (suffix, _) in enumerate(self._suffixes()):
            backwards = suffix.endswith("_reverse")
            y, final = self._layer(
                _reverse(x, lengths) if backwards else x,
                suffix,
                None if initial is None else initial[:, index],
                lengths,
            )
            last.append(final)
            outputs.append(_reverse(y, lengths) if backwards else y)
            if len(outputs) == 1 + self.bidirectional:  # the layer is whole
                x, outputs = (outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)), []
                if self.dropout and len(last) < len(self._suffixes()):
                    x = F.dropout(x, self.dropout, self.training)
        return x, torch.stack(last, 1)

    def _layer(self, x: Tensor, suffix: str, initial: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run one direction of one layer; return its output ``(B, T, H)`` and last states ``(S, B, H)``."""
        heads, width = self.num_heads, self.hidden_size // self.num_heads
        Wx = F.linear(x, getattr(self, "weight_ih" + suffix)).unflatten(-1, (-1, heads, width))  # (B, T, Gw, NH, D)
        states = None if initial is None else initial.unflatten(-1, (heads, width)).unsqueeze(2)
        found, last = flash_rnn(
            Wx,
            getattr(self, "weight_hh" + suffix),
            getattr(self, "bias" + suffix) if self.bias else None,
            states,
            function=self.cell,
            return_states=lengths is not None,
            recurrent_gradient=self.recurrent_gradient,
            gradient_clip=self.gradient_clip,
            backend=self.backend,
        )
        if lengths is None:
            return found.flatten(2), last.squeeze(2).flatten(2)
        final = found[:, torch.arange(len(x), device=x.device), lengths - 1]  # (S, B, NH, D)
        return found[0].flatten(2), final.flatten(2)

    def extra_repr(self) -> str:
        """Say what the network was built with."""
        text = f"{self.input_size}, {self.hidden_size}, num_heads={self.num_heads}, cell={self.cell!r}"
        shown = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        return text + "".join(f", {k}={getattr(self, k)}" for k, v in shown.items() if getattr(self, k) != v)


def _reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverse sequences ``(B, T, ...)``, each within its length."""
    if lengths is None:
        return x.flip(1)
    steps = torch.arange(x.shape[1], device=x.device)
    index = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)  # (B, T)
    return x.gather(1, index.unsqueeze(-1).expand_as(x))


# Row blocks of torch's matrices, by gate; torch has its biases on the input and the recurrent side.
_TORCH_RECURRENT = {"elman": (0,), "lstm": (0, 1, 2, 3), "gru": (2, 0, 1)}  # torch's gru: r, z, n; ours: g, r, z


def convert_state_dict(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn the weights of ``torch.nn.LSTM``, ``GRU`` or ``RNN`` into those of a :class:`FlashRNN`.

    A dense recurrent matrix fits a network with several heads only if it is zero outside their blocks.

    Args:
        state: Weights of torch, or of this library, which pass unchanged.
        model: The :class:`FlashRNN` that will load them.

    Raises:
        ValueError: A recurrent matrix mixes the heads.
    """
    dense = [key for key, x in state.items() if key.startswith("weight_hh") and x.ndim == 2]
    if not isinstance(model, FlashRNN) or not dense:
        return dict(state)
    heads, width, out = model.num_heads, model.hidden_size // model.num_heads, dict(state)
    for suffix, _ in model._suffixes():
        if "weight_hh" + suffix not in out or model.cell not in _TORCH_RECURRENT:
            continue
        order = _TORCH_RECURRENT[model.cell]
        dense = out["weight_hh" + suffix].unflatten(0, (-1, heads, width)).unflatten(-1, (heads, width))[list(order)]
        blocks = torch.stack([dense[:, n, :, n] for n in range(heads)], 1)  # (Gr, NH, D, D)
        if int(dense.count_nonzero()) != int(blocks.count_nonzero()):
            raise ValueError(f"weight_hh{suffix} mixes the {heads} heads: load it with num_heads=1.")
        out["weight_hh" + suffix] = blocks
        if "bias_ih" + suffix in out:
            b_ih, b_hh = (out.pop(f"bias_{k}{suffix}").unflatten(0, (-1, heads, width)) for k in ("ih", "hh"))
            if model.cell == "gru":
                out["bias" + suffix] = torch.cat([b_hh[2:], (b_ih + b_hh)[:2], b_ih[2:]])
            else:
                out["bias" + suffix] = b_ih + b_hh
    return out


def flash_lstm(**overrides) -> FlashRNN:
    """Build an LSTM of two layers of width 256 with 4 heads on 128 features, ``(B, T, 128)`` to ``(B, T, 256)``."""
    return FlashRNN(**{**_SIZES, "cell": "lstm", **overrides})


def flash_gru(**overrides) -> FlashRNN:
    """Build a GRU of two layers of width 256 with 4 heads on 128 features, ``(B, T, 128)`` to ``(B, T, 256)``."""
    return FlashRNN(**{**_SIZES, "cell": "gru", **overrides})


def flash_elman(**overrides) -> FlashRNN:
    """Build an Elman network of two layers of width 256, 4 heads, 128 features: ``(B, T, 128)`` to ``(B, T, 256)``."""
    return FlashRNN(**{**_SIZES, "cell": "elman", **overrides})


def flash_slstm(**overrides) -> FlashRNN:
    """Build an sLSTM of two layers of width 256 with 4 heads on 128 features, ``(B, T, 128)`` to ``(B, T, 256)``."""
    return FlashRNN(**{**_SIZES, "cell": "slstm", **overrides})


_SIZES = {"input_size": 128, "hidden_size": 256, "num_layers": 2, "batch_first": True, "num_heads": 4}


class _Sequence(nn.Module):
    """A residual recurrent layer ``(B, T, D) -> (B, T, D)`` after a norm."""

    def __init__(self, d_model: int, **options) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.rnn = FlashRNN(d_model, d_model, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rnn(self.norm(x))[0]


def forecast(*, channels: int, context: int, horizon: int, time_features: int) -> SeriesForecast:
    """Build a forecaster for ``dynakern compare``: an sLSTM of width 64 with 4 heads.

    Args:
        channels: Number of variates C.
        context: Steps seen.
        horizon: Steps forecast.
        time_features: Number of calendar features of a step.

    Returns:
        A module that takes ``(B, context, C)`` and marks to ``(B, horizon, C)``.
    """
    return SeriesForecast(
        _Sequence(64, num_heads=4, cell="slstm"),
        channels=channels,
        context=context,
        horizon=horizon,
        d_model=64,
        time_features=time_features,
    )


def classify_series(*, channels: int, length: int, classes: int) -> SeriesClassification:
    """Build a classifier for ``dynakern compare``: an LSTM of width 64 with 4 heads.

    Args:
        channels: Number of variates C.
        length: Steps of the longest series; the network takes any.
        classes: Number of classes.

    Returns:
        A module that takes ``(B, L, C)`` and lengths to logits ``(B, classes)``.
    """
    return SeriesClassification(_Sequence(64, num_heads=4, cell="lstm"), channels=channels, classes=classes, d_model=64)
