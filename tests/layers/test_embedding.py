from __future__ import annotations

import math

import pytest
import torch

from dynakern.layers import DataEmbedding, sinusoidal_table
from dynakern.testing import assert_same, randn


@pytest.mark.parametrize("d_model", [6, 7])
def test_sinusoidal_table(d_model):
    table = sinusoidal_table(50, d_model, dtype=torch.float64)
    assert table.shape == (50, d_model)
    for p, c in ((0, 0), (0, 1), (17, 2), (49, d_model - 1)):
        angle = p * 10000 ** (-(c - c % 2) / d_model)
        assert table[p, c].item() == pytest.approx(math.cos(angle) if c % 2 else math.sin(angle), abs=1e-5)


def test_values_are_convolved_on_a_circle():
    layer, x = DataEmbedding(3, 4, dropout=0.0, dtype=torch.float64), randn(2, 9, 3)
    positions, weight = layer.position_embedding.pe[:, :9], layer.value_embedding.tokenConv.weight
    expected = sum(x.roll(1 - s, 1) @ weight[:, :, s].T for s in range(3)) + positions
    assert_same(layer(x), expected)


@pytest.mark.parametrize("embed", ["fixed", "learned"])
def test_tables_are_summed_by_column(embed):
    layer, x = DataEmbedding(3, 4, embed=embed, num_marks=5, dropout=0.0), randn(1, 2, 3, dtype=torch.float32)
    marks = torch.tensor([[[12, 31, 6, 23, 3], [1, 1, 0, 0, 0]]])
    tables = [layer.state_dict()[key] for key in layer.state_dict() if "_embed." in key]
    assert [len(table) for table in tables] == [13, 32, 7, 24, 4]
    expected = sum(table[marks[..., i]] for i, table in enumerate(tables))
    assert_same(layer(x, marks) - layer(x), expected, rtol=1e-5)
    assert_same(layer(x, marks.float()), layer(x, marks))
    assert all(p.requires_grad == (embed == "learned") for n, p in layer.named_parameters() if "_embed." in n)


def test_features_are_mapped_linearly():
    layer, x, marks = DataEmbedding(3, 4, dropout=0.0), randn(2, 5, 3, dtype=torch.float32), torch.rand(2, 5, 4)
    assert_same(layer(x, marks) - layer(x), marks @ layer.temporal_embedding.embed.weight.T, rtol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="`embed` must be one of"):
        DataEmbedding(3, 4, embed="none")
    with pytest.raises(ValueError, match="`num_marks` must be 4 or 5 for embedding tables, got 6"):
        DataEmbedding(3, 4, embed="learned", num_marks=6)
    with pytest.raises(ValueError, match="num_marks=0"):
        DataEmbedding(3, 4, num_marks=0)(torch.zeros(1, 5, 3), torch.zeros(1, 5, 4))
    with pytest.raises(ValueError, match="`marks` must have size 5 on axis 1"):
        DataEmbedding(3, 4)(torch.zeros(1, 5, 3), torch.zeros(1, 6, 4))
