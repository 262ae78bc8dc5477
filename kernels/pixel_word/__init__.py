"""Triton kernels of ``pixel_word``; start with forward.py."""
