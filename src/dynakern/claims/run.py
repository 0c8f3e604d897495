"""Run a system's claim: measure, compare with the bound, and say whether it holds.

A claim module ``dynakern.claims.<slug>`` has a docstring that states the claim and a tuple ``CLAIMS`` of functions.
Each takes a ``progress`` callback (a text and a fraction) and yields :class:`Measurement` objects; verdicts are
computed here.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from dynakern.catalog import find_system

__all__ = ["ClaimResult", "Measurement", "NotMeasurable", "Progress", "run_claim"]

Progress = Callable[[str, float], None]


class NotMeasurable(RuntimeError):
    """The claim cannot be measured here: data, an extra or a device is missing. The message names it."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measured figure and the bound that the claim sets it.

    Attributes:
        name: What was measured.
        value: The figure.
        unit: Its unit, e.g. ``"x"`` for a ratio, ``"accuracy"``, ``"MSE"``.
        at_least: Lower bound, or None.
        at_most: Upper bound, or None. With neither bound the figure is reported without a verdict.
        baseline: What the baseline reached in the same run, in the same unit, or None.
    """

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    baseline: float | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the value is within its bounds; None without a bound. NaN never holds."""
        if self.at_least is None and self.at_most is None:
            return None
        above = self.at_least is None or self.value >= self.at_least
        below = self.at_most is None or self.value <= self.at_most
        return above and below

    @property
    def bound(self) -> str:
        """The bound in words."""
        parts = [f">= {self.at_least:g}"] if self.at_least is not None else []
        return " and ".join(parts + ([f"<= {self.at_most:g}"] if self.at_most is not None else [])) or "reported"


@dataclass(frozen=True)
class ClaimResult:
    """One part of a claim: its name, measurements, seconds taken, and why it could not be measured, if so."""

    part: str
    description: str
    measurements: tuple[Measurement, ...]
    seconds: float
    not_measurable: str | None = None

    @property
    def verdict(self) -> str:
        """``"holds"``, ``"falls short"`` or ``"not measurable"``."""
        if self.not_measurable is not None:
            return "not measurable"
        return "falls short" if any(m.holds is False for m in self.measurements) else "holds"

    def as_dict(self) -> dict[str, object]:
        """Return the result as plain data for JSON."""
        return {
            "part": self.part,
            "description": self.description,
            "verdict": self.verdict,
            "seconds": round(self.seconds, 1),
            "not_measurable": self.not_measurable,
            "measurements": [{**asdict(m), "bound": m.bound, "holds": m.holds} for m in self.measurements],
        }


def run_claim(slug: str, *, only: str | None = None, progress: Progress | None = None) -> Iterator[ClaimResult]:
    """Measure the parts of a system's claim one by one.

    Args:
        slug: The system.
        only: Run only the part of this name.
        progress: Called with a text and a fraction in [0, 1] as the work goes on.

    Yields:
        A :class:`ClaimResult` for each part, as it ends.

    Raises:
        ValueError: No system or no part has this name.
    """
    system = find_system(slug)
    module = importlib.import_module(f"dynakern.claims.{system.slug}")
    parts = {function.__name__: function for function in module.CLAIMS}
    if only is not None and only not in parts:
        raise ValueError(f"Claim {slug!r} has no part {only!r}. Parts: {', '.join(parts)}.")
    report = progress or (lambda text, fraction: None)
    for name, function in parts.items():
        if only not in (None, name):
            continue
        start, found, reason = time.perf_counter(), [], None
        try:
            for measurement in function(report):
                found.append(measurement)
        except (NotMeasurable, ImportError) as error:
            reason = str(error)
        description = (function.__doc__ or "").strip().partition("\n")[0]
        yield ClaimResult(name, description, tuple(found), time.perf_counter() - start, reason)
