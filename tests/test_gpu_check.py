"""scripts/gpu_check.sh where there is no GPU, and its parts' bookkeeping with stand-ins for the tools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def check(*arguments: str, path: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | environment | ({"PATH": path} if path else {})
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env=env, timeout=120)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU here")
def test_without_a_gpu_it_says_so_and_exits_3(tmp_path: Path) -> None:
    done = check(str(tmp_path / "out"))
    assert done.returncode == 3
    assert "no NVIDIA GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_folder_it_says_how(tmp_path: Path) -> None:
    done = check()
    assert done.returncode == 2
    assert "usage: scripts/gpu_check.sh OUT_DIR" in done.stderr


def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    done = check(str(tmp_path / "out"), "benchmark")
    assert done.returncode == 2
    assert "unknown part 'benchmark'; there are tests, sanitizer, benchmarks, autotune" in done.stderr


@pytest.mark.parametrize("parts", [("tests", "sanitizer", "benchmarks"), ("autotune",)], ids=["all", "named"])
def test_a_part_that_fails_is_a_row_and_the_rest_still_runs(tmp_path: Path, parts: tuple[str, ...]) -> None:
    """A pretended GPU and a python whose every build, test and benchmark fails."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: pretended'\n")
    (tools / "python").write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f'  *gpu_check_row*) shift; exec {sys.executable} "$@" ;;\n'
        "  *is_available*) exit 0 ;;\n"
        '  *) echo "refused: $1 $2 $3"; exit 1 ;;\nesac\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    out = tmp_path / "out"
    named = parts if len(parts) == 1 else ()
    done = check(str(out), *named, path=f"{tools}:{os.environ['PATH']}", PYTHON=str(tools / "python"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert {f.name for f in out.iterdir()} == {"build.json", "log.txt", *(f"{part}.json" for part in parts)}
    for part in ("build", *parts):
        (row,) = json.loads((out / f"{part}.json").read_text())["rows"]
        assert row["work"] == part
        assert row["ok"] is False
        assert row["note"]
    assert "refused" in (out / "log.txt").read_text()
