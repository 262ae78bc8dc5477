"""Continue a run in its folder: compare settings, and keep the log up to the checkpoint's step."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd._atomic import remove_leftovers
from fastkd._messages import suggestion
from fastkd.distill.distiller import Distiller
from fastkd.distill.terms import loss_and_options
from fastkd.evaluate.result import EvalResult
from fastkd.train.checkpoint import FOLDER, find_checkpoints, latest_checkpoint, read_state
from fastkd.train.config import TrainConfig
from fastkd.train.teacher_cache.reader import teacher_settings
from fastkd.train.trackers import PACKAGES

# These do not influence the result, so they may differ without permission.
_FREE = frozenset(
    {
        "workers",
        "log_every",
        "gradients_every",
        "tracker",
        "checkpoint_every",
        "keep_checkpoints",
        "eval_batch_size",
        "check",
        "shard_teacher",
        "offload_teacher",
        "allow_untrained_teacher",
    }
)


def check_run_folder(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Raise ``FileExistsError`` unless a run can begin in a folder or, with ``resume``, continue there."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out_dir {str(folder)!r} is a file; pass a folder")
    holds_run = any((folder / name).exists() for name in ("log.jsonl", FOLDER))
    if holds_run and not overwrite and not resume:
        raise FileExistsError(
            f"out_dir {str(folder)!r} holds an earlier run; choose another folder, pass overwrite=True (--overwrite), "
            "or continue it with resume=True (--resume)"
        )
    others = {path.name for path in folder.iterdir()} - set(PACKAGES) if folder.is_dir() else ()  # no trackers' folders
    if resume and others and not holds_run:
        raise FileExistsError(
            f"out_dir {str(folder)!r} is not a run: it has neither log.jsonl nor {FOLDER}/; resume=True (--resume) "
            "needs the folder of a run, or one that is empty or does not exist yet"
        )


def find_start(folder: Path) -> Path | None:
    """Return the checkpoint to continue from, or None to start afresh; remove what killed processes left half-written.

    Raises:
        FileExistsError: the folder is not a run, or a complete run without checkpoints.
    """
    check_run_folder(folder, overwrite=False, resume=True)
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    log = folder / "log.jsonl"
    remove_leftovers(folder)
    if (folder / FOLDER).is_dir():
        remove_leftovers(folder / FOLDER)
        if (path := latest_checkpoint(folder / FOLDER)) is not None:
            return path
        if find_checkpoints(folder / FOLDER):
            raise FileExistsError(
                f"out_dir {str(folder)!r}: none of its checkpoints can be read; restore one, or pass overwrite=True "
                "(--overwrite) in place of resume to start afresh"
            )
    lines = read_lines(log)
    if lines and lines[-1].get("event") == "end" and "samples_per_second" in lines[-1]:
        raise FileExistsError(
            f"out_dir {str(folder)!r} holds a complete run without checkpoints; choose another folder or pass "
            "overwrite=True (--overwrite)"
        )
    return None


def saved_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in a folder, empty if it has no readable checkpoint."""
    for path in find_checkpoints(folder / FOLDER).values():
        with contextlib.suppress(ValueError):  # `find_start` warns about it
            return dict(read_state(path)["settings"])
    return {}


def run_settings(
    config: TrainConfig,
    distiller: Distiller,
    *,
    device: torch.device,
    precision: str,
    processes: int,
    samples: int,
    val_samples: int | None,
    further: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what determines a run's result, by flat key, as JSON values.

    Args:
        config: device and precision are replaced by those in effect.
        distiller: weights, schedules, losses, selectors and options of its terms, and a digest of its teacher.
        device: device in effect.
        precision: precision in effect.
        processes: number of processes.
        samples: size of the training set.
        val_samples: size of the validation set.
        further: settings that only the caller knows, such as paths.
    """
    settings: dict[str, Any] = {**asdict(config), "device": device.type, "precision": precision}
    settings = {key: value for key, value in settings.items() if key not in _FREE}
    settings |= {"processes": processes, "samples": samples, "val_samples": val_samples}
    for name, term in distiller.terms.items():
        loss, options = loss_and_options(term)
        settings[f"terms.{name}"] = _qualified_name(loss)
        settings[f"weights.{name}"] = term.weight
        if isinstance(loss, nn.Module):
            options = {**vars(loss), **options}
        plain = {k: v for k, v in options.items() if _is_plain(v) and k[0] != "_"}
        plain |= {"student": _selector(term.student), "teacher": _selector(term.teacher)}
        settings |= {f"terms.{name}.{key}": value for key, value in plain.items() if key not in ("training", "backend")}
    settings |= {f"schedules.{name}": asdict(schedule) for name, schedule in distiller.schedules.items()}
    if distiller.teacher is not None:
        settings |= teacher_settings(distiller.teacher)
    return json.loads(json.dumps(settings | dict(further), default=str))  # type: ignore[no-any-return]


def check_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ from those of the run, key to (before, now).

    Raises:
        ValueError: a setting differs and neither it nor its group (``weights`` of ``weights.kd``) is in ``allowed``, or
            ``allowed`` names an unknown one.
    """
    keys = list(dict.fromkeys([*before, *now]))
    known = {*keys, *(key.partition(".")[0] for key in keys)}
    for key in allowed:
        if key not in known:
            raise ValueError(f"resume_allow (--resume-allow): no setting is named {key!r}.{suggestion(key, known)}")
    changed = {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}
    refused = {key: values for key, values in changed.items() if not {key, key.partition(".")[0]} & set(allowed)}
    if refused:
        listed = ", ".join(f"{key}: {old!r} → {new!r}" for key, (old, new) in refused.items())
        raise ValueError(
            f"the run to resume has other settings ({listed}); restore them, or allow the change by name: "
            f"resume_allow={sorted(refused)} (--resume-allow {' '.join(sorted(refused))})"
        )
    return changed


def read_lines(log: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; a line cut off by the end of the process is skipped."""
    lines = []
    for text in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def lines_until(lines: Sequence[dict[str, Any]], state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of a log that precede a checkpoint with this ``state.json``."""
    evaluated = {evaluation["step"] for evaluation in state["evaluations"]}

    def precedes(line: Mapping[str, Any]) -> bool:
        step = line.get("step", 0)
        if line.get("event") == "train":
            return bool(step <= state["reported"])
        return step in evaluated if line.get("event") == "eval" else bool(step <= state["step"])

    return [line for line in lines if precedes(line)]


def evaluation_to_json(step: int, result: EvalResult) -> dict[str, Any]:
    """Return an evaluation without its per-sample values."""
    return {"step": step, **result.to_dict()}


def evaluation_from_json(values: Mapping[str, Any]) -> tuple[int, EvalResult]:
    """Return step and result of an evaluation; its per-sample values are empty."""
    return values["step"], EvalResult.from_dict({name: value for name, value in values.items() if name != "step"})


def _is_plain(value: Any) -> bool:
    """Return whether a value can be compared after a round trip through JSON."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, str | int | float | bool)


def _selector(selector: Any) -> Any:
    """Return a selector as a JSON value; a function by its name."""
    if isinstance(selector, tuple):
        return [_selector(part) for part in selector]
    return selector if isinstance(selector, str | None) else _qualified_name(selector)


def _qualified_name(loss: Any) -> str:
    while isinstance(loss, functools.partial):
        loss = loss.func
    kind = type(loss) if isinstance(loss, nn.Module) or not hasattr(loss, "__qualname__") else loss
    return f"{kind.__module__}.{kind.__qualname__}"
