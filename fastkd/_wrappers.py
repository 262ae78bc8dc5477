"""Unwrap modules from torch.compile, data parallelism, weight averaging and activation checkpointing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

_T = TypeVar("_T")

_RESERVED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # child names that only torch uses
_BY_TYPE = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_BY_NAME = {
    "timm.utils.model_ema.ModelEma",
    "timm.utils.model_ema.ModelEmaV2",
    "timm.utils.model_ema.ModelEmaV3",
    "deepspeed.runtime.engine.DeepSpeedEngine",
}  # compared by name, so that these packages are not imported


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside its wrappers."""
    while (inner := _inner(module)) is not None:
        module = inner
    return module


@contextmanager
def unwrapped(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module inside its wrappers, with its submodules unwrapped until the end of the block.

    Within the block, parameter names are those of the model's code, and a forward runs without the wrappers.
    """
    root = unwrap(module)
    wrapped = [
        (parent, name, child)
        for parent in list(root.modules())
        if _inner(parent) is None
        for name, child in parent._modules.items()
        if child is not None and _inner(child) is not None
    ]
    try:
        for parent, name, child in wrapped:
            parent._modules[name] = unwrap(child)
        yield root
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


def uncompiled() -> AbstractContextManager[Any]:
    """Return a context in which compiled modules and functions run eagerly.

    Several backwards through one graph need it: compiled code reuses the graph's memory in the first one.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module's weights are divided between processes by ``fully_shard`` (FSDP2)."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def plain_name(name: str) -> str:
    """Return a parameter's name without the parts that torch's wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _RESERVED)


def plain_names(state: Mapping[str, _T]) -> dict[str, _T]:
    """Return a state dict with the wrappers' parts removed from the names, ``module.`` only if all names start with it.

    Raises:
        ValueError: two names differ only by a wrapper.
    """
    plain: dict[str, _T] = {}
    for name, value in state.items():
        if plain.setdefault(plain_name(name), value) is not value:
            raise ValueError(f"two tensors are named {plain_name(name)!r}, one with a wrapper's name in it")
    while plain and all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): value for name, value in plain.items()}
    return plain


def _inner(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper, or None if ``module`` is not a wrapper."""
    name = next((name for name in _RESERVED if name in module._modules), None)
    if name is None:
        kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__}
        if not isinstance(module, _BY_TYPE) and kinds.isdisjoint(_BY_NAME):
            return None
        name = "module"
    return module._modules.get(name)
