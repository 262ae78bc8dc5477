"""The figures as text: fastkd's kernels against their targets, or every row."""

from __future__ import annotations

from typing import Any

from benchmarks import workloads

Row = dict[str, Any]
OTHERS = ("eager_nn", "eager", "compile", "compile_max", "reference")


def against_targets(todo: list[workloads.Work], rows: list[Row]) -> str:
    """One line per work and kernel of fastkd, forward and backward, in the mode that its targets are about.

    ``!`` marks what misses its target, next to the ratio that a kernel exactly at the work's limit would have.
    """
    head = ["work", "kernel", "ms", "x eager", "x compile", "x eager NxN", "extra memory", "of limit", "error"]
    tuned = any(r["provider"] == "compile_max" for r in rows)
    head[4:5] = ["x compile", "x autotuned"] if tuned else ["x compile"]
    lines = [head]
    for work in todo:
        mine = of_one_run([r for r in rows if r["work"] == work.name and r["mode"] == work.judged])
        for name, row in mine.items():
            if name in OTHERS:
                continue
            if not row["ok"]:
                lines.append([work.name, name, f"not measured: {row['note']}"])
                continue
            target = work.target
            lines.append(
                [
                    work.name,
                    name,
                    f"{row['ms']['median']:.2f}",
                    _ratio(row, mine.get("eager"), target.eager),
                    _ratio(row, mine.get("compile"), target.compile),
                    *([_ratio(row, mine.get("compile_max"), target.compile)] if tuned else []),
                    _ratio(row, mine.get("eager_nn"), target.eager_nn),
                    _memory(work, row, mine.get("eager")),
                    _share(row, target),
                    f"{row['error_vs_fp64']:.1e}",
                ]
            )
    return _aligned(lines)


def of_one_run(rows: list[Row]) -> dict[str, Row]:
    """Return the rows by provider, with the times of later sweeps scaled to the first one.

    A later sweep measures eager again, in turn with its other providers: their times are multiplied by the ratio of
    eager's times in the first sweep and in theirs.
    """
    eager = {r.get("sweep", "own"): r for r in rows if r["provider"] == "eager" and r["ok"]}
    found: dict[str, Row] = {}
    for row in sorted(rows, key=lambda r: workloads.SWEEPS.index(r.get("sweep", "own"))):
        sweep = row.get("sweep", "own")
        if row["provider"] in found:
            continue
        if sweep != "own" and row["ok"] and {"own", sweep} <= eager.keys():
            scale = eager["own"]["ms"]["median"] / eager[sweep]["ms"]["median"]
            row = row | {"ms": {key: scale * ms for key, ms in row["ms"].items()}}
        found[row["provider"]] = row
    return found


def every_row(rows: list[Row]) -> str:
    lines = [["work", "mode", "provider", "ms", "extra MiB", "resident MiB", "of limit", "error"]]
    for r in rows:
        name = [r["work"], r["mode"], r["provider"]]
        if not r["ok"]:
            lines.append([*name, f"not measured: {r['note']}"])
            continue
        sizes = [r["peak_extra_bytes"], r["peak_resident_bytes"]]
        share = "-" if r["share_of_limit"] is None else f"{r['share_of_limit']:.0%}"
        lines.append([*name, f"{r['ms']['median']:.3f}", *map(_mebibytes, sizes), share, f"{r['error_vs_fp64']:.1e}"])
    return _aligned(lines)


def _share(row: Row, target: workloads.Target) -> str:
    share = row[f"share_of_{target.of}"]
    if share is None:
        return "-"
    what = "" if target.of == "limit" else f" of {target.of} ({target.share:.0%})"
    return f"{share:.0%}{what}" + ("" if share >= target.share else " !")


def _ratio(row: Row, base: Row | None, target: float | None) -> str:
    if base is None or not base["ok"]:
        return "-"
    ratio = base["ms"]["median"] / row["ms"]["median"]
    if target is None:
        return f"{ratio:.2f}"
    if ratio >= target:
        return f"{ratio:.2f} ({target:g})"
    share = row["share_of_limit"]
    return f"{ratio:.2f} ({target:g}{f'; {ratio / share:.1f} at the limit' if share else ''}) !"


def _memory(work: workloads.Work, row: Row, eager: Row | None) -> str:
    got, target = row["peak_extra_bytes"], work.target.memory
    if got is None or target is None:
        return _mebibytes(got)
    needs_eager = "of eager" in target
    if needs_eager and (eager is None or eager["peak_extra_bytes"] is None):
        return f"{_mebibytes(got)} ({target}: eager was not measured)"
    limit = workloads.MEMORY[target](work, eager["peak_extra_bytes"] if eager is not None and needs_eager else 0)
    return f"{_mebibytes(got)} ({target}: {_mebibytes(round(limit))})" + ("" if got <= limit else " !")


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f}"


def _aligned(lines: list[list[str]]) -> str:
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(len(line[i]) for line in full) for i in range(len(lines[0]))]
    first = max(len(line[0]) for line in lines)
    widths[0] = max(widths[0], first)
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=False)).rstrip() for line in lines)
