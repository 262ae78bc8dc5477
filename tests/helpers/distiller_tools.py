"""A small model with features, a batch for it, and a distiller of two such models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd import Distiller, Term


@dataclass
class Out:
    logits: Tensor
    features: Tensor
    stages: list[Tensor]
    nothing: Tensor | None = None


class Toy(nn.Module):
    def __init__(self, width: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.idle = nn.Identity()
        self.head = nn.Conv2d(width, 2, 1)
        self.dropout = dropout

    def forward(self, image: Tensor, word_mask: Tensor | None = None) -> Out:
        features = torch.relu(self.norm(self.stem(image)))
        features = F.dropout(features, self.dropout, training=self.dropout > 0)
        return Out(self.head(features), features, [features, features.mean((2, 3))])


def task_loss(output: Out, batch: dict[str, Any]) -> Tensor:
    return F.cross_entropy(output.logits, batch["mask"].long())


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student, teacher)


def make_batch() -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    image = torch.randn(4, 3, 6, 6, generator=g)
    return {
        "image": image,
        "word_mask": torch.ones(4, 5, dtype=torch.bool),
        "mask": image[:, 0] > 0,
        "sentence": ["the left one"] * 4,
    }


def make_distiller(
    *terms: Term, student: nn.Module | None = None, teacher: nn.Module | None = None, **kwargs: Any
) -> Distiller:
    torch.manual_seed(0)
    student = student or Toy()
    teacher = teacher or Toy().eval().requires_grad_(False)
    return Distiller(student, teacher, task_loss, terms or [Term(mse, "features")], **kwargs)
