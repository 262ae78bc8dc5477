"""The table of sizes and errors of a teacher cache."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_page_shows_the_committed_results() -> None:
    module = importlib.import_module("benchmarks.cache_storage")
    content = json.loads((ROOT / module.RESULTS).read_text(encoding="utf-8"))
    page = (ROOT / "docs/teacher_cache.md").read_text(encoding="utf-8")
    for name, table in module.tables(content).items():
        begin, end = module.MARKERS[name]
        assert page.partition(begin)[2].partition(end)[0].strip() == table
    sizes = {row["dtype"]: row["bytes_per_sample"] for row in content["rows"]["dtypes"]}
    assert sizes["int8"] < sizes["bf16"] < sizes["teacher"]
