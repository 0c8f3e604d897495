"""The data embedding that the networks of the Informer family share: values, positions and calendar."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from dynakern.checks import check_choice, check_shape

__all__ = ["DataEmbedding", "sinusoidal_table"]


def sinusoidal_table(
    length: int, d_model: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    r"""Return a table of :math:`t_{p,2i} = \sin(p\,10000^{-2i/d})`, :math:`t_{p,2i+1} = \cos(p\,10000^{-2i/d})`.

    Args:
        length: Number of positions, counted from 0.
        d_model: Width d; where it is odd the last cosine is left out.
        device: Device of the result.
        dtype: Dtype of the result, by default the default dtype.

    Returns:
        ``(length, d_model)``.

    Source: Vaswani et al., 2017, arXiv:1706.03762, section 3.5.
    """
    position = torch.arange(length, device=device, dtype=torch.float32).unsqueeze(1)
    rate = torch.exp(torch.arange(0, d_model, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / d_model))
    angle = position * rate  # (length, ceil(d / 2))
    table = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :d_model]
    return table.to(dtype or torch.get_default_dtype())


class DataEmbedding(nn.Module):
    r"""Embed a multivariate series: a circular convolution of its values, plus positions, plus its calendar.

    .. math:: h_t = \sum_{s=-1}^{1} W_s x_{(t+s) \bmod L} + \mathrm{pe}_t + \mathrm{calendar}(m_t)

    Args:
        channels: Number of variates C.
        d_model: Width d.
        embed: How time marks enter: ``"timeF"`` a linear map of real calendar features
            (:func:`dynakern.data.calendar.calendar_features`); ``"fixed"`` and ``"learned"`` sums of tables, sinusoidal
            or trained, indexed by integer columns (:func:`dynakern.data.calendar.calendar_columns`).
        num_marks: Number F of mark columns; for tables 4, or 5 with the quarter of the hour. 0 for no marks at all.
        dropout: Dropout rate of the sum.
        max_length: Longest series.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``embed`` is unknown, or tables are asked for with another number of columns than 4 or 5.

    Source: ``DataEmbedding`` of https://github.com/thuml/Time-Series-Library, whose state-dict keys it has.
    """

    def __init__(
        self,
        channels: int,
        d_model: int,
        *,
        embed: Literal["timeF", "fixed", "learned"] = "timeF",
        num_marks: int = 4,
        dropout: float = 0.1,
        max_length: int = 5000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("embed", embed, ("timeF", "fixed", "learned"))
        kwargs = {"device": device, "dtype": dtype}
        self.num_marks = num_marks
        self.value_embedding = _TokenEmbedding(channels, d_model, **kwargs)
        self.position_embedding = _PositionalEmbedding(d_model, max_length, **kwargs)
        if num_marks == 0:
            self.temporal_embedding = None
        elif embed == "timeF":
            self.temporal_embedding = _FeatureEmbedding(num_marks, d_model, **kwargs)
        else:
            self.temporal_embedding = _CalendarTables(num_marks, d_model, trained=embed == "learned", **kwargs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, marks: Tensor | None = None) -> Tensor:
        """Return the embedding.

        Args:
            x: Series, ``(B, L, C)``.
            marks: Calendar of each step, ``(B, L, num_marks)``, or None.

        Returns:
            ``(B, L, d_model)``.

        Raises:
            ValueError: Shapes disagree, or marks come although ``num_marks`` is 0.
        """
        h = self.value_embedding(x) + self.position_embedding(x)
        if marks is not None:
            if self.temporal_embedding is None:
                raise ValueError("`marks` were given, but the network was built with num_marks=0.")
            check_shape("marks", marks, f"{x.shape[0]} {x.shape[1]} {self.num_marks}")
            h = h + self.temporal_embedding(marks)
        return self.dropout(h)


class _TokenEmbedding(nn.Module):
    def __init__(self, channels: int, d_model: int, **kwargs) -> None:
        super().__init__()
        self.tokenConv = nn.Conv1d(channels, d_model, 3, padding=1, padding_mode="circular", bias=False, **kwargs)
        nn.init.kaiming_normal_(self.tokenConv.weight, mode="fan_in", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.tokenConv(x.transpose(1, 2)).transpose(1, 2)


class _PositionalEmbedding(nn.Module):
    pe: Tensor

    def __init__(self, d_model: int, max_length: int, **kwargs) -> None:
        super().__init__()
        self.register_buffer("pe", sinusoidal_table(max_length, d_model, **kwargs).unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.pe[:, : x.shape[1]]


class _FeatureEmbedding(nn.Module):
    def __init__(self, num_marks: int, d_model: int, **kwargs) -> None:
        super().__init__()
        self.embed = nn.Linear(num_marks, d_model, bias=False, **kwargs)

    def forward(self, marks: Tensor) -> Tensor:
        return self.embed(marks.to(self.embed.weight.dtype))


# Table to its size, in the order of the columns; day and month count from 1.
_TABLES = {"month": 13, "day": 32, "weekday": 7, "hour": 24, "minute": 4}


class _CalendarTables(nn.Module):
    def __init__(self, num_marks: int, d_model: int, *, trained: bool, **kwargs) -> None:
        super().__init__()
        if num_marks not in (4, 5):
            raise ValueError(f"`num_marks` must be 4 or 5 for embedding tables, got {num_marks}.")
        self.names = [f"{name}_embed" for name in _TABLES][:num_marks]
        for name, size in zip(self.names, _TABLES.values(), strict=False):
            self.add_module(
                name, nn.Embedding(size, d_model, **kwargs) if trained else _FixedTable(size, d_model, **kwargs)
            )

    def forward(self, marks: Tensor) -> Tensor:
        columns = marks.long().unbind(-1)
        return torch.stack([self.get_submodule(n)(c) for n, c in zip(self.names, columns, strict=True)]).sum(0)


class _FixedTable(nn.Module):
    def __init__(self, size: int, d_model: int, **kwargs) -> None:
        super().__init__()
        self.emb = nn.Embedding.from_pretrained(sinusoidal_table(size, d_model, **kwargs), freeze=True)

    def forward(self, index: Tensor) -> Tensor:
        return self.emb(index)
