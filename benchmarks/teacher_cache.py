"""Cost of a training step alone, with the teacher online and with the teacher cached; random reads of cache formats.

Seconds are CPU seconds of this process (one thread, no loading processes, so reading and decoding samples count),
medians over rounds that alternate between the variants: on a shared machine only ratios within a run are comparable.

    python -m benchmarks.teacher_cache --setting demo  --out benchmarks/results/teacher_cache.json
    python -m benchmarks.teacher_cache --setting lavt  --out benchmarks/results/teacher_cache.json
    python -m benchmarks.teacher_cache --setting reads --out benchmarks/results/teacher_cache.json

Each setting replaces its own part of the file. Formats whose package is not installed are rows with ``ok: false``.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastkd import Distiller
from fastkd._atomic import replace_files
from fastkd._console import plain_characters
from fastkd._info import environment
from fastkd.cli._models import load_model
from fastkd.cli.demo import TERMS, TRAINING
from fastkd.data import RefCOCO, ReferDataset, collate, load_tokenizer, make_shapes
from fastkd.distill import recipe
from fastkd.models import LAVT, LAVTConfig, RISModel, preset
from fastkd.train import TeacherCache, TrainConfig, segmentation_loss
from fastkd.train.feed import Feed
from fastkd.train.optim import BatchOrder, adamw
from fastkd.train.seeding import seed_step

VARIANTS = ("alone", "online", "cached")
CPU = torch.device("cpu")
SWIN_B = {"embed": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "window": 12}
BERT_BASE = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}


class Run:
    """A distiller with its own batches and optimiser."""

    def __init__(self, distiller: Distiller, dataset: ReferDataset, config: TrainConfig) -> None:
        self.steps = 0
        distiller.train()
        if config.channels_last:
            distiller.to(memory_format=torch.channels_last)
        self.distiller, self.optimizer = distiller, adamw(distiller, config)
        self.batches = Feed(dataset, BatchOrder(len(dataset), config), config, collate, distiller, CPU).start(0)

    def step(self) -> float:
        """Take one step and return its CPU seconds."""
        seed_step(0, self.steps, 0, 0)  # the same dropout in all variants
        self.steps += 1
        start = time.process_time()
        batch = next(self.batches)
        self.distiller(batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start


def student_of(name: str) -> RISModel:
    torch.manual_seed(0)
    return RISModel(preset(name))


def lavt() -> LAVT:
    """Return a LAVT of the published size (Swin-B, BERT base) with random weights."""
    torch.manual_seed(0)
    return LAVT(LAVTConfig(**SWIN_B, text=BERT_BASE, tokenizer="shapes")).eval().requires_grad_(False)  # type: ignore[arg-type]


def steps(setting: str, rounds: int, images: int, root: Path) -> dict[str, Any]:
    """Measure the three variants of a setting in turns."""
    teacher: nn.Module
    if setting == "demo":
        size, name, teacher, config = 64, "shapes-student", load_model("shapes"), TRAINING
        names = [term.partition("=")[0] for term in TERMS]
    else:
        size, name, teacher, config = 224, "student-15m", lavt(), TrainConfig(batch_size=4)
        names = ["first_order", "mask"]
    make_shapes(root / "data", images=images, image_size=size)
    refs, tokenizer = RefCOCO(root / "data", split="train"), load_tokenizer("shapes")
    every = ReferDataset(refs, tokenizer, image_size=size, sentences="all")
    drawn = ReferDataset(refs, tokenizer, image_size=size, cache=size <= 128)  # as the commands open them
    terms = recipe(names)
    start = time.process_time()
    built = TeacherCache.build(
        root / "cache",
        Distiller(student_of(name), teacher, segmentation_loss, terms),
        every,
        batch_size=config.batch_size,
        channels_last=config.channels_last,
        device="cpu",
        allow_untrained_teacher=True,  # for LAVT's size
    )
    building = time.process_time() - start
    runs = {
        "alone": Run(Distiller(student_of(name), None, segmentation_loss), drawn, config),
        "online": Run(Distiller(student_of(name), teacher, segmentation_loss, terms), drawn, config),
        "cached": Run(
            Distiller(student_of(name), TeacherCache(root / "cache"), segmentation_loss, terms), drawn, config
        ),
    }
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for round_ in range(rounds + 1):
        for variant in VARIANTS:
            value = runs[variant].step()
            if round_:  # the first step of each warms up
                seconds[variant].append(value)
    medians = {variant: statistics.median(values) for variant, values in seconds.items()}
    parts = in_parts(runs, rounds)
    weights = [
        {n: p.detach().clone() for n, p in runs[variant].distiller.student.named_parameters()}
        for variant in ("online", "cached")
    ]
    return {
        "image_size": size,
        "batch_size": config.batch_size,
        "channels_last": config.channels_last,
        "student": name,
        "terms": names,
        "parameters": {
            "student": sum(p.numel() for p in runs["alone"].distiller.student.parameters()),
            "teacher": sum(p.numel() for p in teacher.parameters()),
        },
        "rounds": rounds,
        "cpu_seconds": {variant: [round(v, 5) for v in values] for variant, values in seconds.items()},
        "medians": medians,
        "online_over_alone": medians["online"] / medians["alone"],
        "cached_over_alone": medians["cached"] / medians["alone"],
        "medians_of_parts": parts,
        "equal_weights": all(torch.equal(value, weights[1][n]) for n, value in weights[0].items()),
        "cache": {"samples": len(built), "build_cpu_seconds": building, **built.measured},
    }


def in_parts(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Return the CPU seconds of the teacher's forward, and of finding and reading its output, for one batch."""
    online, cached = runs["online"].distiller, runs["cached"].distiller
    cache = cached.teacher
    assert isinstance(cache, TeacherCache)
    found: dict[str, list[float]] = {"teacher_forward": [], "cache_read": []}
    for _ in range(rounds):
        batch = next(runs["online"].batches)
        actions: dict[str, Callable[[], Any]] = {
            "teacher_forward": lambda batch=batch: online.run_teacher(batch),
            "cache_read": lambda batch=batch: cache.read(batch, cached.inputs, list(cache.parts)),
        }
        for name, action in actions.items():
            start = time.process_time()
            action()
            found[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def reads(samples: int, bytes_each: int, number: int, root: Path) -> list[dict[str, Any]]:
    """Read random samples from files of each format, all in the page cache, and copy them."""
    rows: list[dict[str, Any]] = []
    data = torch.randn(samples, bytes_each // 4, generator=torch.Generator().manual_seed(0))
    order = random.Random(0).choices(range(samples), k=number)
    for name, prepare in FORMATS.items():
        row: dict[str, Any] = {"format": name, "samples": samples, "bytes": bytes_each, "reads": number}
        try:
            read = prepare(root, data)
        except ImportError as error:
            rows.append({**row, "ok": False, "note": str(error)})
            continue
        assert all(torch.equal(read(n), data[n]) for n in order[:5])
        times = []
        for _ in range(5):
            start = time.process_time()
            for n in order:
                read(n)
            times.append((time.process_time() - start) / number)
        rows.append({**row, "ok": True, "microseconds": 1e6 * statistics.median(times)})
    return rows


Reader = Callable[[int], Tensor]


def safetensors_shard(root: Path, data: Tensor) -> Reader:
    save_file({"x": data}, str(root / "x.safetensors"))
    mapped = safe_open(str(root / "x.safetensors"), framework="pt").get_tensor("x")
    return lambda n: mapped[n].clone()


def safetensors_slice(root: Path, data: Tensor) -> Reader:
    save_file({"x": data}, str(root / "s.safetensors"))
    part = safe_open(str(root / "s.safetensors"), framework="pt").get_slice("x")
    return lambda n: part[n : n + 1][0].clone()


def numpy_map(root: Path, data: Tensor) -> Reader:
    np.save(root / "x.npy", data.numpy())
    mapped = np.load(root / "x.npy", mmap_mode="r")
    return lambda n: torch.from_numpy(np.array(mapped[n]))


def arrow_file(root: Path, data: Tensor) -> Reader:
    import pyarrow as pa

    kind = pa.list_(pa.float32(), data.shape[1])
    column = pa.FixedSizeListArray.from_arrays(pa.array(data.numpy().reshape(-1)), data.shape[1])
    with pa.OSFile(str(root / "x.arrow"), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("x", kind)])) as writer:
        writer.write_batch(pa.record_batch([column], names=["x"]))
    mapped = pa.ipc.open_file(pa.memory_map(str(root / "x.arrow"))).get_batch(0).column(0)
    return lambda n: torch.from_numpy(np.array(mapped[n].values.to_numpy()))


