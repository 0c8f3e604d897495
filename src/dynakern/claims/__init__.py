"""Every paper's claim as something to run: ``dynakern claim NAME`` measures it beside a baseline."""

from dynakern.claims.run import Measurement, run_claim

__all__ = ["Measurement", "run_claim"]
