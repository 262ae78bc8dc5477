"""Triton kernels of ``pixel_word``: see forward.py and backward.py."""