def webdataset_tar(root: Path, data: Tensor) -> Reader:
    """Write WebDataset's layout, one .npy per sample, and read members at their offsets: it reads in order only."""
    with tarfile.open(root / "x.tar", "w") as tar:
        for n, value in enumerate(data):
            buffer = io.BytesIO()
            np.save(buffer, value.numpy())
            info = tarfile.TarInfo(f"{n:06d}.npy")
            info.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(info, buffer)
    tar = tarfile.open(root / "x.tar")  # noqa: SIM115
    members = tar.getmembers()

    def read(n: int) -> Tensor:
        member = tar.extractfile(members[n])
        assert member is not None
        return torch.from_numpy(np.load(io.BytesIO(member.read())))

    return read


FORMATS: dict[str, Callable[[Path, Tensor], Reader]] = {
    "safetensors, mapped tensor": safetensors_shard,
    "safetensors, slice": safetensors_slice,
    "numpy, mapped": numpy_map,
    "Arrow IPC, mapped": arrow_file,
    "WebDataset tar, by offset": webdataset_tar,
}


@plain_characters()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=("demo", "lavt", "reads"), required=True)
    parser.add_argument("--rounds", type=int, help="steps per variant; default 60 (demo) or 5 (lavt)")
    parser.add_argument("--images", type=int, help="images of the procedural set; default 120 (demo) or 12 (lavt)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result: Any
        if args.setting == "reads":
            sizes = ((512, 1 << 18), (128, 3 << 19))  # a sample of the demo, and of LAVT at 480²
            result = [row for samples, size in sizes for row in reads(samples, size, 400, Path(folder))]
        else:
            rounds = args.rounds or (60 if args.setting == "demo" else 5)
            images = args.images or (120 if args.setting == "demo" else 12)
            result = steps(args.setting, rounds, images, Path(folder))
    content = {} if args.out is None or not args.out.exists() else json.loads(args.out.read_text("utf-8"))
    content[args.setting] = {"environment": environment(CPU), "result": result}
    text = json.dumps(content, indent=1) + "\n"
    if args.out is not None:
        with replace_files(args.out) as (partial,):
            partial.write_text(text, encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
