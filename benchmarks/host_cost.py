"""Measure the time that the host spends in a call of each loss, without a GPU.

    python -m benchmarks.host_cost --out benchmarks/results/host_cost.json --write docs/benchmarks.md

On a GPU, kernels of small inputs finish before the host has launched the next one, so that this time is the time of the
call. Everything that Python, torch and Triton do runs here, on tensors of a few thousand elements; kernels do not:

- triton: Triton's driver is replaced (benchmarks/aot/record.py); its launch code runs up to the call of the driver.
- cuda: the CUDA kernels built for the host (tests/helpers/emulation.py), which record a launch instead of running it.
- cpu: the C++ kernels run, on inputs of at most 512 elements.

Times are CPU seconds of the calling thread, medians of rounds in which all parts take turns. ``launch`` is the
difference between calls with Triton's launch code and with nothing in its place. ``torch`` is the time of what torch
alone would do: the call's operators of torch, called again with the same arguments, and an autograd function with the
same inputs and its backward, whose operators have the schemas and arguments of fastkd's and compute nothing. ``fastkd``
is the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import measure, providers, workloads
from benchmarks.table import write_between
from fastkd._console import plain_characters
from fastkd.ops.launch import native

BACKENDS = ("triton", "cuda", "cpu")
MODES = {"forward": "forward", "both": "forward + backward"}
TINY = {"pixel_word": (1, 16, 4, 8), "attention_kl": (1, 1, 8, 8, 8)}
"""Shapes on which the C++ kernels take next to no time; other families take (1, 8, 4, 4)."""

BEGIN, END = "<!-- host cost: begin (written by benchmarks/host_cost.py) -->", "<!-- host cost: end -->"
_HELPERS = Path(__file__).parents[1] / "tests" / "helpers"

Step = Callable[[], Any]
Row = dict[str, Any]


def measured(backend: str) -> list[workloads.Workload]:
    """Return one small workload per loss that the backend computes."""
    if backend == "cpu":
        first = {one.loss: one for family in workloads.CPU_WORKLOADS.values() for one in family if not one.maps}
        tiny = [replace(one, shape=TINY.get(one.family, (1, 8, 4, 4))) for one in first.values()]
        return [replace(one, distance="kl" if one.distance else "", teacher_width=None) for one in tiny]
    small = [one for family in workloads.GPU_WORKLOADS.values() for one in family if one.small]
    return [replace(one, dtype=torch.bfloat16) for one in small]


@contextmanager
def stand_in(backend: str) -> Iterator[None]:
    """Let the backend take CPU tensors, and its launches do nothing."""
    with ExitStack() as stack:
        if backend != "cpu":  # the default is a share of a GPU's memory
            limit = {"FASTKD_WORKSPACE_MIB": str(measure_limit())}
            stack.enter_context(mock.patch.dict(os.environ, limit))
        if backend == "triton":
            from triton.runtime.jit import JITFunction

            from benchmarks.aot.record import recorded

            run = JITFunction.run
            stack.enter_context(recorded())

            def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
                return run(self, *args, grid=grid, warmup=True, **options)  # everything except the driver's launch

            stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        if backend == "cuda":
            sys.path.append(str(_HELPERS))
            from emulation import emulated

            module = stack.enter_context(emulated())
            providers.unavailable_reason("cuda", "relation", "cpu")  # the self-tests run the kernels
            for workload in measured(backend):
                providers.unavailable_reason("cuda", workload.family, "cpu")
            stack.callback(module.record_launches, False)
            module.record_launches(True)
        yield


def measure_limit() -> float:
    """Return the MiB of workspace of a GPU with enough memory for the largest default."""
    from fastkd.ops.launch import MAX_GPU_WORKSPACE_MIB

    return MAX_GPU_WORKSPACE_MIB


@contextmanager
def without_triton() -> Iterator[None]:
    """Replace Triton's launch code by nothing."""
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Do nothing."""

    with mock.patch.object(JITFunction, "run", run):
        yield


class Operators(TorchDispatchMode):
    """Records the operators that run, in order, with their arguments: torch's and fastkd's, also inside others."""

    def __init__(self) -> None:
        super().__init__()
        self.of_torch: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self.of_fastkd: list[tuple[Any, tuple[Any, ...], Any]] = []  # with their results

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        if function.namespace == "fastkd":
            self.of_fastkd.append((function, args, result))
        else:
            self.of_torch.append((function, args, kwargs or {}))
        return result


def operators_of(step: Step) -> Operators:
    """Return the operators that run in a step."""
    with Operators() as mode:
        step()
    return mode


def python_calls_of(step: Step) -> int:
    """Return the number of calls of fastkd's own Python functions in a step."""
    count = 0

    def counting(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_globals.get("__name__", "").startswith("fastkd.")

    sys.setprofile(counting)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


class _Nothing(torch.autograd.Function):
    """Calls operators that compute nothing and returns given results, so that only torch's own work takes time."""

    @staticmethod
    def forward(
        ctx: Any, operators: list[Step], result: Tensor, grads: tuple[Tensor | None, ...], *inputs: Tensor
    ) -> Tensor:
        operators[0]()
        ctx.save_for_backward(*inputs)
        ctx.operators, ctx.grads = operators, grads
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018 - reading them takes time
        for operator in ctx.operators[1:]:
            operator()
        return (None, None, None, *ctx.grads)


_nothing = torch.library.Library("fastkd_nothing", "DEF")
_results: dict[str, Any] = {}


def without_content(function: Any, args: tuple[Any, ...], result: Any) -> Step:
    """Return a call, with these arguments, of an operator of the same schema that returns ``result``."""
    name, schema = function._schema.name.rpartition("::")[2], str(function._schema)
    if name not in _results:
        _nothing.define(name + schema[schema.index("(") :])
        _nothing.impl(name, lambda *_: _results[name], "CPU")
    _results[name] = result
    operator = getattr(torch.ops.fastkd_nothing, name).default
    return lambda: operator(*args)


def torch_alone(step: Step, mode: str, inputs: tuple[Tensor, ...]) -> Step:
    """Return what torch alone does in a step: its operators, the dispatch of fastkd's, and with a backward autograd."""
    calls = operators_of(step)
    operators = [without_content(*call) for call in calls.of_fastkd]  # the forward's, then the backward's, if any
    grads = tuple(torch.empty_like(x) if x.requires_grad else None for x in inputs)
    leaves = [x for x in inputs if x.requires_grad]
    loss, one = torch.zeros(()), torch.ones(())

    def again() -> None:
        with torch.no_grad():
            for function, args, kwargs in calls.of_torch:
                function(*args, **kwargs)
            if mode != "both":
                operators[0]()
        if mode == "both":
            torch.autograd.grad(_Nothing.apply(operators, loss, grads, *inputs), leaves, one)

    return again


def microseconds(step: Step, calls: int) -> float:
    """Return the CPU time of this thread per call."""
    begin = time.thread_time()
    for _ in range(calls):
        step()
    return (time.thread_time() - begin) / calls * 1e6


def counts(backend: str, workload: workloads.Workload, mode: str) -> dict[str, int]:
    """Return the numbers of torch's operators and of fastkd's Python functions in a call, which no load changes."""
    step = providers.make_step(workload, backend, mode, workload.inputs("cpu"))
    step()  # plans are made at the first call
    return {"torch_operators": len(operators_of(step).of_torch), "python_calls": python_calls_of(step)}


def host_cost(backend: str, workload: workloads.Workload, mode: str, rounds: int, calls: int) -> Row:
    """Return one row: microseconds per call, in all and by part. Needs :func:`stand_in` of the backend."""
    inputs = workload.inputs("cpu")
    step = providers.make_step(workload, backend, mode, inputs)
    step()
    alone = torch_alone(step, mode, inputs)
    parts: dict[str, list[float]] = {"call": [], "torch": [], "without launches": []}
    hidden = without_triton if backend == "triton" else nullcontext
    for repeat in range(rounds + 1):
        found = {"call": microseconds(step, calls), "torch": microseconds(alone, calls)}
        with hidden():
            found["without launches"] = microseconds(step, calls)
        if backend == "cuda":
            native("cuda").record_launches(True)  # forget the launches so far
        if repeat:  # the first is the warm-up
            for name, value in found.items():
                parts[name].append(value)
    total, torch_time, rest = (statistics.median(parts[name]) for name in ("call", "torch", "without launches"))
    row = {"work": workload.name, "loss": workload.loss, "mode": mode, "provider": backend}
    launch = round(total - rest, 1) if backend == "triton" else None
    ours = rest if backend == "triton" else total
    return row | {
        "us": round(total, 1),
        "launch_us": launch,
        "torch_us": round(torch_time, 1),
        "fastkd_us": round(ours - torch_time, 1),
        **counts(backend, workload, mode),
    }


def table(content: dict[str, Any]) -> str:
    """Return the rows as a Markdown table, with the conditions of the measurement."""
    lines = ["| loss | backend | pass | call | Triton's launches | torch | fastkd |", "|---|---|---|---|---|---|---|"]
    for row in content["rows"]:
        launch = "–" if row["launch_us"] is None else f"{row['launch_us']:.0f}"
        times = [f"{row['us']:.0f}", launch, f"{row['torch_us']:.0f}", f"{row['fastkd_us']:.0f}"]
        lines.append("| " + " | ".join([f"`{row['loss']}`", f"`{row['provider']}`", MODES[row["mode"]], *times]) + " |")
    env = content["environment"]
    versions = f"torch {env['torch']}, Triton {env['triton']}, Python {env['python']}"
    return "\n".join([*lines, "", f"{env['cpu']}, {versions}, {env['date'][:10]}."])


@plain_characters()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default=",".join(BACKENDS), help="some of %(default)s")
    parser.add_argument("--match", default="", help="only workloads whose name contains this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=100, help="calls per round")
    parser.add_argument("--out", type=Path, help="results file to write")
    parser.add_argument("--write", type=Path, help="page that holds the table between its markers; needs --out")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for backend in args.backends.split(","):
        with stand_in(backend):
            for workload in measured(backend):
                for mode in MODES if args.match in workload.name else ():
                    rows.append(host_cost(backend, workload, mode, args.rounds, args.calls))
                    print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        measure.write_results(args.out, measure.environment("cpu"), rows)
        if args.write is not None:
            write_between(args.write, BEGIN, END, table(json.loads(args.out.read_text("utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
