"""Import public names on first use, with one clear error if the ``[ris]`` extra is missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

EXTRA = {
    "PIL",
    "accelerate",
    "huggingface_hub",
    "matplotlib",
    "numpy",
    "pycocotools",
    "rich",
    "safetensors",
    "timm",
    "tokenizers",
    "torchmetrics",
    "transformers",
    "yaml",
}
"""Import names of the extra's packages."""


def lazy_names(package: str, names: dict[str, str]) -> Callable[[str], Any]:
    """Return a module ``__getattr__`` for ``package``; ``names`` maps each public name to its module.

    A value that equals the attribute's full name (``"fastkd.data.shapes"``) stands for the module itself.
    """

    def load(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(names[name])
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in EXTRA:
                raise
            raise ImportError(
                f"{package}.{name} needs the package {error.name!r}, which is not installed: pip install 'fastkd[ris]'"
            ) from error
        return module if names[name] == f"{package}.{name}" else getattr(module, name)

    return load
