"""Register operators with torch: schema, kernels, fake implementation and FLOP formula, in two overloads.

A definition lives as long as the process, but the package may be imported again: by ``importlib.reload``, or after
``sys.modules`` was cleared. torch is therefore given functions that look up the implementation in a table kept with the
definitions, in ``torch.ops.fastkd``. The first import defines the operators; each import replaces the table's entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.ops.flops import register_flops
from fastkd.ops.torch_state import has_tangent

NAMESPACE = "fastkd"


class Implementation(NamedTuple):
    """The functions of an operator; each takes the temperature as a float or a tensor."""

    kernels: Callable[..., Any]
    fake: Callable[..., Any]
    flops: Callable[..., int]


def register(name: str, schema: str, implementation: Implementation) -> None:
    """Define ``torch.ops.fastkd.<name>``, or replace its implementation.

    Args:
        name: without the namespace.
        schema: arguments and results; one argument is "float temperature". The overload "scheduled" takes a 0-d CPU
            tensor for it, which torch.compile can change from call to call.
        implementation: the functions of both overloads.

    Raises:
        RuntimeError: the process has an operator of this name with other arguments.
    """
    table = vars(getattr(torch.ops, NAMESPACE)).setdefault("_implementations", {})
    defined = name in table
    if defined and table[name][0] != schema:
        raise RuntimeError(
            f"fastkd: this process has imported another version of fastkd, whose operator {name} takes other "
            "arguments; restart the interpreter"
        )
    table[name] = (schema, implementation)
    if defined:
        return

    def kernels(*arguments: Any, **named: Any) -> Any:
        return table[name][1].kernels(*arguments, **named)

    def fake(*arguments: Any, **named: Any) -> Any:
        return table[name][1].fake(*arguments, **named)

    def flops(*arguments: Any, out_shape: Any = None, **named: Any) -> int:
        return table[name][1].flops(*arguments, **named)

    # A replayed CUDA graph would use the value that the tensor had during capture.
    unsafe = (torch.Tag.cudagraph_unsafe,)
    for overload, text, tags in (
        ("", schema, ()),
        (".scheduled", schema.replace("float temperature", "Tensor temperature"), unsafe),
    ):
        torch.library.define(f"{NAMESPACE}::{name}{overload}", text, tags=(torch.Tag.pt2_compliant_tag, *tags))
        torch.library.impl(f"{NAMESPACE}::{name}{overload}", ("cpu", "cuda"), kernels)
        torch.library.register_fake(f"{NAMESPACE}::{name}{overload}", fake)
    register_flops(getattr(getattr(torch.ops, NAMESPACE), name), flops)


def operator(name: str, temperature: float | Tensor) -> Callable[..., Any]:
    """Return the overload of ``torch.ops.fastkd.<name>`` for a temperature."""
    packet = getattr(torch.ops.fastkd, name)
    return packet.scheduled if isinstance(temperature, Tensor) else packet.default


# --- the temperature of an operator -----------------------------------------------------------------------------------


def operator_argument(number: float | Tensor) -> float | Tensor:
    """Return ``number`` as operators take it: a float, or a tensor where torch.compile keeps it a variable.

    torch.compile makes a float argument of an operator a constant and compiles a graph per value. A tensor multiplied
    by the float stays variable. ``torch.full`` and ``torch.scalar_tensor`` do not help: they also cost a graph per
    value, and under inductor in torch 2.14 they keep the value that was traced.
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
    """Return the value of an argument that :func:`operator_argument` made."""
    return argument.item() if isinstance(argument, Tensor) else argument


def save_temperature(ctx: Any, temperature: float | Tensor) -> tuple[Tensor, ...]:
    """Keep a float temperature on ``ctx``; return a tensor one as the last argument of ``ctx.save_for_backward``."""
    ctx.temperature = None if isinstance(temperature, Tensor) else temperature
    return (temperature,) if isinstance(temperature, Tensor) else ()


def saved_temperature(ctx: Any) -> float | Tensor:
    """Return the temperature that :func:`save_temperature` saved."""
    return ctx.saved_tensors[-1] if ctx.temperature is None else ctx.temperature


# --- backward ---------------------------------------------------------------------------------------------------------


def gradient(family: str, temperature: float | Tensor, grad_loss: Tensor, *arguments: Any) -> Any:
    """Return the result of the operator ``<family>_backward``, whose last argument is the backend.

    Raises:
        RuntimeError: forward mode differentiates the gradient; a double backward of the result raises one later.
    """
    if has_tangent(grad_loss):
        raise RuntimeError(
            f"{family}: the gradient of the {arguments[-1]} backend does not support forward-mode AD; use "
            "backend='reference'"
        )
    if torch.is_grad_enabled():  # create_graph=True: the gradient may be differentiated
        return _Gradient.apply(family, temperature, grad_loss, *arguments)
    return operator(f"{family}_backward", temperature)(grad_loss, *arguments)


class _Gradient(torch.autograd.Function):
    """The backward operator as a Function, so that differentiating it raises an error instead of giving zeros."""

    @staticmethod
    def forward(ctx: Any, family: str, temperature: float | Tensor, *arguments: Any) -> Any:
        ctx.family, ctx.backend = family, arguments[-1]
        return operator(f"{family}_backward", temperature)(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.family}: the {ctx.backend} backend is differentiable once; for double backward use "
            'backend="reference"'
        )
