"""A grid of runs, read from YAML."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fastkd._messages import shortened, suggestion
from fastkd.cli._convert import convert
from fastkd.cli._grid.records import best_scales, read_records
from fastkd.cli._settings import DistillSettings, RunSettings, TrainSettings
from fastkd.cli._yaml import read_mapping, settings_from

# The runner sets these.
_RESERVED = (
    "out",
    "seed",
    "shards",
    "shuffle_buffer",
    "teacher_cache",
    "max_seconds",
    "eval_every",
    "checkpoint_every",
)
_ONLY_DISTILL = ("teacher", "student", "terms", "task", "student_taps", "teacher_taps", "teacher_tokenizer")
_NO_RESULT = ("data", "image_root", "workers", "log_every", "gradients_every", "tracker")  # cannot change a result
OF_CACHE = (
    "data",
    "mix",
    "dataset",
    "split_by",
    "teacher",
    "teacher_taps",
    "teacher_tokenizer",
    "tokenizer",
    "image_root",
)


@dataclass(kw_only=True)
class Grid:
    """Rows of settings to compare, with the seeds and splits of the comparison.

    Raises:
        ValueError: a row or setting that cannot be used; the message names it.
    """

    setting: str
    """Name of the comparison in the results, such as "main"."""
    settings: dict[str, Any]
    """Settings of ``fastkd distill`` that all rows share."""
    rows: dict[str, dict[str, Any]]
    """Row name to the settings in which it differs; without terms, the student is trained alone."""
    seeds: tuple[int, ...] = (0,)
    """Each determines initial weights and data order, the same in all rows."""
    splits: tuple[str, ...] = ("val",)
    """Splits on which the last student of each run is scored."""
    equal: Literal["steps", "time"] = "steps"
    """Quantity that is equal in all rows: the steps, or the time that ``reference`` takes for them."""
    reference: str | None = None
    """The row whose time all rows get, with equal: time."""
    scale: float | tuple[float, ...] | str = 1.0
    """Factor of the shares and weights of every row; a list tries each; with a results file, every row gets the factor
    that has its best mIoU on val there."""
    cache: Literal["teacher", "bf16", "fp16", "int8"] | None = "teacher"
    """Storage of the teacher's output, computed once for all runs; null runs the teacher in every step."""
    results: Path
    """JSONL file to which the results are appended."""
    work: Path
    """Folder of the teacher cache and of the runs."""
    every_row: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    """All rows before some were selected; the teacher cache holds what any of them reads."""
    source: str = field(default="the grid", repr=False)

    def __post_init__(self) -> None:
        if not self.rows or not self.seeds or not self.splits:
            raise ValueError("rows, seeds and splits must each name at least one")
        if self.equal == "time" and self.reference not in self.rows:
            raise ValueError(
                f"equal: time needs reference, the row whose time all rows get, got {self.reference!r}."
                f"{suggestion(self.reference, self.rows)}"
            )
        for name, values in {"settings": self.settings, **self.rows}.items():
            for key in values:
                if key in _RESERVED:
                    raise ValueError(f"{name}: {key} is set for each run: remove it")
                if name != "settings" and self.cache is not None and key in OF_CACHE:
                    raise ValueError(f"rows.{name}: rows share one teacher cache, so {key} belongs to settings")
        self.every_row = {**self.every_row, **self.rows}
        for row in self.rows:
            self.settings_of(row)  # raises for a wrong setting

    def values_of(self, row: str) -> dict[str, Any]:
        """Return a row's settings as the flat mapping of a configuration."""
        return {"threads": 1, "keep_checkpoints": 0, **self.settings, "terms": {}, **self.every_row[row]}

    def settings_of(
        self, row: str, *, seed: int = 0, scale: float = 1.0, out: Path | None = None, steps: int | None = None
    ) -> RunSettings:
        """Return the settings of one run: `TrainSettings` for a row without terms, else `DistillSettings`.

        The teacher runs online; `fastkd.cli._grid.runs.cached` replaces it by the cache.
        """
        values = {**self.values_of(row), "seed": seed, "out": str(out or self.work)}
        values |= {} if steps is None else {"steps": steps}
        where = f"{self.source}: rows.{row}"
        if not values["terms"]:
            values["model"] = values.get("student", DistillSettings.student)
            values = {key: value for key, value in values.items() if key not in _ONLY_DISTILL}
            return settings_from(TrainSettings, values, where)
        settings = settings_from(DistillSettings, values, where)
        settings.teacher = settings.teacher or "shapes"
        scaled = {name: _scaled(term, scale) for name, term in settings.terms.items()}
        return replace(settings, terms=scaled)

    def digest_of(self, row: str) -> str:
        """Return a digest of what determines a row's results in addition to scale and seed."""
        values = {key: value for key, value in self.values_of(row).items() if key not in _NO_RESULT}
        text = json.dumps([values, self.cache], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def digest_of_reference(self) -> str | None:
        """Return the digest of the row whose time all rows get; None with equal steps."""
        return self.digest_of(self.reference) if self.equal == "time" and self.reference is not None else None

    def runs(self, rows: Sequence[str] = ()) -> list[Run]:
        """Return the runs of some rows, or of all; the first seed comes first, so that rows are comparable early.

        Raises:
            ValueError: the results that ``scale`` names lack one of these rows.
        """
        chosen = [row for row in self.rows if not rows or row in rows]
        scales = self._scales(chosen)
        return [
            Run(
                self.setting,
                self._student(row),
                row,
                scale,
                seed,
                self.equal == "time",
                self.digest_of(row),
                self.digest_of_reference(),
            )
            for seed in self.seeds
            for row in chosen
            for scale in scales[row]
        ]

    def _student(self, row: str) -> str:
        return Path(str(self.values_of(row).get("student", DistillSettings.student))).name

    def _scales(self, rows: Sequence[str]) -> dict[str, tuple[float, ...]]:
        """Return the factors to run by row; a row without terms has one."""
        distilled = [row for row in rows if self.values_of(row)["terms"]]
        if isinstance(self.scale, str):
            best = best_scales(read_records(Path(self.scale)), self.scale)
            missing = [row for row in distilled if row not in best]
            if missing:
                raise ValueError(
                    f"scale: {self.scale} has no result on val of {shortened(missing)}: run its grid first"
                )
            found: dict[str, tuple[float, ...]] = {row: (best[row],) for row in distilled}
        else:
            found = dict.fromkeys(distilled, self.scale if isinstance(self.scale, tuple) else (self.scale,))
        return {row: found.get(row, (1.0,)) for row in rows}


@dataclass(frozen=True)
class Run:
    """One run of a grid.

    Attributes:
        setting: name of the comparison.
        student: name of the student.
        row: name of the row.
        scale: factor of its shares and weights.
        seed: seed of initial weights and data order.
        equal_time: whether all rows have the reference's time.
        digest: digest of the row's settings.
        reference: digest of those of the row whose time all rows have; None with equal steps.
    """

    setting: str
    student: str
    row: str
    scale: float
    seed: int
    equal_time: bool
    digest: str
    reference: str | None = None

    @property
    def name(self) -> str:
        """Return the run's name."""
        return "-".join([self.row, *([] if self.scale == 1 else [f"x{self.scale:g}"]), f"seed{self.seed}"])

    @property
    def folder(self) -> Path:
        """Return its folder below that of all runs."""
        return Path(self.setting.replace(" ", "-"), "equal-time" if self.equal_time else "equal-steps", self.name)

    def keys(self, splits: Sequence[str]) -> list[tuple[Any, ...]]:
        """Return the keys of its results, as `fastkd.cli._grid.records.key_of` gives them."""
        first = (self.setting, self.student, self.row, self.scale, self.seed)
        return [(*first, split, self.equal_time) for split in splits]


def load_grid(path: Path, *, seeds: Sequence[int] = ()) -> Grid:
    """Return the grid in a YAML file.

    Relative paths of ``results``, ``scale`` and ``extends`` refer to the file's folder, those of the settings and of
    ``work`` to the current one. With ``extends: other.yaml`` the file states how it differs from another: ``settings``
    are merged, other keys replaced. ``rows`` names the rows to run: a list of rows of the other grid, or a mapping with
    new settings, or null for a row as it is there.

    Args:
        path: the file.
        seeds: seeds in place of the file's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a grid; the message names the key.
    """
    values = _read(path)
    values.setdefault("results", f"{path.stem}.jsonl")
    values["results"] = str(path.parent / values["results"])
    values.setdefault("work", "runs/experiments")
    values["source"] = str(path)
    if seeds:
        values["seeds"] = list(seeds)
    return convert(values, Grid, str(path))  # type: ignore[no-any-return]


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no grid at {path}: expected a YAML file, such as benchmarks/evidence/main.yaml")
    if path.resolve() in below:
        raise ValueError(f"{path}: extends itself, directly or through another grid: name a grid that does not")
    values = read_mapping(path, str(path))
    if isinstance(values.get("scale"), str):
        values["scale"] = str(path.parent / values["scale"])
    base = values.pop("extends", None)
    if base is None:
        return values
    source = path.parent / str(base)
    merged = _read(source, (*below, path.resolve()))
    merged.pop("results", None)
    for key in ("rows", "settings"):
        if not isinstance(merged.get(key), Mapping):
            raise ValueError(f"{source}: {key} must be a mapping for {path} to extend it, got {merged.get(key)!r}")
    own: Any = values.pop("rows", list(merged["rows"]))
    own = dict.fromkeys(own) if isinstance(own, list) else own
    changes = values.pop("settings", {})
    for key, given in (("rows", own), ("settings", changes)):
        if not isinstance(given, Mapping):
            expected = "a list of rows or a mapping" if key == "rows" else "a mapping"
            raise ValueError(f"{path}: {key} must be {expected}, got {given!r}; omit the key to change nothing")
    check_rows([row for row, differs in own.items() if differs is None], merged["rows"], f"{path}: rows")
    needs_other = bool({*OF_CACHE} & {*changes})  # another cache, of the selected rows only
    merged["every_row"] = {} if needs_other else merged.get("every_row") or merged["rows"]
    merged["rows"] = {row: merged["rows"][row] if differs is None else differs for row, differs in own.items()}
    merged["settings"] = {**merged["settings"], **changes}
    return merged | values


def check_rows(rows: Sequence[str], known: Mapping[str, Any], where: str) -> None:
    """Raise ``ValueError`` for a row that a grid lacks; ``where`` begins the message."""
    for row in rows:
        if row not in known:
            raise ValueError(f"{where}: no row is named {row!r}.{suggestion(row, known)}")


def _scaled(term: Any, scale: float) -> Any:
    changes = {name: getattr(term, name) * scale for name in ("share", "weight") if getattr(term, name) is not None}
    return replace(term, **changes)
