"""Read labelled series: UCR/UEA text files, npz archives, WAV files, ECG records with annotations."""

from __future__ import annotations

import io
import os
import re
import wave
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["LabelledSeries", "log_spectrogram", "read_ecg_beats", "read_labelled_series"]


@dataclass(frozen=True)
class LabelledSeries:
    """Series with one label each.

    Attributes:
        series: N arrays ``(L_i, C)``, float64, finite.
        labels: ``(N,)``, strings.
        is_test: ``(N,)``, whether a series belongs to the published test part; None where there is no such part.
        source: Where they came from.
    """

    series: list[np.ndarray]
    labels: np.ndarray
    is_test: np.ndarray | None
    source: str

    @property
    def lengths(self) -> np.ndarray:
        """Number of steps of each series, ``(N,)``."""
        return np.array([len(row) for row in self.series])


def read_labelled_series(path: str | os.PathLike[str]) -> LabelledSeries:
    """Read labelled series, by what the path is.

    - ``NAME.ts`` or UCR ``NAME.txt``/``NAME.tsv``; the file ``NAME_TEST`` beside a ``NAME_TRAIN`` is the test part.
    - ``NAME.npz``: ``X`` ``(N, L)`` or ``(N, L, C)``, ``y`` ``(N,)``; optionally ``lengths``, ``X_test``, ``y_test``.
    - a folder, or a zip, of WAV files (16 bit): the label is the name of the file's own folder, or what stands before
      the first ``_`` of the file's name where all lie in one folder.
    - ``NAME.hea``: an ECG record in WFDB format 212 with beat annotations; see :func:`read_ecg_beats`.
    - a folder with one ``NAME_TRAIN.ts`` (or ``.txt``, ``.tsv``).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The content cannot be read; the message names file, line and what was expected.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No file or folder {path}.")
    if path.is_dir():
        trains = sorted(p for suffix in ("ts", "txt", "tsv") for p in path.glob(f"*_TRAIN.{suffix}"))
        if len(trains) > 1:
            raise ValueError(f"{path} holds several data sets ({', '.join(p.name for p in trains)}); name one file.")
        data = _read_text(trains[0]) if trains else _from_wavs(_folder_wavs(path), str(path))
    elif path.suffix in (".ts", ".txt", ".tsv"):
        data = _read_text(path)
    elif path.suffix == ".npz":
        data = _read_npz(path)
    elif path.suffix == ".zip":
        data = _from_wavs(_zip_wavs(path), str(path))
    elif path.suffix == ".hea":
        data = read_ecg_beats(path)
    else:
        raise ValueError(f"{path}: a .ts, .txt, .tsv, .npz, .zip or .hea file or a folder is needed.")
    classes = sorted(set(data.labels.tolist()))
    if len(classes) < 2:
        raise ValueError(f"{path} must hold at least two classes, got {classes}.")
    return data


def _read_text(path: Path) -> LabelledSeries:
    read = _read_ts if path.suffix == ".ts" else _read_ucr
    parts = [path]
    if path.stem.endswith("_TRAIN"):
        partner = path.with_name(path.name.replace("_TRAIN", "_TEST"))
        parts += [partner] if partner.is_file() else []
    series: list[np.ndarray] = []
    labels: list[str] = []
    sizes = []
    for part in parts:
        found = list(read(part))
        if not found:
            raise ValueError(f"{part} holds no series.")
        sizes.append(len(found))
        series += [row for row, _ in found]
        labels += [label for _, label in found]
    if len({row.shape[1] for row in series}) > 1:
        raise ValueError(f"{path}: the series have different numbers of dimensions.")
    is_test = None if len(parts) == 1 else np.repeat([False, True], sizes)
    return LabelledSeries(series, np.array(labels), is_test, str(path))


def _floats(path: Path, number: int, text: str) -> np.ndarray:
    try:
        values = np.array(text.split(","), dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}.") from error
    if not np.isfinite(values).all():
        raise ValueError(f"{path}, line {number}: a value is missing or not finite.")
    return values


def _read_ts(path: Path) -> Iterator[tuple[np.ndarray, str]]:
    """Yield series ``(L, C)`` and labels of a ``.ts`` file: dimensions separated by ``:``, the label last."""
    in_data = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if not in_data:
            lowered = line.lower()
            if lowered.startswith("@timestamps true"):
                raise ValueError(f"{path}, line {number}: series with timestamps are not read.")
            if lowered.startswith("@classlabel false"):
                raise ValueError(f"{path}, line {number}: the series have no class labels.")
            if not line.startswith("@"):
                raise ValueError(f"{path}, line {number}: a header line starting with @ is needed before @data.")
            in_data = lowered == "@data"
            continue
        *dimensions, label = line.split(":")
        if not dimensions or not label:
            raise ValueError(f"{path}, line {number}: values, ':' and a class label are needed.")
        rows = [_floats(path, number, text) for text in dimensions]
        if len({len(row) for row in rows}) > 1:
            raise ValueError(f"{path}, line {number}: the dimensions have different lengths.")
        yield np.stack(rows, 1), label


def _read_ucr(path: Path) -> Iterator[tuple[np.ndarray, str]]:
    """Yield series ``(L, 1)`` and labels of a UCR text file: the label first, shorter series end in NaN."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = re.split(r"[,\s]+", line.strip())
        if fields == [""]:
            continue
        if len(fields) < 2:
            raise ValueError(f"{path}, line {number}: a label and values are needed.")
        try:
            values = np.array(fields[1:], dtype=np.float64)
            label = float(fields[0])
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}.") from error
        missing = np.isnan(values)
        length = len(values) if not missing.any() else int(np.argmax(missing))
        if length == 0 or not missing[length:].all() or not np.isfinite(values[:length]).all():
            raise ValueError(f"{path}, line {number}: a value inside the series is missing or not finite.")
        yield values[:length, None], f"{label:g}"


