"""Triton kernels; imported lazily."""
