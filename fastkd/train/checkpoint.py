"""Checkpoints of the student: whole or not there at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from fastkd._wrappers import bare


def save_student(student: nn.Module, folder: Path) -> Path:
    """Write the student to a folder, replacing an earlier checkpoint only when the new one is complete.

    Uses the model's ``save_pretrained``; a model without one is written as ``model.safetensors``. Wrappers (of
    ``torch.compile``, data parallelism, averaging) are looked through: names are those of the model itself.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with bare(student) as model:
            save_pretrained: Any = getattr(model, "save_pretrained", None)
            if save_pretrained is not None:
                save_pretrained(fresh)
            else:
                from safetensors.torch import save_model

                save_model(model, str(fresh / "model.safetensors"))
        fresh.chmod(0o755)  # temporary folders, and files that are renamed into place, are born private
        for file in fresh.iterdir():
            file.chmod(0o755 if file.is_dir() else 0o644)
        old = folder.with_name(f".{folder.name}-old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder
