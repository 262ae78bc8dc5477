"""Send the numbers of the log to experiment trackers, through accelerate's tracker classes."""

from __future__ import annotations

import importlib.util
import math
import re
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd._messages import suggestion
from fastkd.errors import FastKDWarning

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "fastkd"
PACKAGES = {  # tracker to import names, any of which suffices; the first is also the name to install
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
}
_PREFIXES = {"train": "train", "eval": "eval", "gradients": "gradients"}  # event to the first part of names


def check_trackers(names: Sequence[str], folder: Path | None) -> None:
    """Raise an error unless every tracker is known, installed and has a folder if it needs one.

    Raises:
        ValueError: a name that is neither one of `PACKAGES` nor registered in accelerate, or a tracker that writes
            files in a run without a folder.
        ImportError: a package that is not installed.
    """
    known = _classes()
    for name in names:
        if name not in known:
            raise ValueError(f"tracker: no tracker is named {name!r}.{suggestion(name, known)}")
    for name in names:
        packages = PACKAGES.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise ImportError(
                f"tracker {name!r} needs the package {packages[0]!r}, which is not installed: pip install {packages[0]}"
            )
        if known[name].requires_logging_directory and folder is None:
            raise ValueError(f"tracker {name!r} writes files and needs out_dir, the folder of the run")


class Trackers:
    """The trackers of a run. Numbers are queued, so that a slow network delays neither signals nor checkpoints.

    A tracker that fails causes one warning; the run continues.

    Args:
        names: checked by `check_trackers`.
        folder: folder of the run, or None.
        title: name of the run.
        identities: tracker to the id of the run to continue, from `identities` of the earlier process.
        step: steps taken so far.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path | None,
        title: str,
        identities: Mapping[str, str] | None = None,
        step: int = 0,
    ) -> None:
        self.identities: dict[str, str] = {}
        self._trackers: dict[str, GeneralTracker] = {}
        self._new: list[str] = []
        self._queue: list[tuple[str, dict[str, Any]]] = []
        self._warned: set[str] = set()
        try:
            for name in dict.fromkeys(names):
                self._start(name, folder, title, (identities or {}).get(name), step)
        except BaseException:
            self.close()  # those that have started
            raise

    def _start(self, name: str, folder: Path | None, title: str, known: str | None, step: int) -> None:
        identity = known or uuid.uuid4().hex[:8]
        options = _options(name, folder, title, identity, known is not None, step)
        tracker_class = _classes()[name]
        # TensorBoard's first argument is a folder inside the second one; that of the others is the project.
        place = (name, str(folder)) if tracker_class.requires_logging_directory else (PROJECT,)
        tracker = tracker_class(*place, **options)
        tracker.start()
        self._trackers[name] = tracker
        self.identities[name] = tracker.tracker.info.run_id if name == "mlflow" else identity
        if known is None:
            self._new.append(name)

    def configure(self, settings: Mapping[str, Any]) -> None:
        """Store the settings with the runs that begin here."""
        values = {_plain_name(key): _plain_value(value) for key, value in _flat(settings) if value is not None}
        for name in self._new:
            self._call(name, "store_init_configuration", values)

    def add(self, event: str, values: Mapping[str, Any]) -> None:
        """Queue a line of the log, if it has numbers to draw."""
        if self._trackers and event in _PREFIXES:
            self._queue.append((event, dict(values)))

    def flush(self) -> None:
        """Send the queued lines."""
        while self._queue:
            event, values = self._queue.pop(0)
            step = values.pop("step")
            shown = values["metrics"] if event == "eval" else values
            numbers = {
                f"{_PREFIXES[event]}/{_plain_name(key)}": value for key, value in _flat(shown) if _is_number(value)
            }
            for name in self._trackers:
                self._call(name, "log", numbers, step=step)

    def close(self) -> None:
        """Send what is queued and end the runs."""
        self.flush()
        for name in self._trackers:
            self._call(name, "finish")
        self._trackers.clear()

    def _call(self, name: str, method: str, *args: Any, **options: Any) -> None:
        try:
            getattr(self._trackers[name], method)(*args, **options)
        except Exception as error:  # of any package; the run is worth more than its curves
            if name not in self._warned:
                self._warned.add(name)
                message = (
                    f"tracker {name!r} failed ({type(error).__name__}: {error}); the run continues, with log.jsonl"
                )
                warnings.warn(message, FastKDWarning, stacklevel=3)


def _classes() -> dict[str, Any]:
    """Return accelerate's tracker classes by name, those that a user registered included."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return {str(name): tracker for name, tracker in LOGGER_TYPE_TO_CLASS.items()}


def _options(name: str, folder: Path | None, title: str, identity: str, continues: bool, step: int) -> dict[str, Any]:
    """Return the options with which a tracker begins a run or continues one after a step."""
    if name == "tensorboard":
        return {"purge_step": step + 1} if continues else {}  # hides what a resumed run logs again
    if name == "wandb":
        place = {} if folder is None else {"dir": str(folder)}
        return {"id": identity, "name": title, "resume": "allow", **place}
    if name == "trackio":
        return {"name": f"{title} {identity}", "resume": "allow"}
    if name == "mlflow":
        return {"run_name": title, **({"run_id": identity} if continues else {})}
    return {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain_name(name: str) -> str:
    """Return a name of characters that every tracker takes: "P@0.5" becomes "P_0.5"."""
    return re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII)


def _plain_value(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) else str(value)
