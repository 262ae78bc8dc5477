"""Run the losses over 2 and 4 gloo processes and save what each rank computed, for ``losses/test_group.py``.

One process imports torch and forks the ranks, because each import takes seconds.
"""

from __future__ import annotations

import importlib
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from fastkd import losses
from fastkd.distill import Distiller, recipe

SAMPLES, WIDTH_IN, SIDE = 8, 5, 3
SPLITS = {2: {"even": (4, 4), "uneven": (5, 3), "empty": (8, 0)}, 4: {"even": (2, 2, 2, 2), "uneven": (3, 0, 4, 1)}}


class Case(NamedTuple):
    """A loss with options, at given widths; tensors among the options are made by `options_of`."""

    loss: Callable[..., Tensor]
    options: dict[str, Any]
    widths: tuple[int, int] = (7, 7)


def _channel(**options: Any) -> Case:
    return Case(losses.channel_kd, {"across_batch": True} | options)


def _pixel(widths: tuple[int, int] = (4, 4), **options: Any) -> Case:
    return Case(losses.pixel_relation_kd, {"cross_image": True} | options, widths)


CASES = {
    "channel kl": _channel(),
    "channel kl centered attention": _channel(centered=True, weight="attention"),
    "channel kl dot negate": _channel(similarity="dot", negate=True, temperature=30.0, reduction="sum"),
    "channel kl learned temperature": _channel(temperature="parameter", centered=True),
    "channel mse mean weight": _channel(similarity="mean", distance="mse", weight="channels"),
    "channel row_cosine centered": _channel(distance="row_cosine", centered=True),
    "pixel kl": _pixel(),
    "pixel kl unequal widths weight": _pixel((4, 6), weight="pixels"),
    "pixel kl dot learned temperature": _pixel(similarity="dot", temperature="parameter"),
    "pixel row_cosine mean": _pixel((4, 6), similarity="mean", distance="row_cosine", reduction="sum"),
    "pixel mse": _pixel(distance="mse"),
    "pixel mse unequal widths weight": _pixel((4, 6), distance="mse", similarity="mean", weight="pixels"),
}


MASKED = {
    "channel kl centered attention pair masked": _channel(
        centered=True, weight="attention", temperature="pair", pixel_mask=True
    ),
    "channel mse mean masked": _channel(similarity="mean", distance="mse", pixel_mask=True),
    "pixel kl pair masked weight": _pixel((4, 6), temperature="pair", weight="pixels", pixel_mask=True),
    "pixel kl dot pair": _pixel(similarity="dot", temperature="pair"),
    "pixel kl dot masked": _pixel(similarity="dot", temperature=0.75, pixel_mask=True),
    "pixel mse masked": _pixel(distance="mse", pixel_mask=True),
    "pixel row_cosine masked": _pixel((4, 6), distance="row_cosine", pixel_mask=True),
}
"""Cases with pixel masks or a pair of temperatures, learned ones."""

CKA = {
    "cka": Case(losses.channel_attention_kd, {"temperature": 0.4}, (5, 7)),
    "cka biased learned temperature": Case(
        losses.channel_attention_kd, {"debiased": False, "temperature": "parameter"}, (7, 7)
    ),
}


HALF = ("channel kl centered attention", "pixel kl", "pixel mse unequal widths weight")


class Result(NamedTuple):
    """The loss and the gradients of the parameters."""

    loss: Tensor
    gradients: list[Tensor]


def batch(dtype: torch.dtype, rounded: torch.dtype) -> tuple[Tensor, ...]:
    """Return images (8, 5, 3, 3), teacher maps (8, 7, 4, 3), and weights of channels (1, 7) and pixels (8, 9).

    The values are rounded to one dtype and converted to another.
    """
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    images, maps = draw(SAMPLES, WIDTH_IN, SIDE, SIDE) + 0.5, draw(SAMPLES, 7, SIDE + 1, SIDE) + 0.5
    weights = draw(1, 7).abs(), draw(SAMPLES, SIDE * SIDE).abs()
    return tuple(x.to(rounded).to(dtype) for x in (images, maps, *weights))


def pixel_mask() -> Tensor:
    """Return a mask (8, 3, 3) with different numbers of valid pixels."""
    return torch.arange(SAMPLES * SIDE**2).reshape(SAMPLES, SIDE, SIDE) % torch.arange(2, 10)[:, None, None] > 0


