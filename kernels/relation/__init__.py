"""``relation`` in Triton."""
