"""Make the tables and the figure of docs/evidence.md from the results under benchmarks/evidence.

    python -m benchmarks.evidence                            # print the tables
    python -m benchmarks.evidence --write docs/evidence.md   # between its markers, and docs/evidence.svg

`fastkd experiments benchmarks/evidence/GRID.yaml` adds results; see docs/experiments.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence.figure import gains_figure
from benchmarks.evidence.tables import (
    ALONE,
    Records,
    conditions,
    deployment_table,
    latency,
    scores_table,
    select,
    tuning_table,
    variants_table,
)
from benchmarks.table import write_between
from fastkd._atomic import replace_files
from fastkd._console import plain_characters
from fastkd.cli._grid.records import read_records

RESULTS = Path(__file__).resolve().parent
MARKERS = ("<!-- evidence: begin (written by benchmarks/evidence) -->", "<!-- evidence: end -->")
TEST = ("testA", "testB")
DEPLOYMENT = "deployment.json"
MAIN, CONFIRMATION, TUNING = "main", "confirmation", "tuning"
TOGETHER = f"{MAIN} and {CONFIRMATION} together"
# Settings whose rows are losses and their variants.
VARIANTS = ("sweeps", "readings of channel attention", "terms of cross_modal_kd")


def read_all(folder: Path) -> list[dict[str, Any]]:
    """Return the records of all results files of a folder."""
    return [record for path in sorted(folder.glob("*.jsonl")) for record in read_records(path)]


def digest_of(folder: Path) -> str:
    """Return a digest of a folder's results files, which the page states."""
    digest = hashlib.sha256()
    deployment = [path for path in [folder / DEPLOYMENT] if path.is_file()]
    for path in sorted([*folder.glob("*.jsonl"), *deployment]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def page(records: Records, digest: str, resamples: int = 10_000, deployment: Mapping[str, Any] | None = None) -> str:
    """Return the generated part of the page: "main", other comparisons by name, then choices of weights."""
    parts = [
        f"Made from results with digest `{digest}`. Intervals: 95 %, [paired bootstrap](#intervals) over seeds, then"
        " images; bold: 0 is outside."
    ]
    if len(select(records, MAIN, "time")) > 1:
        parts.append("![Gain of each row over the student alone, on testA and testB, in equal time](evidence.svg)")
        parts.append("The dashed line is the plain baseline, logit + feature.")
    records = [*records, *together(records)]
    first = (MAIN, CONFIRMATION, TOGETHER)
    found = {r["setting"] for r in records}
    settings = [name for name in first if name in found] + sorted(found.difference(first))
    for setting in settings:
        if setting.startswith(TUNING):
            continue
        for equal in ("time", "steps"):
            rows = select(records, setting, equal)
            if len(rows) < 2:
                continue
            held = {split for sample in rows.values() for found in sample.by_seed.values() for split in found}
            groups = [TEST] if set(TEST) <= held else []
            groups += [(split,) for split in sorted(held - set(TEST)) if not groups or split != "val"]
            parts.append(f"### {setting}: equal {'wall-clock time' if equal == 'time' else 'steps'}")
            for splits in groups:
                table = variants_table if setting in VARIANTS else scores_table
                parts.append(f"{' and '.join(splits)}:\n\n{table(rows, splits, resamples)}")
            parts.append(conditions([r for s in rows.values() for one in s.by_seed.values() for r in one.values()]))
            if setting == MAIN and equal == "time" and deployment is not None:
                parts.append(latency(deployment))
    if tunings := [setting for setting in settings if setting.startswith(TUNING)]:
        parts.append("### Choice of weights")
    for setting in tunings:
        steps = {r["steps"] for r in records if r["setting"] == setting}
        parts.append(f"mIoU on val by the factor of all shares, {' or '.join(f'{n}' for n in sorted(steps))} steps:")
        parts.append(tuning_table(records, setting))
    if deployment is not None:
        about = (
            f"Exported students and the teacher, run by onnxruntime {deployment['onnxruntime']} on one thread "
            f"({deployment['processor']}): mIoU on {' and '.join(deployment['splits'])}, milliseconds for one image "
            f"and one sentence. Ranges of activations come from {deployment['calibration']} training sentences."
        )
        parts.append(f"### Int8 and fp16\n\n{about}\n\n{deployment_table(deployment)}")
    return "\n\n".join(parts)


def together(records: Records) -> list[dict[str, Any]]:
    """Return the rows of the confirmation, with its seeds and those of the main comparison, as one setting."""
    rows = {r["row"] for r in records if r["setting"] == CONFIRMATION}
    found = [r for r in records if r["setting"] in (MAIN, CONFIRMATION) and r["row"] in rows]
    return [{**r, "setting": TOGETHER} for r in found]


@plain_characters()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the .jsonl files")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page with the markers; its figure is PAGE's .svg")
    parser.add_argument("--resamples", type=int, default=10_000)
    args = parser.parse_args(argv)
    records = read_all(args.results)
    if not records:
        raise SystemExit(f"no results in {args.results}: run `fastkd experiments benchmarks/evidence/main.yaml`")
    path = args.results / DEPLOYMENT
    deployment = json.loads(path.read_text("utf-8")) if path.is_file() else None
    text = page(records, digest_of(args.results), args.resamples, deployment)
    if args.write is None:
        print(text)
        return 0
    rows = select(records, MAIN, "time")
    if ALONE in rows and len(rows) > 1:
        with replace_files(args.write.with_suffix(".svg")) as (partial,):
            partial.write_text(gains_figure(rows, TEST, args.resamples), encoding="utf-8")
    write_between(args.write, *MARKERS, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