class Student(nn.Module):
    """A 1×1 convolution and the loss of its result."""

    def __init__(self, case: Case, dtype: torch.dtype, rounded: torch.dtype | None = None) -> None:
        super().__init__()
        self.case, self.rounded = case, rounded or dtype
        self.features: Tensor | None = None  # in place of the convolution's result
        generator = torch.Generator().manual_seed(4)
        weight = torch.randn((case.widths[0], WIDTH_IN), generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight.to(self.rounded).to(dtype))
        names = {"parameter": ["temperature"], "pair": ["temperature_s", "temperature_t"]}
        for i, name in enumerate(names.get(case.options.get("temperature"), [])):
            setattr(self, name, nn.Parameter(torch.tensor(0.75 + i, dtype=dtype)))

    def map_of(self, part: slice) -> Tensor:
        """Return the features (b, C, 3, 3) of a part of the batch."""
        return torch.einsum("ck,bkhw->bchw", self.weight, batch(self.weight.dtype, self.rounded)[0][part])

    def forward(self, part: slice, loss: Callable[..., Tensor] | None = None, **more: Any) -> Tensor:
        _, maps, channels, pixels = batch(self.weight.dtype, self.rounded)
        options = {k: v for k, v in self.case.options.items() if k not in ("weight", "temperature")} | more
        if "temperature" in self.case.options:
            given = self.case.options["temperature"]
            options["temperature"] = self.temperature if given == "parameter" else given
            if given == "pair":
                options["temperature"] = (self.temperature_s, self.temperature_t)
        if "pixel_mask" in options:
            options["pixel_mask"] = pixel_mask()[part]
        if "weight" in self.case.options:
            named = {"channels": channels, "pixels": pixels[part], "attention": "attention"}
            options["weight"] = named[self.case.options["weight"]]
        features = self.map_of(part) if self.features is None else self.features
        # Other losses, and one mask of both maps, need equal sizes.
        height = SIDE + (self.case.loss is losses.channel_kd and "pixel_mask" not in options)
        return (loss or self.case.loss)(features, maps[part, : self.case.widths[1], :height], **options)

    def result(self, part: slice, **more: Any) -> Result:
        loss = self(part, **more)
        return Result(loss.detach(), list(torch.autograd.grad(loss, list(self.parameters()))))


def part_of(counts: tuple[int, ...], rank: int) -> slice:
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


@contextmanager
def recorded() -> Iterator[list[tuple[str, int]]]:
    """Record the kinds and bytes of the collectives called through torch.distributed."""
    found: list[tuple[str, int]] = []
    kinds = {
        "all_reduce": "all_reduce",
        "all_gather_into_tensor": "all_gather",
        "reduce_scatter_tensor": "reduce_scatter",
    }
    kinds |= {"all_gather_single": "all_gather", "reduce_scatter_single": "reduce_scatter"}
    originals = {name: getattr(dist, name) for name in kinds if hasattr(dist, name)}

    def recording(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append((kinds[name], max(x.nbytes for x in args if isinstance(x, Tensor))))
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, recording(name))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def averaged(result: Result, ranks: int) -> Result:
    for gradient in result.gradients:
        dist.all_reduce(gradient)
        gradient /= ranks
    return result


def check(rank: int, ranks: int) -> dict[str, Any]:
    """Return what one rank computes, by the name of the check."""
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        for split, counts in SPLITS[ranks].items():
            for dtype in (torch.float64, torch.float32) if split == "even" else (torch.float64,):
                result = Student(case, dtype).result(part_of(counts, rank), group="world")
                found[f"{name}, {split}, {dtype}"] = averaged(result, ranks)
        wrapped = DistributedDataParallel(Student(case, torch.float64))
        loss = wrapped(part_of(SPLITS[ranks]["even"], rank), group=dist.group.WORLD)
        loss.backward()
        found[f"{name}, DDP"] = Result(loss.detach(), [p.grad for p in wrapped.module.parameters()])
    for name, case in (CKA | (MASKED if ranks == 2 else {})).items():
        for split, counts in SPLITS[ranks].items():
            result = Student(case, torch.float64).result(part_of(counts, rank), group="world")
            found[f"{name}, {split}"] = averaged(result, ranks)
    if ranks == 2:
        found |= single_checks(rank)
    return found


def single_checks(rank: int) -> dict[str, Any]:
    """Return the results of checks that do not depend on the number of ranks."""
    found: dict[str, Any] = {}
    part = part_of(SPLITS[2]["even"], rank)
    for name in CASES:
        with recorded() as collectives:
            Student(CASES[name], torch.float32).result(part, group="world")
        found[f"collectives of {name}"] = collectives
        found[f"FLOP of {name}"] = flops_of(CASES[name], part)
    found["dead channel"] = averaged(dead_channel(part, group="world"), 2)
    found["far from 0"] = far_from_zero(part, torch.float32, group="world")
    for name in HALF:
        found[f"bfloat16 {name}"] = half_precision(CASES[name], part)
    for name in ("channel kl", "pixel kl", "pixel mse"):
        student = Student(CASES[name], torch.float64)
        found[f"double backward of {name}"] = error_of(lambda student=student: twice_differentiated(student, part))
        with torch.no_grad():
            found[f"no_grad of {name}"] = student(part, group="world")
        rows = student(part, group="world", reduction="none")
        weights = torch.arange(1.0, rows.numel() + 1, dtype=torch.float64).view_as(rows) * (rank + 1)
        (gradient,) = torch.autograd.grad(rows, student.weight, weights)
        found[f"rows of {name}"] = averaged(Result(rows.detach(), [gradient]), 2)
    found |= compiled_checks(rank, part)
    draw = torch.randn
    found["unequal pixels"] = error_of(
        lambda: losses.pixel_relation_kd(
            draw(2, 3, 4 + rank), draw(2, 3, 4 + rank), cross_image=True, group="world", weight=torch.ones(2, 4 + rank)
        )
    )
    one = dist.new_group([0])
    found["not a member"] = error_of(
        lambda: losses.channel_kd(draw(2, 3, 4), draw(2, 3, 4), across_batch=True, group=one, backend="reference")
    )
    few = lambda: losses.channel_attention_kd(draw(1, 3, 4), draw(1, 3, 4), group="world")
    found["too few samples"] = error_of(few)
    wide = lambda: losses.channel_attention_kd(draw(3, 3 + rank, 4), draw(3, 3, 4), group="world")
    found["unequal widths"] = error_of(wide)
    found["distiller"] = distilled(part)
    return found


