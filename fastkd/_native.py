"""Load the compiled modules ``fastkd._cpu`` and ``fastkd._cuda``, and report what the installation built.

Neither module links to torch: they take addresses, sizes and strides (see ``csrc/bindings``). Only :mod:`fastkd.ops`
calls them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import json
from importlib.metadata import Distribution, distributions
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

HERE = Path(__file__).parent.resolve()  # this file may be a link into a source tree
MODULES = ("cpu", "cuda")


@functools.cache
def build_info() -> dict[str, Any]:
    """Return what the installation built, and why a module was not built.

    One entry per module, ``"cpu"`` and ``"cuda"``, each with ``built`` (bool); if built, ``compiler`` and the module's
    contents (``isas`` and ``openmp``, or ``targets``, ``ptx`` and ``runtime``), else ``reason`` (str). Empty for a
    source tree that was never installed.

    Example:
        >>> sorted(build_info())  # doctest: +SKIP
        ['cpu', 'cuda']
    """
    try:
        return json.loads((HERE / _build_info_name()).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _build_info_name() -> str:
    """Return the name of the build record; it contains the Python version, as several may share one source tree."""
    tag = importlib.machinery.EXTENSION_SUFFIXES[0].split(".")[1]
    return f"_build_info.{tag}.json"


def hidden() -> Path | None:
    """Return the folder of an installed fastkd that this one shadows on the path, or None.

    This happens when Python starts inside a checkout, because it searches the current folder first.
    """
    for found in distributions(name="fastkd"):
        try:
            package = _package_of(found)
            if package is not None and package != HERE and (package / "__init__.py").is_file():
                return package
        except (OSError, ValueError):  # a damaged installation record
            continue
    return None


def not_installed(name: str) -> str:
    """Return why the module ``name``, which an installation creates, is missing, and how to fix it."""
    installed = hidden()
    if installed is None:
        return f"{name} is missing: this source tree was never installed; run `pip install -e .` in it"
    return (
        f"{name} is missing: Python imported fastkd from the source tree {HERE.parent}, which was never installed and "
        f"hides the installed package {installed}; start Python in another folder or with `python -P` to use that one, "
        "or run `pip install -e .` in the source tree to use this one"
    )


def _package_of(found: Distribution) -> Path | None:
    """Return the package folder of a distribution, in site-packages or in the tree of an editable installation."""
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return Path(url2pathname(urlsplit(origin["url"]).path)).resolve() / "fastkd"
    if found.read_text("RECORD") is None:  # not an installation: metadata that a build leaves in a source tree
        return None
    return Path(str(found.locate_file("fastkd"))).resolve()


def load(name: str) -> ModuleType:
    """Return the compiled module ``fastkd._cpu`` (``name="cpu"``) or ``fastkd._cuda`` (``"cuda"``).

    Needs no GPU and no driver: ``load("cuda").device_count()`` is 0 without them.

    Raises:
        ValueError: ``name`` is neither.
        ImportError: the module was not built, or does not load here; gives the reason and the fix.
    """
    if name not in MODULES:
        raise ValueError(f"name: expected 'cpu' or 'cuda', got {name!r}")
    try:
        return importlib.import_module(f"fastkd._{name}")
    except ImportError as error:
        raise ImportError(_reason(name, error), name=f"fastkd._{name}") from error


def _reason(name: str, error: ImportError) -> str:
    info = build_info().get(name)
    if info is None:
        return not_installed(f"fastkd._{name}")
    if not info["built"]:
        switch = "FASTKD_CUDA=1 " if name == "cuda" else ""
        return (
            f"fastkd._{name} was not built when fastkd was installed: {info['reason']}. "
            f"Fix that, then reinstall from the sources: {switch}pip install --force-reinstall --no-deps ."
        )
    return f"fastkd._{name} was built but does not load here: {error}"
