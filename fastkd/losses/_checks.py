"""Argument checks of the losses: each raises one error that names the argument, the value received, and the fix.

Shapes, dtypes, devices and options are checked everywhere. What a tensor *holds* is looked at on the CPU only: on a GPU
the look would stall the stream, and under ``torch.compile`` break the graph; there, bad values show as NaN. Messages
are put together where they are raised, because under ``torch.compile`` a batch size may have no digits yet.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._compile import finite
from fastkd.ops import dispatch
from fastkd.ops.torch_state import check_dense, savable, transformed, values_exist

REDUCTIONS = ("mean", "sum", "none")


def values_visible(tensor: Tensor) -> bool:
    """Return whether ``tensor`` has values that can be looked at without a device synchronisation or a graph break."""
    return tensor.device.type == "cpu" and values_exist(tensor)


def option(name: str, value: object, choices: Sequence[str | None]) -> None:
    """``value`` must be one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def number(name: str, value: Any, traced: bool = False) -> float | Tensor:
    """Return a Python number for ``value``: a number of Python or numpy, or a tensor or array that holds one.

    A tensor whose gradient is asked for (by ``backward``, or by a transform of torch.func or forward mode) is returned
    as a tensor of no dimensions; with ``traced`` any tensor is under torch.compile: ``.item()`` would break its graph.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    kind = type(value).__name__
    if isinstance(value, Tensor):
        check_dense(name, value)
        if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
            shown = f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
            raise TypeError(f"{name}: expected a real number or a tensor that holds one, got {shown}")
        if (torch.is_grad_enabled() and value.requires_grad) or transformed(value):
            return savable(value)[0].reshape(())
        return value.detach().reshape(()) if traced and torch.compiler.is_compiling() else value.item()
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # numpy's scalars, and its arrays of one number
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a real number or a tensor that holds one, got {kind}")
    return float(value)


def temperature(value: Any, name: str = "temperature") -> float | Tensor:
    """``value`` must be a finite number above 0; return it as :func:`number` does."""
    given = number(name, value, traced=True)
    if isinstance(given, Tensor):
        if not values_visible(given):
            return given
        value = given.item()
    else:
        value = given
    if not (finite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
    return given


def floating(name: str, tensor: object, dims: Sequence[int], layout: str) -> None:
    """``tensor`` must be a non-empty floating-point tensor with one of ``dims`` numbers of dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {layout}, got {type(tensor).__name__}")
    check_dense(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}; convert it with .float()")
    if tensor.dim() not in dims:
        raise ValueError(f"{name}: expected shape {layout}, got {tuple(tensor.shape)}")
    if any(size == 0 for size in tensor.shape):
        raise ValueError(f"{name}: is empty, shape {tuple(tensor.shape)}; every dimension must be at least 1")


