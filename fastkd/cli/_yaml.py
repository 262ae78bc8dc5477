"""Read and write the settings of a run as YAML: the flags' names with underscores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro
import yaml

from fastkd._messages import suggestion
from fastkd.cli._convert import build, convert, read_yaml
from fastkd.cli._settings import REQUIRED, RunSettings, TermSettings

ASSETS = Path(__file__).resolve().parent / "assets"
_FLAGS = (
    "overwrite",
    "resume",
    "resume_allow",
    "replay",
    "preflight_only",
)  # what to do with the folder, not settings of the run
_FLAT = ("data", "config")  # fields whose own fields stand in the same mapping
Settings = TypeVar("Settings", bound=RunSettings)


def recipes() -> dict[str, Path]:
    """Return the shipped configurations: name to file."""
    return {path.stem: path for path in sorted(ASSETS.glob("*.yaml"))}


def load_settings(kind: type[Settings], source: str) -> Settings:
    """Return settings from a YAML file or from the recipe of that name.

    Settings that the file lacks have their defaults; required ones, and those with the value ``???``, must come from
    flags.

    Raises:
        FileNotFoundError: neither a file nor a recipe.
        ValueError: it is not YAML, a key is unknown or repeated, or a value has the wrong type or is out of range.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        if source not in recipes():
            inside = path / "config.yaml"
            hint = f" Did you mean {inside}?" if inside.is_file() else suggestion(source, recipes())
            raise FileNotFoundError(f"no configuration at {source}, and no recipe of that name.{hint}")
        path = recipes()[source]
    return settings_from(kind, read_mapping(path, source), source)


def read_mapping(path: Path, source: str) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ValueError: it is not YAML, or not a mapping; ``source`` begins the message.
    """
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of bytes that are not UTF-8
        raise ValueError(f"{source}: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ValueError(f"{source} must hold a mapping of settings (steps: 1000), got {values!r}")
    return dict(values)


def settings_from(kind: type[Settings], values: Mapping[str, Any], source: str) -> Settings:
    """Return settings from a flat mapping; ``source`` begins the messages of errors.

    Raises:
        ValueError: a key is unknown, or a value has the wrong type or is out of range.
    """
    known = _flat_names(kind)
    for key in values:
        if key in _FLAGS:
            raise ValueError(f"{source}: {key} is not a setting of the run: pass --{key.replace('_', '-')}")
        if key not in known:
            raise ValueError(f"{source}: no setting is named {key!r}.{suggestion(key, known)}")
    return _fill(kind, values, source)  # type: ignore[no-any-return]


def dump_settings(settings: RunSettings) -> str:
    """Return the YAML that `load_settings` reads back as equal settings."""
    return yaml.safe_dump(plain_settings(settings), sort_keys=False, allow_unicode=True, width=100)


def plain_settings(settings: Any) -> dict[str, Any]:
    """Return the settings by flat key, as plain values."""
    flat: dict[str, Any] = {}
    for one in sorted(fields(settings), key=lambda one: one.name == "config"):  # TrainConfig's at the end
        value = getattr(settings, one.name)
        flat |= plain_settings(value) if one.name in _FLAT and is_dataclass(value) else {one.name: _plain(value)}
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, TermSettings):
        return {name: each for name, each in _plain(vars(value)).items() if each not in (None, {})}
    if is_dataclass(value):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _flat_names(kind: type[Any]) -> list[str]:
    """Return the names of the settings; those of ``data`` and ``config`` stand in the same mapping."""
    names: list[str] = []
    for name, hint in get_type_hints(kind).items():
        names += _flat_names(hint) if name in _FLAT and isinstance(hint, type) and is_dataclass(hint) else [name]
    return names


def _fill(kind: type[Any], values: Mapping[str, Any], source: str) -> Any:
    """Return an instance from its part of a flat mapping."""
    given: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if name in _FLAT and is_dataclass(hint):
            given[name] = _fill(hint, values, source)  # type: ignore[arg-type]
        elif name in values:
            required = values[name] == REQUIRED
            given[name] = tyro.MISSING if required else convert(values[name], hint, f"{source}: {name}")
        elif name == "data":
            given[name] = tyro.MISSING
    return build(kind, given, source)
