"""Settings of a training run: the dataclasses behind the flags of ``fastkd train`` and ``distill`` and their YAML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from fastkd._messages import suggestion
from fastkd.cli._arguments import Config
from fastkd.cli._data import Data, DataArgs, MixArgs
from fastkd.cli._shipped import SHIPPED
from fastkd.data._files import absolute
from fastkd.distill.schedules import Kind, Schedule
from fastkd.train.config import TrainConfig

REQUIRED = "???"  # in YAML, as in OmegaConf: a flag must give the value

TapTarget = str | tuple[str, int | str]
"""A module path, or a path and the part of the module's output, or ``path[tokens]`` of an attention module."""


@dataclass(kw_only=True)
class ScheduleSettings:
    """Schedule of a weight over the steps; see `fastkd.distill.Schedule`.

    Raises:
        ValueError: the schedule is not defined.
    """

    schedule: Kind = "constant"
    """constant, linear or cosine, between the steps start and stop."""
    start: int | float = 0
    """First step at which the loss counts; a number between 0 and 1 is a share of all steps."""
    stop: int | float | None = None
    """Step from which the weight is multiplied by final, or a share of all steps, such as 0.5; null: the last step for
    linear and cosine, none for constant."""
    initial: float = 1.0
    """Factor of the weight at start."""
    final: float = 0.0
    """Factor of the weight from stop on."""

    def __post_init__(self) -> None:
        for name in ("start", "stop"):
            value = getattr(self, name)
            if type(value) is float and not 0 < value < 1:
                raise ValueError(
                    f"schedule: {name} must be a step, an integer >= 0, or a share of all steps between 0 and 1, "
                    f"got {value!r}"
                )
        if self.stop is None or isinstance(self.start, float) == isinstance(self.stop, float):
            self.resolve(1_000_000)
        elif isinstance(self.start, float):  # which of them comes first depends on the steps
            Schedule(self.schedule, 0, self.stop, self.initial, self.final)  # type: ignore[arg-type]
        else:
            Schedule(self.schedule, self.start, self.start + 1, self.initial, self.final)

    def resolve(self, steps: int, name: str = "") -> Schedule | None:
        """Return the schedule in a run of this many steps; None for a weight that never changes.

        Raises:
            ValueError: the schedule is not defined; the message begins with ``name``.
        """
        start = round(self.start * steps) if isinstance(self.start, float) else self.start
        stop: int | None
        if isinstance(self.stop, float):
            stop = max(round(self.stop * steps), 1)  # half of a single step
        elif self.stop is None and self.schedule != "constant":
            stop = max(steps, start + 1) if type(start) is int else steps
        else:
            stop = self.stop
        if float in (type(self.start), type(self.stop)) and stop is not None and stop <= start:
            raise ValueError(
                f"{name and f'{name}: '}schedule: stop must be after start, got start={self.start} and "
                f"stop={self.stop}, which of {steps} steps are {start} and {stop}"
            )
        schedule = Schedule(self.schedule, start, stop, self.initial, self.final)
        return None if schedule == Schedule(final=self.final) else schedule


@dataclass(kw_only=True)
class TermSettings(ScheduleSettings):
    """One distillation term.

    Raises:
        ValueError: a value is out of range, or both share and weight are given.
    """

    shorthand = "share"  # what a number alone means

    share: float | None = None
    """Norm of the term's gradient relative to the task's, measured on the first batches."""
    weight: float | None = None
    """Weight, in place of a share."""
    loss: str | None = None
    """A function or module of fastkd.losses, for a term that is not one of fastkd.distill.recipes.TERMS."""
    student: str | tuple[str, ...] | None = None
    """Path into the student's output, or the name of a tap; a list for a loss of several tensors."""
    teacher: str | tuple[str, ...] | None = None
    """The same for the teacher; null: as for the student."""
    temperature: float | tuple[float, float] | None = None
    """Temperature of the loss, or [student's, teacher's]; null: its default."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None and self.weight is not None:
            raise ValueError(f"share={self.share:g} and weight={self.weight:g} exclude each other: give one of them")
        for name in ("share", "weight", "temperature"):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if value is not None and not all(0 <= number < float("inf") for number in numbers):
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def without_schedules(terms: Mapping[str, TermSettings]) -> dict[str, TermSettings]:
    """Return the terms with constant weights."""
    plain: dict[str, Any] = {one.name: one.default for one in fields(ScheduleSettings)}
    return {name: replace(term, **plain) for name, term in terms.items()}


def parse_terms(texts: Sequence[str]) -> dict[str, TermSettings]:
    """Convert ``["first_order=0.5", "logit=0.2,temperature=2,schedule=linear"]`` to a dict of name to settings.

    Raises:
        ValueError: a term is repeated, or an entry cannot be read.
    """
    terms: dict[str, TermSettings] = {}
    for text in texts:
        head, *rest = _split(text)
        name, equals, share = head.partition("=")
        if not name or name in terms:
            raise ValueError(f"terms: expected each term once, as name=share (first_order=0.5), got {text!r}")
        settings = [f"share={share}", *rest] if equals else rest
        terms[name] = _parse(TermSettings, settings, f"term {text!r}: expected name=share (first_order=0.5)")
    return terms


def _split(text: str) -> list[str]:
    """Return the parts between commas, except for those within the brackets of a list or a mapping."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def parse_schedule(texts: Sequence[str]) -> ScheduleSettings:
    """Convert ``["schedule=linear", "stop=500"]``.

    Raises:
        ValueError: an entry cannot be read.
    """
    return _parse(ScheduleSettings, texts, "expected key=value (start=500)")


