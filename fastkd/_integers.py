"""Integer arithmetic on sizes, shared by fastkd and its Triton kernels."""


def ceil_div(a: int, b: int) -> int:
    """Return ⌈a / b⌉ for positive integers, which may be symbolic."""
    return (a + b - 1) // b


def round_up(a: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``a``."""
    return ceil_div(a, multiple) * multiple
