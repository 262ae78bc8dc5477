"""The table of sizes and errors of a teacher cache."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_page_shows_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    module = importlib.import_module("benchmarks.cache_storage")
    content = json.loads((ROOT / module.RESULTS).read_text(encoding="utf-8"))
    begin, end = module.MARKERS
    page = (ROOT / "docs/teacher_cache.md").read_text(encoding="utf-8")
    assert page.partition(begin)[2].partition(end)[0].strip() == module.table(content)
    sizes = {row["dtype"]: row["bytes"] for row in content["rows"]}
    assert sizes["int8"] < sizes["bf16"] < sizes["teacher"]
