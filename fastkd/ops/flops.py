"""Register the FLOP formulas of operators with ``torch.utils.flop_counter``.

A multiply-add counts as two FLOP. As in torch's own formulas, only matrix products count, and each in full: symmetric
matrices are not halved, exponentials and sums are ignored. Operators count what they compute: a backward that
recomputes matrices counts them again. The formulas are in each family's folder.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"


def register_flops(packet: Any, formula: Callable[..., int]) -> None:
    """Make torch count the FLOP of ``packet`` by ``formula``, a function of its arguments with shapes for tensors.

    torch's module takes half a second to import because it imports Triton. If it is not imported yet, the formula is
    registered when it is.
    """

    def add(module: ModuleType) -> None:
        module.register_flop_formula(packet)(formula)

    if COUNTER in sys.modules:
        add(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _AfterImport(add))


class _AfterImport(MetaPathFinder):
    """Import hook that calls ``action`` with torch's module once it is imported."""

    def __init__(self, action: Callable[[ModuleType], None]) -> None:
        self._action = action

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the other finders' spec, with a loader that calls ``action`` after executing the module."""
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self._action(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
