"""Triton kernels of ``relation``: see forward.py and backward.py."""
