"""The CSV reader: what it reads, and that every refusal names the line and the column."""

from __future__ import annotations

import numpy as np
import pytest

from dynakern.data import list_samples, sample
from dynakern.data.series import as_series_table, read_series_csv

GOOD = "date,load,OT\n2016-07-01 00:00:00,1,2.5\n2016-07-01 01:00:00,2,3.5\n2016-07-01 02:00:00,3,4.5\n"


def write(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "series.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_reads_a_table(tmp_path):
    table = read_series_csv(write(tmp_path, GOOD))
    assert table.columns == ("load", "OT")
    assert table.values.tolist() == [[1, 2.5], [2, 3.5], [3, 4.5]]
    assert str(table.timestamps[-1]) == "2016-07-01T02:00:00"
    assert table.step_seconds == 3600
    assert table.select("OT").values.tolist() == [[2.5], [3.5], [4.5]]


def test_time_column_is_found_by_name_content_or_argument(tmp_path):
    assert read_series_csv(write(tmp_path, "when,x\n2020-01-01,1\n2020-01-02,2\n")).timestamps is not None
    assert read_series_csv(write(tmp_path, "x,ds\n1,2020/01/01\n2,2020/01/02\n")).columns == ("x",)
    assert read_series_csv(write(tmp_path, "x,y\n1,2\n3,4\n")).timestamps is None
    table = read_series_csv(write(tmp_path, "x,stamp\n1,2020-01-01\n2,2020-01-02\n"), time_column="stamp")
    assert table.columns == ("x",)


def test_bundled_sample_is_the_published_file():
    import hashlib

    digest = hashlib.sha256(sample("ett-h1/ETTh1.csv").read_bytes()).hexdigest()
    assert digest == "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"
    table = read_series_csv(sample("ETTh1.csv"))
    assert table.values.shape == (17420, 7)
    assert "NoDerivatives" in (sample("ETTh1.csv").parent / "LICENSE.md").read_text()
    assert "ett-h1/ETTh1.csv" in list_samples()
    with pytest.raises(ValueError, match=r"Did you mean 'ett-h1/ETTh1.csv'"):
        sample("ett-h1/ETTh2.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("3.5", "high"), r"line 3, column 'OT': 'high' is no number"),
        (GOOD.replace("3.5", ""), r"line 3, column 'OT': the value is missing.*Imputer"),
        (GOOD.replace("3.5", "NaN"), r"line 3, column 'OT': 'NaN' is not a finite number"),
        (GOOD.replace("4.5", "inf"), r"line 4, column 'OT': 'inf' is not a finite number"),
        (GOOD.replace("02:00:00", "00:30:00"), r"line 4, column 'date': time must increase, got 2016-07-01T00:30:00"),
        (GOOD.replace("02:00:00", "01:00:00"), r"line 4, column 'date': time must increase"),
        (
            GOOD.replace("2016-07-01 01", "1st of July 01"),
            r"line 3, column 'date': '1st of July 01:00:00' is no ISO time",
        ),
        (GOOD.replace("2,3.5", "2"), r"line 3: 2 field\(s\), the header has 3"),
        (GOOD.replace("load", "OT"), r"line 1: column name\(s\) used twice: OT"),
        ("date,OT\n", r"must have a header line and data, got 1 line"),
        ("", r"must have a header line and data, got 0 line"),
        ("1,2\n3,4\n", r"line 1: a header with column names is needed"),
        ("date\n2016-07-01\n2016-07-02\n", r"no number column beside the time column 'date'"),
    ],
)
def test_refusals_name_line_and_column(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_series_csv(write(tmp_path, text))


def test_more_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file"):
        read_series_csv(tmp_path / "nothing.csv")
    path = tmp_path / "binary.csv"
    path.write_bytes(b"\xff\xfe\x00a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a CSV text file"):
        read_series_csv(path)
    with pytest.raises(ValueError, match="Did you mean 'OT'"):
        read_series_csv(write(tmp_path, GOOD)).select("OTT")
    with pytest.raises(ValueError, match="Unknown column 'tiem'"):
        read_series_csv(write(tmp_path, GOOD), time_column="tiem")


def test_gaps_warn_once_with_their_place(tmp_path):
    rows = "".join(f"2016-07-01 {h:02d}:00:00,{h}\n" for h in range(12) if h != 7)
    with pytest.warns(UserWarning, match=r"irregular, 1 gap\(s\), the first at line 9"):
        read_series_csv(write(tmp_path, "date,x\n" + rows))


def test_missing_values_where_allowed(tmp_path):
    table = read_series_csv(write(tmp_path, GOOD.replace("3.5", "")), allow_missing=True)
    assert np.isnan(table.values[1, 1])


def test_arrays_and_frames():
    pd = pytest.importorskip("pandas")
    index = pd.date_range("2020-01-01", periods=4, freq="h")
    frame = pd.DataFrame({"a": [1, 2, 3, 4], "b": [0.5] * 4}, index=index)
    table = as_series_table(frame)
    assert table.columns == ("a", "b")
    assert table.step_seconds == 3600
    assert as_series_table(frame.reset_index(names="when")).step_seconds == 3600
    assert as_series_table(np.arange(5)).values.shape == (5, 1)
    with pytest.raises(ValueError, match=r"got nan in row 1, column 'x0'"):
        as_series_table([0.0, float("nan")])
    with pytest.raises(TypeError, match="Column 'a'"):
        as_series_table(pd.DataFrame({"a": ["x", "y"]}))
    with pytest.raises(TypeError, match="must hold numbers"):
        as_series_table(["x", "y"])
    with pytest.raises(ValueError, match="time must increase"):
        as_series_table(frame.iloc[::-1])
