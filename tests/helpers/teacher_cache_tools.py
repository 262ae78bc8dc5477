"""A distiller whose terms select in every way that a teacher cache stores, and caches of its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from train_tools import Scenes, Toy, collate, run

from fastkd import Distiller, Term, losses
from fastkd.train import TeacherCache, segmentation_loss


@dataclass
class Output:
    logits: Tensor
    stages: list[Tensor]
    word_mask: Tensor


class Net(Toy):
    """`Toy` with intermediate outputs; adds up the samples before each one if ``mixes``."""

    mixes = False

    def forward(self, image: Tensor, input_ids: Tensor, word_mask: Tensor | None = None) -> Any:
        x = torch.relu(self.norm(self.stem(image)))
        fused = x + self.words(input_ids).mean(1)[:, :, None, None]
        if self.mixes:
            fused = fused + fused.cumsum(0)
        return Output(self.head(self.dropout(fused)), [x, fused], input_ids > 0)


def masked(student: Tensor, teacher: Tensor, *, mask: Tensor) -> Tensor:
    return (F.mse_loss(student, teacher, reduction="none").mean((1, 2, 3)) * mask.any(1)).mean()


def make(cached: TeacherCache | None = None, dropout: float = 0.1, **changes: Any) -> Distiller:
    """Return a distiller whose terms select a list, an item, a tap and a keyword argument."""
    torch.manual_seed(100)
    teacher = Net(8).eval().requires_grad_(False)
    torch.manual_seed(0)
    student = Net(8, dropout=dropout)
    terms = [
        Term(losses.pixel_relation_kd, "stages.*", weight=0.5, name="relation"),
        Term(losses.logit_kd, "logits", weight=0.5),
        Term(masked, "stages.-1", kwargs={"mask": "teacher.word_mask"}),
        Term(losses.channel_kd, "early", weight=0.1, name="tap"),
    ]
    values = {"student_taps": {"early": "stem"}, "teacher_taps": {"early": "stem"}, "terms": terms, **changes}
    terms = values.pop("terms")
    return Distiller(student, cached or values.pop("teacher", teacher), segmentation_loss, terms, **values)


def build(folder: Path, distiller: Distiller | None = None, data: Any = None, **options: Any) -> TeacherCache:
    usual = {"batch_size": 8, "device": "cpu", "collate": collate, "progress": False, "allow_untrained_teacher": True}
    options = {**usual, **options}
    return TeacherCache.build(folder, distiller or make(), data or Scenes(), **options)


def built_and_trained(folder: Path) -> str:
    """Build a cache and train from it, in one process or several; return the shards that this one wrote, and a norm."""
    from fastkd.train.teacher_cache import build as module

    write, written = module.write_shard, []

    def counted(path: Path, *rest: Any) -> None:
        written.append(path.name[6:11])
        write(path, *rest)

    module.write_shard = counted
    try:
        distiller = make(build(folder, pca={"early": 4}), dropout=0.0)
    finally:
        module.write_shard = write
    run(distiller, steps=2)
    norm = torch.cat([p.double().reshape(-1) for p in distiller.student.parameters()]).norm().item()
    return f"{','.join(written)} {norm}"
