"""Kernels over images: large, dynamic and generated convolutions."""

__all__: list[str] = []
