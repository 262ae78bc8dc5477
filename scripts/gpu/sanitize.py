"""Call the CUDA kernels forward and backward under compute-sanitizer, without a test runner.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --kernel-name kernel_substring=fastkd \\
        --error-exitcode 9 python -P scripts/gpu/sanitize.py OUT.jsonl

and the same with ``--tool racecheck``. Without torch's cache each tensor is a separate allocation, so an out-of-bounds
access is an error. Inputs are created on the CPU and copied; results are not compared. Each finished case is appended
to OUT.jsonl at once. Cases that passed under the same --id are skipped. The tool reports its findings in its output
and exit status, so start a new file after a finding.

    sanitize.py OUT.jsonl [--id TEXT] [--only SUBSTRING] [--seconds N] [--device cuda]
    sanitize.py --list

Exit status: 0 all cases finished, 1 one failed or the time ran out, 2 usage error.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests" / "helpers")]  # python -P adds neither

import records  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from fastkd.ops import dispatch  # noqa: E402
from fastkd.ops.pixel_word import pixel_word, pixel_word_from_logits  # noqa: E402
from fastkd.ops.relation import relation  # noqa: E402
from fastkd.ops.softmax_kl import softmax_kl  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    """One call: shapes of the student's inputs followed by the teacher's, and options."""

    name: str
    function: Callable[..., Any]
    shapes: Sequence[tuple[int, ...]]
    dtype: torch.dtype
    options: dict[str, Any]
    maps: bool = False  # inputs are (B, K, R) in memory
    masked: bool = False
    workspace_mib: float | None = None

    @property
    def family(self) -> str:
        return self.name.split()[0]


def _rows(name: str, dtype: torch.dtype, *shape: int) -> Case:
    return Case(f"softmax_kl {name}", softmax_kl, [shape] * 2, dtype, {"temperature": 2.0})


def _relation(
    name: str, dtype: torch.dtype, batch: int, count: int, *widths: int, maps: bool = False,
    workspace_mib: float | None = None, **options: Any,
) -> Case:  # fmt: skip
    shapes = [(batch, count, widths[0]), (batch, count, widths[-1])]
    return Case(f"relation {name}", relation, shapes, dtype, options, maps=maps, workspace_mib=workspace_mib)


def _words(
    name: str, dtype: torch.dtype, b: int, n: int, t: int, *widths: int, maps: bool = False, masked: bool = False,
    **options: Any,
) -> Case:  # fmt: skip
    shapes = [shape for d in (widths[0], widths[-1]) for shape in ((b, n, d), (b, t, d))]
    return Case(f"pixel_word {name}", pixel_word, shapes, dtype, options, maps=maps, masked=masked)


CASES = [
    _rows("bf16 short rows of odd width", BF16, 2, 37, 49),
    _rows("bf16 long rows", BF16, 2, 5, 8193),
    _rows("fp16 long rows of odd width", FP16, 3, 7, 2085),
    _rows("fp32 rows of odd width", FP32, 2, 11, 417),
    _relation("fp32 tiles of 64 x 64", FP32, 2, 150, 24),
    _relation("fp32 stored tiles", FP32, 2, 100, 40, keep=True),
    _relation("fp32 bands of the backward", FP32, 1, 700, 24, workspace_mib=1.0),
    _relation("fp32 across samples", FP32, 3, 71, 35, cross=True),
    _relation("fp32 maxima", FP32, 2, 71, 35, temperature=0.03),
    _relation("bf16 odd width", BF16, 2, 71, 35, distance="row_cosine"),
    _relation("fp16 odd width", FP16, 2, 71, 35, 21, distance="mse", similarity="dot"),
    _relation("bf16 bands of both", BF16, 1, 1400, 24, workspace_mib=0.3),
    _relation("fp16 bands of the backward, maps", FP16, 1, 700, 24, maps=True, workspace_mib=0.75),
    # 88 × 3 tiles are 264, the minimum number for tiles of 128 × 128.
    _relation("bf16 tiles of 128 x 128", BF16, 88, 150, 16),
    _relation("bf16 stored tiles of 128 x 128, maps", BF16, 264, 72, 16, 24, maps=True, keep=True),
    _relation("fp16 tiles of 128 x 128", FP16, 264, 72, 16, distance="mse"),
    _words("bf16 20 words", BF16, 2, 225, 20, 64),
    _words("bf16 70 words", BF16, 2, 131, 70, 40),
    _words("bf16 128 words of maps", BF16, 2, 196, 128, 32, 48, maps=True),
    _words("fp16 40 words, odd width", FP16, 3, 131, 40, 33, 7),
    _words("fp32 40 words", FP32, 2, 131, 40, 24),
    _words("fp32 cosine of maps, masked", FP32, 2, 131, 13, 9, maps=True, masked=True, similarity="cosine"),
    _words("bf16 many pixels", BF16, 1, 20011, 20, 16),
    Case("pixel_word fp16 logits of 100 words", pixel_word_from_logits, [(2, 131, 100)] * 2, FP16, {}),
]


def call(case: Case, device: str) -> dict[str, Any]:
    """Run a case and return its row: "ok", and "error" if that is False."""
    generator = torch.Generator().manual_seed(0)
    student_inputs = len(case.shapes) // 2
    inputs = []
    for i, (b, n, d) in enumerate(case.shapes):
        maps = case.maps and (case.family == "relation" or i % 2 == 0)  # words are never maps
        drawn = torch.randn((b, d, n) if maps else (b, n, d), generator=generator).to(case.dtype).to(device)
        inputs.append((drawn.mT if maps else drawn).requires_grad_(i < student_inputs))
    masks = {}
    if case.masked:
        (b, n, _), (_, t, _) = case.shapes[:2]
        words, pixels = (torch.arange(b * k).reshape(b, k) % 4 != 0 for k in (t, n))
        words, pixels = words.to(device), pixels.to(device)
        masks = {"student_word_mask": words, "teacher_word_mask": words, "pixel_mask": pixels}
    limit = {} if case.workspace_mib is None else {"FASTKD_WORKSPACE_MIB": str(case.workspace_mib)}
    with mock.patch.dict(os.environ, limit):
        losses = case.function(*inputs, **case.options, **masks, backend="cuda")
        losses = list(losses.values()) if isinstance(losses, dict) else [losses]
        weights = [(torch.rand(x.shape, generator=generator) + 0.25).to(device) for x in losses]
        results: list[Tensor] = [*losses, *torch.autograd.grad(losses, inputs[:student_inputs], weights)]
    wrong = [i for i, x in enumerate(results) if not x.detach().cpu().isfinite().all()]  # .cpu() waits for the kernels
    return {"ok": not wrong} | ({"error": f"not finite: results {wrong}"} if wrong else {})


def main(arguments: list[str] | None = None) -> int:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT.jsonl")
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="run only cases whose name contains it")
    parser.add_argument(
        "--id", default="", help="build under test, such as a commit; rows with another id are not reused"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this time")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if options.only in case.name]
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    if options.out is None:
        parser.error("missing argument OUT.jsonl")
    if not cases:
        parser.error(f"--only: no case name contains {options.only!r}; --list prints the names")

    passed = {row.get("case") for row in records.read(options.out) if row.get("ok") and row.get("id") == options.id}
    cases = [case for case in cases if case.name not in passed]
    with ExitStack() as stack:
        device = options.device
        if device == "cpu":
            from emulation import emulated

            stack.enter_context(emulated())
        else:
            device = f"cuda:{torch.cuda.current_device()}"
        for family in {case.family for case in cases}:  # skip the self-test
            dispatch._reasons[("cuda", family, device)] = None
        for case in cases:
            start = time.monotonic()
            if start - begin > options.seconds:
                print(f"no time left for {case.name} and later cases")
                return 1
            try:
                row = call(case, device)
            except Exception as error:  # such as an illegal access, after which nothing runs
                row = {"ok": False, "error": f"{type(error).__name__}: {error}"[:4000]}
            row = {"case": case.name} | row | {"seconds": round(time.monotonic() - start, 2), "id": options.id}
            records.append(options.out, row)
            print(f"{case.name}: {'finished' if row['ok'] else 'FAILED: ' + row['error']}", flush=True)
            if not row["ok"]:
                return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
