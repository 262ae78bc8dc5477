"""torch's state around a call (compilation, transforms, inference mode), and tensors that kernels cannot read.

Kernels read plain, dense memory, and their autograd is an ``autograd.Function`` with reverse mode only.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., object])
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)

_PLAIN = (Tensor, nn.Parameter)


def constant_result(function: F) -> F:
    """Decorate ``function`` so that torch.compile runs it while tracing and makes its result a constant of the graph.

    Same as ``torch.compiler.assume_constant_result``, which would import all of Dynamo at decoration time.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside_graphs(reason: str) -> Callable[[F], F]:
    """Return a decorator for a function that torch.compile must not trace, nor what it calls.

    Same as ``torch.compiler.disable``, which would import all of Dynamo at decoration time.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> object:
            if "torch._dynamo" in sys.modules:
                return torch.compiler.disable(function)(*args, **kwargs)
            return function(*args, **kwargs)

        call._torchdynamo_disable, call._torchdynamo_disable_msg = True, reason  # type: ignore[attr-defined]
        return cast(F, call)

    return decorate


def is_finite(number: float) -> bool:
    """Return whether ``number`` is neither NaN nor infinite, also while torch.compile traces.

    ``math.isfinite`` cannot be traced with a symbolic float, and torch assumes that one is below inf. The largest float
    is written out because ``sys.float_info.max`` would become another variable of the graph.
    """
    return -1.7976931348623157e308 <= number <= 1.7976931348623157e308


@constant_result
def _any_transform() -> bool:
    """Return whether a torch.func transform or forward mode is active; torch.compile guards on both."""
    return _within_func() or forward_ad._current_level >= 0


def _within_func() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


def is_transformed(*tensors: Tensor) -> bool:
    """Return whether this call is vmapped or differentiated by anything other than ``backward``.

    ``requires_grad`` does not reveal this: it is False inside vmap and torch.func, and in forward mode a tensor has a
    tangent instead.
    """
    if torch.compiler.is_compiling():
        return _any_transform()
    if torch._C._functorch.maybe_current_level() is not None:
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def has_tangent(tensor: Tensor) -> bool:
    """Return whether forward mode differentiates ``tensor``."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def wrapper_class_name(*tensors: Tensor | None) -> str:
    """Return the class name of the first tensor that wraps others, such as a DTensor, or "" if there is none."""
    for x in tensors:
        if x is not None and type(x) not in _PLAIN and _is_wrapper(type(x)):
            return type(x).__name__
    return ""


@constant_result
def _is_wrapper(tensor_class: type) -> bool:
    """Return whether a tensor class overrides how operators run, except for those that torch uses for tracing."""
    if tensor_class.__torch_dispatch__ is Tensor.__torch_dispatch__:  # type: ignore[attr-defined]
        return False
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return not issubclass(tensor_class, FakeTensor | FunctionalTensor)


def savable(*tensors: MaybeTensor) -> tuple[MaybeTensor, ...]:
    """Return the tensors, with inference tensors copied where autograd may have to save them."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tensors
    for x in tensors:  # a loop, as any(...) would double the cost
        if x is not None and x.is_inference():
            return tuple(y.clone() if y is not None and y.is_inference() else y for y in tensors)
    return tensors


def has_values(tensor: Tensor) -> bool:
    """Return whether Python can read the values of ``tensor``; False for fake, meta, batched and traced tensors."""
    if torch.compiler.is_compiling() or tensor.is_meta or _within_func() or torch._C._get_tracing_state() is not None:
        return False
    tensor_class = type(tensor)
    if (
        tensor_class not in _PLAIN and tensor_class.__torch_dispatch__ is not Tensor.__torch_dispatch__  # type: ignore[attr-defined]
    ):
        return False
    keys = torch._C._TorchDispatchModeKey
    return torch._C._get_dispatch_mode(keys.FAKE) is None and torch._C._get_dispatch_mode(keys.PROXY) is None
