"""Format results: fastkd's kernels against their targets, every row, or the README's speed table.

    python -m benchmarks.table [--results FOLDER] [--write README.md]

prints the README's speed table, or writes it between its markers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import measure, workloads
from fastkd._atomic import replace_files
from fastkd._console import plain_characters

Row = dict[str, Any]
OTHERS = ("eager_nn", "eager", "compile", "compile_max", "reference")


def against_targets(measured: list[workloads.Workload], rows: list[Row]) -> str:
    """Return one line per workload and fastkd backend, in the mode of its targets.

    ``!`` marks a missed target, preceded by the speed-up that a kernel at the roofline would have. Known reasons for
    missing the share of the roofline follow.
    """
    head = ["work", "kernel", "ms", "x eager", "x compile", "x eager NxN", "extra memory", "of limit", "error"]
    tuned = any(r["provider"] == "compile_max" for r in rows)
    head[4:5] = ["x compile", "x autotuned"] if tuned else ["x compile"]
    lines = [head]
    reasons = []
    for workload in measured:
        by_provider = of_one_run([r for r in rows if r["work"] == workload.name and r["mode"] == workload.target_mode])
        for name, row in by_provider.items():
            if name in OTHERS:
                continue
            if not row["ok"]:
                lines.append([workload.name, name, f"not measured: {row['note']}"])
                continue
            target = workload.target
            share = row[f"share_of_{target.of}"]
            if share is not None and share < target.share and target.limited_by:
                reasons.append(f"{workload.name}, below {target.share:.0%} of the {target.of}: {target.limited_by}.")
            lines.append(
                [
                    workload.name,
                    name,
                    f"{row['ms']['median']:.2f}",
                    _ratio(row, by_provider.get("eager"), target.eager),
                    _ratio(row, by_provider.get("compile"), target.compile),
                    *([_ratio(row, by_provider.get("compile_max"), target.compile)] if tuned else []),
                    _ratio(row, by_provider.get("eager_nn"), target.eager_nn),
                    _memory(workload, row, by_provider.get("eager")),
                    _share(row, target),
                    f"{row['error_vs_fp64']:.1e}",
                ]
            )
    return "\n".join([_aligned(lines), *reasons])


def of_one_run(rows: list[Row]) -> dict[str, Row]:
    """Return the rows by provider, with the times of later sweeps scaled to the first sweep.

    Each sweep times eager in turn with its other providers; the scale is the ratio of eager's two medians.
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
    """Return all rows as a text table."""
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
    """Return the share of the target's roofline; ``!`` marks a missed target."""
    share = row[f"share_of_{target.of}"]
    if share is None:
        return "-"
    what = "" if target.of == "limit" else f" of {target.of} ({target.share:.0%})"
    return f"{share:.0%}{what}" + ("" if share >= target.share else " !")


def _ratio(row: Row, base: Row | None, target: float | None) -> str:
    """Return the speed-up over ``base`` and its target; ``!`` marks a missed target."""
    if base is None or not base["ok"]:
        return "-"
    ratio = base["ms"]["median"] / row["ms"]["median"]
    if target is None:
        return f"{ratio:.2f}"
    if ratio >= target:
        return f"{ratio:.2f} ({target:g})"
    share = row["share_of_limit"]
    return f"{ratio:.2f} ({target:g}{f'; {ratio / share:.1f} at the limit' if share else ''}) !"


def _memory(workload: workloads.Workload, row: Row, eager: Row | None) -> str:
    """Return the extra memory in MiB and its target; ``!`` marks a missed target."""
    got, target = row["peak_extra_bytes"], workload.target.memory
    if got is None or target is None:
        return _mebibytes(got)
    needs_eager = "of eager" in target
    if needs_eager and (eager is None or eager["peak_extra_bytes"] is None):
        return f"{_mebibytes(got)} ({target}: eager was not measured)"
    limit = workloads.MEMORY[target](workload, eager["peak_extra_bytes"] if eager is not None and needs_eager else 0)
    return f"{_mebibytes(got)} ({target}: {_mebibytes(round(limit))})" + ("" if got <= limit else " !")


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f}"


