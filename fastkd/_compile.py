"""What operators and losses tell torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_result(function: F) -> F:
    """Run ``function`` while torch.compile traces and take its answer as a constant of the graph.

    This is ``torch.compiler.assume_constant_result``, which would import all of Dynamo when a module is defined.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
