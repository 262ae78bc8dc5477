"""``softmax_kl`` in Triton."""
