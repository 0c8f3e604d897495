"""Tables of samples: what is read, and what is refused with file, line and column."""

from __future__ import annotations

import numpy as np
import pytest

from dynakern.data import sample
from dynakern.data.tables import read_sample_table


def write(tmp_path, text, name="table.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "shape", "test"), [("yacht", (308, 6), 31), ("concrete", (1030, 8), 103), ("power", (9568, 4), 957)]
)
def test_bundled_tables_bring_their_split(name, shape, test):
    table = read_sample_table(sample(f"uci/{name}.txt"))
    assert table.features.shape == shape
    assert table.target.dtype == np.float64
    assert table.is_test.sum() == test
    assert table.columns[:2] == ("x0", "x1")


def test_scikit_learn_tables():
    assert read_sample_table("sklearn:diabetes").target.dtype == np.float64
    digits = read_sample_table("sklearn:digits")
    assert digits.features.shape == (1797, 64)
    assert set(digits.target) == set("0123456789")
    with pytest.raises(ValueError, match="Did you mean 'sklearn:wine'"):
        read_sample_table("sklearn:wines")


def test_categories_targets_and_unsupervised(tmp_path):
    path = write(tmp_path, "size;colour;y\n1.5;red;a\n2;blue;b\n3;red;a\n")
    table = read_sample_table(path)
    assert table.columns == ("size", "colour=blue", "colour=red")
    np.testing.assert_array_equal(table.features, [[1.5, 0, 1], [2, 1, 0], [3, 0, 1]])
    assert table.target.tolist() == ["a", "b", "a"]
    assert read_sample_table(path, target="size").target.tolist() == [1.5, 2.0, 3.0]
    whole = read_sample_table(path, supervised=False)
    assert whole.target is None
    assert whole.columns[-2:] == ("y=a", "y=b")
    assert "y=a" not in read_sample_table(path, target="y", supervised=False).columns


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3\n", r"line 3: 1 field\(s\), expected 2"),
        ("a,b\n1,2\n,3\n", r"line 3, column 'a': an empty field is no number"),
        ("a,b\n1,2\nx,3\n4,5\n", r"line 3, column 'a': 'x' is no number"),
        ("a,b\n1,2\ninf,3\n", r"line 3, column 'a': 'inf' is not a finite number"),
        ("a,b\n1,u\n2,\n", r"line 3, column 'b': the value to predict is missing"),
        ("a,a\n1,2\n3,4\n", "used twice: a"),
        ("a,b\n1,2\n", "at least 2 rows"),
        ("a\n1\n2\n", "no column beside 'a'"),
        ("", "is empty"),
    ],
)
def test_refusals(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_sample_table(write(tmp_path, text))


def test_more_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No file .*none\.csv"):
        read_sample_table(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="Did you mean 'price'"):
        read_sample_table(write(tmp_path, "price,y\n1,2\n3,4\n"), target="prize")
    path = write(tmp_path, "1 2\n3 4\n", "t.txt")
    write(tmp_path, "0\n7\n", "t_test_0.txt")
    with pytest.raises(ValueError, match="must hold row numbers from 0 to 1"):
        read_sample_table(path)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match="not a text file"):
        read_sample_table(tmp_path / "binary.csv")
