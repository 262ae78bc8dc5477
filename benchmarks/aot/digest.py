"""Hash everything that an ahead-of-time compilation depends on, so that unchanged kernels are not recompiled."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from typing import Any


def digest(kernel: Any, *arguments: dict[str, Any] | tuple[str, ...]) -> str:
    """Return a hash of a kernel, every device function it calls, and of its arguments' types, values and options.

    It does not depend on comments, docstrings, formatting or the modules that define the functions.
    """
    groups = (sorted(group.items()) if isinstance(group, dict) else sorted(group) for group in arguments)
    parts = [_closure(kernel), *(repr(group) for group in groups)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@functools.cache
def _closure(kernel: Any) -> str:
    """Return the code of a kernel and of every function it calls, and the module constants they read."""
    found: dict[str, str] = {}
    _collect(kernel, found)
    return "\n".join(sorted(set(found.values())))


def _collect(kernel: Any, found: dict[str, str]) -> None:
    """Add the code of a kernel and of everything it uses to ``found``, by qualified name."""
    function = kernel.fn
    name = f"{function.__module__}.{function.__qualname__}"
    if name in found:
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    if ast.get_docstring(definition, clean=False) is not None:
        del definition.body[0]
    found[name] = ast.unparse(tree)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for used in sorted(names & set(function.__globals__)):
        value = function.__globals__[used]
        value = getattr(value, "value", value)  # of a tl.constexpr
        if hasattr(value, "fn"):
            _collect(value, found)
        elif isinstance(value, bool | int | float | str):
            found[f"{function.__module__}.{used}"] = f"{used} = {value!r}"
