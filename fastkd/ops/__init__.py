"""Operators: one folder per kernel family, with autograd, the reference formula, and the call of each backend.

Internal: users call :mod:`fastkd.losses`. A family's folder has the same name in every layer: here, in ``kernels``
(Triton), ``csrc/cpu`` and ``csrc/cuda``.
"""
