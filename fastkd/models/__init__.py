"""Students (timm × transformers with fusion) and teachers (LAVT, CLIPSeg, SAM 3) for referring image segmentation.

Needs the ``[ris]`` extra (``pip install 'fastkd[ris]'``). Names are imported on first use; presets and configurations
need neither torch nor timm::

    import fastkd.models as models

    print(models.list_presets())
    model = models.RISModel(models.preset("shapes-student"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkd._lazy import lazy_names

if TYPE_CHECKING:
    from fastkd.models.config import RISConfig
    from fastkd.models.lavt.config import LAVTConfig
    from fastkd.models.lavt.model import LAVT
    from fastkd.models.onnx_model import OnnxModel
    from fastkd.models.presets import list_presets, preset
    from fastkd.models.ris import RISModel, RISOutput
    from fastkd.models.teachers import CLIPSegTeacher, SAM3Teacher, TextPromptedTeacher

__all__ = [
    "LAVT",
    "CLIPSegTeacher",
    "LAVTConfig",
    "OnnxModel",
    "RISConfig",
    "RISModel",
    "RISOutput",
    "SAM3Teacher",
    "TextPromptedTeacher",
    "list_presets",
    "preset",
]

__getattr__ = lazy_names(
    __name__,
    {
        "CLIPSegTeacher": "fastkd.models.teachers",
        "LAVT": "fastkd.models.lavt.model",
        "LAVTConfig": "fastkd.models.lavt.config",
        "OnnxModel": "fastkd.models.onnx_model",
        "RISConfig": "fastkd.models.config",
        "RISModel": "fastkd.models.ris",
        "RISOutput": "fastkd.models.ris",
        "SAM3Teacher": "fastkd.models.teachers",
        "TextPromptedTeacher": "fastkd.models.teachers",
        "list_presets": "fastkd.models.presets",
        "preset": "fastkd.models.presets",
    },
)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
