"""``pixel_word`` in Triton."""
