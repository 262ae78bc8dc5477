"""Triton kernels, one file per family, installed as ``fastkd.kernels``.

Imported on first use by ``fastkd.ops`` and by nothing else: Triton is not a dependency of fastkd.
"""
