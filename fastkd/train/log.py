"""Log a run as JSON lines and show its progress."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastkd import _info
from fastkd._atomic import replace_files
from fastkd._console import plain
from fastkd.errors import FastKDWarning
from fastkd.train.trackers import Trackers


class RunLog:
    """Log with one JSON object per line, flushed after each; without a path it writes nothing.

    Lines that cannot be written (a full disk) are kept and written with the next one; the first failure is a warning.

    Args:
        path: the file, or None.
        append: continue the file, rather than replace it.
        trackers: also get every line.
    """

    def __init__(self, path: Path | None, append: bool = False, trackers: Trackers | None = None) -> None:
        self._path, self.trackers = path, trackers
        self._file = path.open("a" if append else "w", encoding="utf-8") if path is not None else None
        self._warned = False

    def write(self, event: str, **values: Any) -> None:
        """Append ``{"event": event, ...}``."""
        if self.trackers is not None:
            self.trackers.add(event, values)
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"event": event, **_finite(values)}, default=str) + "\n")
            self._file.flush()  # after a failure the file's buffer still holds the rest
        except OSError as error:
            self._warn(error)

    def restart(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Replace the content by the given lines, as a whole."""
        if self._path is not None and self._file is not None:
            self._file.close()
            with replace_files(self._path) as (partial,):
                partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            self._file = self._path.open("a", encoding="utf-8")

    @property
    def identities(self) -> dict[str, str]:
        """Tracker to the id of its run."""
        return {} if self.trackers is None else self.trackers.identities

    def forward(self) -> None:
        """Send the trackers the lines since the previous call."""
        if self.trackers is not None:
            self.trackers.flush()

    def close(self) -> None:
        """Close the file, and end the trackers' runs."""
        if self.trackers is not None:
            self.trackers.close()
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the log {self._path} cannot be written ({error}); the run continues and tries again with each line",
                FastKDWarning,
                stacklevel=3,
            )


def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions, hardware and torch settings that a run's results depend on."""
    facts = _info.environment(device)
    gpu = device.type == "cuda"
    return {
        **{name: facts[name] for name in ("fastkd", "torch", "python", "system")},
        "device": facts["device"] if gpu else str(device),
        "cuda": facts["cuda"] if gpu else None,
        "cpus": facts["cores"],
        "threads": facts["threads"],
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "date": facts["date"],
    }


class Progress:
    """Progress bar with remaining time and losses; without a terminal, a plain line every 15 seconds.

    If the terminal disappears, the output stops and the run continues.
    """

    def __init__(self, steps: int, title: str, shown: bool) -> None:
        self.steps, self.title = steps, plain(title, getattr(sys.stderr, "encoding", None) or "utf-8")
        self.shown = shown and sys.stderr is not None
        self._bar: Any = None
        self._line_at = time.monotonic()
        if self.shown and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=20),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[losses]}"),
                console=Console(stderr=True),
                refresh_per_second=2,
            )
            self._task = self._bar.add_task(self.title, total=steps, losses="")
            self._bar.start()

    def update(self, step: int, losses: Mapping[str, float], seconds: float, fraction: float) -> None:
        """Show the steps done, the losses, and the remaining time from the seconds and the fraction done."""
        if not self.shown:
            return
        text = "  ".join(f"{name} {value:.3g}" for name, value in losses.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=max(step, round(fraction * self.steps)), losses=text)
        elif time.monotonic() - self._line_at > 15:
            self._line_at = time.monotonic()
            left = seconds * (1 - fraction) / fraction if fraction else math.nan
            self.print(f"step {step}/{self.steps}  {seconds:.0f} s, {left:.0f} s left  {text}")

    def print(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if not self.shown:
            return
        try:
            if self._bar is not None:
                self._bar.console.print(f"{self.title}: {text}", markup=False, highlight=False)
            else:
                print(f"{self.title}: {text}", file=sys.stderr, flush=True)
        except OSError:
            self.shown = False

    def show(self, content: Any) -> None:
        """Print an object above the bar: as rich shows it on a terminal, else the lines of ``str``."""
        if not self.shown:
            return
        try:
            if self._bar is not None:
                self._bar.console.print(content)
            else:
                print(content, file=sys.stderr, flush=True)
        except OSError:
            self.shown = False

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, with None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
