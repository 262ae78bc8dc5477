"""Kill a training run with SIGKILL at random moments, resume it each time, and compare it with an uninterrupted run.

    python -m benchmarks.kill_and_resume [--kills 20] [--seed 0] [--workers 2] [--steps 240] [--out FILE]

The run has dropout, batch norm, an aligner, an average of the weights, random augmentation, accumulation, evaluations
and loading processes. Every third kill waits for a save to begin. After each kill all checkpoints must be readable; in
the end weights, optimiser, average and log must be equal bit for bit. Writes one JSON line per kill and a summary, and
exits with status 1 if anything differs. Needs a system with fork.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import fastkd.train.loop  # imported before the processes fork
from fastkd import Distiller, Term, _atomic, losses
from fastkd._console import plain_characters
from fastkd.errors import FastKDWarning
from fastkd.train import TrainConfig, segmentation_loss
from fastkd.train.checkpoint import FOLDER, find_checkpoints, read_checkpoint

SIDE = 8
SYNC_SECONDS = 0.004  # added to each file of a save, so that kills hit it
SAMPLE_SECONDS = 0.001
ACCUMULATE = 2
TIMES = (
    "seconds",
    "cpu_seconds",
    "samples_per_second",
    "eval_seconds",
    "save_seconds",
    "milliseconds",
    "data_share",
    "peak_memory_mib",
)


class Output(NamedTuple):
    features: Tensor
    logits: Tensor


class Student(nn.Module):
    """A network with running statistics and dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.words = nn.Embedding(8, width)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, image: Tensor, input_ids: Tensor) -> Output:
        features = self.norm(self.stem(image)).relu() + self.words(input_ids).mean(1)[:, :, None, None]  # (B, C, H, W)
        return Output(features, self.head(self.dropout(features)))


class Scenes(Dataset[dict[str, Any]]):
    """Images whose mask is where the first channel is positive, with random noise if ``augment``."""

    sentences, split = "all", "val"

    def __init__(self, count: int, augment: bool) -> None:
        generator = torch.Generator().manual_seed(count)
        self.images = torch.randn(count, 3, SIDE, SIDE, generator=generator)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        if self.augment:
            time.sleep(SAMPLE_SECONDS)
            image = image + 0.1 * torch.randn(image.shape) + random.gauss(0.0, 0.1)
        ids = torch.tensor([index % 8, index % 5])
        return {"image": image, "input_ids": ids, "mask": image[0] > 0, "ref_id": index, "sent_id": index}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: torch.stack([s[key] for s in samples]) if isinstance(value, Tensor) else [s[key] for s in samples]
        for key, value in samples[0].items()
    }


