"""The main job: which of these kernels helps on my data, and at what cost."""

from dynakern.compare.report import write_report
from dynakern.compare.run import Comparison, Summary, run_comparison
from dynakern.compare.store import JobRow, Store

__all__ = ["Comparison", "JobRow", "Store", "Summary", "run_comparison", "write_report"]
