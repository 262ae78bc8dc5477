"""One room per kernel family: operator schema, fake, autograd and choice of backend.

Internal: users call :mod:`fastkd.losses`. A family's file has the same name on every floor
(``fastkd/reference``, ``kernels``, ``csrc/cpu``, ``csrc/cuda``, ``tests``, ``benchmarks``).
"""