def _read_npz(path: Path) -> LabelledSeries:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except ValueError as error:
        raise ValueError(f"{path} cannot be read without unpickling, which is refused: {error}.") from error
    missing = {"X", "y"} - set(arrays)
    if missing:
        raise ValueError(f"{path} must hold the arrays X and y, missing: {', '.join(sorted(missing))}.")
    series: list[np.ndarray] = []
    labels, sizes = [], []
    for x_name, y_name, lengths_name in (("X", "y", "lengths"), ("X_test", "y_test", "lengths_test")):
        if x_name not in arrays:
            continue
        x, y = arrays[x_name].astype(np.float64), arrays[y_name]
        x = x[:, :, None] if x.ndim == 2 else x
        if x.ndim != 3 or y.shape != (len(x),):
            raise ValueError(
                f"{path}: {x_name} must be (N, L) or (N, L, C) and {y_name} (N,), got {x.shape} and {y.shape}."
            )
        lengths = arrays.get(lengths_name, np.full(len(x), x.shape[1]))
        rows = [row[:n] for row, n in zip(x, lengths, strict=True)]
        for index, row in enumerate(rows):
            if not np.isfinite(row).all() or len(row) == 0:
                raise ValueError(f"{path}: {x_name}[{index}] is empty or not finite.")
        series += rows
        labels.append(y.astype(str))
        sizes.append(len(x))
    is_test = np.repeat([False, True], sizes) if len(sizes) == 2 else None
    return LabelledSeries(series, np.concatenate(labels), is_test, str(path))


def _folder_wavs(path: Path) -> list[tuple[str, str, bytes]]:
    return [(f.parent.name, f.name, f.read_bytes()) for f in sorted(path.rglob("*.wav"))]


