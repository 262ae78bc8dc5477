"""Triton kernels of ``softmax_kl``; start with forward.py."""