def half_precision(case: Case, part: slice, **more: Any) -> Result:
    """Return the loss and gradient by features in bfloat16, of a teacher in float32."""
    student = Student(case, torch.float32)
    student.features = student.map_of(part).detach().bfloat16().requires_grad_()
    loss = student(part, group="world", **more)
    return Result(loss.detach(), list(torch.autograd.grad(loss, student.features)))


def far_from_zero(part: slice, dtype: torch.dtype, **more: Any) -> Result:
    """Return the loss and gradient by features that are 100 times as far from 0 as they vary."""
    case = Case(losses.channel_kd, {"across_batch": True, "centered": True})
    student = Student(case, dtype, torch.float32)
    features = Student(case, torch.float32).map_of(part).detach() + 100
    student.features = features.to(dtype).requires_grad_()
    loss = student(part, **more)
    return Result(loss.detach(), list(torch.autograd.grad(loss, student.features)))


def dead_channel(part: slice, **more: Any) -> Result:
    """Return the result for a channel that is 0 everywhere, whose cosines have no slope."""
    student = Student(CASES["channel kl"], torch.float64)
    with torch.no_grad():
        student.weight[2] = 0
    return student.result(part, **more)


def compiled_checks(rank: int, part: slice) -> dict[str, Any]:
    """Return results where one rank compiles the loss and the other, which communicates with it, does not."""
    found: dict[str, Any] = {}
    if rank == 0:
        loss = torch.compile(CASES["pixel kl"].loss, backend="aot_eager", fullgraph=True)
        found["pixel kl in one graph"] = error_of(
            lambda: Student(CASES["pixel kl"], torch.float64)(part, loss=loss, group="world")
        )
    for name, whole in (("channel mse mean weight", True), ("pixel mse", True), ("pixel kl", False)):
        case = CASES[name]
        loss = torch.compile(case.loss, backend="aot_eager", fullgraph=whole) if rank == 0 else case.loss
        found[f"compiled {name}"] = averaged(Student(case, torch.float64).result(part, loss=loss, group="world"), 2)
    return found


def distilled(part: slice) -> Result:
    """Return the loss and gradient of a `Distiller` with the recipe "channel" over both ranks, under DDP."""
    images = batch(torch.float32, torch.float32)[0]

    class Decoder(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.project = nn.Conv2d(WIDTH_IN, width, 1, bias=False)  # centring would cancel a bias

        def forward(self, image: Tensor) -> dict[str, Tensor]:
            return {"decoder_features": self.project(image)}

    torch.manual_seed(0)
    student, teacher = Decoder(6), Decoder(6).eval().requires_grad_(False)
    task = lambda output, batch: output["decoder_features"].mean() * 0
    group = "world" if dist.is_initialized() else None
    distiller = Distiller(student, teacher, task, recipe(["channel"], group=group), inputs=("image",))
    model = DistributedDataParallel(distiller) if group else distiller
    loss = model({"image": images[part]}).loss
    loss.backward()
    return Result(loss.detach(), [p.grad for p in student.parameters()])


def flops_of(case: Case, part: slice) -> tuple[int, int]:
    """Return the FLOP of a loss on features, forward and backward, without those of the convolution."""
    student = Student(case, torch.float32)
    student.features = student.map_of(part).detach().requires_grad_()
    with FlopCounterMode(display=False) as forward:
        loss = student(part, group="world")
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(loss, student.features)
    return forward.get_total_flops(), backward.get_total_flops()


def twice_differentiated(student: Student, part: slice) -> None:
    (first,) = torch.autograd.grad(student(part, group="world"), student.weight, create_graph=True)
    torch.autograd.grad(first.sum(), student.weight)


def error_of(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # DistributedDataParallel would import it in every rank
    for ranks in SPLITS:
        children = []
        for rank in range(ranks):
            pid = os.fork()
            if pid:
                children.append(pid)
                continue
            try:
                dist.init_process_group(
                    "gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks
                )
                (folder / f"{ranks}-{rank}.pickle").write_bytes(pickle.dumps(check(rank, ranks)))
                dist.destroy_process_group()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        if any(codes):
            return 1
    return 0
