"""Measure what loading training samples costs: CPU time per sample by part, and samples per second.

    python -m benchmarks.data_throughput --out benchmarks/results/data_throughput.json --write docs/benchmarks.md

Writes a set of JPEG files in RefCOCO's layout with about as many bytes per pixel as COCO's photographs (half a byte),
polygons of 30 points, and reads them all once, so that they are in the page cache. Measured per size of the images:

- parts: CPU time of one thread in this process, medians of rounds in which all parts take turns.
- worker: CPU time per sample of one loading process that serves the trainer's samples, medians of runs. What the parts
  do not explain of it is ``transfer``: allocating batches in shared memory and passing them on.
- receive: CPU time per sample of the process that receives the batches; normalise: of converting their images to
  float32, which a GPU does where the run has one.
- samples per second with ``--workers`` processes; depends on the machine's other load, which is recorded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info

from benchmarks import measure
from benchmarks.table import write_between
from fastkd._console import plain_characters
from fastkd.data import RefCOCO, ReferDataset, collate, load_tokenizer
from fastkd.data._loading import batches
from fastkd.data._pixels import with_pixels
from fastkd.data._prepare import with_images
from fastkd.data.images import to_square
from fastkd.train.samples import TrainingSamples

BEGIN = "<!-- data throughput: begin (written by benchmarks/data_throughput.py) -->"
END = "<!-- data throughput: end -->"
SIZES = ((480, 480), (480, 640))
"""Height and width of the images. COCO's are at most 640 wide."""

SIDE = 480
PARTS = ("decode", "resize", "mask", "other", "collate", "transfer")
_JPEG = {"quality": 90, "subsampling": "4:2:0"}
_NOISE = 16.0  # gives half a byte per pixel at this quality
_WARM_UP = 4  # batches

Row = dict[str, Any]


