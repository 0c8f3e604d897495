"""Engines: what is picked and why, what is refused, and that threads do not change results."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import numba
import pytest
import torch
from torch.autograd import forward_ad

from dynakern.measure import count_flops
from dynakern.ops import explain_backend, fft_conv
from dynakern.ops.dispatch import numba_threads, refuse_double_backward, resolve_backend


def pick(backend="auto", x=None, refusals=None, small=False):
    x = torch.zeros(2) if x is None else x
    return resolve_backend(
        "op", backend, (x, None), refusals={"cpu": None} if refusals is None else refusals, small=small
    )


def test_auto_takes_what_fits_and_never_raises():
    assert pick() == "cpu"
    assert pick(small=True) == "reference"
    assert pick(refusals={"cpu": "too odd"}) == "reference"
    assert pick(refusals={"gpu": None}) == "reference"
    assert pick(refusals={}) == "reference"
    with forward_ad.dual_level():
        assert pick(x=forward_ad.make_dual(torch.zeros(2), torch.ones(2))) == "reference"
        assert pick() == "cpu"
    seen = []
    torch.func.vmap(lambda row: (seen.append(pick(x=row)), row)[1])(torch.zeros(3, 2))
    assert seen == ["reference"]


def test_a_named_engine_runs_or_says_why():
    assert pick("cpu", small=True) == "cpu"
    assert pick("reference") == "reference"
    with pytest.raises(NotImplementedError, match="op: the gpu engine cannot run: the operator has no gpu engine"):
        pick("gpu")
    with pytest.raises(NotImplementedError, match=r"does not take tensors on 'cpu'\. Pass backend='reference'"):
        pick("gpu", refusals={"gpu": None})
    with pytest.raises(NotImplementedError, match="too odd"):
        pick("cpu", refusals={"cpu": "too odd"})
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode tangent"):
        pick("cpu", x=forward_ad.make_dual(torch.zeros(2), torch.ones(2)))
    with pytest.raises(NotImplementedError, match="functorch transform"):
        torch.func.vmap(lambda row: (pick("cpu", x=row), row)[1])(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="Did you mean 'reference'"):
        pick("refrence")


def test_explain_backend_runs_nothing():
    u, k = torch.zeros(8, 32, 4096), torch.zeros(32, 4096)
    choice = explain_backend(fft_conv, u, k)
    assert (choice.operator, choice.engine) == ("fft_conv", "cpu")
    assert "cpu" in str(choice)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="called no operator"):
        explain_backend(model, torch.zeros(1, 2))
    assert fft_conv(u, k).shape == u.shape  # explaining has ended
    with pytest.raises(ValueError, match="must have"):
        explain_backend(fft_conv, u, k[:2])


def test_choice_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger="dynakern.ops"):
        pick()
    assert "op: cpu (the fast engine for 'cpu' tensors)" in caplog.text


def test_counting_flops_ignores_size():
    seen = []
    count_flops(lambda: seen.append(pick(small=True)))
    assert seen == ["cpu"]


def test_numba_leaves_torch_threads_alone():
    code = """
import torch
torch.set_num_threads(1)
from dynakern.ops import dtw
x = torch.randn(3, 8, 1)
dtw(x, x)
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


def test_numba_threads_follow_torch():
    before = numba.get_num_threads()
    with numba_threads():
        assert numba.get_num_threads() == min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    assert numba.get_num_threads() == before


def test_double_backward_message_names_the_way_out():
    with pytest.raises(NotImplementedError, match=r"op: .*backend='reference'"):
        refuse_double_backward("op")
