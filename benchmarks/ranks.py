"""Data-parallel steps with relations over all ranks: measured with two gloo ranks, simulated for 8 to 512 GPUs.

    python -m benchmarks.ranks --measure     # two processes, one thread each; needs two quiet cores for its wall times
    python -m benchmarks.ranks --simulate    # counts the FLOP of a student; takes seconds
    python -m benchmarks.ranks --write docs/scaling.md

The first two write their parts of benchmarks/results/ranks.json (--out), the last the tables from that file between its
markers. The batch of a rank is constant (weak scaling). Efficiency is the time of a step of one process alone, with the
batch of a rank and relations within it, divided by that of a step in which all ranks take part.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import RESULTS
from benchmarks.table import write_between
from fastkd import losses
from fastkd._atomic import replace_files
from fastkd._console import plain_characters
from fastkd._info import environment
from fastkd.ops.relation.group_costs import (
    Collective,
    Flops,
    Traffic,
    channel_flops,
    channel_traffic,
    pixel_flops,
    pixel_traffic,
)

STUDENT, WORDS = "student-15m", 20
TEACHER_WIDTH = 512  # of LAVT's third stage
QUIET = 1.25  # load average per rank up to which wall times are worth reading
VARIANTS: dict[str, dict[str, Any]] = {
    "channel": {"across_batch": True, "centered": True},
    "pixel, mse": {"cross_image": True, "distance": "mse"},
    "pixel, kl": {"cross_image": True},
}
MARKERS = {
    part: (f"<!-- {part}: begin (written by benchmarks/ranks.py) -->", f"<!-- {part}: end -->")
    for part in ("measured", "simulated")
}

# --- two processes ----------------------------------------------------------------------------------------------------


def student() -> nn.Module:
    """Return the student with random weights, the same in every process."""
    from fastkd.models import RISModel, preset

    torch.manual_seed(0)
    return RISModel(preset(STUDENT)).train()


class Step(nn.Module):
    """A student, and a task loss plus one relation; the teacher's maps are random constants."""

    def __init__(self, variant: str, size: int, samples: int, group: str | None) -> None:
        super().__init__()
        self.student = student()
        self.options = VARIANTS.get(variant, {}) | {"group": group}
        self.loss: Callable[..., Tensor] | None = None
        self.image = torch.randn(samples, 3, size, size)
        self.ids = torch.ones(samples, WORDS, dtype=torch.int64)
        with torch.no_grad():
            output = self.student(self.image, self.ids)
        if variant == "channel":
            self.loss, self.select = losses.channel_kd, lambda output: output.decoder_features
            self.teacher = torch.randn_like(output.decoder_features)
        elif variant != "task":
            self.loss, self.select = losses.pixel_relation_kd, lambda output: output.stages[2]
            self.teacher = torch.randn(samples, TEACHER_WIDTH, *output.stages[2].shape[2:])

    def forward(self) -> Tensor:
        output = self.student(self.image, self.ids)
        loss: Tensor = output.logits.float().square().mean()
        return loss if self.loss is None else loss + self.loss(self.select(output), self.teacher, **self.options)


def timed(step: nn.Module) -> tuple[float, float]:
    """Return the wall and the CPU seconds of one forward and backward."""
    wall, cpu = time.perf_counter(), time.process_time()
    step().backward()
    for p in step.parameters():
        p.grad = None
    return time.perf_counter() - wall, time.process_time() - cpu


def measure_rank(rank: int, ranks: int, port: int, rounds: int, size: int, samples: int, connection: Any) -> None:
    """Take steps alone and together in turns, so that other load falls on both; send the seconds of each."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for variant in ("task", *VARIANTS):
        alone = Step(variant, size, samples, None)
        together = DistributedDataParallel(Step(variant, size, samples, "world"))
        seconds: dict[str, list[tuple[float, float]]] = {"alone": [], "together": []}
        for turn in range(rounds + 1):
            dist.barrier()
            if rank == 0:
                taken = timed(alone)
                if turn:  # the first step warms up
                    seconds["alone"].append(taken)
            dist.barrier()
            taken = timed(together)
            if turn:
                seconds["together"].append(taken)
        found[variant] = seconds
    connection.send(found)
    dist.destroy_process_group()


def measure(ranks: int, rounds: int, size: int, samples: int) -> dict[str, Any]:
    """Return medians and efficiencies of every variant, in wall and in CPU seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(target=measure_rank, args=(rank, ranks, port, rounds, size, samples, pipe[1]))
        for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    found = [pipe[0].recv() for pipe in pipes]
    for process in processes:
        process.join()
    rows = {variant: compare([results[variant] for results in found]) for variant in ("task", *VARIANTS)}
    return {
        "student": STUDENT,
        "image_size": size,
        "samples_per_rank": samples,
        "ranks": ranks,
        "rounds": rounds,
        "load_average": os.getloadavg()[0],
        "rows": rows,
    }


