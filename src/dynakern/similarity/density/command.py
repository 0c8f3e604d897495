"""``dynakern run density TABLE``: in which regime is a kernel density of this table, and at which bandwidth?"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dynakern.checks import check_choice
from dynakern.data.tables import read_sample_table
from dynakern.similarity.density.estimator import HighDimKDE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Diagnose a table: hold out a quarter, fit the rest, print the regime, draw the curve of bandwidths."""
    parser = argparse.ArgumentParser(prog="dynakern run density", description=main.__doc__)
    parser.add_argument("table", help="CSV with a header, file of numbers, or sklearn:NAME")
    parser.add_argument("--leave-out", metavar="COLUMN", help="column that is no measurement, such as a label")
    parser.add_argument("--kernel", default="gaussian", help="gaussian, epanechnikov, exponential or tophat")
    parser.add_argument("--bandwidth", default="loo", help="a number, loo, rem, scott or silverman")
    parser.add_argument("--out", type=Path, default=Path("dynakern-density.png"), help="picture to write")
    options = parser.parse_args(argv)
    check_choice("--out", options.out.suffix, (".png", ".svg", ".pdf"))
    table = read_sample_table(options.table, target=options.leave_out, supervised=False)
    features = table.features[:, table.features.std(0) > 0]
    if features.shape[1] == 0 or len(features) < 8:
        raise ValueError(f"{table.source}: at least 8 rows and a feature that varies are needed.")
    features = (features - features.mean(0)) / features.std(0)
    rows = np.random.default_rng(0).permutation(len(features))
    held, kept = features[rows[: len(rows) // 4]], features[rows[len(rows) // 4 :]]
    try:
        rule = float(options.bandwidth)
    except ValueError:
        rule = options.bandwidth
    estimator = HighDimKDE(options.kernel, rule).fit(kept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what it warns of is printed below
        found = estimator.diagnose(held)
    n, d = kept.shape
    print(f"{n} rows of {d} standardised features (alpha = ln n / d = {np.log(n) / d:.3f}), {len(held)} held out")
    print(f"bandwidth {found.bandwidth:.4g} ({options.bandwidth}); regime at the median held-out row: {found.regime}")
    print(f"points that contribute there: {found.effective_points:.3g}; stable index {found.mu:.3g}")
    print(f"condensed below {found.h_g:.4g}, a Gaussian mean above {found.h_clt:.4g}")
    print(f"mean log density of the held-out rows: {found.query_log_density.mean():.4f}")
    temporary = options.out.with_name(f"{options.out.stem}.tmp{options.out.suffix}")
    _picture(estimator, found.h_g, found.h_clt).savefig(temporary, dpi=130)
    temporary.replace(options.out)
    print(f"Picture: {options.out}")
    return 0


def _picture(estimator: HighDimKDE, h_g: float, h_clt: float) -> Figure:
    from matplotlib.figure import Figure

    grid = estimator.bandwidth_ * np.geomspace(1 / 6, 6, 41)
    score = estimator.leave_one_out(grid)
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    shown = np.isfinite(score)
    axes.plot(grid[shown], score[shown], lw=1.5)
    for h, label in ((h_g, "condensed below"), (h_clt, "Gaussian mean above")):
        if grid[0] < h < grid[-1]:
            axes.axvline(h, color="0.6", lw=0.9, ls="--")
            axes.annotate(label, (h, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=8, ha="right")
    axes.axvline(estimator.bandwidth_, color="C1", lw=1.2)
    axes.annotate("in use", (estimator.bandwidth_, 0.98), xycoords=("data", "axes fraction"), va="top", color="C1")
    axes.set(xscale="log", xlabel="bandwidth", ylabel="leave-one-out log density of a row")
    return figure
