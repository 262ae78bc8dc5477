"""Check the arguments of losses and operators; errors state the argument, the value received and the fix.

A loss checks its arguments under the names its caller knows, then calls the operator's ``..._unchecked`` function. An
operator that is called directly checks its own arguments.

Shapes, dtypes, devices and options are checked everywhere. Values are read on the CPU only: on a GPU that would stall
the stream, and under ``torch.compile`` break the graph; there, bad values result in NaN. Messages are formatted where
they are raised, because under ``torch.compile`` a batch size may be symbolic.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.errors import BackendUnavailable
from fastkd.ops import dispatch
from fastkd.ops.torch_state import has_values, is_finite, is_transformed, savable

REDUCTIONS = ("mean", "sum", "none")


def readable(tensor: Tensor) -> bool:
    """Return whether the values of ``tensor`` can be read without a device synchronisation or a graph break."""
    return tensor.device.type == "cpu" and has_values(tensor)


# --- options and numbers ----------------------------------------------------------------------------------------------


def option(name: str, value: object, choices: Sequence[str | None]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def flags(**values: object) -> None:
    """Raise ``TypeError`` unless every value is True or False: a string such as "false" would count as True."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")


def number(name: str, value: Any, traced: bool = False) -> float | Tensor:
    """Return ``value``, a Python or numpy number or a tensor or array that holds one, as a Python number.

    A tensor that is differentiated (by ``backward``, a torch.func transform or forward mode) is returned as a 0-d
    tensor. With ``traced``, so is any tensor under torch.compile, where ``.item()`` would break the graph.

    Raises:
        TypeError: anything else, such as a bool, a complex number or several elements.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, Tensor):
        dense(name, value)
        if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
            received = f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
            raise TypeError(f"{name}: expected a real number or a tensor that holds one, got {received}")
        if (torch.is_grad_enabled() and value.requires_grad) or is_transformed(value):
            return savable(value)[0].reshape(())
        return value.detach().reshape(()) if traced and torch.compiler.is_compiling() else value.item()
    received = type(value).__name__
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a numpy scalar or 0-d array
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a real number or a tensor that holds one, got {received}")
    return float(value)


def temperature(value: Any, name: str = "temperature") -> float | Tensor:
    """Return ``value`` as :func:`number` does; raise ``ValueError`` unless it is finite and above 0."""
    parsed = value if type(value) is float else number(name, value, traced=True)
    if isinstance(parsed, Tensor):
        if not readable(parsed):
            return parsed
        value = parsed.item()
    else:
        value = parsed
    if not (is_finite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
    return parsed


def temperatures(value: Any) -> tuple[float | Tensor, float | Tensor | None]:
    """Return the student's temperature, and the teacher's if ``value`` is a pair of different ones.

    Raises:
        ValueError, TypeError: as :func:`temperature`, and for other than two values.
    """
    if not isinstance(value, tuple | list):
        return temperature(value), None
    if len(value) != 2:
        raise ValueError(f"temperature: expected a number or a pair (student's, teacher's), got {len(value)} values")
    student, teacher = temperature(value[0], "temperature[0]"), temperature(value[1], "temperature[1]")
    if isinstance(student, Tensor) or isinstance(teacher, Tensor) or torch.compiler.is_compiling():
        return student, teacher  # comparing would synchronise, or add a guard to the graph
    return student, None if student == teacher else teacher


def differentiates_temperature(backend: str, *temperatures: float | Tensor) -> bool:
    """Return whether the call is differentiated with respect to a temperature, which only the reference supports.

    Raises:
        BackendUnavailable: it is, but another backend was requested by name.
    """
    differentiated = False
    for t in temperatures:
        if isinstance(t, Tensor) and (t.requires_grad or is_transformed(t)):
            differentiated = True
    if differentiated and backend not in ("auto", "reference"):
        raise BackendUnavailable(
            f"backend={backend!r}: the kernels have no gradient with respect to the temperature; pass "
            "temperature.detach(), or use backend='auto' or 'reference'"
        )
    return differentiated


def backend(family: str, value: str, student: Tensor) -> None:
    """Raise if a backend requested by name cannot run here; losses call this before computing guides or weights."""
    if value != "auto" and (value not in dispatch.BACKENDS or student.dtype in dispatch.KERNEL_DTYPES):
        dispatch.choose(family, value, student)


# --- tensors ----------------------------------------------------------------------------------------------------------


def dense(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a nested, sparse or mkldnn tensor."""
    if tensor.layout is torch.strided and not tensor.is_nested:
        return
    layout = str(tensor.layout).removeprefix("torch.").removeprefix("_")
    if tensor.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested one (layout {layout}); pad it with "
            "torch.nested.to_padded_tensor(x, 0.0) and pass a mask if the loss takes one, or call "
            "the loss once per sample"
        )
    raise TypeError(f"{name}: expected a dense tensor, got layout {layout}; convert it with .to_dense()")


def floating(
    name: str, tensor: object, dims: Sequence[int], layout: str, allow_empty: bool = False, no_samples: bool = False
) -> None:
    """Raise unless ``tensor`` is a dense floating-point tensor whose number of dimensions is one of ``dims``.

    With ``allow_empty`` every size may be 0, with ``no_samples`` the first.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {layout}, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        dense(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}; convert it with .float()")
    if tensor.dim() not in dims:
        raise ValueError(f"{name}: expected shape {layout}, got {tuple(tensor.shape)}")
    if not allow_empty and tensor.numel() == 0 and any(size == 0 for size in tensor.shape[int(no_samples) :]):
        raise ValueError(f"{name}: is empty, shape {tuple(tensor.shape)}; every dimension must be at least 1")


def teacher(name: str, tensor: Tensor) -> None:
    """Raise if a teacher's tensor requires grad while gradients are recorded."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(
            f"{name}: requires grad, but the teacher is a constant target: detach it with {name}.detach(), or run the "
            "teacher under torch.no_grad()"
        )


