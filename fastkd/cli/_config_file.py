"""The configuration that may follow a command: its settings become the defaults of the flags."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

ConfigFile = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]


def config_of(command: str, args: Sequence[str]) -> str | None:
    """Return the configuration that directly follows a command on the command line; None if a flag does."""
    return args[1] if len(args) > 1 and args[0] == command and not args[1].startswith("-") else None


def with_defaults(command: Callable[..., None], source: str | None, **defaults: Any) -> Callable[..., None]:
    """Return a command with other defaults of its flags.

    Args:
        command: a function with an argument ``config_file``.
        source: the configuration from which the defaults come.
        defaults: value by argument.
    """

    def run(*, config_file: str | None, **rest: Any) -> None:
        if config_file != source:  # it stands behind a flag, where it was not read
            raise ValueError(
                f"{config_file!r}: the configuration must directly follow the command: fastkd {command.__name__} "
                f"{config_file} --flag ..."
            )
        command(config_file=config_file, **rest)

    return functools.partial(functools.wraps(command)(run), **defaults)
