"""Taps: read features of a model by module path, through forward hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastkd._messages import suggestion
from fastkd._wrappers import plain_name, unwrap
from fastkd.distill.attention_taps import AttentionHooks, AttentionTap
from fastkd.distill.selectors import follow


class Taps(Mapping[str, Any]):
    """Record the outputs of chosen modules at every forward of a model.

    A mapping from your names to the latest outputs. Every forward of the model clears the previous ones; if a module is
    called several times in one forward, its last output is kept. Reading an output that has been changed in place since
    (by an ``inplace=True`` activation or ``+=``) is an error. Closing the taps, or dropping the last reference to them,
    removes the hooks.

    Paths are those of ``model.named_modules()``. The prefixes of wrappers are optional: the ``module.`` of
    DistributedDataParallel and AveragedModel, the ``_orig_mod.`` of ``torch.compile``. Make the taps before
    ``torch.compile``: a compiled graph ignores hooks added after it.

    Args:
        model: the model to watch; it may be wrapped.
        paths: name to module path, or to ``(path, index)`` to record one part of a tuple, list, dict or object
            (``("encoder", 0)``, ``("encoder", "last_hidden_state")``), or to an `AttentionTap` to record the queries
            and keys of an attention module.

    Raises:
        TypeError: a model that is not a module, or a path that is not a string.
        ValueError: an empty or dotted name, or a path that is not a module of the model (the message suggests others).
        KeyError: reading a name that is not a tap.
        RuntimeError: reading a tap that is closed, whose module did not run in the latest forward, or whose output was
            changed in place.

    Example:
        >>> with fastkd.Taps(model, {"stage4": "backbone.layers.3.fusion"}) as taps:
        ...     model(image)
        ...     feature = taps["stage4"]
    """

    def __init__(self, model: nn.Module, paths: Mapping[str, str | tuple[str, int | str]]) -> None:
        if not isinstance(paths, Mapping) or not paths:
            raise ValueError(f"paths must be a non-empty dict of name to module path, got {paths!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        modules = dict(_modules(model))
        self.paths: dict[str, str] = {}
        self.targets: dict[str, tuple[str, int | str | None]] = {}  # with the index, for `RecordedTeacher`
        self._outputs = _Outputs()
        self._handles: list[RemovableHandle] = []
        found: list[tuple[str, nn.Module, int | str | None]] = []
        for name, target in paths.items():
            path, index = target if isinstance(target, tuple) and len(target) == 2 else (target, None)
            if not isinstance(name, str) or not name or "." in name:
                raise ValueError(f"tap name {name!r} must be a non-empty string without dots")
            if not isinstance(path, str):
                raise TypeError(f"tap {name!r}: expected a module path or (path, index), got {target!r}")
            path = _canonical(path, modules)
            if path not in modules:
                raise ValueError(
                    f"tap {name!r}: the model has no module {path!r}.{suggestion(path, _candidates(path, modules))}"
                )
            self.paths[name] = path
            self.targets[name] = (path, index)
            found.append((name, modules[path], index))
        self._handles.append(unwrap(model).register_forward_pre_hook(_ClearHook(self._outputs)))
        for name, module, index in found:
            if isinstance(paths[name], AttentionTap):
                hooks = AttentionHooks(self._outputs, name, str(index))
                self._handles.append(module.register_forward_pre_hook(hooks.before))
                self._handles.append(module.register_forward_hook(hooks.after, always_call=True))
            else:
                self._handles.append(module.register_forward_hook(_RecordHook(self._outputs, name, index)))

    def __getitem__(self, name: str) -> Any:
        if name not in self.paths:
            raise KeyError(f"no tap named {name!r}.{suggestion(name, self.paths)}")
        if name not in self._outputs:
            if not self._handles:
                raise RuntimeError(f"tap {name!r} is closed")
            if not self._outputs.forwards:
                raise RuntimeError(f"tap {name!r} is empty: the model has not run since the tap was made")
            raise RuntimeError(
                f"tap {name!r} never fired: module {self.paths[name]!r} did not run in the latest forward. It may be "
                "skipped in this mode, replaced after the tap was made, or compiled before it (make the taps first)"
            )
        value, version = self._outputs[name]
        if version is not None and _version(value) != version:
            raise RuntimeError(
                f"tap {name!r}: the output of module {self.paths[name]!r} was changed in place afterwards, by an "
                "activation with inplace=True or a '+=', so its original values are lost: tap the module that changed "
                "it, which returns the same values, or remove its inplace"
            )
        return value

    def __contains__(self, name: object) -> bool:
        return name in self.paths  # even if it has not fired; reading it raises then

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def clear(self) -> None:
        """Release the latest outputs and their graph."""
        self._outputs.clear()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_handles"):  # else __init__ failed
            self.close()

    def __repr__(self) -> str:
        return f"Taps({self.paths})"


# Hooks are classes, so that a hooked model can be pickled and copied. They do not refer to the taps, so that the model
# does not keep the taps alive.


class _ClearHook:
    """Forward pre-hook of the model: clears the outputs of the previous forward."""

    def __init__(self, outputs: _Outputs) -> None:
        self.outputs = outputs

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.outputs.clear()
        self.outputs.forwards += 1


class _RecordHook:
    """Forward hook of a tapped module: records its output."""

    def __init__(self, outputs: _Outputs, name: str, index: int | str | None) -> None:
        self.outputs, self.name, self.index = outputs, name, index

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.index is not None:
            try:
                output = follow(output, str(self.index))
            except ValueError as error:
                raise ValueError(f"tap {self.name!r}: {error}") from error
        self.outputs[self.name] = output, _version(output)


class _Outputs(dict[str, tuple[Any, int | None]]):
    """The latest output of every tap, with its version (see `_version`) when it was recorded.

    Copies and pickles are empty: tensors that belong to a graph cannot be copied.
    """

    forwards = 0

    def __deepcopy__(self, memo: Any) -> _Outputs:
        return _Outputs()

    def __reduce__(self) -> tuple[type[_Outputs], tuple[()]]:
        return _Outputs, ()


def _version(value: Any) -> int | None:
    """Return torch's counter of in-place writes to a tensor, or None where there is none."""
    has_counter = isinstance(value, Tensor) and not torch.compiler.is_compiling() and not value.is_inference()
    return value._version if has_counter else None


def _modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of the whole tree, with wrappers omitted from the paths."""
    module = unwrap(module)
    if prefix:
        yield prefix, module
    for name, child in module.named_children():
        yield from _modules(child, f"{prefix}.{name}" if prefix else name)


def _canonical(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the path without the names that wrappers add."""
    path = plain_name(path)
    while path not in modules and path.startswith("module."):
        path = path.removeprefix("module.")
    if path not in modules:  # a wrapped part of the model
        bare = ".".join(part for part in path.split(".") if part != "module")
        path = bare if bare in modules else path
    return path


def _candidates(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the modules that an unknown path may refer to: those below its longest known prefix, same depth first."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        prefix = ".".join(parts[:depth])
        if not prefix or prefix in modules:
            below = [name for name in modules if not prefix or name.startswith(prefix + ".")]
            level = [name for name in below if name.count(".") == depth]
            same = [name for name in below if name.count(".") == len(parts) - 1]
            return list(dict.fromkeys([*same, *level])) or list(modules)
    return list(modules)
