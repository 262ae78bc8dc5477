"""The table of presets in docs/models.md, and the command that writes it."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", reason="needs the [ris] extra")
pytest.importorskip("transformers", reason="needs the [ris] extra")

from fastkd.models import RISModel, list_presets, preset

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_table():
    return importlib.import_module("benchmarks.model_table")


def test_documented_table_matches_the_presets(model_table):
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    text = page.split(model_table.BEGIN)[1].split(model_table.END)[0]
    rows = {m[1]: m[2].split("|") for m in re.finditer(r"^\| `([^`]+)` \|(.*)\|$", text, re.MULTILINE)}
    assert list(rows) == [name for name in list_presets() if not name.startswith("shapes")]
    for name, cells in rows.items():
        with torch.device("meta"):
            parameters = RISModel(preset(name)).parameter_count()
        documented = [float(cell) for cell in cells[1:4]]
        assert documented == [round(parameters[k] / 1e6, 2) for k in ("total", "backbone", "text_encoder")]
        assert float(cells[4]) > 0
        assert float(cells[5]) > 0


def test_command_writes_the_table_between_its_markers(model_table, tmp_path, monkeypatch, capsys):
    parameters, flop, milliseconds = model_table.measure("shapes-student", 64, 1)
    _, larger, none = model_table.measure("shapes-student", 128, 0)
    assert parameters["total"] == RISModel(preset("shapes-student")).parameter_count()["total"]
    assert len(milliseconds) == 1
    assert milliseconds[0] > 0
    assert none == []
    assert 3.5 < larger / flop < 4.1  # four times the pixels, the same sentence

    page = tmp_path / "models.md"
    page.write_text(f"before\n{model_table.BEGIN}\nold\n{model_table.END}\nafter\n")
    arguments = ["shapes-student", "--size", "64", "--repeats", "1", "--write", str(page)]
    monkeypatch.setattr(sys, "argv", ["model_table.py", *arguments])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # keep the setting of this process
    for _ in range(2):
        model_table.main()
    text = page.read_text()
    assert text.startswith("before\n<!--")
    assert text.endswith("-->\nafter\n")
    assert "old" not in text
    assert text.count("`shapes-student`") == 1
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="each marker once"):
        model_table.main()
