"""Readers of labelled series: what they read, and that refusals name file and line."""

from __future__ import annotations

import io
import wave
import zipfile

import numpy as np
import pytest

from dynakern.data.labelled import log_spectrogram, read_ecg_beats, read_labelled_series

TS = "# a comment\n@problemName Toy\n@timeStamps false\n@univariate false\n@classLabel true a b\n@data\n"


def test_ts_with_unequal_lengths_and_its_test_part(tmp_path):
    (tmp_path / "Toy_TRAIN.ts").write_text(TS + "1,2,3:4,5,6:a\n1,2:3,4:b\n")
    (tmp_path / "Toy_TEST.ts").write_text(TS + "7,8:9,10:b\n")
    data = read_labelled_series(tmp_path / "Toy_TRAIN.ts")
    assert [row.shape for row in data.series] == [(3, 2), (2, 2), (2, 2)]
    assert data.series[0].tolist() == [[1, 4], [2, 5], [3, 6]]
    assert data.labels.tolist() == ["a", "b", "b"]
    assert data.is_test.tolist() == [False, False, True]
    assert data.lengths.tolist() == [3, 2, 2]
    folder = read_labelled_series(tmp_path)
    assert folder.labels.tolist() == data.labels.tolist()


def test_ucr_text_with_nan_tails(tmp_path):
    (tmp_path / "Toy_TRAIN.txt").write_text(" 1.0  0.5 0.6 NaN\n2  1 2 3\n")
    data = read_labelled_series(tmp_path / "Toy_TRAIN.txt")
    assert [row.shape for row in data.series] == [(2, 1), (3, 1)]
    assert data.labels.tolist() == ["1", "2"]
    assert data.is_test is None


def test_npz(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", X=rng.random((4, 6)), y=[0, 1, 0, 1], X_test=rng.random((2, 6)), y_test=[1, 0])
    data = read_labelled_series(tmp_path / "a.npz")
    assert len(data.series) == 6
    assert data.is_test.sum() == 2
    np.savez(tmp_path / "b.npz", X=rng.random((2, 6, 3)), y=["x", "y"], lengths=[4, 6])
    assert read_labelled_series(tmp_path / "b.npz").lengths.tolist() == [4, 6]


def wav(samples, rate=8000, width=2):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples, "<i2" if width == 2 else "u1").tobytes())
    return buffer.getvalue()


def test_wav_folders_and_zips(tmp_path):
    for label in ("yes", "no"):
        (tmp_path / "speech" / label).mkdir(parents=True)
        (tmp_path / "speech" / label / "1.wav").write_bytes(wav([0, 16384, -16384]))
    data = read_labelled_series(tmp_path / "speech")
    assert sorted(data.labels) == ["no", "yes"]
    assert data.series[0][:, 0].tolist() == [0.0, 0.5, -0.5]
    with zipfile.ZipFile(tmp_path / "digits.zip", "w") as archive:
        archive.writestr("recordings/3_anna_0.wav", wav([1] * 5))
        archive.writestr("recordings/7_anna_0.wav", wav([1] * 9))
    data = read_labelled_series(tmp_path / "digits.zip")
    assert data.labels.tolist() == ["3", "7"]
    assert data.lengths.tolist() == [5, 9]


def test_spectrogram_finds_a_tone():
    t = np.arange(2048) / 8000
    low, high = (log_spectrogram(np.sin(2 * np.pi * f * t)[:, None]) for f in (300, 3000))
    assert low.shape == (15, 24)
    assert low.mean(0).argmax() < high.mean(0).argmax()
    assert log_spectrogram(np.zeros((10, 1))).shape == (1, 24)


def test_ecg_record(tmp_path):
    samples = np.zeros((400, 2), int)
    samples[:, 0], samples[:, 1] = 1024 + 200, 1024 - 100
    a, b = samples[:, 0] & 4095, samples[:, 1] & 4095
    raw = np.stack([a & 255, (a >> 8) | (b >> 8) << 4, b & 255], 1).astype(np.uint8)
    words = [28 << 10 | 5]  # a rhythm mark, with its text
    words += [63 << 10 | 2, 0x4E28]
    words += [1 << 10 | 95]  # a normal beat at sample 100
    words += [59 << 10, 0, 40]  # a long interval
    words += [5 << 10 | 10]  # a ventricular beat at sample 150
    words += [1 << 10 | 10] * 12 + [5 << 10 | 1] * 12 + [0]
    (tmp_path / "r.atr").write_bytes(np.array(words, "<u2").tobytes())
    (tmp_path / "r.dat").write_bytes(raw.tobytes())
    (tmp_path / "r.hea").write_text(
        "r 2 360 400\nr.dat 212 200 11 1024 0 0 0 MLII\nr.dat 212 200 11 1024 0 0 0 V5\n# note\n"
    )
    data = read_ecg_beats(tmp_path / "r.hea", before=20, after=30)
    assert data.series[0].shape == (50, 2)
    np.testing.assert_allclose(data.series[0][0], [1.0, -0.5])
    assert data.labels.tolist() == ["N", "V"] + ["N"] * 12 + ["V"] * 12


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.ts", TS + "1,2:3,4,5:a\n", r"x\.ts, line 7: the dimensions have different lengths"),
        ("x.ts", TS + "1,?:3,4:a\n", r"x\.ts, line 7: could not convert string to float"),
        ("x.ts", TS + "1,nan:3,4:a\n", r"x\.ts, line 7: a value is missing or not finite"),
        ("x.ts", TS + "1,2\n", r"x\.ts, line 7: values, ':' and a class label are needed"),
        ("x.ts", TS + "1,2:a\n3,4:5,6:b\n", "different numbers of dimensions"),
        ("x.ts", TS, "holds no series"),
        ("x.ts", TS + "1,2:3,4:a\n1,2:3,4:a\n", r"at least two classes, got \['a'\]"),
        ("x.ts", TS.replace("timeStamps false", "timeStamps true"), "line 3: series with timestamps are not read"),
        ("x.ts", "1,2:a\n", "line 1: a header line starting with @"),
        ("x.txt", "1 2 nan 3\n", "line 1: a value inside the series is missing"),
        ("x.txt", "1 2 3\none 2 3\n", "line 2: could not convert"),
        ("x.zip", "no zip", "is no zip archive"),
        ("x.foo", "", "a .ts, .txt, .tsv, .npz, .zip or .hea file"),
    ],
)
def test_refusals(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_labelled_series(tmp_path / name)


def test_more_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file or folder"):
        read_labelled_series(tmp_path / "nothing.ts")
    np.savez(tmp_path / "objects.npz", X=np.array([{}], dtype=object), y=[1])
    with pytest.raises(ValueError, match="without unpickling"):
        read_labelled_series(tmp_path / "objects.npz")
    np.savez(tmp_path / "short.npz", X=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="missing: y"):
        read_labelled_series(tmp_path / "short.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.wav file"):
        read_labelled_series(tmp_path / "empty")
    for name, content, message in (
        ("a_8bit.wav", wav([1, 2], width=1), "16-bit samples are needed, got 8 bit"),
        ("a_broken.wav", b"RIFFxxxx", "not a WAV file"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_labelled_series(folder)
    (tmp_path / "r.hea").write_text("r 2 360 400\n")
    with pytest.raises(FileNotFoundError, match=r"No file .*r\.dat"):
        read_labelled_series(tmp_path / "r.hea")