def _zip_wavs(path: Path) -> list[tuple[str, str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if n.lower().endswith(".wav") and "__MACOSX" not in n)
            return [(Path(n).parent.name, Path(n).name, archive.read(n)) for n in names]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no zip archive: {error}.") from error


def _from_wavs(files: list[tuple[str, str, bytes]], source: str) -> LabelledSeries:
    if not files:
        raise ValueError(f"{source} holds no .wav file and no *_TRAIN.ts.")
    by_folder = len({folder for folder, _, _ in files}) > 1
    labels = [folder if by_folder else name.split("_")[0] for folder, name, _ in files]
    series, rates = [], set()
    for _, name, content in files:
        try:
            with wave.open(io.BytesIO(content)) as file:
                if file.getsampwidth() != 2:
                    raise ValueError(f"{source}, {name}: 16-bit samples are needed, got {8 * file.getsampwidth()} bit.")
                frames, channels = file.readframes(file.getnframes()), file.getnchannels()
                rates.add(file.getframerate())
        except (wave.Error, EOFError) as error:
            raise ValueError(f"{source}, {name}: not a WAV file with PCM samples: {error}.") from error
        samples = np.frombuffer(frames, "<i2").astype(np.float64) / 32768
        if len(samples) == 0:
            raise ValueError(f"{source}, {name}: the recording is empty.")
        series.append(samples.reshape(-1, channels))
    if len(rates) > 1:
        raise ValueError(f"{source}: all recordings must have one sampling rate, got {sorted(rates)} Hz.")
    if len({row.shape[1] for row in series}) > 1:
        raise ValueError(f"{source}: all recordings must have the same number of channels.")
    return LabelledSeries(series, np.array(labels), None, source)


def log_spectrogram(x: np.ndarray, *, window: int = 256, hop: int = 128, bands: int = 24) -> np.ndarray:
    """Return the logarithm of the power in mel-like bands of short windows, ``(frames, bands * C)``.

    Args:
        x: Signal, ``(L, C)``; padded with zeros to one window at least.
        window: Samples of a Hann window.
        hop: Samples between windows.
        bands: Triangular bands, equally wide on the scale log(1 + 10 f) of the relative frequency f.
    """
    x = np.pad(x, ((0, max(0, window - len(x))), (0, 0)))
    frames = np.lib.stride_tricks.sliding_window_view(x, window, axis=0)[::hop]  # (frames, C, window)
    power = np.abs(np.fft.rfft(frames * np.hanning(window), axis=-1)) ** 2
    scale = np.log1p(10 * np.linspace(0, 1, power.shape[-1])) / np.log(11)
    centres = np.linspace(0, 1, bands + 2)
    weights = np.clip(1 - np.abs(scale[None] - centres[1:-1, None]) * (bands + 1), 0, None)  # (bands, frequencies)
    return np.log(power @ weights.T + 1e-8).reshape(len(frames), -1)


def read_ecg_beats(path: str | os.PathLike[str], *, before: int = 90, after: int = 110) -> LabelledSeries:
    """Cut the beats out of an ECG record (WFDB format 212, annotations in ``.atr``), labelled by their beat code.

    Args:
        path: The ``.hea`` file; ``.dat`` and ``.atr`` lie beside it.
        before: Samples before an annotated R peak.
        after: Samples from it on.

    Returns:
        Windows ``(before + after, leads)`` in mV. Classes with fewer than 10 beats are left out.

    Raises:
        FileNotFoundError: One of the three files is missing.
        ValueError: The record is not in format 212.

    Source: the WFDB file formats, https://physionet.org/physiotools/wag/signal-5.htm and annot-5.htm.
    """
    header = Path(path)
    parts = [header.with_suffix(suffix) for suffix in (".hea", ".dat", ".atr")]
    for part in parts:
        if not part.is_file():
            raise FileNotFoundError(f"No file {part}.")
    lines = [ln.split() for ln in parts[0].read_text().splitlines() if ln.strip() and not ln.startswith("#")]
    leads = int(lines[0][1])
    signals = lines[1 : 1 + leads]
    if leads != 2 or any(fields[1] != "212" for fields in signals):
        raise ValueError(f"{header}: two signals in format 212 are needed, got {[f[1] for f in signals]}.")
    raw = np.fromfile(parts[1], np.uint8)
    raw = raw[: len(raw) // 3 * 3].reshape(-1, 3).astype(np.int32)
    samples = np.stack([raw[:, 0] | (raw[:, 1] & 15) << 8, raw[:, 2] | (raw[:, 1] >> 4) << 8], 1)
    samples = np.where(samples > 2047, samples - 4096, samples)
    gains = np.array([float(re.split(r"[(/]", fields[2])[0]) for fields in signals])
    zeros = np.array([float(fields[4]) for fields in signals])
    millivolts = (samples - zeros) / gains
    beats = [(t, code) for t, code in _annotations(parts[2]) if code in _BEATS and before <= t < len(samples) - after]
    kept = {code for _, code in beats if sum(c == code for _, c in beats) >= 10}
    beats = [(t, code) for t, code in beats if code in kept]
    series = [millivolts[t - before : t + after] for t, _ in beats]
    return LabelledSeries(series, np.array([_BEATS[code] for _, code in beats]), None, str(header))


# Codes of beats in the annotation format, and the letters they are known by.
_BEATS = {1: "N", 2: "L", 3: "R", 4: "a", 5: "V", 6: "F", 7: "J", 8: "A", 9: "S", 10: "E", 11: "j", 12: "/", 13: "Q"}


def _annotations(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (sample, code): two-byte words, six bits of code and ten of time since the annotation before."""
    words = np.frombuffer(path.read_bytes(), "<u2").astype(np.int64)
    sample, index = 0, 0
    while index < len(words):
        code, interval = int(words[index] >> 10), int(words[index] & 1023)
        index += 1
        if code == 0 and interval == 0:
            return
        if code == 59:  # SKIP: the next two words are a long interval, high half first
            sample += int(words[index] << 16 | words[index + 1])
            index += 2
        elif code == 63:  # AUX: so many bytes of text follow, padded to whole words
            index += (interval + 1) // 2
        elif code < 50:
            sample += interval
            yield sample, code
