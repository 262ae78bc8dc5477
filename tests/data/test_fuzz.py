"""A sample of the damaged inputs of `python -m benchmarks.fuzz_data`: read, or rejected by a documented error."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fuzz_data
from fastkd.data import RefCOCO


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [("refs", 120), ("instances", 120), ("masks", 250), ("images", 250), ("rows", 150), ("check", 80)],
)
def test_damaged_inputs_are_read_or_rejected(tmp_path: Path, kind: str, inputs: int) -> None:
    counts = fuzz_data.fuzz(kind, inputs, 0, tmp_path / "set")
    assert counts["read"] > 0
    assert counts["rejected"] > inputs // 3 or kind == "check"  # a check lists what readers reject


def test_the_undamaged_set_is_read_and_other_errors_are_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = fuzz_data.Targets(tmp_path / "set")
    targets.refs(fuzz_data._pickled(fuzz_data.reference_refs(), 2))

    def fail(*_: object) -> None:
        raise KeyError

    monkeypatch.setattr(RefCOCO, "mask", fail)
    with pytest.raises(KeyError):
        fuzz_data.fuzz("instances", 200, 0, tmp_path / "other")