def train(folder: Path, steps: int, workers: int, resume: bool, forwards: Any) -> None:
    """Run or resume the training in a forked process, with slow saves; count the student's forwards."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FastKDWarning)  # batch norm with accumulation is intended here
    sync = _atomic._sync

    def slow_sync(path: Path) -> None:
        time.sleep(SYNC_SECONDS)
        sync(path)

    _atomic._sync = slow_sync
    torch.manual_seed(0)
    teacher = Student(6).eval().requires_grad_(False)
    term = Term(losses.ChannelKD(student_channels=4, teacher_channels=6), "features", weight=0.5, name="kd")
    student = Student(4)

    def count(*call: Any) -> None:
        forwards.value += 1

    student.register_forward_hook(count)
    distiller = Distiller(student, teacher, segmentation_loss, [term], inputs=("image", "input_ids"))
    config = TrainConfig(
        steps=steps,
        batch_size=8,
        accumulate=ACCUMULATE,
        lr=1e-2,
        warmup=5,
        ema=0.99,
        device="cpu",
        workers=workers,
        log_every=4,
        gradients_every=6,
        allow_untrained_teacher=True,
        eval_every=23,
        checkpoint_every=5,
    )
    fastkd.train.loop.train(
        distiller,
        Scenes(88, True),
        config,
        val_dataset=Scenes(16, False),
        out_dir=folder,
        collate=collate,
        progress=False,
        resume=resume,
    )


def start(folder: Path, steps: int, workers: int, resume: bool) -> tuple[Any, Any]:
    """Return the process of a run and its counter of forwards."""
    fork = multiprocessing.get_context("fork")
    forwards = fork.Value("i", 0, lock=False)
    process = fork.Process(target=train, args=(folder, steps, workers, resume, forwards))
    process.start()
    return process, forwards


def kill(folder: Path, steps: int, workers: int, inside: bool, after: int, chance: random.Random) -> dict[str, Any]:
    """Resume the run and kill it after a number of forwards, or inside the first save after that."""
    process, forwards = start(folder, steps, workers, True)
    while process.is_alive() and forwards.value < after:
        time.sleep(0.0005)
    while inside and process.is_alive() and not list((folder / FOLDER).glob(".*.partial")):
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 5 * SYNC_SECONDS))
    alive = process.is_alive()
    if alive and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError("the run failed")
    partial = [path.name for path in (folder / FOLDER).glob(".*.partial")]
    found = find_checkpoints(folder / FOLDER)
    for path in found.values():
        read_checkpoint(path)  # raises if one cannot be read
    return {
        "killed": alive and process.exitcode == -signal.SIGKILL,
        "forwards": forwards.value,
        "inside_a_save": bool(partial),
        "checkpoints": list(found),
    }


def differences(ours: Path, theirs: Path, steps: int) -> list[str]:
    """Return what differs between two finished runs."""
    found = []
    a, b = (read_checkpoint(folder / FOLDER / f"step-{steps:06d}") for folder in (ours, theirs))
    for part in sorted({*a.tensors, *b.tensors}):
        names = a.tensors[part].keys() | b.tensors[part].keys()
        found += [f"{part} {n}" for n in names if not torch.equal(a.tensors[part][n], b.tensors[part][n])]
    for index, state in a.optimizer["state"].items():
        found += [
            f"optimiser {index} {k}" for k, v in state.items() if not torch.equal(v, b.optimizer["state"][index][k])
        ]
    for name in ("last", "best"):
        if (ours / name / "model.safetensors").read_bytes() != (theirs / name / "model.safetensors").read_bytes():
            found.append(name)
    logs = [
        [
            {key: value for key, value in line.items() if key not in TIMES}
            for line in map(json.loads, (folder / "log.jsonl").read_text("utf-8").splitlines())
            if line["event"] in ("train", "eval", "gradients")
        ]
        for folder in (ours, theirs)
    ]
    return found + ([] if logs[0] == logs[1] else ["log"])


@plain_characters()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        whole, killed = Path(root, "whole"), Path(root, "killed")
        process, _ = start(whole, args.steps, args.workers, False)
        process.join()
        while len(rows) < args.kills:
            after = chance.randint(0, 2 * ACCUMULATE * args.steps // (args.kills + 1))
            rows.append(kill(killed, args.steps, args.workers, len(rows) % 3 == 2, after, chance))
            print(json.dumps(rows[-1]), flush=True)
        process, _ = start(killed, args.steps, args.workers, True)
        process.join()
        differ = differences(killed, whole, args.steps) if process.exitcode == 0 else ["the last run failed"]
    kills = [row for row in rows if row["killed"]]
    summary = {
        "kills": len(kills),
        "inside_a_save": sum(row["inside_a_save"] for row in kills),
        "unreadable_checkpoints": 0,  # the first one would have ended this program
        "steps": args.steps,
        "workers": args.workers,
        "seed": args.seed,
        "torch": torch.__version__,
        "equal": not differ,
        "differences": differ[:5],
    }
    print(json.dumps(summary))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("".join(json.dumps(row) + "\n" for row in [*rows, summary]), encoding="utf-8")
    return 0 if not differ and len(kills) == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