def same_device(**tensors: Tensor | None) -> None:
    """Raise unless all tensors are on the device of the first."""
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


def same_size(quantity: str, names: tuple[str, str], sizes: tuple[object, object], hint: str) -> None:
    """Raise unless two sizes or shapes are equal."""
    if sizes[0] != sizes[1]:
        one, other = (tuple(x) if isinstance(x, torch.Size) else x for x in sizes)
        raise ValueError(f"{names[0]} and {names[1]}: {quantity} differ, {one} and {other}; {hint}")


def row_weight(
    value: object, shape: tuple[int, ...], layout: str, like: Tensor, attention: bool, pooled: bool = False
) -> None:
    """Raise unless ``value`` is None, "attention" (if allowed), or a tensor ≥ 0 of ``shape`` that is not all 0.

    With ``pooled``, rows of other processes count too, so that all of these may be 0.
    """
    if value is None or (attention and isinstance(value, str) and value == "attention"):
        return
    expected = ("None, 'attention'" if attention else "None") + f" or a tensor of shape {layout}"
    if isinstance(value, str):
        raise ValueError(f"weight: expected {expected}, got {value!r}")
    if not isinstance(value, Tensor):
        raise TypeError(f"weight: expected {expected}, got {type(value).__name__}")
    dense("weight", value)
    if not value.is_floating_point():
        raise TypeError(f"weight: expected a floating-point tensor, got {value.dtype}; convert it with .float()")
    if tuple(value.shape) != shape:
        raise ValueError(f"weight: expected {expected} = {shape}, got shape {tuple(value.shape)}")
    same_device(student=like, weight=value)
    if readable(value):
        if bool((value < 0).any()):
            raise ValueError(f"weight: expected values ≥ 0, got a minimum of {value.min().item():g}")
        if not pooled and bool((value == 0).all()):
            raise ValueError(
                "weight: is 0 everywhere, so the weighted mean is undefined; give some row a weight above 0"
            )


# --- masks and labels -------------------------------------------------------------------------------------------------


def bool_mask(name: str, mask: object, shapes: Sequence[tuple[int, ...]], like: Tensor) -> Tensor:
    """Return the mask, copied if it is an inference tensor.

    Raises:
        TypeError, ValueError: it is not a bool tensor of one of ``shapes`` on the device of ``like``.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a bool tensor of shape {_either(shapes)}, got {type(mask).__name__}")
    dense(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor (True = valid), got {mask.dtype}; convert it with .bool()")
    return _check_shape_and_device(name, mask, shapes, like)


def integers(name: str, tensor: object, shapes: Sequence[tuple[int, ...]], like: Tensor) -> Tensor:
    """Return a tensor of integers, checked and copied as :func:`bool_mask` does."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name}: expected a tensor of integers of shape {_either(shapes)}, got {type(tensor).__name__}"
        )
    dense(name, tensor)
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name}: expected a tensor of integers, got {tensor.dtype}")
    return _check_shape_and_device(name, tensor, shapes, like)


def _check_shape_and_device(name: str, tensor: Tensor, shapes: Sequence[tuple[int, ...]], like: Tensor) -> Tensor:
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {_either(shapes)}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: is on {tensor.device}, but the inputs are on {like.device}; move it with .to(device)"
        )
    return savable(tensor)[0]


def _either(shapes: Sequence[tuple[int, ...]]) -> str:
    return " or ".join(str(shape) for shape in dict.fromkeys(shapes))


def every_sample_valid(name: str, mask: Tensor, element: str) -> None:
    """Raise unless every sample of a (B, n) mask has a valid ``element``."""
    if readable(mask):
        valid = mask.any(1)
        if not bool(valid.all()):
            empty = (~valid).nonzero().flatten().tolist()
            raise ValueError(
                f"{name}: no valid {element} in sample(s) {', '.join(map(str, empty))}; drop such samples from the "
                "batch"
            )


def term_weights(terms: object, known: Sequence[str]) -> dict[str, float]:
    """Return ``terms`` as a dict of finite weights ≥ 0; raise for any other value or an unknown term."""
    if not isinstance(terms, Mapping):
        raise TypeError(f"terms: expected None or a dict such as {{{known[0]!r}: 1.0}}, got {type(terms).__name__}")
    if not terms:
        raise ValueError(f"terms: is empty; name at least one of {', '.join(map(repr, known))}")
    weights: dict[str, float] = {}
    for term, weight in terms.items():
        if term not in known:
            option("terms", term, known)
        parsed = weight if type(weight) is float else number(f"terms[{term!r}]", weight)
        if isinstance(parsed, Tensor):
            raise ValueError(
                f"terms[{term!r}]: requires grad; to learn it, pass return_terms=True and weight the terms returned"
            )
        if not (is_finite(parsed) and parsed >= 0):
            raise ValueError(f"terms[{term!r}]: expected a finite weight ≥ 0, got {parsed!r}")
        weights[term] = parsed
    return weights