def write_set(folder: Path, height: int, width: int, images: int, seed: int = 0) -> int:
    """Write a set in RefCOCO's layout with one ref per image; return the mean size of a file in bytes."""
    random = np.random.default_rng(seed)
    (folder / "refcoco").mkdir(parents=True)
    (folder / "images" / "train2014").mkdir(parents=True)
    entries, annotations, refs, sizes = [], [], [], []
    for number in range(images):
        name = f"COCO_train2014_{number:012d}.jpg"
        path = folder / "images" / "train2014" / name
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = smooth + random.normal(0, _NOISE, (height, width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, **_JPEG)
        sizes.append(len(path.read_bytes()))
        angles = np.linspace(0, 2 * math.pi, 30, endpoint=False)
        radii = height / 4 + height / 16 * np.sin(random.integers(2, 6) * angles)
        outline = np.stack([width / 2 + radii * np.cos(angles), height / 2 + radii * np.sin(angles)], axis=1)
        entries.append({"id": number, "file_name": name, "height": height, "width": width})
        segmentation = [outline.ravel().round(2).tolist()]
        annotations.append({"id": number, "image_id": number, "category_id": 1, "segmentation": segmentation})
        sentences = [{"sent_id": 3 * number + n, "sent": f"the {word} circle"} for n, word in enumerate(("red", "big"))]
        fields = {"ann_id": number, "image_id": number, "category_id": 1, "split": "train"}
        refs.append({"ref_id": number, **fields, "sentences": sentences})
    instances = {"images": entries, "annotations": annotations, "categories": [{"id": 1, "name": "circle"}]}
    (folder / "refcoco" / "instances.json").write_text(json.dumps(instances), encoding="utf-8")
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    return round(statistics.mean(sizes))


def open_dataset(folder: Path) -> ReferDataset:
    """Return the set, resized as for LAVT."""
    return ReferDataset(RefCOCO(folder), load_tokenizer("shapes"), image_size=SIDE)


def cost_of_parts(dataset: ReferDataset, batch_size: int, rounds: int) -> dict[str, float]:
    """Return CPU milliseconds per sample of each part, and of all but the batch as ``sample``, on this thread.

    The dataset serves uint8, as for the trainer.
    """
    refs = dataset.refcoco.refs[:batch_size]
    raw = [dataset.refcoco.image(ref.image_id) for ref in refs]
    samples = [dataset[index] for index in range(len(refs))]
    batch = collate(samples)
    parts: dict[str, Callable[[], Any]] = {
        "decode": lambda: [dataset.refcoco.image(ref.image_id) for ref in refs],
        "resize": lambda: [to_square(pixels, SIDE) for pixels in raw],
        "mask": lambda: [torch.from_numpy(dataset._mask(ref.ref_id).copy()) for ref in refs],
        "normalise": lambda: with_images(batch),
        "sample": lambda: [dataset[index] for index in range(len(refs))],
        "collate": lambda: collate(samples),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(rounds + 1):
        for name, part in parts.items():
            begin = time.thread_time()
            part()
            if turn:  # the first is the warm-up
                times[name].append((time.thread_time() - begin) / len(refs) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


class TimedCollate:
    """Collate, and add which worker did it and the CPU time that it had used until then."""

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch."""
        worker = get_worker_info()
        return {**collate(samples), "worker": (0 if worker is None else worker.id, time.process_time())}


def loaded(dataset: ReferDataset, batch_size: int, workers: int, count: int) -> dict[str, float]:
    """Load about ``count`` samples; return CPU milliseconds per sample of workers and receiver, and samples per second.

    The first batches of each worker are not counted.
    """
    numbers = [n % len(dataset) for n in range(count + 2 * _WARM_UP * workers * batch_size)]
    chunks = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
    loader = DataLoader(
        TrainingSamples(dataset, seed=0), batch_sampler=chunks, num_workers=workers, collate_fn=TimedCollate()
    )
    used: dict[int, list[float]] = {}
    clocks = []  # wall time, this process's CPU time
    for batch in batches(loader):
        worker, cpu = batch["worker"]
        used.setdefault(worker, []).append(cpu)
        clocks.append((time.perf_counter(), time.process_time()))
    first = _WARM_UP * workers
    served = (len(clocks) - 1 - first) * batch_size
    seconds = sum(found[-1] - found[_WARM_UP] for found in used.values())
    timed = sum(len(found) - 1 - _WARM_UP for found in used.values()) * batch_size
    return {
        "worker": seconds / timed * 1e3,
        "receive": (clocks[-1][1] - clocks[first][1]) / served * 1e3,
        "samples_per_s": served / (clocks[-1][0] - clocks[first][0]),
    }


def throughput(height: int, width: int, workers: int, batch_size: int, samples: int, rounds: int, runs: int) -> Row:
    """Return one row: the costs for images of one size."""
    with tempfile.TemporaryDirectory() as folder:
        file_bytes = write_set(Path(folder) / "set", height, width, images=2 * batch_size)
        dataset = with_pixels(open_dataset(Path(folder) / "set"), collate)
        parts = cost_of_parts(dataset, batch_size, rounds)
        alone, together, load = [], [], []
        for _ in range(runs):
            alone.append(loaded(dataset, batch_size, 1, samples))
            load.append(os.getloadavg()[0])
            together.append(loaded(dataset, batch_size, workers, samples))
    sample, normalise = parts.pop("sample"), parts.pop("normalise")
    worker = statistics.median(run["worker"] for run in alone)
    parts["other"] = sample - sum(parts[name] for name in ("decode", "resize", "mask"))
    parts["transfer"] = worker - sample - parts["collate"]
    return {
        "image": f"{width}x{height}",
        "file_bytes": file_bytes,
        "workers": workers,
        "batch_size": batch_size,
        "worker_ms": round(worker, 2),
        "parts_ms": {name: round(parts[name], 2) for name in PARTS},
        "receive_ms": round(statistics.median(run["receive"] for run in alone), 2),
        "normalise_ms": round(normalise, 2),
        "samples_per_s": [round(run["samples_per_s"]) for run in together],
        "load": round(statistics.median(load), 1),
    }


def table(content: dict[str, Any]) -> str:
    """Return the rows as a Markdown table, with the conditions of the measurement."""
    lines = [
        "| image | worker | " + " | ".join(PARTS) + " | receive | normalise | samples/s per core | measured |",
        "|---" * (len(PARTS) + 6) + "|",
    ]
    for row in content["rows"]:
        shares = [f"{value:.2f} ({value / row['worker_ms']:.0%})" for value in row["parts_ms"].values()]
        rates = f"{statistics.median(row['samples_per_s']):.0f}"
        received = [f"{row[name]:.2f}" for name in ("receive_ms", "normalise_ms")]
        cells = [row["image"], f"{row['worker_ms']:.2f}", *shares, *received, f"{1e3 / row['worker_ms']:.0f}", rates]
        lines.append("| " + " | ".join(cells) + " |")
    env, [first, *_] = content["environment"], content["rows"]
    versions = f"torch {env['torch']}, Pillow {content['pillow']}, Python {env['python']}"
    load = ", ".join(f"{row['load']:.1f}" for row in content["rows"])
    return "\n".join(
        [
            *lines,
            "",
            f"CPU milliseconds per sample of one worker, and of the process that receives the batches and normalises "
            f"them; samples per second with a core per worker, and measured with "
            f"{first['workers']} workers at a load average of {load} on {env['cores']} cores. Batches of "
            f"{first['batch_size']}. {env['cpu']}, {versions}, {env['date'][:10]}.",
        ]
    )


@plain_characters()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=1600, help="samples per run of the loader")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the parts")
    parser.add_argument("--runs", type=int, default=5, help="runs of the loader")
    parser.add_argument("--out", type=Path, help="results file to write")
    parser.add_argument("--write", type=Path, help="page that holds the table between its markers; needs --out")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for height, width in SIZES:
        rows.append(throughput(height, width, args.workers, args.batch_size, args.samples, args.rounds, args.runs))
        print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        measure.write_results(args.out, measure.environment("cpu"), rows, pillow=Image.__version__)
        if args.write is not None:
            write_between(args.write, BEGIN, END, table(json.loads(args.out.read_text("utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
