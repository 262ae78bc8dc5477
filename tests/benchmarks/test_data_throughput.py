"""The data benchmark counts each part once, and its page shows the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import data_throughput

ROOT = Path(__file__).parents[2]


def test_parts_of_a_sample_add_up() -> None:
    row = data_throughput.throughput(48, 64, workers=1, batch_size=2, samples=4, rounds=1, runs=1)
    assert tuple(row["parts_ms"]) == data_throughput.PARTS
    assert sum(row["parts_ms"].values()) == pytest.approx(row["worker_ms"], abs=0.05)
    assert all(row["parts_ms"][name] > 0 for name in ("decode", "mask", "collate"))
    assert min(row["receive_ms"], row["normalise_ms"]) > 0
    assert row["samples_per_s"][0] > 0


def test_files_have_as_many_bytes_per_pixel_as_photographs(tmp_path: Path) -> None:
    size = data_throughput.write_set(tmp_path, 480, 640, images=1)
    assert 0.4 < size / (480 * 640) < 0.6
    sample = data_throughput.open_dataset(tmp_path)[0]
    assert sample["image"].shape == (3, 480, 480)
    assert 0.1 < sample["mask"].float().mean() < 0.5


def test_the_page_shows_the_committed_results() -> None:
    content = json.loads((ROOT / "benchmarks/results/data_throughput.json").read_text("utf-8"))
    page = (ROOT / "docs/benchmarks.md").read_text("utf-8")
    shown = page.partition(data_throughput.BEGIN)[2].partition(data_throughput.END)[0].strip()
    assert shown == data_throughput.table(content)
