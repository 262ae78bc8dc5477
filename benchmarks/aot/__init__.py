"""Ahead-of-time compilation of the Triton kernels: ``python -m benchmarks.aot``."""
