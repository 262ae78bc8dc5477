"""The torch state around a call and the kinds of tensors it is given, as far as they decide whether kernels can run.

Kernels read plain, dense memory, and their autograd is an ``autograd.Function`` that knows reverse mode alone.
"""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from fastkd._compile import constant_result, finite

_PLAIN = (Tensor, nn.Parameter)


@constant_result
def _any_transform() -> bool:
    """Return whether a transform of torch.func or forward mode is active; a constant of a compiled graph.

    torch.compile guards on both, and runs transforms that it traces.
    """
    return _within_func() or forward_ad._current_level >= 0


def _within_func() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


def check_temperature(value: object) -> None:
    """Raise unless ``value`` is a finite number above 0, or a tensor, which torch.compile traces without its value."""
    if isinstance(value, Tensor) or (isinstance(value, int | float) and finite(value) and value > 0):
        return
    raise ValueError(f"temperature: expected a finite number > 0, got {value!r}")


def transformed(*tensors: Tensor) -> bool:
    """Return whether this call is vmapped or differentiated other than by ``backward``.

    ``requires_grad`` does not tell: inside vmap and torch.func a tensor denies it, in forward mode it has a tangent.
    """
    if torch.compiler.is_compiling():
        return _any_transform()
    if _within_func():
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def refuse_tangent(family: str, backend: str, grad_loss: Tensor) -> None:
    """Raise where a backward is asked for its derivative by forward mode, which would be lost silently."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(grad_loss).tangent is not None:
        raise RuntimeError(
            f"{family}: the gradient of the {backend} backend has no rule for forward-mode AD; use backend='reference'"
        )


def wrapper(*tensors: Tensor | None) -> str:
    """Return the name of the class of the first tensor that is a wrapper (DTensor, ...), which has no memory; or ""."""
    for x in tensors:
        if x is not None and type(x) not in _PLAIN and _dispatches(type(x)):
            return type(x).__name__
    return ""


@constant_result
def _dispatches(kind: type) -> bool:
    """Return whether a class computes its operators itself, other than torch's own stand-ins while tracing."""
    if kind.__torch_dispatch__ is Tensor.__torch_dispatch__:  # type: ignore[attr-defined]
        return False
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return not issubclass(kind, FakeTensor | FunctionalTensor)


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a nested, sparse or mkldnn tensor."""
    if tensor.layout is torch.strided and not tensor.is_nested:
        return
    layout = str(tensor.layout).removeprefix("torch.").removeprefix("_")
    if tensor.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested one (layout {layout}); pad it with "
            "torch.nested.to_padded_tensor(x, 0.0) and pass a mask of what is valid where the loss takes one, or call "
            "the loss once per sample"
        )
    raise TypeError(f"{name}: expected a dense tensor, got layout {layout}; convert it with .to_dense()")


def savable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, with a copy of each that inference mode made where autograd may have to save it."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tensors
    for x in tensors:  # a generator would double the cost
        if x.is_inference():
            return tuple(y.clone() if y.is_inference() else y for y in tensors)
    return tensors


def values_exist(tensor: Tensor) -> bool:
    """Return whether the values of ``tensor`` can be looked at: not those of fake, meta, batched or traced tensors."""
    if torch.compiler.is_compiling() or tensor.is_meta or _within_func() or torch._C._get_tracing_state() is not None:
        return False
    kind = type(tensor)
    if kind not in _PLAIN and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:  # type: ignore[attr-defined]
        return False
    keys = torch._C._TorchDispatchModeKey
    return torch._C._get_dispatch_mode(keys.FAKE) is None and torch._C._get_dispatch_mode(keys.PROXY) is None
