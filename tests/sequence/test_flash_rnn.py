"""FlashRNN the module: with one head it is torch's LSTM, GRU and RNN, argument by argument."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from dynakern import create_model, load_official
from dynakern.ops.flash_rnn import CELLS
from dynakern.sequence import FlashRNN
from dynakern.sequence.flash_rnn import classify_series, forecast
from dynakern.testing import assert_same, grads, randn

TORCH = {"lstm": nn.LSTM, "gru": nn.GRU, "elman": nn.RNN}


def pair(cell, **options):
    torch.manual_seed(0)
    theirs = TORCH[cell](5, 6, dtype=torch.float64, **options)
    ours = FlashRNN(5, 6, cell=cell, dtype=torch.float64, **options)
    return load_official(ours, theirs.state_dict()).eval(), theirs.eval()


def state(cell, rows, *batch):
    found = tuple(randn(rows, *batch, 6, seed=7 + k, requires_grad=False) for k in range(CELLS[cell].states))
    return found if len(found) > 1 else found[0]


@pytest.mark.parametrize("cell", list(TORCH))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"num_layers": 3, "bias": False},
        {"bidirectional": True},
    ],
    ids=["plain", "layers", "no-bias", "directions"],
)
def test_one_head_is_torch(cell, options):
    ours, theirs = pair(cell, **options)
    rows = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    x = randn(4, 7, 5)
    for hx in (None, state(cell, rows, 4 if options.get("batch_first") else 7)):
        actual, expected = ours(x, hx), theirs(x, hx)
        assert_same(actual[0], expected[0])
        assert_same(actual[1], expected[1])
        assert_same(grads(actual[0], (x,)), grads(expected[0], (x,)))
    single, hx = randn(7, 5), state(cell, rows)
    assert_same(ours(single, hx)[0], theirs(single, hx)[0])
    assert_same(ours(single, hx)[1], theirs(single, hx)[1])


@pytest.mark.parametrize("cell", list(TORCH))
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences_are_torch(cell, enforce_sorted):
    ours, theirs = pair(cell, num_layers=2, bidirectional=True)
    lengths = [7, 5, 3, 1] if enforce_sorted else [3, 7, 1, 5]
    x = pack_padded_sequence(randn(7, 4, 5), lengths, enforce_sorted=enforce_sorted)
    for hx in (None, state(cell, 4, 4)):
        (y, last), (want, want_last) = ours(x, hx), theirs(x, hx)
        assert isinstance(y, PackedSequence)
        assert_same(y.data, want.data)
        assert_same(pad_packed_sequence(y)[0], pad_packed_sequence(want)[0])
        assert_same(last, want_last)


@pytest.mark.parametrize("cell", list(CELLS))
def test_heads_are_networks_of_their_own(cell):
    torch.manual_seed(0)
    net = FlashRNN(5, 12, cell=cell, num_heads=3, batch_first=True, dtype=torch.float64)
    x = randn(2, 9, 5, requires_grad=False)
    y, _ = net(x)
    for n in range(3):
        head = FlashRNN(5, 4, cell=cell, batch_first=True, dtype=torch.float64)
        with torch.no_grad():
            head.weight_ih_l0.copy_(net.weight_ih_l0.unflatten(0, (-1, 3, 4))[:, n].flatten(0, 1))
            head.weight_hh_l0.copy_(net.weight_hh_l0[:, n : n + 1])
            head.bias_l0.copy_(net.bias_l0[:, n : n + 1])
        assert_same(y[..., 4 * n : 4 * n + 4], head(x)[0])


@pytest.mark.parametrize("cell", list(CELLS))
def test_pieces_join(cell):
    torch.manual_seed(0)
    net = FlashRNN(5, 8, 2, batch_first=True, cell=cell, num_heads=2, dtype=torch.float64)
    x = randn(3, 11, 5, requires_grad=False)
    y, last = net(x)
    first, hx = net(x[:, :4])
    rest, hx = net(x[:, 4:], hx)
    assert_same(torch.cat([first, rest], 1), y)
    assert_same(hx, last)


def test_block_diagonal_weights_of_torch_load_into_heads():
    torch.manual_seed(0)
    theirs = nn.LSTM(5, 6, dtype=torch.float64)
    ours = FlashRNN(5, 6, num_heads=2, dtype=torch.float64)
    with pytest.raises(ValueError, match="mixes the 2 heads"):
        load_official(ours, theirs.state_dict())
    with torch.no_grad():
        blocks = theirs.weight_hh_l0.unflatten(0, (4, 6))
        blocks[:, :3, 3:] = 0
        blocks[:, 3:, :3] = 0
    x = randn(7, 2, 5)
    assert_same(load_official(ours, theirs.state_dict())(x)[0], theirs(x)[0])
    assert_same(load_official(FlashRNN(5, 6, num_heads=2, dtype=torch.float64), ours.state_dict())(x)[0], ours(x)[0])


def test_dropout_acts_between_layers_in_training_only():
    torch.manual_seed(0)
    net, x = FlashRNN(5, 8, 2, dropout=0.5), torch.randn(7, 2, 5)
    assert not torch.equal(net(x)[0], net(x)[0])
    net.eval()
    assert torch.equal(net(x)[0], net(x)[0])
    with pytest.warns(UserWarning, match="between layers"):
        lone = FlashRNN(5, 8, dropout=0.5)
    assert torch.equal(lone(x)[0], lone(x)[0])


def test_the_empty_batch_and_variants():
    net = FlashRNN(5, 8, batch_first=True, cell="slstm", num_heads=2)
    y, last = net(torch.zeros(0, 3, 5))
    assert y.shape == (0, 3, 8)
    assert last[3].shape == (1, 0, 8)
    for name in ("flash_lstm", "flash_gru", "flash_elman", "flash_slstm"):
        model = create_model(name, num_layers=1, device="meta")
        assert model.weight_hh_l0.shape[1:] == (4, 64, 64)
    assert "num_heads=2, cell='slstm', batch_first=True" in repr(net)


def test_refusals():
    with pytest.raises(NotImplementedError, match="proj_size"):
        FlashRNN(5, 8, proj_size=2)
    with pytest.raises(ValueError, match="divisible by `num_heads`"):
        FlashRNN(5, 8, num_heads=3)
    with pytest.raises(ValueError, match="`cell` must be one of"):
        FlashRNN(5, 8, cell="mlstm")
    with pytest.raises(ValueError, match="rate in"):
        FlashRNN(5, 8, 2, dropout=1.5)
    with pytest.raises(ValueError, match="`hidden_size` must be a positive integer"):
        FlashRNN(5, 0)
    net = FlashRNN(5, 8)
    with pytest.raises(TypeError, match="a tuple of 2 tensors"):
        net(torch.zeros(3, 2, 5), torch.zeros(1, 2, 8))
    with pytest.raises(TypeError, match="one tensor"):
        FlashRNN(5, 8, cell="gru")(torch.zeros(3, 2, 5), (torch.zeros(1, 2, 8),))
    with pytest.raises(ValueError, match="`hx` must have"):
        net(torch.zeros(3, 2, 5), (torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)))
    with pytest.raises(ValueError, match="5 features"):
        net(torch.zeros(3, 2, 4))
    with pytest.raises(ValueError, match="`input` must have shape"):
        net(torch.zeros(3))


def test_competitors_train():
    torch.manual_seed(0)
    series = torch.sin(torch.arange(400.0) / 5).unsqueeze(-1)
    windows = series.unfold(0, 56, 4).transpose(1, 2)  # (N, 56, 1)
    model = forecast(channels=1, context=48, horizon=8, time_features=0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = (model(windows[:, :48]) - windows[:, 48:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    logits = classify_series(channels=2, length=9, classes=3)(torch.randn(4, 9, 2), torch.tensor([9, 1, 4, 3]))
    assert logits.shape == (4, 3)