def _parse(kind: type[Any], texts: Sequence[str], expected: str) -> Any:
    """Return an instance from ``key=value`` texts; values are read as in YAML."""
    from fastkd.cli._convert import convert, read_yaml  # PyYAML is not needed by other commands

    known = [one.name for one in fields(kind)]
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key in values:
            raise ValueError(f"{expected}, with each key once, got {text!r}")
        if key not in known:
            raise ValueError(f"{expected}: nothing is named {key!r}.{suggestion(key, known)}")
        values[key] = read_yaml(value)
    return convert(values, kind, expected)


def _show(settings: Any) -> list[str]:
    """Return what differs from the defaults as ``key=value`` texts."""
    pairs = [(one.name, getattr(settings, one.name)) for one in fields(settings)]
    plain = type(settings)()
    shown = {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}
    return [f"{name}={shown[name]}" for name, value in pairs if value != getattr(plain, name) and name != "share"]


def show_terms(terms: Mapping[str, TermSettings]) -> list[str]:
    """Return the texts that `parse_terms` reads."""
    heads = {name: name if term.share is None else f"{name}={term.share!r}" for name, term in terms.items()}
    return [",".join([heads[name], *_show(term)]) for name, term in terms.items()]


def parse_taps(texts: Sequence[str]) -> dict[str, TapTarget]:
    """Convert ``["map=encoder.layer4", "words=text:last_hidden_state", "a=blocks.11.attn[1:]"]`` to a dict.

    Raises:
        ValueError: an entry is not name=path, or a name is repeated.
    """
    taps: dict[str, TapTarget] = {}
    for text in texts:
        name, equals, target = text.partition("=")
        path, colon, part = (target, "", "") if target.endswith("]") else target.partition(":")
        if not equals or not name or not path or name in taps:
            raise ValueError(f"taps: expected each tap once, as name=path (map=encoder.layer4), got {text!r}")
        taps[name] = (path, int(part) if part.isdigit() else part) if colon else path
    return taps


def show_taps(taps: Mapping[str, TapTarget]) -> list[str]:
    """Return the texts that `parse_taps` reads."""
    return [
        f"{name}={target if isinstance(target, str) else ':'.join(map(str, target))}" for name, target in taps.items()
    ]


def parse_ranks(texts: Sequence[str]) -> dict[str, int]:
    """Convert ``["stages.2=32"]`` to a dict of path to rank.

    Raises:
        ValueError: an entry is not path=rank, or a path is repeated.
    """
    ranks: dict[str, int] = {}
    for text in texts:
        path, _, rank = text.partition("=")
        if not path or path in ranks or not rank.isdigit():
            raise ValueError(f"pca: expected each path once, as path=rank (stages.2=32), got {text!r}")
        ranks[path] = int(rank)
    return ranks


def show_ranks(ranks: Mapping[str, int]) -> list[str]:
    """Return the texts that `parse_ranks` reads."""
    return [f"{path}={rank}" for path, rank in ranks.items()]


def _flag(
    metavar: str, kind: type[Any], parse: Callable[[Sequence[str]], Any], show: Callable[[Any], list[str]]
) -> Any:
    """Return how a flag with any number of texts is read and shown."""
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{metavar} ...]",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=show,
    )


Terms = Annotated[dict[str, TermSettings], _flag("NAME=SHARE", dict, parse_terms, show_terms)]
TapPaths = Annotated[dict[str, TapTarget], _flag("NAME=PATH", dict, parse_taps, show_taps)]
Ranks = Annotated[dict[str, int], _flag("PATH=RANK", dict, parse_ranks, show_ranks)]
TaskSchedule = Annotated[ScheduleSettings, _flag("KEY=VALUE", ScheduleSettings, parse_schedule, _show)]


def _missing() -> Any:
    """Return tyro's mark of a required value."""
    return tyro.MISSING


