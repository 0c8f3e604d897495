"""Networks that adapt their own computation."""

from dynakern.adaptive.dynamic_pruning import DynamicPruner

__all__ = ["DynamicPruner"]
