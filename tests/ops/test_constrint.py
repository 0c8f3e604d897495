"""ConstrINT: the solver finds what exhaustive search finds, and says what is wrong with a text."""

from __future__ import annotations

import itertools
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynakern.ops.constrint import (
    ConstraintSyntaxError,
    Infeasible,
    Undecided,
    autotune,
    largest_head,
    solutions,
    solve,
    tiling_problem,
)

A100 = {
    "maxThreadsPerBlock": 1024, "regsPerMultiprocessor": 65536, "multiProcessorCount": 108,
    "sharedMemPerBlockOptin": 166912,
}  # fmt: skip
RTX3090 = A100 | {"multiProcessorCount": 82, "sharedMemPerBlockOptin": 101376}
H100 = A100 | {"multiProcessorCount": 132, "sharedMemPerBlockOptin": 232448}

LIMIT = 9  # of every variable in the exhaustive comparison
NAMES = "ABC"


@st.composite
def side(draw, depth=2):
    """Return the text of a side and its value as a function of an assignment."""
    kind = draw(st.sampled_from(["name", "name", "number", "power", "sum", "product"] if depth else ["name", "number"]))
    if kind == "name":
        name = draw(st.sampled_from(NAMES))
        return name, lambda v: v[name]
    if kind == "number":
        number = draw(st.integers(1, 30))
        return str(number), lambda v: number
    if kind == "power":
        text, value = draw(side(depth=depth - 1))
        exponent = draw(st.integers(1, 3))
        return f"({text}) ^ {exponent}", lambda v: value(v) ** exponent
    (t1, f1), (t2, f2) = draw(side(depth=depth - 1)), draw(side(depth=depth - 1))
    if kind == "sum":
        return f"({t1} + {t2})", lambda v: f1(v) + f2(v)
    return f"{t1} * {t2}", lambda v: f1(v) * f2(v)


@st.composite
def clause(draw, depth=1):
    kind = draw(st.sampled_from(["<=", "<=", "==", "%", *(["or", "or"] if depth else []), "list"]))
    if kind == "or":
        parts = [draw(clause(depth=0)) for _ in range(draw(st.integers(2, 3)))]
        return " | ".join(t for t, _ in parts), lambda v: any(f(v) for _, f in parts)
    if kind == "list":
        name, values = draw(st.sampled_from(NAMES)), draw(st.lists(st.integers(1, LIMIT), min_size=1, max_size=4))
        return f"{name} == {values}", lambda v: v[name] in values
    (t1, f1), (t2, f2) = draw(side()), draw(side())
    if kind == "<=":
        return f"{t1} <= {t2}", lambda v: f1(v) <= f2(v)
    if kind == "==":
        return f"{t1} == {t2}", lambda v: f1(v) == f2(v)
    return f"{t1} % {t2} == 0", lambda v: f1(v) % f2(v) == 0


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(clause(), min_size=1, max_size=4), st.permutations(NAMES), st.tuples(*[st.booleans()] * 3))
def test_all_solutions_are_those_of_exhaustive_search(clauses, order, largest):
    text = "; ".join(t for t, _ in clauses) + "; " + "; ".join(f"{name} <= {LIMIT}" for name in NAMES) + ";"
    ranges = [range(LIMIT, 0, -1) if high else range(1, LIMIT + 1) for high in largest]
    expected = [
        values for values in itertools.product(*ranges)
        if all(f(dict(zip(order, values, strict=True))) for _, f in clauses)
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about parentheses
        names = [name + (":largest" if high else "") for name, high in zip(order, largest, strict=True)]
        found = [tuple(s[name] for name in order) for s in solutions(text, order=names)]
        assert found == expected
        # with the first variable alone, one solution for each of its values
        alone = [s[order[0]] for s in solutions(text, order=names[:1])]
    assert alone == list(dict.fromkeys(values[0] for values in expected))


def test_the_language():
    text = """
    # sizes
    N == 48;  N % (A * B) == 0;   # honoured, and the same without
    A == [2, 4, 8]; B == [3, 6, 12]
    """
    assert solve(text, order=["A:largest", "B"]) == {"N": 48, "A": 8, "B": 3}
    assert solve("A ^ 3 == 64") == {"A": 4}  # a floating-point root would miss it
    assert solve("A == 3 | A == 5 | A == 9; B <= 10; B % A == 0;", order=["A", "B:largest"]) == {"A": 3, "B": 9}
    assert solve("7 * A == 7000000007 * B", order=["B"], max_steps=1000) == {"A": 1000000001, "B": 1}
    assert solve("") == {}
    assert solve("2 * A % 14 == 0; A % 3 == 0; 1000000 <= A") == {"A": 1000020}


def test_parentheses_that_matter_are_flagged():
    with pytest.warns(UserWarning, match="change its meaning"):
        assert solve("(A + B) * C == 12; A == 1; B == 2") == {"A": 1, "B": 2, "C": 4}
    with pytest.warns(UserWarning, match="change its meaning"):
        assert solve("(A == 1; B == 2) | (A == 3; B == 4); 2 <= A") == {"A": 3, "B": 4}
    with pytest.warns(UserWarning, match="change its meaning"):
        assert solve("(A + B) ^ 2 == 49; A + 1 <= B; B == A + 3", order=["A"]) == {"A": 2, "B": 5}
    with pytest.warns(UserWarning, match="change its meaning"):  # nothing is left of it without them
        assert solve("(A ^ 2) ^ 2 == 16") == {"A": 2}
    with pytest.raises(ConstraintSyntaxError):
        solve("(A ^ 2) ^ 2 == 16", parentheses="strip")
    stripped = solve("(A + B) * C == 12; A == 2; B == 2", parentheses="strip")
    assert stripped == {"A": 2, "B": 2, "C": 5}
    with pytest.raises(ValueError, match="'honour' or 'strip'"):
        solve("A == 1", parentheses="keep")


def test_variables_outside_the_order_only_have_to_exist():
    assert [s["A"] for s in solutions("A * B == 12; C <= B; 2 <= C", order=["A:largest"])] == [6, 4, 3, 2, 1]
    with pytest.raises(Infeasible):
        solve("A <= 4; A * A == B; B == 10", order=[])


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        ("A - B == 1;", 1, 3, "no minus"),
        ("A == 4;\n  B / 2 == A;", 2, 5, "no division"),
        ("A < 4", 1, 3, "a \\+ 1 <= b"),
        ("A == ;", 1, 6, "expected a name"),
        ("A + 2;", 1, 6, "expected '<=', '==' or '%'"),
        ("A % 3 == 1", 1, 10, "expected 0"),
        ("A == [1, B]", 1, 10, "expected a number"),
        ("A == 0", 1, 6, "must be positive"),
        ("A ^ B == 4", 1, 5, "exponent"),
        ("A == (3", 1, 8, r"expected '\)'"),
        ("A == 3 B == 4", 1, 8, "expected ';'"),
        ("A == [1, 2", 1, 11, r"expected '\]'"),
    ],
)
def test_malformed_text_is_refused_with_its_position(text, line, column, message):
    with pytest.raises(ConstraintSyntaxError, match=message) as found:
        solve(text)
    assert (found.value.line, found.value.column) == (line, column)
    assert f"line {line}, column {column}" in str(found.value)


