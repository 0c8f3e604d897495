"""Small redistributable data sets that travel with the package, each in a folder with its licence."""

from __future__ import annotations

import os
from pathlib import Path

from dynakern.checks import unknown_name

__all__ = ["find_data", "list_samples", "sample"]

_HERE = Path(__file__).parent


def list_samples() -> list[str]:
    """Return the names of the bundled data sets, as ``folder/file``.

    Example:
        >>> "ett-h1/ETTh1.csv" in list_samples()
        True
    """
    return sorted(
        f"{folder.name}/{path.name}"
        for folder in _HERE.iterdir()
        if folder.is_dir() and not folder.name.startswith("__")
        for path in folder.iterdir()
        if not path.name.startswith(("LICENSE", "README"))
    )


def sample(name: str) -> Path:
    """Return the path of a bundled data file.

    Args:
        name: ``"folder/file"``, or the file name alone where only one folder has it, e.g. ``"ETTh1.csv"``.

    Raises:
        ValueError: There is no such sample; the message lists them.

    Example:
        >>> sample("ETTh1.csv").name
        'ETTh1.csv'
    """
    matches = [known for known in list_samples() if name in (known, known.rpartition("/")[2])]
    if len(matches) != 1:
        raise ValueError(unknown_name("sample", name, list_samples()))
    return _HERE / matches[0]


def find_data(name: str) -> Path | None:
    """Return the path of ``name`` below the folder that ``DYNAKERN_DATA`` names, or None.

    Data that may be used for research but not passed on is never bundled; set the environment variable
    ``DYNAKERN_DATA`` to a folder that holds it.
    """
    root = os.environ.get("DYNAKERN_DATA")
    if not root:
        return None
    path = Path(root).expanduser() / name
    return path if path.exists() else None
