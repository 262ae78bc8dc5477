"""What operators and losses tell torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., object])


def constant_result(function: F) -> F:
    """Run ``function`` while torch.compile traces and take its answer as a constant of the graph.

    This is ``torch.compiler.assume_constant_result``, which would import all of Dynamo when a module is defined.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def finite(number: float) -> bool:
    """Return whether ``number`` is neither NaN nor infinite.

    ``math.isfinite`` cannot be traced on a symbolic float, and of one torch takes ``number < inf`` for granted. The
    largest float is written out since ``sys.float_info.max`` would become another variable of the graph.
    """
    return -1.7976931348623157e308 <= number <= 1.7976931348623157e308


def operator_argument(number: float | Tensor) -> float | Tensor:
    """Return ``number`` as operators take it: a float, or a tensor where torch.compile keeps it a variable.

    Of a float given to an operator torch.compile makes a constant, and another graph for each value. A tensor that is
    multiplied by the float follows it. ``torch.full`` and ``torch.scalar_tensor`` do not: they cost a graph per value,
    and under inductor of torch 2.14 they go on with the value that was traced.
    """
    if isinstance(number, Tensor):
        return number.to("cpu", torch.float64)
    if not torch.compiler.is_compiling():
        return float(number)
    from torch.fx.experimental.symbolic_shapes import has_static_value

    if has_static_value(number):
        return float(number)
    return torch.ones((), dtype=torch.float64, device="cpu") * number


def number_of(argument: float | Tensor) -> float:
    """Return the value of an operator's argument that :func:`operator_argument` made."""
    return argument.item() if isinstance(argument, Tensor) else argument