def test_contradictions_are_named():
    with pytest.raises(Infeasible) as found:
        solve("A == 7; B <= 3; A <= 5; B == 2")
    assert found.value.conflict == ("A == 7", "A <= 5")
    assert str(found.value).endswith("contradict each other: A == 7; A <= 5")
    assert list(solutions("A == 7; A <= 5")) == []


def test_a_search_that_does_not_end_is_given_up():
    with pytest.raises(Undecided, match="max_steps"):
        solve("A + 1 <= B; B + 1 <= A", max_steps=1000)


def test_refusals():
    with pytest.raises(ValueError, match="names 'C', which is no variable"):
        solve("A == 1", order=["C"])
    with pytest.raises(ValueError, match="NAME:smallest or NAME:largest"):
        solve("A == 1", order=["A:big"])
    with pytest.raises(ValueError, match="twice"):
        solve("A == 1", order=["A", "A:largest"])
    with pytest.raises(TypeError, match="`text` must be a string"):
        solve(3)
    limits = {k: v for k, v in A100.items() if k != "multiProcessorCount"}
    with pytest.raises(ValueError, match="lacks multiProcessorCount"):
        autotune(device=limits, function="lstm", num_heads=1, head_dim=64, batch=8)
    with pytest.raises(ValueError, match="`function` must be one of"):
        autotune(device=A100, function="rnn", num_heads=1, head_dim=64, batch=8)
    with pytest.raises(ValueError, match="`dtype` must be one of"):
        autotune(device=A100, function="lstm", num_heads=1, head_dim=64, batch=8, dtype="float64")


@pytest.mark.parametrize(("device", "lstm", "elman"), [(H100, 2688, 5376), (A100, 2304, 4608), (RTX3090, 1728, 3648)])
def test_largest_heads(device, lstm, elman):
    assert largest_head(device=device, function="lstm") == lstm
    assert largest_head(device=device, function="elman") == elman


def test_a_head_too_wide_is_infeasible():
    with pytest.raises(Infeasible, match=r"contradict each other: .*<= 82"):
        autotune(device=RTX3090, function="lstm", num_heads=1, head_dim=2048, batch=8)


def test_a_tiling_satisfies_its_own_inequalities():
    tiling = autotune(device=A100, function="gru", num_heads=2, head_dim=128, batch=20)
    f, hidden, columns, batch = tiling.forward, 128, 3 * 128, 24  # the batch is rounded up to a multiple of 8
    assert f["tb"] * f["tg"] == 256
    assert f["rg"] * f["rh"] * f["bb"] * f["mh"] <= 108
    assert batch % (f["bb"] * f["wb"] * f["lb"] * f["tb"]) == 0
    assert hidden % (f["rh"] * f["wh"] * f["th"]) == columns % (f["lg"] * f["rg"] * f["tg"]) == 0
    text, order = tiling_problem("backward", device=A100, function="gru", num_heads=2, head_dim=128, batch=20)
    assert solve(text, order=order) == tiling.backward
    assert tiling.macros()["FLASHRNN_HIDDEN_DIM"] == 256
