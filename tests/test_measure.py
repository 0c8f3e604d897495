"""The meters: FLOPs of known work, memory of a known allocation, times in order."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from dynakern.measure import count_flops, count_parameters, describe_environment, peak_memory, time_interleaved


def test_times_are_interleaved_and_ordered():
    order = []

    def work(label, seconds):
        return lambda: (order.append(label), time.sleep(seconds))

    times = time_interleaved({"a": work("a", 0.001), "b": work("b", 0.01)}, repeats=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert times["a"].median < times["b"].median
    assert times["b"].lower <= times["b"].median <= times["b"].upper
    assert times["b"].median >= 0.01
    assert times["a"].runs == 3


def test_peak_memory_sees_an_allocation_that_is_gone_at_the_end():
    def use(megabytes):
        block = np.ones(megabytes * 125_000)
        return float(block.sum())

    use(1)
    assert peak_memory(lambda: use(40)) == pytest.approx(40, abs=4)
    assert peak_memory(lambda: None) < 1


def test_flops_of_known_work():
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    conv = torch.nn.Conv2d(3, 4, 3, padding=1)
    assert count_flops(lambda: conv(torch.zeros(2, 3, 8, 8))) == 2 * 2 * 8 * 8 * 4 * 3 * 9
    lstm = torch.nn.LSTM(3, 5)
    assert count_flops(lambda: lstm(torch.zeros(7, 2, 3))) == 2 * 7 * 2 * 4 * 5 * (3 + 5)
    assert count_flops(lambda: torch.fft.rfft(torch.zeros(6, 1024))) == round(2.5 * 6 * 1024 * 10)
    assert count_flops(lambda: torch.fft.fft(torch.zeros(6, 1024, dtype=torch.complex64))) == 5 * 6 * 1024 * 10


def test_unknown_flops_are_none_never_zero():
    assert count_flops(lambda: torch.zeros(3) + 1) is None

    @torch.library.custom_op("dynakern::test_without_formula", mutates_args=())
    def op(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    a = torch.zeros(3, 3)
    assert count_flops(lambda: op(a @ a)) is None


def test_parameters_and_environment():
    model = torch.nn.Linear(3, 4)
    model.bias.requires_grad_(False)
    assert count_parameters(model) == 12
    environment = describe_environment()
    assert environment["torch"].startswith("2.")
    assert {"cpu", "threads", "gpu", "python", "dynakern"} <= set(environment)
