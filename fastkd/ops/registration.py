"""Registration of operators with torch: definition, kernels, fake and FLOP formula of each, in two overloads.

A definition lives as long as the process, the package may not: ``importlib.reload`` and a second import after
``sys.modules`` was emptied run this again. So torch is given functions that look their work up in a table kept where
the definitions are, in ``torch.ops.fastkd``. The first import defines; each import replaces the entries of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.ops.flops import count_by

NAMESPACE = "fastkd"


class Work(NamedTuple):
    """The implementation of an operator."""

    kernels: Callable[..., Any]
    fake: Callable[..., Any]
    flops: Callable[..., int]


def register(name: str, schema: str, work: Work) -> None:
    """Make ``torch.ops.fastkd.<name>``, or replace what it does.

    Args:
        name: without the namespace.
        schema: arguments and results; one argument is "float temperature". The overload "scheduled" takes a 0-d CPU
            tensor for it, which torch.compile can change from call to call.
        work: takes the temperature as either.

    Raises:
        RuntimeError: the process has an operator of this name with other arguments.
    """
    table = vars(getattr(torch.ops, NAMESPACE)).setdefault("_work", {})
    defined = name in table
    if defined and table[name][0] != schema:
        raise RuntimeError(
            f"fastkd: this process has imported another version of fastkd, whose operator {name} takes other "
            "arguments; restart the interpreter"
        )
    table[name] = (schema, work)
    if defined:
        return

    def kernels(*arguments: Any, **named: Any) -> Any:
        return table[name][1].kernels(*arguments, **named)

    def fake(*arguments: Any, **named: Any) -> Any:
        return table[name][1].fake(*arguments, **named)

    def flops(*arguments: Any, out_shape: Any = None, **named: Any) -> int:
        return table[name][1].flops(*arguments, **named)

    # A replayed CUDA graph would keep the number that the tensor held while it was recorded.
    unsafe = (torch.Tag.cudagraph_unsafe,)
    for overload, text, tags in (
        ("", schema, ()),
        (".scheduled", schema.replace("float temperature", "Tensor temperature"), unsafe),
    ):
        torch.library.define(f"{NAMESPACE}::{name}{overload}", text, tags=(torch.Tag.pt2_compliant_tag, *tags))
        torch.library.impl(f"{NAMESPACE}::{name}{overload}", ("cpu", "cuda"), kernels)
        torch.library.register_fake(f"{NAMESPACE}::{name}{overload}", fake)
    count_by(getattr(getattr(torch.ops, NAMESPACE), name), flops)


def operator(name: str, temperature: float | Tensor) -> Callable[..., Any]:
    """Return the overload of ``torch.ops.fastkd.<name>`` for a temperature."""
    packet = getattr(torch.ops.fastkd, name)
    return packet.scheduled if isinstance(temperature, Tensor) else packet.default


def saved(temperature: float | Tensor) -> tuple[tuple[Tensor, ...], float | None]:
    """Return what of the temperature an ``autograd.Function`` saves for its backward: tensors, and a number."""
    return ((temperature,), None) if isinstance(temperature, Tensor) else ((), temperature)