def _aligned(lines: list[list[str]]) -> str:
    """Return lines of cells as text with aligned columns; short lines do not affect the widths."""
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(len(line[i]) for line in full) for i in range(len(lines[0]))]
    first = max(len(line[0]) for line in lines)
    widths[0] = max(widths[0], first)
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=False)).rstrip() for line in lines)


# ---- the README's table ----------------------------------------------------------------------------------------------

BEGIN, END = "<!-- speed table: begin -->", "<!-- speed table: end -->"
README_ROWS = {
    "pixel_relation_kd kl 2x128x60x60 float32": "`pixel_relation_kd` | (2, 128, 60, 60)",
    "pixel_relation_kd kl 1x64x120x120 float32": "`pixel_relation_kd` | (1, 64, 120, 120)",
    "pixel_relation_kd mse 4x256to128x60x60 float32": "`pixel_relation_kd`, mse | (4, 256 → 128, 60, 60)",
    "channel_kd kl 8x512x30x30 float32": "`channel_kd` | (8, 512, 30, 30)",
    "cross_modal_kd 4x14400x20x128 float32": "`cross_modal_kd` | (4, 14400 pixels, 20 words, 128)",
    "channel_distribution_kd 8x512x30x30 float32": "`channel_distribution_kd` | (8, 512, 30, 30)",
    "pixel_relation_kd kl 2x128x60x60 bfloat16": "`pixel_relation_kd`, bf16 | (2, 128, 60, 60)",
    "channel_kd kl 8x512x30x30 bfloat16": "`channel_kd`, bf16 | (8, 512, 30, 30)",
    "cross_modal_kd 8x900x20x512 bfloat16": "`cross_modal_kd`, bf16 | (8, 900 pixels, 20 words, 512)",
    "channel_distribution_kd 8x512x30x30 bfloat16": "`channel_distribution_kd`, bf16 | (8, 512, 30, 30)",
}


def speed_table(rows: list[Row], backend: str = "cpu") -> str:
    """Return a Markdown table of forward plus backward: speed-ups of ``backend``, and extra memory."""
    lines = [
        "| loss | inputs | × eager | × torch.compile | MiB fastkd | MiB eager |",
        "|---|---|---|---|---|---|",
    ]
    for name, label in README_ROWS.items():
        by_provider = {r["provider"]: r for r in rows if r["work"] == name and r["mode"] == "both"}
        missing = [p for p in (backend, "eager", "compile") if not by_provider.get(p, {}).get("ok")]
        if missing:
            raise SystemExit(f"{name}: no result of {', '.join(missing)}; run `python -m benchmarks --device cpu`")
        ms = {provider: row["ms"]["median"] for provider, row in by_provider.items() if row["ok"]}
        ratios = [_two_digits(ms[other] / ms[backend]) for other in ("eager", "compile")]
        sizes = [f"{by_provider[p]['peak_extra_bytes'] / 2**20:.0f}" for p in (backend, "eager")]
        lines.append(f"| {' | '.join([label, *ratios, *sizes])} |")
    return "\n".join(lines)


def _two_digits(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace the text between two markers of a page."""
    page = path.read_text(encoding="utf-8")
    if page.count(begin) != 1 or page.count(end) != 1:
        raise SystemExit(f"{path} must contain each marker once: {begin} and {end}")
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    with replace_files(path) as (partial,):
        partial.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


@plain_characters()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="folder of FAMILY.json; default: benchmarks/results/DEVICE")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the table between the markers of this page")
    args = parser.parse_args(argv)
    folder = args.results or measure.RESULTS / measure.device_slug(measure.environment("cpu"))
    shown = [f for f in workloads.CPU_WORKLOADS if any(w.name in README_ROWS for w in workloads.select(f, "cpu"))]
    files = [folder / f"{family}.json" for family in shown]
    if absent := [str(file) for file in files if not file.exists()]:
        raise SystemExit(f"no results: {', '.join(absent)}; run `python -m benchmarks --device cpu`")
    files += [file for family in shown if (file := folder / "bfloat16" / f"{family}.json").exists()]
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    text = speed_table(rows)
    if args.write is None:
        print(text)
    else:
        write_between(args.write, BEGIN, END, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
