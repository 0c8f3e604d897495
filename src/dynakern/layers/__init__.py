"""Torch modules that more than one network uses."""
