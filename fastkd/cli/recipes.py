"""``fastkd recipes``: configurations that ship with fastkd."""

from __future__ import annotations

from typing import Annotated

import tyro

from fastkd._console import show


def recipes(name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = None) -> None:
    """List the recipes, or print one: ``fastkd recipes shapes > mine.yaml``, then ``fastkd distill mine.yaml``.

    With ``fastkd distill NAME`` a recipe is used as it is; flags override its values.

    Args:
        name: the recipe to print.
    """
    from fastkd._messages import suggestion
    from fastkd.cli._yaml import recipes as shipped

    files = shipped()
    if name is None:
        for each, file in files.items():
            show(f"{each}: {file.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")
    elif name in files:
        show(files[name].read_text(encoding="utf-8").rstrip("\n"))
    else:
        raise ValueError(f"no recipe is named {name!r}.{suggestion(name, files)}")
