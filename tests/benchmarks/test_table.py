"""The README's speed table, made from the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import table, workloads

ROOT = Path(__file__).parents[2]

FOLDER = ROOT / "benchmarks" / "results" / "amd-epyc-family-25-model-17-2-cores"


def test_readme_table_matches_the_results(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n", encoding="utf-8")
    assert table.main(["--results", str(FOLDER), "--write", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{table.BEGIN}\n| loss |")
    assert text.endswith(f"{table.END}\nafter\n")
    written = text.split(table.BEGIN)[1].split(table.END)[0]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.split(table.BEGIN)[1].split(table.END)[0] == written, "run `python -m benchmarks.table`"


def test_speed_table_divides_medians_and_rounds() -> None:
    def row(name: str, provider: str, ms: float, mib: float) -> dict[str, Any]:
        return {
            "work": name,
            "mode": "both",
            "provider": provider,
            "ok": True,
            "ms": {"median": ms},
            "peak_extra_bytes": mib * 2**20,
        }

    providers = (("cpu", 2.0, 5.0), ("eager", 40.0, 100.0), ("compile", 7.0, 50.0))
    rows = [row(name, *provider) for name in table.README_ROWS for provider in providers]
    lines = table.speed_table(rows).splitlines()
    assert len(lines) == 2 + len(table.README_ROWS) == 12
    assert all(line.endswith("| 20 | 3.5 | 5 | 100 |") for line in lines[2:])
    with pytest.raises(SystemExit, match="no result of compile; run `python -m benchmarks"):
        table.speed_table([r for r in rows if r["provider"] != "compile"])


def test_readme_rows_are_workloads() -> None:
    names = {w.name for family in workloads.CPU_WORKLOADS for w in workloads.select(family, "cpu")}
    assert {name.replace("bfloat16", "float32") for name in table.README_ROWS} <= names
    files = [json.loads(file.read_text(encoding="utf-8")) for file in FOLDER.glob("*.json")]
    # The table compares times of two cores; a file with a "clock" has CPU times of one thread.
    losses = {row["loss"] for file in files if "clock" not in file["environment"] for row in file["rows"]}
    assert {name.split()[0] for name in table.README_ROWS} == losses


@pytest.mark.parametrize(("share", "reasons"), [(0.59, 1), (0.6, 0)])
def test_a_missed_share_has_its_reason(share: float, reasons: int) -> None:
    (workload,) = (w for w in workloads.select("attention_kl", "cpu") if w.target.limited_by)
    row = {"work": workload.name, "mode": "both", "provider": "cpu", "ok": True, "ms": {"median": 1.0}, "note": ""}
    row |= {"peak_extra_bytes": None, "share_of_limit": share, "error_vs_fp64": 1e-7}
    text = table.against_targets([workload], [row])
    assert text.count(f"{workload.name}, below 60% of the limit: {workload.target.limited_by}.") == reasons
    assert (f"{share:.0%} !" in text) == bool(reasons)


def test_write_between_needs_both_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(SystemExit, match="must contain each marker once"):
        table.write_between(page, table.BEGIN, table.END, "text")
    assert page.read_text(encoding="utf-8") == "no markers"
