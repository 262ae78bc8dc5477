"""Models, and runs whose weights are saved, for tests of several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_tools import Scenes, run, toy

from fastkd import Distiller, Term
from fastkd.train import TrainConfig, segmentation_loss


class Blocks(nn.Module):
    """A teacher of blocks, one of them shared with the stem."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        block = lambda: nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(2, width), nn.SiLU())
        self.blocks = nn.ModuleList([block() for _ in range(3)])
        self.blocks[2][0].weight = self.blocks[0][0].weight
        self.head = nn.Conv2d(width, 2, 1)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, image: Tensor, input_ids: Tensor, word_mask: Tensor | None = None) -> Tensor:
        x = self.stem(image)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x) * self.scale


class Normed(nn.Module):
    """A student with BatchNorm layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.mix = nn.Conv2d(6, 6, 1, bias=False)
        self.last = nn.BatchNorm2d(6, momentum=None)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, image: Tensor, input_ids: Tensor, word_mask: Tensor | None = None) -> Tensor:
        return self.head(self.last(self.mix(self.norm(self.stem(image)).relu())))


class HalfBroken(Scenes):
    """Images of even numbers are NaN."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample = super().__getitem__(i)
        return {**sample, "image": sample["image"] * (torch.nan if i % 2 == 0 else 1.0)}


def with_teacher(student: nn.Module) -> Distiller:
    torch.manual_seed(100)
    teacher = Blocks().eval().requires_grad_(False)
    return Distiller(student, teacher, segmentation_loss, [Term(F.mse_loss, lambda y: y, weight=0.5, name="kd")])


def normed() -> Normed:
    torch.manual_seed(0)
    return Normed()


def trained(folder: Path, name: str, model: nn.Module, **settings: Any) -> None:
    """Train, and save the weights and the losses of every step."""
    result = run(model, **{"steps": 4, "log_every": 1, "lr": 1e-3, **settings})
    student = model.student if isinstance(model, Distiller) else model
    content = {"weights": student.state_dict(), "losses": [line["loss"] for line in result.history]}
    torch.save(content, folder / f"{name}.pt")


def streamed(folder: Path, rank: int) -> None:
    """Train on shards, 2 of 4 per process, and save the ids of the samples in the order of the steps."""
    from stream_tools import Words

    from fastkd.data import ShardDataset, collate
    from fastkd.train import train

    served: list[str] = []

    def recorded(samples: list[Any]) -> dict[str, Any]:
        served.extend(sample["id"] for sample in samples)
        return collate(samples)

    data = ShardDataset(folder / "shards", Words(), image_size=8, max_words=3, buffer=3)
    config = TrainConfig(steps=6, batch_size=4, device="cpu", check=False)
    train(toy(), data, config, collate=recorded, progress=False)
    (folder / str(rank) / "served").write_text(" ".join(served))


def refused(write: Any, name: str, call: Any) -> None:
    try:
        call()
    except (ValueError, FloatingPointError) as error:
        write(f"{name} {error}")
