"""Triton kernels of ``relation``; start with forward.py."""
