"""The list of systems: pure data, the only registry of the library.

A system is one published method under one name (its slug). Everything that walks the library - ``dynakern list``,
``create_model``, ``compare``, the README's table, the test suite - walks this list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["SYSTEMS", "System", "find_system"]


@dataclass(frozen=True, kw_only=True)
class System:
    """One row of the catalogue.

    Attributes:
        slug: The system's name everywhere: file, claim, docs page, command line.
        title: What it is, in a few words.
        paper: Authors, year and identifier of the paper.
        wing: The package it lives in, e.g. ``"sequence"``; ``"ops"`` for an operator.
        kind: ``"operator"``, ``"network"``, ``"estimator"`` or ``"kernel"``.
        names: Import strings ``"module:object"`` of its public objects.
        variants: Names of the model functions in its module that ``create_model`` calls.
        tasks: Task name to the import string of a factory that builds a competitor for ``dynakern compare``.
        cli: Import string of ``main(argv)`` behind ``dynakern run SLUG``.
        lens: Import string of the function behind ``dynakern lens SLUG``.
        golden: Name of its folder of golden numbers, if it has one.
    """

    slug: str
    title: str
    paper: str
    wing: str
    kind: str
    names: tuple[str, ...]
    variants: tuple[str, ...] = ()
    tasks: Mapping[str, str] = field(default_factory=dict)
    cli: str | None = None
    lens: str | None = None
    golden: str | None = None

    @property
    def module(self) -> str:
        """Import path of the system's module."""
        return f"dynakern.{self.wing}.{self.slug}"


SYSTEMS: tuple[System, ...] = ()


def find_system(slug: str) -> System:
    """Return the row of ``slug``.

    Raises:
        ValueError: No system has this name; the message suggests the nearest.
    """
    for system in SYSTEMS:
        if system.slug == slug:
            return system
    from dynakern.checks import unknown_name

    raise ValueError(unknown_name("system", slug, [system.slug for system in SYSTEMS]))
