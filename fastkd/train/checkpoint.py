"""Save checkpoints of the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fastkd._atomic import replace_folder
from fastkd._wrappers import unwrapped


def save_student(student: nn.Module, folder: Path) -> Path:
    """Save the student to a folder and return the folder; an earlier checkpoint is replaced once this one is complete.

    Calls the model's ``save_pretrained``, or writes ``model.safetensors`` if there is none. Parameter names have no
    wrapper prefixes (``torch.compile``, data parallelism, averaging).
    """
    with replace_folder(folder) as partial, unwrapped(student) as model:
        save_pretrained: Any = getattr(model, "save_pretrained", None)
        if save_pretrained is not None:
            save_pretrained(partial)
        else:
            from safetensors.torch import save_model

            save_model(model, str(partial / "model.safetensors"))
    return folder