def compare(of_ranks: list[Mapping[str, list[tuple[float, float]]]]) -> dict[str, float]:
    """Return medians over the rounds: wall seconds of the slowest rank, CPU seconds of the mean rank."""
    wall = [max(step[0] for step in steps) for steps in zip(*(r["together"] for r in of_ranks), strict=True)]
    cpu = [statistics.mean(step[1] for step in steps) for steps in zip(*(r["together"] for r in of_ranks), strict=True)]
    row = {
        "alone_wall": statistics.median(step[0] for step in of_ranks[0]["alone"]),
        "alone_cpu": statistics.median(step[1] for step in of_ranks[0]["alone"]),
        "together_wall": statistics.median(wall),
        "together_cpu": statistics.median(cpu),
    }
    return row | {f"efficiency_{of}": row[f"alone_{of}"] / row[f"together_{of}"] for of in ("wall", "cpu")}


# --- a simulation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Assumed rates: peaks of NVIDIA's data sheets of the H100 SXM and DGX H100, and the shares of them in use."""

    bf16: float = 989e12  # FLOP/s, dense
    fp32: float = 67e12
    share: float = 0.4  # of either peak
    node: int = 8  # GPUs joined by NVLink
    node_rate: float = 450e9  # bytes/s each way: NVLink, 900 GB/s in both directions
    network_rate: float = 50e9  # bytes/s: one 400 Gb/s adapter per GPU
    link_share: float = 0.7  # of either rate
    latency: float = 10e-6  # seconds per collective and doubling of the ranks

    def seconds(self, collectives: list[Collective], ranks: int) -> float:
        """Return the time of collectives in rings whose slowest link is the network's beyond one node."""
        if ranks == 1:
            return 0.0
        rate = self.link_share * (self.node_rate if ranks <= self.node else self.network_rate)
        hops = math.ceil(math.log2(ranks))
        return sum(one.sent(ranks) / rate + self.latency * hops for one in collectives)


class Model(NamedTuple):
    """Counts of a student's step."""

    parameters: int
    forward: int  # FLOP of a rank's batch; a backward has two products for each of the forward


def relation(variant: str, ranks: int, shapes: Mapping[str, list[int]], size: int) -> tuple[Flops, Traffic]:
    """Return the costs of a rank for a relation over all ranks; ``size`` is that of an element of a feature."""
    samples, channels, *side = shapes["decoder_features"]
    if variant == "none":
        return Flops(0, 0), Traffic([], [])
    if variant == "channel":
        columns = samples * math.prod(side)
        return channel_flops(channels, columns, columns), channel_traffic(channels, means=True)
    samples, width, *side = shapes["stage"]
    pixels, distance = math.prod(side), VARIANTS[variant].get("distance", "kl")
    traffic = pixel_traffic(samples, pixels, width, TEACHER_WIDTH, ranks, distance=distance, size_s=size, size_t=size)
    flops = pixel_flops(samples, ranks * samples, pixels, width, TEACHER_WIDTH, distance=distance)
    return flops, traffic


def simulate(model: Model, flops: Flops, traffic: Traffic, ranks: int, machine: Machine) -> dict[str, float]:
    """Return the seconds of a step's parts.

    DDP's all-reduce of fp32 gradients overlaps with the student's backward; the relation's collectives do not.
    """
    forward = model.forward / (machine.share * machine.bf16)
    reduced = machine.seconds([Collective("all_reduce", 4 * model.parameters)], ranks)
    return {
        "student": 3 * forward,
        "gradients": max(0.0, reduced - 2 * forward),
        "relation": sum(flops) / (machine.share * machine.fp32),
        "collectives": machine.seconds([*traffic.forward, *traffic.backward], ranks),
    }


