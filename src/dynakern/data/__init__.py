"""Readers of the field's file formats, bundled samples and synthetic generators."""

from dynakern.data.samples import find_data, list_samples, sample

__all__ = ["find_data", "list_samples", "sample"]
