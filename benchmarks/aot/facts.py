"""Tables of compile-time facts: one row per kernel, block shape, dtype and chip, with a digest of the code."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.aot.cases import Case, recorded_cases
from benchmarks.aot.compiler import (
    SHARED_LIMIT,
    compile_case,
    logarithms_of_approximate_quotients,
    resources,
    sums_in_tensor_cores,
)
from benchmarks.aot.digest import digest
from fastkd._atomic import replace_files

RESULTS = Path(__file__).parents[1] / "results" / "triton"
"""Folder of the committed tables: one VERSION.json per version of Triton, written by ``benchmarks.aot.versions``."""

FAMILIES = ("softmax_kl", "relation", "pixel_word")
FACTS = (
    *("registers", "stack", "shared", "local", "spills", "matrix_instructions", "loads_of_16_bits"),
    *("shared_limit", "ok"),
)

SAMPLED = ("softmax_kl.forward", "relation.tiles", "relation.derivative", "relation.product", "pixel_word.logits")
"""Kernels of a sample: those with matrix products, and one of each other family."""

Entry = tuple[str, int, int, Case]
"""(dtype, index of the case among its chip's, target, case)."""


def identity(case: Case, target: int) -> dict[str, Any]:
    """Return the columns that identify a row: kernel, dtype, constants, warps, chip and code digest."""
    named = {n: value for n, value in case.constants.items() if n.isupper() and isinstance(value, int | str)}
    source = digest(case.load(), case.signature, case.constants, case.aligned, case.options)
    chip = {"target": f"sm_{target}", "source": source}
    return {"kernel": case.kernel, "dtype": case.dtype, **named, "warps": case.options["num_warps"], **chip}


def key(row: dict[str, Any]) -> str:
    """Return the identity of a row, without its facts, as a string."""
    return json.dumps({name: value for name, value in row.items() if name not in FACTS})


def block_label(constants: dict[str, Any]) -> str:
    """Return a short label of a block shape, such as ``128x64x64s``.

    After the sizes, ``+`` marks a kernel that loops and another ``+`` rows split across programs, ``s`` stored tiles,
    and ``'`` rows as the inner dimension.
    """
    sizes = [str(constants[size]) for size in SIZES if size in constants]
    return "x".join(sizes) + "".join(mark for name, mark in MARKS.items() if constants.get(name) is True)


SIZES = ("ROWS", "COLS", "PARTS", "BLOCK", "WIDTH", "DEPTH", "BN", "TP", "BD", "SLAB")
MARKS = {"LOOP": "+", "SPLIT": "+", "STORE": "s", "STORED": "s", "STUDENT_ROWS_INNER": "'"}


def select(family: str, targets: tuple[int, ...], dtypes: tuple[str, ...], match: str = "") -> Iterator[Entry]:
    """Yield the cases of a family once per chip."""
    for target in targets:
        for i, case in enumerate(recorded_cases(target)):
            label = f"{case.kernel} {block_label(case.constants)}"
            if case.family == family and case.dtype in dtypes and re.search(match, label):
                yield case.dtype, i, target, case


def sample(entries: list[Entry]) -> list[Entry]:
    """Return one block shape per sampled kernel, in the middle of bf16 cases that multiply, if any; chips alternate."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry[3].kernel in SAMPLED:
            groups.setdefault(entry[3].kernel, []).append(entry)
    chips = itertools.cycle(sorted({entry[2] for entry in entries}))
    chosen = []
    for group, chip in zip(groups.values(), chips, strict=False):
        group = [entry for entry in group if entry[2] == chip] or group
        preferred = [e for e in group if e[0] == "bf16" and not e[3].constants.get("STORED")] or group
        chosen.append(preferred[len(preferred) // 2])
    return chosen


def compile_row(case: Case, target: int) -> dict[str, Any]:
    """Compile one case for one chip and return its row."""
    compiled = compile_case(case, target)
    row = identity(case, target) | resources(compiled.asm["cubin"])
    row["shared"] = max(row["shared"], compiled.metadata.shared)
    row["shared_limit"] = SHARED_LIMIT[target]
    inexact = logarithms_of_approximate_quotients(compiled.asm["ptx"]) + sums_in_tensor_cores(compiled.asm["ttgir"])
    row["ok"] = row["local"] == row["spills"] == inexact == 0 and row["shared"] <= row["shared_limit"]
    return row


def rows(entries: list[Entry], known: dict[str, dict[str, Any]], jobs: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield one row per entry, taken from ``known`` or else compiled by ``jobs`` worker processes."""
    keys = [key(identity(case, target)) for _, _, target, case in entries]
    missing = [(case, target) for (_, _, target, case), k in zip(entries, keys, strict=True) if k not in known]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = pool.map(compile_row, *zip(*missing, strict=True)) if missing else iter(())
        for k in keys:
            yield known[k] if k in known else next(compiled)


def known_rows(file: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a table by key, or none if it was written with another version of Triton."""
    table = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if table.get("environment", {}).get("triton") != version("triton"):
        return {}
    return {key(row): row for row in table["rows"]}


def write_table(file: Path, environment: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """Write a table with one row per line, and the compiler versions that produced it."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = f'{{"environment": {json.dumps(environment)}, "rows": [\n{lines}\n]}}\n'
    with replace_files(file) as (partial,):
        partial.write_text(text, encoding="utf-8")
