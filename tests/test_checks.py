"""Checks name the argument, what came and what is needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynakern.checks import (
    check_choice,
    check_finite,
    check_floating,
    check_positive,
    check_same_device,
    check_shape,
    require,
    unknown_name,
)
from dynakern.testing import assert_same, relative_error


def test_check_shape_binds_and_refuses():
    dims = check_shape("x", torch.zeros(2, 5, 3), "B L 3")
    assert dims == {"B": 2, "L": 5}
    assert check_shape("y", torch.zeros(5), "L", dims) == dims
    with pytest.raises(ValueError, match=r"`y` must have L = 5 on axis 0, got shape \(4,\)"):
        check_shape("y", torch.zeros(4), "L", dims)
    with pytest.raises(ValueError, match=r"`x` must have shape \(B, L\), got \(3,\)"):
        check_shape("x", torch.zeros(3), "B L")
    with pytest.raises(ValueError, match="must have size 4 on axis 1"):
        check_shape("x", torch.zeros(3, 5), "B 4")
    with pytest.raises(TypeError, match="`x` must be a tensor, got list"):
        check_shape("x", [1, 2], "B")


def test_other_checks():
    with pytest.raises(TypeError, match=r"floating-point dtype, got torch\.int64"):
        check_floating("x", torch.arange(3))
    with pytest.raises(ValueError, match="`x` on cpu, `y` on meta"):
        check_same_device(x=torch.zeros(1), y=torch.zeros(1, device="meta"), z=None)
    for value, error in (
        (0, ValueError),
        (-1.0, ValueError),
        (float("inf"), ValueError),
        ("1", TypeError),
        (True, TypeError),
    ):
        with pytest.raises(error, match="`n` must be a"):
            check_positive("n", value)
    with pytest.raises(TypeError, match=r"an integer, got 1\.5"):
        check_positive("n", 1.5, integer=True)
    check_positive("n", 0, zero=True)
    with pytest.raises(ValueError, match=r"one of 'zoh', 'dss', got 'zho'. Did you mean 'zoh'"):
        check_choice("disc", "zho", ("zoh", "dss"))
    with pytest.raises(ValueError, match=r"got 1 NaN or infinite value\(s\), the first at index \(1, 0\)"):
        check_finite("x", np.array([[0.0], [np.inf]]))
    with pytest.raises(ImportError, match=r"pip install 'dynakern\[hf\]'"):
        require("no_such_package_anywhere", extra="hf")
    assert unknown_name("system", "zzz", ["b", "a"]) == "Unknown system 'zzz'. Known: a, b."
    many = [f"n{i:02d}" for i in range(30)]
    assert unknown_name("system", "zzz", many) == "Unknown system 'zzz'. Known: 30 names, from n00 to n29."


def test_assert_same_can_fail_and_says_where():
    a = torch.ones(3, 4, dtype=torch.float64)
    b = a.clone()
    b[2, 1] = 1.5
    assert relative_error(b, a) == pytest.approx(0.5 / np.sqrt(12))
    with pytest.raises(AssertionError, match=r"worst at \(2, 1\): 1.5, expected 1.0"):
        assert_same(b, a)
    with pytest.raises(AssertionError, match="shape"):
        assert_same(a[:2], a)
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_same(torch.full((2,), float("nan")), torch.zeros(2))
    assert_same([a, a], [a, a])
