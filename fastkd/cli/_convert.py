"""Read YAML, and convert its values to the types of dataclass fields."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from fastkd._messages import suggestion
from fastkd.data._values import brief

_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false", Path: "a path", type(None): "null"}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also reads 1e-3 as a number and rejects a key that appears twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused below; its text may be exponentially longer than the file
            text = str(key.value)
            if text in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{text!r} appears twice", key.start_mark)
            seen.add(text)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """Return the content of YAML; tags that construct objects are refused.

    Raises:
        ValueError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # safe: a subclass of SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error


def convert(value: Any, hint: Any, where: str) -> Any:
    """Return a value of YAML as the type of a setting.

    Raises:
        ValueError: it has another type, or is out of range; ``where`` begins the message.
    """
    if is_dataclass(hint):
        if hasattr(hint, "shorthand") and isinstance(value, int | float) and not isinstance(value, bool):
            value = {hint.shorthand: value}
        if not isinstance(value, Mapping):
            raise _wrong(value, hint, where)
        hints = get_type_hints(hint)  # type: ignore[arg-type]
        for key in value:
            if key not in hints:
                raise ValueError(f"{where}: nothing is named {key!r}.{suggestion(key, hints)}")
        given = {key: convert(each, hints[key], f"{where}.{key}") for key, each in value.items()}
        return build(hint, given, where)  # type: ignore[arg-type]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for one in arguments:
            try:
                return convert(value, one, where)
            except ValueError:
                continue
        raise _wrong(value, hint, where)
    if origin is dict and isinstance(value, Mapping):
        return {_key(key, where): convert(each, arguments[1], f"{where}.{key}") for key, each in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis:
            return tuple(convert(each, arguments[0], where) for each in value)
        if len(value) == len(arguments):
            return tuple(convert(each, one, where) for each, one in zip(value, arguments, strict=True))
    if hint is Any or (origin is Literal and value in arguments):
        return value
    if hint is Path and isinstance(value, str):
        return Path(value).expanduser()
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    raise _wrong(value, hint, where)


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{where}: names must be text, got {brief(key)}")
    return key


def _wrong(value: Any, hint: Any, where: str) -> ValueError:
    return ValueError(f"{where} must be {_expected(hint)}, got {brief(value)} ({type(value).__name__})")


def _expected(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_expected, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        each = arguments[:1] if arguments[-1] is Ellipsis else arguments
        return "a list of " + " and ".join(map(_expected, each))
    if origin is dict or is_dataclass(hint):
        return f"a number ({hint.shorthand}) or a mapping" if hasattr(hint, "shorthand") else "a mapping"
    return _NAMES.get(hint, str(hint))


def build(kind: type[Any], given: Mapping[str, Any], where: str) -> Any:
    """Return a dataclass of these values; ``where`` begins the message of a ``ValueError``."""
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
