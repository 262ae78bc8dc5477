"""Checks on the first batch of a run, and a table of what its steps cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastkd._messages import shortened, with_unit
from fastkd._runtime import autocast, modes_kept
from fastkd._wrappers import uncompiled
from fastkd.distill import checks
from fastkd.distill.distiller import Distiller, DistillOutput
from fastkd.distill.gradients import GradientReport, preserve_state
from fastkd.train.config import TrainConfig
from fastkd.train.timing import StepTimer, peak_memory


@dataclass(frozen=True)
class PreflightReport:
    """Result of the checks before training; ``print`` shows it as a table.

    Attributes:
        gradients: value, gradient norm, weight and share of each term on the first micro-batch, and the parts of the
            student that its gradient reaches.
        memory: bytes by use: ``"student"``, ``"aligners"`` and ``"teacher"`` (parameters and buffers), ``"gradients"``,
            ``"optimizer"``, ``"activations"`` (what one micro-batch keeps for its backward), and ``"peak"``, measured
            so far: a GPU's memory in use by torch, else that of this process (None if unknown).
        seconds: a step by part, from one micro-batch: ``"data"`` (loading the first one), ``"student"`` and
            ``"teacher"`` (forward), ``"losses"``, ``"backward"``.
    """

    gradients: GradientReport
    memory: dict[str, int | None]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return values, norms, weights, shares and parts per term, memory and seconds as plain values."""
        return {
            **asdict(self.gradients),
            "shares": self.gradients.shares,
            "memory": self.memory,
            "seconds": self.seconds,
        }

    def lines(self) -> list[str]:
        """Return memory and seconds as text."""
        memory = [f"{name} {with_unit(value)}" for name, value in self.memory.items() if value]
        seconds = [f"{name} {value:.3g}" for name, value in self.seconds.items()]
        return [
            f"memory: {', '.join(memory)}",
            f"seconds a step: {sum(self.seconds.values()):.3g} ({', '.join(seconds)}; data: the first batch)",
        ]

    def __str__(self) -> str:
        return "\n".join([str(self.gradients), *self.lines()])

    def __rich__(self) -> Any:
        """Return the table as rich shows it on a terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        header, *rows = self.gradients.rows()
        for number, cell in enumerate(header):
            table.add_column(cell, justify="right" if 0 < number < len(header) - 1 else "left")
        for row in rows:
            table.add_row(*map(Text, row))  # Text: square brackets in a name are not markup
        return Group(table, *map(Text, self.lines()))


def check_first_batch(
    distiller: Distiller,
    batch: Mapping[str, Any],
    config: TrainConfig,
    device: torch.device,
    precision: str,
    processes: int = 1,
    data_seconds: float = 0.0,
) -> PreflightReport:
    """Look for mistakes that would go unnoticed in training; leave models, gradients and random state unchanged.

    Args:
        distiller: on its device, in train mode.
        batch: the first micro-batch of this process, on the device.
        config: settings of the run.
        device: device in effect.
        precision: precision in effect.
        processes: number of processes.
        data_seconds: time that loading the batch took.

    Raises:
        ValueError: a mistake that `Distiller.check` finds, a teacher without its weights, or a loss that adds up
            samples in a run whose steps consist of several micro-batches.
        RuntimeError: a tap that never fires.
    """
    memory = _Saved(distiller)
    # Every term, whatever its schedule; compiling would take longer than all checks.
    with autocast(precision, device), distiller.at_step(None), uncompiled():
        with memory:
            report = distiller.check(batch)
        if distiller.teacher is not None and not config.allow_untrained_teacher:
            checks.check_trained(distiller.teacher, lambda: distiller.run_teacher(batch))
        if config.accumulate * processes > 1:
            check_means(distiller, batch, config.accumulate, processes)
        seconds = {"data": data_seconds, **_seconds(distiller, batch, device)}
    return PreflightReport(
        report, _memory(distiller, memory.bytes, device), {name: s * config.accumulate for name, s in seconds.items()}
    )


def check_means(distiller: Distiller, batch: Mapping[str, Any], accumulate: int, processes: int) -> None:
    """Raise ``ValueError`` if a loss doubles with every sample given twice: it is a sum, which micro-batches divide.

    A batch that cannot be repeated, since it holds more than tensors and lists with one entry per sample, passes.
    """
    size = next((len(v) for v in distiller.model_inputs(batch).values() if isinstance(v, Tensor) and v.ndim), 0)
    half = max(1, size // 2)
    try:
        with modes_kept(distiller), preserve_state(distiller), torch.no_grad():
            distiller.eval()
            once, twice = (_values(distiller(_repeated(batch, size, half, times))) for times in (1, 2))
    except (RuntimeError, ValueError, TypeError, LookupError):
        return
    sums = [name for name, value in once.items() if value and abs(twice[name] - 2 * value) <= 0.02 * abs(2 * value)]
    if sums:
        named = ["the task loss" if name == "task" else f"term {name!r}" for name in sums]
        raise ValueError(
            f"{shortened(named)} adds up samples instead of averaging over them. Gradients are averaged over "
            f"accumulate={accumulate} micro-batches and {processes} processes, so its weight would depend on their "
            "number: use reduction='mean', or divide by the number of samples"
        )


def _values(output: DistillOutput) -> dict[str, float]:
    return {name: float(value) for name, value in {"task": output.task, **output.terms}.items()}


def _repeated(batch: Mapping[str, Any], size: int, count: int, times: int) -> dict[str, Any]:
    """Return the first ``count`` samples of a batch of ``size``, each ``times`` times."""

    def repeat(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.cat([value[:count]] * times) if value.ndim and len(value) == size else value
        return value[:count] * times if isinstance(value, list | tuple) and len(value) == size else value

    return {key: repeat(value) for key, value in batch.items()}


def _seconds(distiller: Distiller, batch: Mapping[str, Any], device: torch.device) -> dict[str, float]:
    """Return the seconds of a micro-batch by part; the checks have warmed everything up."""
    timer = StepTimer(device)
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    before, distiller.timer = distiller.timer, timer.part
    try:
        with preserve_state(distiller), torch.enable_grad():
            loss = distiller(batch).loss
            with timer.part("backward"):
                torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        distiller.timer = before
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = timer.read()
    names = ("student", "teacher", "losses", "backward")
    return {name: seconds[name] for name in names if name != "teacher" or distiller.teacher is not None}


def _memory(distiller: Distiller, activations: int, device: torch.device) -> dict[str, int | None]:
    trained = sum(p.nbytes for p in distiller.parameters() if p.requires_grad)
    student, teacher = _bytes(distiller.student), _bytes(distiller.teacher)
    return {
        "student": student,
        "aligners": _bytes(distiller) - student,
        "teacher": teacher,
        "gradients": trained,
        "optimizer": 2 * trained,  # AdamW's two moments
        "activations": activations,
        "peak": peak_memory(device),
    }


def _bytes(module: nn.Module | None) -> int:
    return 0 if module is None else sum(t.nbytes for t in [*module.parameters(), *module.buffers()])


class _Saved:
    """Count the bytes that a forward keeps for its backward, without the parameters."""

    def __init__(self, distiller: Distiller) -> None:
        models = [model for model in (distiller, distiller.teacher) if model is not None]
        self._weights = {_storage(t)[0] for model in models for t in [*model.parameters(), *model.buffers()]}
        self._found: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(self._found.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        address, size = _storage(tensor)
        if address not in self._weights:
            self._found[address] = size
        return tensor

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Return address and bytes of a tensor's storage, or those of the tensor if it has none."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):  # sparse, for example
        return id(tensor), tensor.nbytes
