"""Triton kernels, one folder per family, installed as ``fastkd.kernels``.

Only ``fastkd.ops`` imports this package, on first use: Triton is an optional dependency.
"""
