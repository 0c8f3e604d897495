r"""TimesNet: fold a series at its own periods and treat it as images.

A value in a series with a daily rhythm resembles the hour before it and the same hour of the day before. TimesNet makes
both neighbours adjacent: it finds the strongest periods of the hidden sequence by a Fourier transform, folds the
sequence at each of them into a picture (a row a period, a column a phase) and convolves the pictures in two dimensions.
One backbone serves forecasting, imputation, anomaly detection (by reconstruction) and classification.

Paper: Wu, Hu, Liu, Zhou, Wang, Long, 2023, "TimesNet: Temporal 2D-Variation Modeling for General Time Series Analysis",
arXiv:2210.02186. Official code: https://github.com/thuml/Time-Series-Library, whose state-dict keys this file has.

All of the paper's tasks are here. Beyond it: the parallel convolutions are merged into one kernel and cropped to what
touches data, which changes no value; periods may be found for every sample alone (``period="sample"``), so that a
sample's output does not depend on its batch; or be given (``period=(24, 168)``), so that the network can be exported.
Losses and scores of the protocols are in :mod:`dynakern.tasks.series_metrics`.

Example:
    >>> import torch
    >>> hour = torch.arange(96.0)
    >>> x = torch.stack((torch.sin(2 * torch.pi * hour / 24), torch.cos(2 * torch.pi * hour / 12)), dim=-1)[None]
    >>> periods, weights = dominant_periods(x, 2)
    >>> sorted(periods.tolist())
    [12, 24]
    >>> model = TimesNet("forecast", seq_len=96, pred_len=24, n_channels=2, d_model=8, d_ff=8, num_kernels=2, top_k=2)
    >>> model(x).shape
    torch.Size([1, 24, 2])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_choice, check_floating, check_positive, check_shape
from dynakern.data.calendar import FREQUENCIES, parse_frequency
from dynakern.layers.embedding import DataEmbedding

__all__ = [
    "InceptionConv2d",
    "TimesBlock",
    "TimesNet",
    "convert_state_dict",
    "dominant_periods",
    "timesnet",
    "timesnet_ecl",
    "timesnet_ett_imputation",
    "timesnet_etth1",
    "timesnet_etth2",
    "timesnet_ettm1",
    "timesnet_ettm2",
    "timesnet_exchange",
    "timesnet_ili",
    "timesnet_m4",
    "timesnet_msl",
    "timesnet_psm",
    "timesnet_smap",
    "timesnet_smd",
    "timesnet_swat",
    "timesnet_traffic",
    "timesnet_uea",
    "timesnet_weather",
]

Task = Literal["forecast", "impute", "anomaly", "classify"]
Period = Literal["batch", "sample"] | Sequence[int]


def dominant_periods(x: Tensor, top_k: int, *, shared: bool = True) -> tuple[Tensor, Tensor]:
    r"""Find the strongest periods of a sequence and how strong each is.

    With :math:`A = |\mathrm{rfft}(x)|` averaged over channels, the frequencies :math:`f_1, \dots, f_k \ge 1` of the
    largest amplitudes give the periods :math:`p_i = \lfloor L / f_i \rfloor`. Gradients flow through the amplitudes
    only.

    Args:
        x: Sequences, ``(B, L, D)``, real floating point.
        top_k: How many periods k, at most ``L // 2``. Several frequencies may give one period.
        shared: Choose the frequencies once, by the mean amplitude over the batch; else for every sample alone.

    Returns:
        Periods, ``(k,)`` or, not shared, ``(B, k)``, strongest first; and the amplitudes of each sample at these
        frequencies, ``(B, k)``, in float32 at least.

    Raises:
        ValueError: ``x`` is not 3-d, or ``top_k`` exceeds ``L // 2``.
    """
    length = check_shape("x", x, "B L D")["L"]
    check_floating("x", x)
    _check_top_k(top_k, length)
    amplitude = _amplitude(x)  # (B, L // 2 + 1)
    score = amplitude.detach()
    score = score.mean(0) if shared else score
    frequencies = score[..., 1:].topk(top_k, dim=-1).indices + 1  # frequency 0 is the mean
    return length // frequencies, amplitude.gather(1, frequencies.expand(len(x), top_k))


def _amplitude(x: Tensor) -> Tensor:
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return torch.fft.rfft(wide, dim=1).abs().mean(-1)


def _check_top_k(top_k: int, length: int) -> None:
    check_positive("top_k", top_k, integer=True)
    if top_k > length // 2:
        raise ValueError(f"`top_k` must be at most {length // 2}, half the length {length}, got {top_k}.")


class InceptionConv2d(nn.Module):
    r"""Mean of parallel convolutions with kernels 1x1, 3x3, ..., (2K-1)x(2K-1).

    The mean of convolutions is the convolution with the mean kernel, each padded to the largest size; so one
    convolution does the work of K, with the same gradients. Of its kernel only the centre can touch data when the
    picture is small: at most ``2 rows - 1`` by ``2 columns - 1``; the rest meets padding and is cropped.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        num_kernels: Number of kernels K.
        merged: Convolve once with the merged and cropped kernel; else K times and average, as the paper writes it.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_kernels: int = 6,
        *,
        merged: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("num_kernels", num_kernels, integer=True)
        self.merged = merged
        self.kernels = nn.ModuleList()
        for j in range(num_kernels):
            kernel = nn.Conv2d(in_channels, out_channels, 2 * j + 1, padding=j, device=device, dtype=dtype)
            nn.init.kaiming_normal_(kernel.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(kernel.bias)  # pyright: ignore[reportArgumentType]
            self.kernels.append(kernel)

    def merge(self) -> tuple[Tensor, Tensor]:
        """Return the merged kernel ``(out, in, 2K-1, 2K-1)`` and bias ``(out,)``, differentiable in the K kernels."""
        weight, *larger = (self.get_parameter(f"kernels.{j}.weight") for j in range(len(self.kernels)))
        for kernel in larger:
            weight = kernel + F.pad(weight, (1, 1, 1, 1))
        biases: list[Tensor] = [self.get_parameter(f"kernels.{j}.bias") for j in range(len(self.kernels))]
        return weight / len(self.kernels), torch.stack(biases).mean(0)

    def forward(self, x: Tensor, kernel: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Convolve pictures.

        Args:
            x: Pictures, ``(B, in_channels, H, W)``; channels-last memory is fastest.
            kernel: Result of :meth:`merge`, to merge once for several calls.

        Returns:
            ``(B, out_channels, H, W)``.
        """
        if not self.merged:
            return torch.stack([conv(x) for conv in self.kernels], dim=-1).mean(-1)
        weight, bias = self.merge() if kernel is None else kernel
        reach = [min(len(self.kernels), size) - 1 for size in x.shape[-2:]]
        crop = [slice(len(self.kernels) - 1 - r, len(self.kernels) + r) for r in reach]
        return F.conv2d(x, weight[:, :, crop[0], crop[1]], bias, padding=reach)


class TimesBlock(nn.Module):
    r"""Residual block: fold at each dominant period, convolve in 2-D, unfold, average by the periods' strength.

    .. math:: y = x + \sum_i \mathrm{softmax}_i(A_{f_i}) \; \mathrm{unfold}(g(\mathrm{fold}_{p_i}(x))),
        \qquad g = \mathrm{Inception} \circ \mathrm{GELU} \circ \mathrm{Inception}

    ``fold`` pads the sequence with zeros to whole periods; g is shared by all periods. A period that comes from several
    frequencies is convolved once, with the sum of their weights, and only for the samples that give it a weight above
    the square of the rounding error. At most O(k (2K-1)^2 d_model d_ff L) time.

    Args:
        d_model: Width d of the sequence.
        d_ff: Width between the two convolutions.
        top_k: Number of frequencies k; not used when periods are given.
        num_kernels: Number of parallel kernels K.
        period: ``"batch"``: one choice of periods for the whole batch, as published. ``"sample"``: each sample has its
            own, so that rows of a batch are independent; samples that share a period are convolved together. A sequence
            of integers: these periods, each weighted by the amplitude at the nearest frequency.
        inception: ``"merged"`` or ``"separate"``, see :class:`InceptionConv2d`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        top_k: int = 5,
        num_kernels: int = 6,
        period: Period = "batch",
        inception: Literal["merged", "separate"] = "merged",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("inception", inception, ("merged", "separate"))
        if isinstance(period, str):
            check_choice("period", period, ("batch", "sample"))
        elif not period or len(set(period)) < len(period) or min(period) < 2:
            raise ValueError(f"`period` must hold distinct integers of at least 2, got {tuple(period)}.")
        self.top_k = top_k
        self.period = period if isinstance(period, str) else tuple(period)
        kwargs = {"merged": inception == "merged", "device": device, "dtype": dtype}
        self.conv = nn.Sequential(
            InceptionConv2d(d_model, d_ff, num_kernels, **kwargs),
            nn.GELU(),
            InceptionConv2d(d_ff, d_model, num_kernels, **kwargs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, ``(B, L, d_model)`` like ``x``.

        Raises:
            ValueError: ``x`` is not 3-d, or shorter than twice ``top_k`` or than a given period.
        """
        length = check_shape("x", x, "B L D")["L"]
        x = x.contiguous()  # so that every fold is a channels-last picture without a copy
        kernels = [c.merge() if c.merged else None for c in self.conv if isinstance(c, InceptionConv2d)]
        if isinstance(self.period, str):
            periods, strength = dominant_periods(x, self.top_k, shared=self.period == "batch")
            distinct = periods.unique().tolist()
        else:
            if max(self.period) > length:
                raise ValueError(f"`period` must be at most the length {length}, got {self.period}.")
            frequencies = [min(max(round(length / p), 1), length // 2) for p in self.period]
            periods, strength = torch.tensor(self.period, device=x.device), _amplitude(x)[:, frequencies]
            distinct = self.period
        share = strength.softmax(1)  # (B, k)
        # A share below the square of the rounding error changes nothing, but gradients times subnormal shares are slow.
        share = share.masked_fill(share < torch.finfo(share.dtype).eps ** 2, 0).to(x.dtype)
        y = x
        for p in distinct:
            weight = (share * (periods == p)).sum(1)  # (B,)
            rows = weight.nonzero().squeeze(1) if isinstance(self.period, str) else None
            if rows is None or len(rows) == len(x):
                y = y + weight[:, None, None] * self._mix(x, p, kernels)
            elif len(rows) > 0:
                y = y.index_add(0, rows, weight[rows, None, None] * self._mix(x[rows], p, kernels))
        return y

    def _mix(self, x: Tensor, period: int, kernels: list[tuple[Tensor, Tensor] | None]) -> Tensor:
        length = x.shape[1]
        folded = F.pad(x, (0, 0, 0, -length % period)).unflatten(1, (-1, period))  # (B, rows, p, D)
        h = self.conv[0](folded.permute(0, 3, 1, 2), kernels[0])  # in channels-last memory as it is
        h = self.conv[1](h.permute(0, 2, 3, 1))  # contiguous: PyTorch's GELU is ten times slower on the permuted view
        h = self.conv[2](h.permute(0, 3, 1, 2), kernels[1])
        return h.permute(0, 2, 3, 1).flatten(1, 2)[:, :length]


class TimesNet(nn.Module):
    r"""TimesNet for one task: normalise the window, embed, ``e_layers`` blocks with one shared LayerNorm, project.

    Args:
        task: ``"forecast"`` (long-term, or short-term without time marks), ``"impute"``, ``"anomaly"`` (reconstruction)
            or ``"classify"``.
        seq_len: Steps seen, S.
        pred_len: Steps to forecast, P; 0 for the other tasks.
        n_channels: Number of variates C.
        d_model: Width of the hidden sequence.
        d_ff: Width inside a block.
        e_layers: Number of blocks.
        top_k: Periods a block uses; at most half of S + P. The paper has 5 for forecasts, 3 for the other tasks.
        num_kernels: Parallel kernels K; the largest is (2K-1)x(2K-1).
        num_class: Number of classes (``task="classify"``).
        embed: How time marks enter, see :class:`~dynakern.layers.embedding.DataEmbedding`.
        freq: Frequency of the series (``"h"``, ``"15min"``, ...); it gives the number of mark columns.
        num_marks: Number of mark columns, where it is not what ``freq`` says; 0 builds a network without marks.
        dropout: Dropout rate.
        period: ``"batch"`` (as published), ``"sample"`` or a sequence of periods, see :class:`TimesBlock`.
        inception: ``"merged"`` or ``"separate"``, see :class:`InceptionConv2d`; the results are equal.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: An option is out of range; the message says which.

    Source: arXiv:2210.02186, section 3. As in the authors' code a series is embedded by a circular convolution with
    sinusoidal positions, and windows are normalised except for classification. Differs from that code: a variate
    without any observed entry has mean 0 instead of dividing by zero; values under a zero mask are ignored, whatever
    they are.
    """

    head_keys = ("projection.",)

    def __init__(
        self,
        task: Task = "forecast",
        *,
        seq_len: int = 96,
        pred_len: int = 0,
        n_channels: int = 7,
        d_model: int = 16,
        d_ff: int = 32,
        e_layers: int = 2,
        top_k: int = 5,
        num_kernels: int = 6,
        num_class: int = 2,
        embed: Literal["timeF", "fixed", "learned"] = "timeF",
        freq: str = "h",
        num_marks: int | None = None,
        dropout: float = 0.1,
        period: Period = "batch",
        inception: Literal["merged", "separate"] = "merged",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("task", task, ("forecast", "impute", "anomaly", "classify"))
        if (pred_len > 0) != (task == "forecast"):
            raise ValueError(
                f"`pred_len` must be positive to forecast and 0 otherwise, got {pred_len} for task={task!r}."
            )
        length = seq_len + pred_len
        if period in ("batch", "sample"):
            _check_top_k(top_k, length)
        elif not isinstance(period, str) and max(period, default=0) > length:
            raise ValueError(f"`period` must be at most seq_len + pred_len = {length}, got {tuple(period)}.")
        kwargs = {"device": device, "dtype": dtype}
        letter = parse_frequency(freq)
        if num_marks is None:
            num_marks = FREQUENCIES[letter] if embed == "timeF" else 4 + (letter == "t")
        self.task, self.seq_len, self.pred_len, self.n_channels = task, seq_len, pred_len, n_channels
        self.enc_embedding = DataEmbedding(
            n_channels,
            d_model,
            embed=embed,
            num_marks=num_marks,
            dropout=dropout,
            max_length=max(5000, seq_len),
            **kwargs,
        )
        if task == "forecast":
            self.predict_linear = nn.Linear(seq_len, length, **kwargs)
        options = {"top_k": top_k, "num_kernels": num_kernels, "period": period, "inception": inception, **kwargs}
        self.model = nn.ModuleList(TimesBlock(d_model, d_ff, **options) for _ in range(e_layers))
        self.layer_norm = nn.LayerNorm(d_model, **kwargs)
        self.dropout = nn.Dropout(dropout)
        wide, out = (d_model * seq_len, num_class) if task == "classify" else (d_model, n_channels)
        self.projection = nn.Linear(wide, out, **kwargs)

    def forward(self, x: Tensor, marks: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Run the network.

        Args:
            x: Windows, ``(B, seq_len, n_channels)``.
            marks: Calendar of the window, ``(B, seq_len, F)`` or, of window and horizon, ``(B, seq_len + pred_len,
                F)``, of which the first ``seq_len`` are used. Not for classification. Optional.
            mask: To impute: ``(B, seq_len, n_channels)``, 1 where observed, 0 where missing. To classify: ``(B,
                seq_len)``, 1 at real and 0 at padded steps; optional. Not for other tasks.

        Returns:
            Forecast ``(B, pred_len, n_channels)``; completed or reconstructed window ``(B, seq_len, n_channels)``; or
            logits ``(B, num_class)``.

        Raises:
            ValueError: A shape is wrong, or the mask is missing or does not belong to the task.
            TypeError: ``x`` is not floating point.
        """
        size = check_shape("x", x, f"B {self.seq_len} {self.n_channels}")["B"]
        check_floating("x", x)
        if marks is not None:
            if self.task == "classify":
                raise ValueError("`marks` are not used to classify.")
            if marks.ndim == 3 and marks.shape[1] == self.seq_len + self.pred_len:
                marks = marks[:, : self.seq_len]
        if (self.task == "impute" and mask is None) or (self.task in ("forecast", "anomaly") and mask is not None):
            verb = "needs" if mask is None else "takes no"
            raise ValueError(f"task={self.task!r} {verb} `mask`.")
        if self.task == "classify":
            return self._classify(x, mask)
        if mask is not None:
            check_shape("mask", mask, f"{size} {self.seq_len} {self.n_channels}")
        x, mean, scale = _normalise(x, mask)
        h = self.enc_embedding(x, marks)
        if self.task == "forecast":
            h = self.predict_linear(h.transpose(1, 2)).transpose(1, 2)  # (B, seq_len + pred_len, d_model)
        y = self.projection(self._encode(h)) * scale + mean
        return y[:, -self.pred_len :]  # all of it when pred_len is 0

    def _encode(self, h: Tensor) -> Tensor:
        for block in self.model:
            h = self.layer_norm(block(h))
        return h

    def _classify(self, x: Tensor, mask: Tensor | None) -> Tensor:
        h = self.dropout(F.gelu(self._encode(self.enc_embedding(x))))
        if mask is not None:
            check_shape("mask", mask, f"{x.shape[0]} {self.seq_len}")
            h = h * mask.unsqueeze(-1).to(h.dtype)
        return self.projection(h.flatten(1))

    def extra_repr(self) -> str:
        """Return task and window, for ``repr``."""
        return f"task={self.task!r}, seq_len={self.seq_len}, pred_len={self.pred_len}, n_channels={self.n_channels}"


def _normalise(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(x - mean) / scale`` (0 where missing), and mean and scale ``(B, 1, C)`` of the observed entries."""
    if mask is None:
        mean = x.mean(1, keepdim=True)
        scale = torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5)
        return (x - mean) / scale, mean, scale
    missing = mask == 0
    count = (~missing).sum(1, keepdim=True).clamp_min(1)  # a variate without observed entries gets mean 0
    mean = x.masked_fill(missing, 0).sum(1, keepdim=True) / count
    x = (x - mean).masked_fill(missing, 0)
    scale = torch.sqrt(x.square().sum(1, keepdim=True) / count + 1e-5)
    return x / scale, mean, scale


def convert_state_dict(state: dict[str, Tensor], model: TimesNet) -> dict[str, Tensor]:
    """Return the authors' ``state`` for ``model``: the keys agree; sinusoidal tables that it leaves out are added."""
    constants = {k: v for k, v in model.state_dict().items() if k.endswith((".pe", "_embed.emb.weight"))}
    return {**constants, **state}


def timesnet(**overrides) -> TimesNet:
    """TimesNet with every option at its default: 96 to 96 steps of 7 variates, width 16/32, 2 blocks."""
    task = overrides.get("task", "forecast")
    return TimesNet(**{"pred_len": 96 if task == "forecast" else 0, **overrides})


def timesnet_etth1(**overrides) -> TimesNet:
    """TimesNet to forecast ETTh1 (7 hourly variates), width 16/32."""
    return timesnet(**{"d_model": 16, "d_ff": 32, **overrides})


def timesnet_etth2(**overrides) -> TimesNet:
    """TimesNet to forecast ETTh2 (7 hourly variates), width 32/32."""
    return timesnet(**{"d_model": 32, "d_ff": 32, **overrides})


def timesnet_ettm1(**overrides) -> TimesNet:
    """TimesNet to forecast ETTm1 (7 quarter-hourly variates), width 64/64, from horizon 336 on 16/32."""
    return _by_horizon(336, (64, 64), (16, 32), {"freq": "15min", **overrides})


def timesnet_ettm2(**overrides) -> TimesNet:
    """TimesNet to forecast ETTm2 (7 quarter-hourly variates), width 32/32, from horizon 720 on 16/32."""
    return _by_horizon(720, (32, 32), (16, 32), {"freq": "15min", **overrides})


def timesnet_ecl(**overrides) -> TimesNet:
    """TimesNet to forecast Electricity (321 hourly variates), width 256/512."""
    return timesnet(**{"n_channels": 321, "d_model": 256, "d_ff": 512, **overrides})


def timesnet_traffic(**overrides) -> TimesNet:
    """TimesNet to forecast Traffic (862 hourly variates), width 512/512."""
    return timesnet(**{"n_channels": 862, "d_model": 512, "d_ff": 512, **overrides})


def timesnet_weather(**overrides) -> TimesNet:
    """TimesNet to forecast Weather (21 variates, every 10 minutes), width 32/32."""
    return timesnet(**{"n_channels": 21, "freq": "10min", "d_model": 32, "d_ff": 32, **overrides})


def timesnet_exchange(**overrides) -> TimesNet:
    """TimesNet to forecast Exchange (8 daily variates), width 64/64, from horizon 336 on 32/32."""
    return _by_horizon(336, (64, 64), (32, 32), {"n_channels": 8, "freq": "d", **overrides})


def timesnet_ili(**overrides) -> TimesNet:
    """TimesNet to forecast ILI (7 weekly variates, 36 to 24 steps), width 768/768."""
    return timesnet(**{"seq_len": 36, "pred_len": 24, "freq": "w", "d_model": 768, "d_ff": 768, **overrides})


def _by_horizon(bound: int, near: tuple[int, int], far: tuple[int, int], overrides: dict) -> TimesNet:
    d_model, d_ff = far if overrides.get("pred_len", 96) >= bound else near
    return timesnet(**{"d_model": d_model, "d_ff": d_ff, **overrides})


_M4_HORIZONS = {"yearly": 6, "quarterly": 8, "monthly": 18, "weekly": 13, "daily": 14, "hourly": 48}


def timesnet_m4(frequency: str = "monthly", **overrides) -> TimesNet:
    """TimesNet to forecast M4 series of one frequency: univariate, twice the horizon seen, no marks, width 32/32."""
    check_choice("frequency", frequency, tuple(_M4_HORIZONS))
    horizon = _M4_HORIZONS[frequency]
    window = {"seq_len": 2 * horizon, "pred_len": horizon, "n_channels": 1, "num_marks": 0}
    return timesnet(**{**window, "d_model": 32, "d_ff": 32, **overrides})


def timesnet_ett_imputation(**overrides) -> TimesNet:
    """TimesNet to impute windows of 96 hourly steps of 7 variates, width 16/32, 3 periods."""
    return TimesNet("impute", **{"d_model": 16, "d_ff": 32, "top_k": 3, **overrides})


def timesnet_uea(**overrides) -> TimesNet:
    """TimesNet to classify series (pass ``n_channels``, ``seq_len``, ``num_class``), width 32/64, 3 periods."""
    return TimesNet("classify", **{"d_model": 32, "d_ff": 64, "top_k": 3, "num_marks": 0, **overrides})


def _detector(overrides: dict, **defaults) -> TimesNet:
    return TimesNet("anomaly", **{"seq_len": 100, "top_k": 3, "num_marks": 0, **defaults, **overrides})


def timesnet_smd(**overrides) -> TimesNet:
    """TimesNet to reconstruct the server machine data (38 variates), width 64/64, 5 periods."""
    return _detector(overrides, n_channels=38, d_model=64, d_ff=64, top_k=5)


def timesnet_msl(**overrides) -> TimesNet:
    """TimesNet to reconstruct the Mars rover's telemetry (55 variates), width 8/16, 1 block."""
    return _detector(overrides, n_channels=55, d_model=8, d_ff=16, e_layers=1)


def timesnet_smap(**overrides) -> TimesNet:
    """TimesNet to reconstruct the soil-moisture satellite's telemetry (25 variates), width 128/128, 3 blocks."""
    return _detector(overrides, n_channels=25, d_model=128, d_ff=128, e_layers=3)


def timesnet_swat(**overrides) -> TimesNet:
    """TimesNet to reconstruct the water-treatment plant (51 variates), width 64/64, 3 blocks."""
    return _detector(overrides, n_channels=51, d_model=64, d_ff=64, e_layers=3)


def timesnet_psm(**overrides) -> TimesNet:
    """TimesNet to reconstruct the pooled server metrics (25 variates), width 64/64."""
    return _detector(overrides, n_channels=25, d_model=64, d_ff=64)


def _small(length: int) -> dict:
    """Return the options of a competitor that trains within a minute on a CPU."""
    return {"d_model": 16, "d_ff": 16, "num_kernels": 4, "top_k": min(3, length // 2), "e_layers": 1}


def forecaster(*, channels: int, context: int, horizon: int, time_features: int) -> TimesNet:
    """Build a small forecaster, ``(x (B, context, C), marks (B, context + horizon, F) | None) -> (B, horizon, C)``.

    Width 16/16, 4 kernels, 3 periods, 1 block: a tenth of the published ETTh1 network's work.
    """
    options = _small(context + horizon)
    return TimesNet(seq_len=context, pred_len=horizon, n_channels=channels, num_marks=time_features, **options)


def imputer(*, channels: int, length: int) -> nn.Module:
    """Build a small imputer, ``(x (B, L, C), mask (B, L, C), 1 = observed) -> (B, L, C)``; width 16/16, 2 blocks."""
    options = {**_small(length), "e_layers": 2}
    return _MaskSecond(TimesNet("impute", seq_len=length, n_channels=channels, num_marks=0, **options))


def detector(*, channels: int, length: int) -> TimesNet:
    """Build a small detector: reconstruction ``(B, L, C) -> (B, L, C)``; width 16/16, 4 kernels, 3 periods, 1 block."""
    return TimesNet("anomaly", seq_len=length, n_channels=channels, num_marks=0, **_small(length))


def series_classifier(*, channels: int, length: int, classes: int) -> nn.Module:
    """Build a small classifier, ``(x (B, L, C), lengths (B,) | None) -> (B, classes)``; width 16/16, 1 block."""
    options = {**_small(length), "num_class": classes}
    return _MaskSecond(TimesNet("classify", seq_len=length, n_channels=channels, num_marks=0, **options))


class _MaskSecond(nn.Module):
    """Pass the second argument on as ``mask``: as it is, or made from lengths ``(B,)``."""

    def __init__(self, net: TimesNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None and self.net.task == "classify":
            mask = torch.arange(x.shape[1], device=x.device) < mask[:, None]
        return self.net(x, mask=mask)