def teacher(name: str, tensor: Tensor) -> None:
    """A teacher's tensor must not require grad where gradients are recorded."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(
            f"{name}: requires grad, but the teacher is a constant target: detach it with {name}.detach(), or run the "
            "teacher under torch.no_grad()"
        )


def backend(family: str, value: str, student: Tensor) -> None:
    """A backend asked for by name must be able to compute here: refused before guides or weights are computed."""
    if value != "auto" and (value not in dispatch.BACKENDS or student.dtype in dispatch.KERNEL_DTYPES):
        dispatch.choose(family, value, student)


def same_device(**tensors: Tensor | None) -> None:
    """All tensors given must be on the device of the first."""
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = (name, tensor)
        elif tensor.device != first[1].device:
            raise ValueError(
                f"{name}: is on {tensor.device}, but {first[0]} is on {first[1].device}; move one with .to(device)"
            )


def same_size(what: str, names: tuple[str, str], sizes: tuple[object, object], hint: str) -> None:
    """Two sizes (or shapes) of student and teacher must agree."""
    if sizes[0] != sizes[1]:
        raise ValueError(f"{names[0]} and {names[1]}: {what} differ, {sizes[0]} and {sizes[1]}; {hint}")


def row_weight(value: object, shape: tuple[int, int], layout: str, like: Tensor, attention: bool) -> None:
    """``value`` must be None, "attention" (where that exists), or a tensor ≥ 0 of the given shape that is not all 0."""
    if value is None or (attention and isinstance(value, str) and value == "attention"):
        return
    wanted = ("None, 'attention'" if attention else "None") + f" or a tensor of shape {layout}"
    if isinstance(value, str):
        raise ValueError(f"weight: expected {wanted}, got {value!r}")
    if not isinstance(value, Tensor):
        raise TypeError(f"weight: expected {wanted}, got {type(value).__name__}")
    check_dense("weight", value)
    if not value.is_floating_point():
        raise TypeError(f"weight: expected a floating-point tensor, got {value.dtype}; convert it with .float()")
    if tuple(value.shape) != shape:
        raise ValueError(f"weight: expected {wanted} = {shape}, got shape {tuple(value.shape)}")
    same_device(student=like, weight=value)
    if values_visible(value):
        if bool((value < 0).any()):
            raise ValueError(f"weight: expected values ≥ 0, got a minimum of {value.min().item():g}")
        if bool((value == 0).all()):
            raise ValueError(
                "weight: is 0 everywhere, so the weighted mean is undefined; give some row a weight above 0"
            )


def bool_mask(name: str, mask: object, shapes: Sequence[tuple[int, ...]], like: Tensor) -> Tensor:
    """``mask`` must be a boolean tensor of one of ``shapes`` on the device of ``like``; return one to compute with."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a bool tensor of shape {_either(shapes)}, got {type(mask).__name__}")
    check_dense(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor (True = valid), got {mask.dtype}; convert it with .bool()")
    return _placed(name, mask, shapes, like)


def integers(name: str, tensor: object, shapes: Sequence[tuple[int, ...]], like: Tensor) -> Tensor:
    """The same of a tensor of integers."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name}: expected a tensor of integers of shape {_either(shapes)}, got {type(tensor).__name__}"
        )
    check_dense(name, tensor)
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name}: expected a tensor of integers, got {tensor.dtype}")
    return _placed(name, tensor, shapes, like)


def _placed(name: str, tensor: Tensor, shapes: Sequence[tuple[int, ...]], like: Tensor) -> Tensor:
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {_either(shapes)}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: is on {tensor.device}, but the inputs are on {like.device}; move it with .to(device)"
        )
    return savable(tensor)[0]


def _either(shapes: Sequence[tuple[int, ...]]) -> str:
    return " or ".join(str(shape) for shape in dict.fromkeys(shapes))


def every_sample_valid(name: str, mask: Tensor, what: str) -> None:
    """Every sample of a (B, n) mask must have a True."""
    if values_visible(mask):
        valid = mask.any(1)
        if not bool(valid.all()):
            empty = (~valid).nonzero().flatten().tolist()
            raise ValueError(
                f"{name}: no valid {what} in sample(s) {', '.join(map(str, empty))}; drop such samples from the batch"
            )


def term_weights(terms: object, known: Sequence[str]) -> dict[str, float]:
    """``terms`` as a checked dict of finite weights ≥ 0."""
    if not isinstance(terms, Mapping):
        raise TypeError(f"terms: expected None or a dict such as {{{known[0]!r}: 1.0}}, got {type(terms).__name__}")
    if not terms:
        raise ValueError(f"terms: is empty; name at least one of {', '.join(map(repr, known))}")
    weights: dict[str, float] = {}
    for term, weight in terms.items():
        option("terms", term, known)
        given = number(f"terms[{term!r}]", weight)
        if isinstance(given, Tensor):
            raise ValueError(
                f"terms[{term!r}]: requires grad; to learn it, pass return_terms=True and weight the terms returned"
            )
        if not (finite(given) and given >= 0):
            raise ValueError(f"terms[{term!r}]: expected a finite weight ≥ 0, got {given!r}")
        weights[term] = given
    return weights
