"""Checks of first light: every family on every GPU backend and dtype, at one size per regime of the kernels.

A check runs a loss forward and backward on poisoned memory, compares with fp64, runs it again, and once in a CUDA
graph. Losses, oracle and tolerances come from the contract suite (tests/helpers). Sizes share Triton compilations:
"small" and "odd width" have one layout and one block shape; the others are maps in large blocks.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from contract_cases import BASIC
from contract_errors import Output, compare_with_fp64
from contract_problems import Case, Problem, Shapes, Size
from contract_tools import assert_same, poisoned, quick_interpreter, threads
from torch import Tensor

from fastkd import losses
from fastkd.ops import dispatch

BACKENDS = ("cuda", "triton")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = ("small", "odd width", "maps", "bands", "128-tile")
"""Sizes, the cheapest first."""


class Regime(NamedTuple):
    """Inputs that select one code path of the kernels."""

    case: Case
    size: Size
    bands: bool = False  # minimum workspace: a launch covers some rows of a problem
    channels_last: bool = False  # memory format of maps


def _case(family: str, loss: Any, shapes: Shapes | None = None) -> Case:
    """Return the family's basic case with another loss or other inputs."""
    return replace(BASIC[family], loss=loss, shapes=shapes or BASIC[family].shapes)


def _pixels_as_maps(b: int, h: int, w: int, t: int, d_s: int, d_t: int) -> list[tuple[int, ...]]:
    return [(b, d_s, h, w), (b, t, d_s), (b, d_t, h, w), (b, t, d_t)]


def _maps_of_two_widths(b: int, c_s: int, c_t: int, h: int, w: int) -> list[tuple[int, ...]]:
    return [(b, c_s, h, w), (b, c_t, h, w)]


_CHANNELS = _case("relation", losses.channel_kd)
_PIXELS = _case("relation", losses.pixel_relation_kd, _maps_of_two_widths)
_WORDS = _case("pixel_word", losses.cross_modal_kd)
_WORDS_OF_MAPS = _case("pixel_word", losses.cross_modal_kd, _pixels_as_maps)
_ROWS = _case("softmax_kl", losses.channel_distribution_kd)

REGIMES: dict[str, dict[str, Regime]] = {
    "softmax_kl": {
        "small": Regime(_ROWS, (2, 3, 3, 7)),
        "odd width": Regime(_ROWS, (2, 37, 7, 7)),
        "maps": Regime(_case("softmax_kl", losses.logit_kd), (2, 19, 12, 10), channels_last=True),
        "bands": Regime(_ROWS, (2, 3, 131, 201)),  # 6 programs share each row of 26331
        "128-tile": Regime(_ROWS, (3, 200, 51, 61)),  # long rows, one program or thread block each
    },
    # The kernels use 128 × 128 tiles if there are at least 264: 88 × 240 rows have 264 of them, 18 × 624 have 270 and
    # 3880 have 496. With that many rows the forward's sums exceed a row block of the backward: both run in bands.
    "relation": {
        "small": Regime(_CHANNELS, (2, 5, 3, 3, 3, 3)),
        "odd width": Regime(_CHANNELS, (2, 71, 5, 7, 3, 5)),
        "maps": Regime(_PIXELS, (18, 32, 48, 24, 26)),
        "bands": Regime(_PIXELS, (1, 32, 32, 40, 97), bands=True),
        "128-tile": Regime(_PIXELS, (88, 32, 32, 15, 16)),
    },
    "pixel_word": {
        "small": Regime(_WORDS, (2, 37, 5, 3, 7)),
        "odd width": Regime(_WORDS, (3, 131, 15, 33, 7)),
        "maps": Regime(_WORDS_OF_MAPS, (2, 18, 22, 72, 40, 24)),
        "bands": Regime(_WORDS, (2, 4101, 13, 9, 9)),  # 64 programs share the pixels
        "128-tile": Regime(_WORDS_OF_MAPS, (2, 30, 30, 128, 40, 40)),
    },
}


@dataclass(frozen=True)
class Check:
    """One loss at one size and dtype on one backend; without a size, the self-test of the backend."""

    family: str
    backend: str
    dtype: str = ""
    size: str = ""

    @property
    def name(self) -> str:
        return " ".join([self.family, self.backend, *([self.dtype, self.size] if self.size else ["self-test"])])

    def problem(self, device: str) -> Problem:
        regime = REGIMES[self.family][self.size]
        problem = regime.case.problem_of(regime.size, dtype=DTYPES[self.dtype], device=device)
        if regime.channels_last:
            problem = problem.mapped(lambda x: x.contiguous(memory_format=torch.channels_last))
        return problem

    @contextmanager
    def environment(self, problem: Problem) -> Iterator[None]:
        """Set the workspace limit of the regime."""
        setting = {}
        if REGIMES[self.family][self.size].bands:
            setting["FASTKD_WORKSPACE_MIB"] = least_workspace(problem, self.backend)
        with mock.patch.dict(os.environ, setting):
            yield


