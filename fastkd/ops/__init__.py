"""Operators: one folder per kernel family, with autograd, the reference formula, and each backend's launch code.

Internal: users call :mod:`fastkd.losses`. A family's folder has the same name in every layer: here, in ``kernels``
(Triton), ``csrc/cpu`` and ``csrc/cuda``.
"""
