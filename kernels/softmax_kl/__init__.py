"""Triton kernels of ``softmax_kl``: see forward.py and backward.py."""
