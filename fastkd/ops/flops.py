"""Register the FLOP formulas of operators with ``torch.utils.flop_counter``.

A multiply-add counts as two FLOP. Only matrix products count, each in full: symmetric matrices are not halved, and
exponentials and sums are ignored, as in torch's own formulas. Operators count what their form computes: a backward
without stored matrices counts them again. The formulas are in each family's folder.
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
    """Have torch count ``packet`` by ``formula``, a function of the operator's arguments with shapes for tensors.

    torch's module takes half a second to import, with all of Triton; if it is not imported yet, register at its first
    import.
    """

    def enter(module: ModuleType) -> None:
        module.register_flop_formula(packet)(formula)

    if COUNTER in sys.modules:
        enter(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _AfterImport(enter))


class _AfterImport(MetaPathFinder):
    """Calls ``action`` once with torch's module, after its import."""

    def __init__(self, action: Callable[[ModuleType], None]) -> None:
        self._action = action

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec of the other finders, with a loader that calls ``action`` after it executes the module."""
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