def count(samples: int, size: int) -> tuple[Model, dict[str, list[int]]]:
    """Count the student's FLOP on one image and return those of a batch, and the shapes of its maps."""
    model = student()
    image, ids = torch.randn(2, 3, size, size), torch.ones(2, WORDS, dtype=torch.int64)
    # The counter does not know every fused attention. It counts the backward of grouped convolutions in full.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(image, ids)
    maps = {"decoder_features": output.decoder_features, "stage": output.stages[2]}
    counts = Model(sum(p.numel() for p in model.parameters()), counter.get_total_flops() * samples // 2)
    return counts, {name: [samples, *x.shape[1:]] for name, x in maps.items()}


def simulated(samples: int, size: int, ranks: tuple[int, ...]) -> dict[str, Any]:
    """Count a student and return the simulation."""
    return rows_of(*count(samples, size), samples, size, ranks)


def rows_of(
    model: Model, shapes: Mapping[str, list[int]], samples: int, size: int, ranks: tuple[int, ...]
) -> dict[str, Any]:
    """Return one row per relation and number of ranks, with all assumptions."""
    machine = Machine()
    rows = []
    for variant in ("none", *VARIANTS):
        own, _ = relation(variant, 1, shapes, 2)
        one = sum(simulate(model, own, Traffic([], []), 1, machine).values())
        for number in ranks:
            flops, traffic = relation(variant, number, shapes, 2)
            parts = simulate(model, flops, traffic, number, machine)
            rows.append(
                {"relation": variant, "ranks": number, "sent": traffic.sent(number), "flops": sum(flops)}
                | {"seconds": parts, "efficiency": one / sum(parts.values())}
            )
    return {
        "student": STUDENT,
        "image_size": size,
        "samples_per_rank": samples,
        "teacher_width": TEACHER_WIDTH,
        "model": model._asdict(),
        "shapes": dict(shapes),
        "machine": asdict(machine),
        "rows": rows,
    }


# --- tables -----------------------------------------------------------------------------------------------------------


def measured_table(result: Mapping[str, Any]) -> str:
    lines = [
        "| step | CPU s alone | CPU s, two ranks | efficiency, CPU | efficiency, wall |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        label = "task alone, DDP" if name == "task" else f"with {name}, over both ranks"
        lines.append(
            f"| {label} | {row['alone_cpu']:.3f} | {row['together_cpu']:.3f} | {row['efficiency_cpu']:.2f} | "
            f"{row['efficiency_wall']:.2f} |"
        )
    load = result["load_average"]
    busy = ", so other work ran too and only CPU times compare" if load > QUIET * result["ranks"] else ""
    return "\n".join([*lines, "", f"Load average of the machine at the end: {load:.1f}{busy}."])


def simulated_table(result: Mapping[str, Any]) -> str:
    lines = [
        "| relation | GPUs | sent per GPU (MB) | student (ms) | gradients not hidden (ms) | relation (ms) | "
        "its collectives (ms) | efficiency |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [1e3 * row["seconds"][part] for part in ("student", "gradients", "relation", "collectives")]
        parts = " | ".join(f"{cell:.2f}" for cell in cells)
        lines.append(
            f"| {row['relation']} | {row['ranks']} | {row['sent'] / 1e6:.1f} | {parts} | {row['efficiency']:.2f} |"
        )
    return "\n".join(lines)


@plain_characters()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--rounds", type=int, default=10, help="measured steps of each kind")
    parser.add_argument("--out", type=Path, default=RESULTS / "ranks.json")
    parser.add_argument("--write", type=Path, help="page that holds the tables between markers")
    args = parser.parse_args(argv)
    content = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    if args.measure:
        result = measure(2, args.rounds, 224, 4)
        content["measured"] = {"environment": environment("cpu"), "result": result}
    if args.simulate:
        content["simulated"] = simulated(16, 480, (8, 64, 512))
    if args.measure or args.simulate:
        with replace_files(args.out) as (partial,):
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    tables = {}
    if "measured" in content:
        tables["measured"] = measured_table(content["measured"]["result"])
    if "simulated" in content:
        tables["simulated"] = simulated_table(content["simulated"])
    for part, table in tables.items():
        print(table)
        if args.write is not None:
            write_between(args.write, *MARKERS[part], table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
