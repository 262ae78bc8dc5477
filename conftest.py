"""Select tests: ``pytest`` runs the tests, ``pytest --benchmark-only`` the benchmarks."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator
from pathlib import Path

import pytest

NO_GPU = "needs an NVIDIA GPU: torch.cuda.is_available() is False here"
BENCHMARKS = Path(__file__).parent / "benchmarks"


def pytest_configure() -> None:
    if os.environ.get("FASTKD_TEST_INSTALLED", "0") not in ("", "0"):
        found = importlib.util.find_spec("fastkd")
        where = Path(found.origin).resolve() if found and found.origin else None
        if where is None or Path(__file__).parent.resolve() / "fastkd" in where.parents:
            raise pytest.UsageError(
                f"FASTKD_TEST_INSTALLED=1 tests the installed fastkd, but Python imports the one at {where}; run "
                "`pip install .` and start `pytest` without `python -m`"
            )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.is_dir() or collection_path.suffix != ".py":
        return None
    if str(collection_path) in {str(Path(a.split("::")[0]).resolve()) for a in config.args}:
        return None  # named on the command line: always collect it
    is_benchmark = BENCHMARKS in collection_path.parents
    return True if is_benchmark != bool(config.getoption("benchmark_only", False)) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=NO_GPU)
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Report all skips for lack of a GPU at one location, so that the summary shows one line."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple) and report.longrepr[2].endswith(NO_GPU):
        report.longrepr = (str(item.config.rootpath / "tests"), None, report.longrepr[2])
    return report
