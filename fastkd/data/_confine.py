"""Keep file names that come from a dataset inside its folders."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastkd.data._values import brief

_LONGEST = 1000  # characters, so that messages stay readable
_DRIVE = re.compile(r"[A-Za-z]:")


def check_name(name: object, owner: str) -> str:
    """Return a relative file name that stays below the folder it is joined to.

    Args:
        name: The name in the dataset, with "/" between folders.
        owner: What holds the name, for messages.

    Raises:
        ValueError: It is not a string, is empty, very long or absolute, or contains "..", a backslash or a control
            character.
    """
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST:
        raise ValueError(
            f"{owner} has file name {brief(name)}: expected the name of a file, of at most {_LONGEST} characters"
        )
    if name.startswith("/") or ".." in re.split(r"[/\\]", name) or _DRIVE.match(name) or name.startswith("\\"):
        raise ValueError(
            f"{owner} has file name {brief(name)}, which points outside of its folder: names must be relative "
            "and without '..'"
        )
    if "\\" in name or any(character < " " or character == "\x7f" for character in name):
        raise ValueError(
            f"{owner} has file name {brief(name)} with a backslash or a control character: folders are separated by '/'"
        )
    return name


def check_inside(path: Path, root: Path) -> None:
    """Reject a file or folder that symbolic links lead out of ``root``.

    Raises:
        ValueError: It is outside; the message names its target.
    """
    target, allowed = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    if target != allowed and allowed not in target.parents:
        raise ValueError(
            f"{path} is a link to {target}, outside of {root}: a dataset could read any file through such links, so "
            "they are not followed. Pass the folder that holds the files as image_root (--image-root), or copy them"
        )