def least_workspace(problem: Problem, backend: str) -> str:
    """Return the minimum workspace in MiB, from the error that a smaller limit raises."""
    with mock.patch.dict(os.environ, {"FASTKD_WORKSPACE_MIB": "0.0001"}):
        try:
            problem.loss(backend)
        except ValueError as error:
            found = re.search(r"set it to at least ([\d.]+\d)", str(error))
            if found:
                return found[1]
            raise
    raise AssertionError("a workspace of 0.0001 MiB was enough")


def checks(
    families: Sequence[str] = tuple(REGIMES),
    backends: Sequence[str] = BACKENDS,
    dtypes: Sequence[str] = tuple(DTYPES),
    sizes: Sequence[str] = SIZES,
) -> list[Check]:
    """Return the checks in the order in which a single process would run them."""
    return [
        check
        for backend in backends
        for family in families
        for check in (
            Check(family, backend),
            *(Check(family, backend, dtype, size) for size in SIZES if size in sizes for dtype in dtypes),
        )
    ]


def run(check: Check, device: str) -> dict[str, Any]:
    """Run a check and return its row: "ok", and "error" if that is False."""
    with ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(_stand_in(check.backend))
        if not check.size:
            reason = dispatch.BACKENDS[check.backend].device_type_reason(torch.device(device).type)
            reason = reason or dispatch.unavailable_reason(check.backend, check.family, _indexed(device))
            return {"ok": reason is None} | ({} if reason is None else {"error": reason})
        # Skip the self-test: one wrong kernel must not hide the others.
        dispatch._reasons[(check.backend, check.family, str(_indexed(device)))] = None
        problem = check.problem(device)
        stack.enter_context(check.environment(problem))
        return _run(check, problem, device)


def _run(check: Check, problem: Problem, device: str) -> dict[str, Any]:
    weight = problem.weight()
    with poisoned(math.nan):
        got = problem.run(check.backend, weight)
    outputs = compare_with_fp64(problem, check.backend, got, weight)
    worst = max(outputs, key=lambda x: x.error / x.allowed)
    row: dict[str, Any] = {
        "worst": worst.name,
        "error_vs_fp64": _number(worst.error),
        "allowed": _number(worst.allowed),
    }
    wrong = [_mismatch(x, value) for x, value in zip(outputs, got, strict=True) if not x.error <= x.allowed]
    wrong += _differences("a second run", problem.run(check.backend, weight), got)
    if device == "cpu":
        row["graph"] = "not captured: no GPU"
    else:
        try:
            wrong += _differences("the replay of a CUDA graph", _replayed(problem, check.backend, weight), got)
            row["graph"] = "captured"
        except Exception as error:
            wrong.append(f"in a CUDA graph: {type(error).__name__}: {error}")
            row["graph"] = "failed"
    return row | {"ok": not wrong} | ({"error": "; ".join(wrong)} if wrong else {})


def unusable(device: str) -> bool:
    """Return whether an error, such as an illegal access, has made the GPU unusable in this process."""
    if device == "cpu":
        return False
    try:
        torch.zeros(1, device=device).add_(1).item()
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _replayed(problem: Problem, backend: str, weight: Tensor) -> list[Tensor]:
    """Return losses and gradients of a CUDA graph of both passes, replayed into memory filled with NaN."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    torch.cuda.synchronize()
    try:
        with poisoned(math.nan), torch.cuda.graph(graph):
            got = problem.run(backend, weight)
    finally:  # a failed capture leaves its own stream current
        torch.cuda.set_stream(stream)
    for x in got:
        x.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    return got


def _mismatch(output: Output, got: Tensor) -> str:
    """Describe the largest error of an output."""
    got = got.detach().cpu().double()
    errors = (got - output.exact).abs().nan_to_num(math.inf)
    index = tuple(int(i) for i in torch.unravel_index(errors.argmax(), errors.shape))
    count = int((errors > output.allowed).sum())
    return (
        f"{output.name}: off by {output.error:.3g}, allowed {output.allowed:.3g}, in {count} of {errors.numel()} "
        f"entries, most at {index} of {tuple(errors.shape)}: {got[index]:.9g} for {output.exact[index]:.9g}"
    )


def _differences(name: str, got: Sequence[Tensor], want: Sequence[Tensor]) -> list[str]:
    try:
        assert_same(list(got), list(want))
    except AssertionError as error:
        return [f"{name} gave different bits: {' '.join(str(error).split())}"]
    return []


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _indexed(device: str) -> torch.device:
    """Return ``device`` with the index of the current device."""
    found = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found


@contextmanager
def _stand_in(backend: str) -> Iterator[None]:
    """Let kernels run on CPU tensors: CUDA kernels built for the host, or Triton's interpreter."""
    with ExitStack() as stack:
        stack.enter_context(threads(1))
        if backend == "cuda":
            from emulation import emulated

            stack.enter_context(emulated())
        else:
            stack.enter_context(quick_interpreter())
        yield
