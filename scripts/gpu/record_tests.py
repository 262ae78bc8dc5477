"""pytest plugin (``-p record_tests``): record each finished test at once, and share the tests between processes.

Tests that have passed with the same sources are deselected. Every process collects all tests in the same order and
claims the next free one. :mod:`kernel_tests` starts the processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from records import Row, append, digest, read, write_json

CONTEXT_LOST = 70
"""Exit status of a process that lost its CUDA context, in which every later test would fail."""

SHARED = ("conftest.py", "tests/conftest.py", "tests/helpers")
MAX_TEXT = 4_000
LARGE = ("test_offsets_beyond_32_bits", "test_row_gradient_offsets_beyond_32_bits")
"""Tests that need many GB and run in one process at a time."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("record_tests")
    group.addoption("--record", type=Path, help="results file; without it the plugin only selects tests")
    group.addoption("--record-id", default="", help="build under test; rows with another id are ignored")
    group.addoption("--claims", type=Path, help="folder shared by the processes")
    group.addoption("--worker", default="0", help="name of this process")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(config), "test-recorder")


def stage(nodeid: str) -> int:
    """Return the stage of a test: compiled kernels, then Triton's, then contract tests in the same order."""
    return 2 * nodeid.startswith("tests/contract/") + ("triton" in nodeid)


def backend_of(item: pytest.Item) -> str | None:
    """Return the backend in a test's parameters, or None."""
    for value in getattr(getattr(item, "callspec", None), "params", {}).values():
        backend = getattr(getattr(value, "place", value), "backend", None)
        if backend is not None:
            return backend
    return None


class Recorder:
    """Select the tests, share them with the other processes and record their outcomes."""

    def __init__(self, config: pytest.Config) -> None:
        self.record: Path | None = config.getoption("record")
        self.id: str = config.getoption("record_id")
        self.claims: Path | None = config.getoption("claims")
        self.worker: str = config.getoption("worker")
        self.root = config.rootpath
        self.reports: list[pytest.TestReport] = []

    @functools.cache  # noqa: B019 - one recorder per process
    def sources(self, file: str) -> str:
        """Return an id of the build, the test file and the shared test sources."""
        return f"{self.id}-{digest(self.root, [*SHARED, file])}"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        rows = read(self.record) if self.record else []
        passed = {(row["test"], row["id"]) for row in rows if row.get("outcome") == "passed"}
        on_reference = [item for item in items if backend_of(item) == "reference"]
        dropped = set(map(id, on_reference))
        before = [i for i in items if id(i) not in dropped and (i.nodeid, self.sources(file_of(i.nodeid))) in passed]
        dropped |= set(map(id, before))
        if dropped:
            config.hook.pytest_deselected(items=[item for item in items if id(item) in dropped])
        items[:] = sorted((item for item in items if id(item) not in dropped), key=lambda item: stage(item.nodeid))
        if self.claims:
            write_json(self.claims / f"selected-{self.worker}", {"selected": len(items), "before": len(before)})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.record and self.claim(report.nodeid):
            self.write(report.nodeid, "error", 0.0, report.longreprtext[-MAX_TEXT:])

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if self.claims is None or session.config.option.collectonly:
            return None
        claimed = (item for item in session.items if self.claim(item.nodeid))
        item = next(claimed, None)
        while item is not None:
            following = next(claimed, None)  # pytest tears down fixtures that the next test does not use
            running = self.claims / f"running-{self.worker}"
            with self.memory(item.nodeid):
                running.write_text(item.nodeid, encoding="utf-8")
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                running.unlink()  # waiting for memory does not count as hanging
            item = following
        return True

    @contextlib.contextmanager
    def memory(self, test: str) -> Iterator[None]:
        """Run a memory-intensive test in one process at a time, and free torch's cache after it."""
        if self.claims is None or not any(name in test for name in LARGE):
            yield
            return
        with (self.claims / "memory").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def claim(self, test: str) -> bool:
        """Claim a test for this process; return whether the claim succeeded (the first process creates the file)."""
        if self.claims is None:
            return True
        try:
            path = self.claims / f"claim-{hashlib.sha1(test.encode()).hexdigest()}"
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        os.write(handle, json.dumps({"worker": self.worker, "test": test}).encode())
        os.close(handle)
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[Any]:
        result = yield
        synchronize()  # report asynchronous errors in the test that caused them
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)
        if report.when != "teardown":
            return
        reports, self.reports = self.reports, []
        worst = next((r for r in reports if r.failed), None) or next((r for r in reports if r.skipped), reports[-1])
        text = "" if worst.passed else reason(worst)
        self.write(report.nodeid, worst.outcome, sum(r.duration for r in reports), text)
        if worst.failed:
            try:
                synchronize()
            except RuntimeError:
                sys.stdout.flush()
                os._exit(CONTEXT_LOST)

    def write(self, test: str, outcome: str, seconds: float, text: str) -> None:
        if self.record is None:
            return
        row: Row = {"test": test, "outcome": outcome, "seconds": round(seconds, 3)}
        row |= {"text": text} if text else {}
        append(self.record, row | {"id": self.sources(file_of(test))})


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def reason(report: pytest.TestReport) -> str:
    """Return why a test failed or was skipped, with its captured output."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    printed = "".join(f"\n---- {name}\n{text}" for name, text in report.sections if text.strip())
    if len(printed) > MAX_TEXT // 2:  # a compiler dump must not displace the error
        printed = f"{printed[: MAX_TEXT // 4]}\n...\n{printed[-MAX_TEXT // 4 :]}"
    return report.longreprtext[-MAX_TEXT:] + printed


def synchronize() -> None:
    """Wait for the GPU if this process uses one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
