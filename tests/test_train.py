"""The training loop: it learns, repeats itself exactly, resumes exactly, and stops when it must."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from dynakern.train import Budget, NonFiniteLossError, fit, parameter_groups


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 1))


def data(rows=64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 3, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


def loss(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_learns_and_keeps_the_best_weights():
    model, valid = make(), data(32)
    history = fit(model, data(), loss=loss, budget=Budget(epochs=30), validation=valid, lr=1e-2)
    losses = [record.validation_loss for record in history.epochs]
    assert min(losses) < 0.3 * losses[0]
    assert losses[history.best_epoch] == min(losses)
    with torch.no_grad():
        assert float(loss(model, valid[:])) == pytest.approx(min(losses), rel=1e-4)
    assert not model.training
    assert history.steps == 30 * 2


def test_same_seed_same_weights_and_no_trace_in_the_global_generator():
    state = torch.random.get_rng_state()
    one, two, three = make(), make(), make()
    state = torch.random.get_rng_state()
    for model, seed in ((one, 5), (two, 5), (three, 6)):
        fit(model, data(), loss=loss, budget=Budget(epochs=2), seed=seed)
    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one), weights(three))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("schedule", ["constant", "halving", "cosine"])
def test_resume_equals_an_uninterrupted_run(tmp_path, schedule):
    whole, resumed = make(), make()
    settings = {"loss": loss, "validation": data(16), "lr": 1e-2, "weight_decay": 0.01, "schedule": schedule, "seed": 3}
    fit(whole, data(), budget=Budget(epochs=5), **settings)

    class Killed(Exception):
        pass

    def kill_in_epoch_three(model, batch):
        kill_in_epoch_three.calls += 1
        if kill_in_epoch_three.calls == 3 * 2 + 2:  # two steps and one validation batch an epoch
            raise Killed
        return loss(model, batch)

    kill_in_epoch_three.calls = 0
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(Killed):
        fit(make(), data(), budget=Budget(epochs=5), checkpoint=checkpoint, **{**settings, "loss": kill_in_epoch_three})
    torch.manual_seed(99)  # whatever happened in between
    history = fit(resumed, data(), budget=Budget(epochs=5), checkpoint=checkpoint, **settings)
    assert len(history.epochs) == 5
    assert torch.equal(weights(whole), weights(resumed))
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(ValueError, match="belongs to seed 3"):
        fit(make(), data(), budget=Budget(epochs=5), checkpoint=checkpoint, **{**settings, "seed": 4})


def test_early_stop_and_time_budget():
    def worse_and_worse(model, batch):
        if not model.training:
            worse_and_worse.calls += 1
            return torch.tensor(float(worse_and_worse.calls))
        return loss(model, batch)

    worse_and_worse.calls = 0
    history = fit(make(), data(), loss=worse_and_worse, budget=Budget(epochs=50), validation=data(8), patience=3)
    assert len(history.epochs) == 4
    assert history.best_epoch == 0
    assert "3 epochs" in history.stopped
    history = fit(make(), data(), loss=loss, budget=Budget(seconds=0.05))
    assert history.stopped == "out of time"
    assert history.epochs[-1].steps >= 1


def test_non_finite_loss_stops_before_the_step():
    model = make()
    before = weights(model)

    def explode(model, batch):
        return loss(model, batch) * math.inf

    with pytest.raises(NonFiniteLossError, match="epoch 1, step 1"):
        fit(model, data(), loss=explode, budget=Budget(epochs=1))
    assert torch.equal(weights(model), before)


def test_parameter_groups_follow_hints_and_leave_out_the_frozen():
    model = make()
    model[0].weight._optim = {"lr": 1e-4, "weight_decay": 0.0}
    model[0].bias.requires_grad_(False)
    groups = parameter_groups(model, lr=1e-2, weight_decay=0.1)
    found = {(g["lr"], g["weight_decay"]): sum(p.numel() for p in g["params"]) for g in groups}
    assert found == {(1e-4, 0.0): 48, (1e-2, 0.1): 17}


def test_clip_limits_the_step():
    model = nn.Linear(3, 1)
    before = weights(model)
    fit(
        model,
        data(32),
        loss=lambda m, b: 1e6 * loss(m, b),
        budget=Budget(epochs=1),
        clip=1e-3,
        optimizer=lambda g: torch.optim.SGD(g),
    )
    assert float((weights(model) - before).norm()) <= 1.01e-6


def test_batched_dataset_and_mixed_precision():
    class Batched(Dataset):
        def __init__(self):
            self.sizes, (self.x, self.y) = [], data()[:]

        def __len__(self):
            return len(self.x)

        def __getitem__(self, index):
            raise AssertionError("whole batches were promised")

        def __getitems__(self, indices):
            self.sizes.append(len(indices))
            return self.x[indices], self.y[indices]

    batched = Batched()
    history = fit(make(), batched, loss=loss, budget=Budget(epochs=1), batch_size=24, mixed_precision="bf16")
    assert batched.sizes == [24, 24, 16]
    assert math.isfinite(history.epochs[0].train_loss)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("60s", Budget(seconds=60)),
        ("1.5m", Budget(seconds=90)),
        ("10ep", Budget(epochs=10)),
        ("2 epochs", Budget(epochs=2)),
    ],
)
def test_budget_is_read(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["10", "ep", "-3ep", "0ep", "0s", "1.5ep", "ten s"])
def test_budget_refuses(text):
    with pytest.raises(ValueError, match=r"budget|epochs|seconds"):
        Budget.parse(text)


def test_refusals():
    with pytest.raises(ValueError, match="must not be empty"):
        fit(make(), TensorDataset(torch.zeros(0, 3)), loss=loss, budget=Budget(epochs=1))
    with pytest.raises(ValueError, match="no trainable parameter"):
        fit(nn.Identity(), data(), loss=loss, budget=Budget(epochs=1))
    with pytest.raises(ValueError, match="budget in epochs"):
        fit(make(), data(), loss=loss, budget=Budget(seconds=1), schedule="cosine")
    with pytest.raises(ValueError, match="Did you mean 'halving'"):
        fit(make(), data(), loss=loss, budget=Budget(epochs=1), schedule="halfing")
    with pytest.raises(ValueError, match="exactly one"):
        Budget()