@dataclass(kw_only=True)
class RunSettings:
    """Settings that ``fastkd train`` and ``fastkd distill`` share."""

    data: Data = field(default_factory=lambda: DataArgs(data=_missing()))
    """Location of the data."""
    shards: Path | None = None
    """A folder of shards, written by ``fastkd.data.write_shards``, to read the training set from in sequence, in place
    of the split train of --data; needs the extra [stream]."""
    shuffle_buffer: int = 1000
    """Samples that a loading process shuffles among each other, with --shards."""
    labels: float = 1.0
    """Share of the training images whose masks are used, the same images in every run; with a teacher, the others are
    only distilled."""
    out: Path = field(default_factory=_missing)
    """Folder for log, checkpoints and config.yaml."""
    backbone_weights: str | None = None
    """Weights of a new model's backbone: "timm" for timm's published ones (downloaded once), the path of a file under
    timm's names, or "random"; default: random, with a warning."""
    text_weights: str | None = None
    """Weights of a new model's text encoder: a local folder, a hub name (downloaded once), or "random"; default:
    random, with a warning."""
    config: Config = field(default_factory=TrainConfig)
    """Optimiser, precision, evaluation and checkpoints."""


@dataclass(kw_only=True)
class TrainSettings(RunSettings):
    """Settings of ``fastkd train``."""

    model: str = "shapes-student"
    """A preset's name, a config.json, or a folder written by save_pretrained."""


@dataclass(kw_only=True)
class DistillSettings(RunSettings):
    """Settings of ``fastkd distill``."""

    teacher: str | None = None
    """A folder written by save_pretrained, a LAVT (.safetensors from ``fastkd convert``, or its .pth), a folder or
    hub name of transformers' CLIPSeg or SAM 3, or a shipped teacher: "shapes" of make-shapes, "shapesref" of
    make-shapesref; default: "shapes", or the one in --teacher-cache."""
    student: str = "shapes-student"
    """A preset's name, a config.json, or a folder written by save_pretrained."""
    terms: Terms = field(default_factory=lambda: {"first_order": TermSettings(share=0.5)})
    """Terms as name=share, such as ``first_order=0.5 logit=0.2``. A share is the norm of the term's gradient relative
    to the task's, measured on the first batches. More after commas: ``logit,weight=2``, ``logit=0.2,temperature=2``
    (``temperature=[2,4]`` for the student's and the teacher's), ``logit=0.2,schedule=linear,stop=800``.
    docs/distiller.md lists the names. A teacher with its own tokenizer supports ``mask``, and
    ``pixel_pixel`` if it compares pixels with words; ``attention`` compares the taps of that name."""
    task: TaskSchedule = field(default_factory=ScheduleSettings)
    """Schedule of the task loss, such as ``start=800``: with terms that stop there, the student is first distilled and
    then trained on the task alone."""
    student_taps: TapPaths = field(default_factory=dict)
    """Names for parts of the student that its output lacks: name=module.path; name=module.path:part for a part of the
    module's output; name=module.path[tokens] for queries and keys of an attention module, [:] for all tokens, [1:]
    without the first."""
    teacher_taps: TapPaths = field(default_factory=dict)
    """The same for the teacher."""
    teacher_tokenizer: str | None = None
    """Path of the teacher's tokenizer if it differs from the student's; those of CLIPSeg and SAM 3 are looked up next
    to their weights."""
    teacher_cache: Path | None = None
    """A folder written by ``fastkd cache``, read in place of running the teacher; --teacher, if given, must be the one
    that was cached."""


def with_absolute_paths(settings: RunSettings) -> Any:
    """Return the settings with every local path absolute, so that they mean the same in another folder."""
    data = settings.data
    shared: dict[str, Any] = {
        "data": absolute(data.data),
        "image_root": data.image_root and absolute(data.image_root),
        "tokenizer": _absolute(data.tokenizer),
        "mix": tuple(MixArgs.parse(text).absolute() for text in data.mix),
    }
    changes: dict[str, Any] = {"data": replace(data, **shared), "out": absolute(settings.out)}
    changes["shards"] = settings.shards and absolute(settings.shards)
    names = ("backbone_weights", "text_weights", "model", "teacher", "student", "teacher_tokenizer")
    changes |= {name: _absolute(getattr(settings, name)) for name in names if hasattr(settings, name)}
    if isinstance(settings, DistillSettings) and settings.teacher_cache is not None:
        changes["teacher_cache"] = absolute(settings.teacher_cache)
    return replace(settings, **changes)


def _absolute(name: str | None) -> str | None:
    """Return a local path as an absolute one, other names as they are."""
    if name in (None, *SHIPPED, "timm", "random"):
        return name
    path = Path(str(name)).expanduser()
    return str(absolute(path)) if path.exists() else name
