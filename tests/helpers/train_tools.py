"""A small model, a dataset that it can learn, and short training runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from fastkd import Distiller, Term
from fastkd.train import TrainConfig, segmentation_loss, train


class Toy(nn.Module):
    """A small model whose norm does not mix samples, so micro-batches are equivalent to the whole batch."""

    def __init__(self, width: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.words = nn.Embedding(8, width)
        self.head = nn.Conv2d(width, 2, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, image: Tensor, input_ids: Tensor, word_mask: Tensor | None = None) -> Tensor:
        x = torch.relu(self.norm(self.stem(image))) + self.words(input_ids).mean(1)[:, :, None, None]
        return self.head(self.dropout(x))


class Scenes(Dataset[dict[str, Any]]):
    """Random images whose mask is where the first channel is positive."""

    sentences, split = "all", "val"

    def __init__(self, n: int = 32, poison: int | None = None) -> None:
        g = torch.Generator().manual_seed(0)
        self.images = torch.randn(n, 3, 8, 8, generator=g)
        self.ids = torch.randint(0, 8, (n, 3), generator=g)
        self.epochs: list[int] = []
        self.served: list[int] = []
        self.poison = poison

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __getitem__(self, i: int) -> dict[str, Any]:
        self.served.append(i)
        mask = self.images[i, 0] > 0
        image = self.images[i] if i != self.poison else torch.full((3, 8, 8), torch.nan)
        return {"image": image, "input_ids": self.ids[i], "mask": mask, "ref_id": i, "sent_id": i, "sentence": "x"}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        k: torch.stack([s[k] for s in samples]) if isinstance(v, Tensor) else [s[k] for s in samples]
        for k, v in samples[0].items()
    }


def toy(seed: int = 0, **kwargs: Any) -> Toy:
    torch.manual_seed(seed)
    return Toy(**kwargs)


def distiller(seed: int = 0, loss: Any = F.mse_loss, **kwargs: Any) -> Distiller:
    teacher = toy(100, width=8).eval().requires_grad_(False)
    select = lambda logits: logits
    return Distiller(toy(seed, **kwargs), teacher, segmentation_loss, [Term(loss, select, weight=0.5, name="kd")])


def run(model: nn.Module, data: Dataset[Any] | None = None, out: Path | None = None, **settings: Any) -> Any:
    more = {
        k: settings.pop(k) for k in ("val_dataset", "overwrite", "task_loss", "resume", "resume_allow") if k in settings
    }
    usual = {"steps": 6, "batch_size": 8, "lr": 1e-2, "device": "cpu", "allow_untrained_teacher": True}
    config = TrainConfig(**{**usual, **settings})
    return train(model, data or Scenes(), config, collate=collate, progress=False, out_dir=out, **more)


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


_PROGRAM = """
import os, sys; sys.path.insert(0, {folder!r})
from pathlib import Path
import torch.multiprocessing as mp
import train_tools as t, fastkd.train.loop, {module}  # imported once, before the processes fork
def main(rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
{body}
if __name__ == "__main__":
    mp.start_processes(main, nprocs={count}, start_method="fork")
"""


def two_processes(body: str) -> str:
    """Run `processes` with two of them."""
    return processes(2, body)


def processes(count: int, body: str, module: str = "fastkd.train.shard") -> str:
    """Run an indented Python body in CPU processes that train together; return their output.

    ``module`` is imported once, before they fork.

    The body may use ``rank`` and this module as ``t``.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = _PROGRAM.format(folder=str(Path(__file__).parent), body=body, count=count, module=module)
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        out, error = parent.communicate(timeout=500)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)  # with its child processes
    assert parent.returncode == 0, error[-4000:]
    return out


class Acts:
    """Task loss that acts before its ``call``-th value."""

    def __init__(self, call: int, act: Callable[[], Any]) -> None:
        self.left, self.act = call, act

    def __call__(self, output: Any, batch: Any) -> Tensor:
        self.left -= 1
        if self.left == 0:
            self.act()
        return segmentation_loss(output, batch)


def failing(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act
