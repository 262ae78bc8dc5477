"""Teachers from transformers: text-prompted segmenters with the call and the output of `RISModel`."""

from fastkd.models.teachers.adapter import TextPromptedTeacher
from fastkd.models.teachers.clipseg import CLIPSegTeacher
from fastkd.models.teachers.files import TeacherConfig
from fastkd.models.teachers.sam3 import SAM3Teacher

__all__ = ["CLIPSegTeacher", "SAM3Teacher", "TeacherConfig", "TextPromptedTeacher"]
