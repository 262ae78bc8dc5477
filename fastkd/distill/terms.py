"""`Term`: one distillation loss, the tensors it compares, and its weight."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.distill.schedules import Schedule
from fastkd.distill.selectors import Selector, select
from fastkd.distill.word_terms import pools_words
from fastkd.losses import (
    ChannelAttentionKD,
    ChannelKD,
    PixelRelationKD,
    channel_attention_kd,
    channel_kd,
    pixel_relation_kd,
)

POOLING_OPTIONS = ("across_batch", "cross_image")
"""Options of a loss that make it compare samples with each other."""

_RESERVED = ("task", "loss", "gradient")  # names of other columns of the log


@dataclass(eq=False)
class Term:
    """One distillation loss: the tensors it compares, and its weight.

    The loss is called as ``loss(*student tensors, *teacher tensors, **kwargs)`` and returns a scalar. If every
    selected value is a list (``"pixel_word_logits.*"``), it is called once per position and the term is the mean.

    Args:
        loss: a function of `fastkd.losses`, one of its modules, your own, or a ``functools.partial`` of one. A module's
            parameters (an aligner) train with the student without becoming part of it.
        student: selects from the student's output: a path (``"decoder_features"``, ``"stages.3"``, ``"stages.*"``,
            ``"stages.1:"``, the name of a tap), a callable that takes the output, or a tuple of those.
        teacher: selects from the teacher's output; default: the student's selector.
        weight: factor of the term in the total loss.
        name: name in logs and errors; default: derived from the loss.
        kwargs: further arguments of the loss. A string that begins with ``batch.``, ``student.`` or ``teacher.`` is
            looked up there at every step, also inside a tuple or list; other values are passed unchanged, and an
            ``nn.Parameter`` trains with the student.
        schedule: factor of the weight by step, for `Distiller.set_step`; None: 1 at every step.

    Raises:
        ValueError: a weight that is negative or not finite, or a name with a dot.
        TypeError: a loss that is not callable, or a schedule that is not a `Schedule`.

    Example:
        >>> Term(losses.channel_distribution_kd, "decoder_features", weight=4.0)
        >>> Term(losses.cross_modal_kd_from_logits, "pixel_word_logits.*", kwargs={"word_mask": "batch.word_mask"})
        >>> Term(losses.attention_kd, ("last.q", "last.k"))  # of an AttentionTap named "last"
    """

    loss: Callable[..., Any]
    student: Selector
    teacher: Selector | None = None
    weight: float = 1.0
    name: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise TypeError(f"Term: loss must be a function or a module, got {self.loss!r}")
        self.name = self.name or _default_name(self.loss)
        if "." in self.name or self.name in _RESERVED:
            raise ValueError(
                f"Term: name {self.name!r} must not contain a dot or be one of {_RESERVED}; pass another name="
            )
        if not (isinstance(self.weight, int | float) and math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"Term {self.name!r}: weight must be a finite number >= 0, got {self.weight!r}")
        if not isinstance(self.kwargs, Mapping):
            raise TypeError(f"Term {self.name!r}: kwargs must be a dict, got {self.kwargs!r}")
        if not isinstance(self.schedule, Schedule | None):
            raise TypeError(f"Term {self.name!r}: schedule must be a Schedule or None, got {self.schedule!r}")
        for side in ("student", "teacher"):
            selector = getattr(self, side)
            if isinstance(selector, list):
                selector = tuple(selector)
                setattr(self, side, selector)
            for part in selector if isinstance(selector, tuple) else (selector,):
                if not (isinstance(part, str) or callable(part) or (part is None and side == "teacher")):
                    raise TypeError(
                        f"Term {self.name!r}: {side} must be a path, a callable or a tuple of them, got {part!r}"
                    )


def term_value(
    term: Term,
    student: Any,
    teacher: Any,
    batch: Mapping[str, Any],
    student_taps: Mapping[str, Any] | None = None,
    teacher_taps: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Select a term's tensors from both outputs and return its loss, a scalar; errors name the term.

    ``parameters`` are the present ones of `named_parameters`, which loading or moving a module may have replaced.
    """
    side = "student"
    try:
        ours = select(term.student, student, student_taps)
        side = "teacher"
        theirs = select(term.student if term.teacher is None else term.teacher, teacher, teacher_taps)
        side = "kwargs"
        sources = {"batch": batch, "student": student, "teacher": teacher}
        options = {**term.kwargs, **_present(term, parameters)} if parameters else term.kwargs
        kwargs = {key: _look_up(value, sources) for key, value in options.items()}
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"term {term.name!r}, {side}: {error}") from error
    except Exception as error:  # raised by the user's own selector
        error.add_note(f"This is term {term.name!r} of the Distiller, selecting for {side}.")
        raise
    try:
        return _mean_loss(term, (*ours, *theirs), kwargs)
    except Exception as error:
        error.add_note(f"This is term {term.name!r} of the Distiller.")  # two terms may share one loss
        raise


def named_parameters(term: Term) -> dict[str, nn.Parameter]:
    """Return the parameters among the arguments of a term's loss, alone or in a pair, by name."""
    _, options = loss_and_options(term)
    named = dict(options)
    for key, value in options.items():
        if isinstance(value, tuple | list):
            named |= {f"{key}_{i}": each for i, each in enumerate(value)}
    return {f"{term.name}_{key}": value for key, value in named.items() if isinstance(value, nn.Parameter)}


def _present(term: Term, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of a term's loss that hold parameters, with the present ones."""
    found: dict[str, Any] = {}
    for key, value in loss_and_options(term)[1].items():
        name = f"{term.name}_{key}"
        if isinstance(value, nn.Parameter):
            found[key] = parameters[name]
        elif isinstance(value, tuple | list) and any(isinstance(each, nn.Parameter) for each in value):
            items = enumerate(value)
            found[key] = tuple(parameters[f"{name}_{i}"] if isinstance(x, nn.Parameter) else x for i, x in items)
    return found


def teacher_paths(term: Term) -> list[str]:
    """Return the paths that a term reads from the teacher's output.

    Raises:
        ValueError: it selects by a function, which has no name under which its result could be recorded.
    """
    selector = term.student if term.teacher is None else term.teacher
    parts = selector if isinstance(selector, tuple) else (selector,)
    for part in parts:
        if not isinstance(part, str):
            raise ValueError(
                f"term {term.name!r} selects from the teacher by a function ({getattr(part, '__name__', part)}), whose "
                "result cannot be recorded under a name: select by a path or the name of a tap"
            )
    paths = [str(part) for part in parts]
    pending = list(term.kwargs.values())
    while pending:
        value = pending.pop()
        if isinstance(value, str) and value.startswith("teacher."):
            paths.append(value.removeprefix("teacher."))
        elif type(value) in (tuple, list):
            pending.extend(value)
    return list(dict.fromkeys(paths))


def loss_and_options(term: Term) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return a term's loss without `functools.partial` around it, and all keyword arguments it is called with."""
    loss, options = term.loss, dict(term.kwargs)
    while isinstance(loss, functools.partial):
        options = {**loss.keywords, **options}
        loss = loss.func
    return loss, options


def pools_batch(term: Term) -> bool:
    """Return whether a term compares samples with each other."""
    loss, options = loss_and_options(term)
    return takes_group(term) or pools_words(loss, options.get("terms", getattr(loss, "terms", None)))


def takes_group(term: Term) -> bool:
    """Return whether a term compares samples with each other, and can pool those of several processes."""
    loss, options = loss_and_options(term)
    value = lambda name, default: options.get(name, getattr(loss, name, default))
    if loss is channel_attention_kd or isinstance(loss, ChannelAttentionKD):
        return bool(value("distance", "cka") == "cka")
    return any(value(name, False) for name in POOLING_OPTIONS)


def check_relational(terms: Iterable[Term], paths: Collection[str]) -> None:
    """Raise ``ValueError`` for a term that reads one of the teacher's paths and does not compare relations."""
    for term in terms:
        loss, _ = loss_and_options(term)
        relational = loss in (channel_kd, pixel_relation_kd) or isinstance(loss, ChannelKD | PixelRelationKD)
        selector = term.student if term.teacher is None else term.teacher
        selected = selector if isinstance(selector, tuple) else (selector,)
        for path in teacher_paths(term):
            if path in paths and not (relational and path in selected):
                raise ValueError(
                    f"term {term.name!r} reads {path!r} of the teacher, whose channels are reduced by PCA, but only "
                    "channel_kd and pixel_relation_kd compare such maps: cache this path without pca"
                )


def _mean_loss(term: Term, values: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    lengths = {len(value) for value in values if isinstance(value, list | tuple)}
    if not lengths:
        return _scalar(term.name, term.loss(*values, **kwargs))
    if len(lengths) > 1 or 0 in lengths or not all(isinstance(value, list | tuple) for value in values):
        received = [len(value) if isinstance(value, list | tuple) else "one tensor" for value in values]
        reason = "; an empty list means that the network does not compute it" if 0 in lengths else ""
        raise ValueError(
            f"term {term.name!r}: lists of tensors must have the same length on both sides, got {received}{reason}"
        )
    each = [_scalar(term.name, term.loss(*tensors, **kwargs)) for tensors in zip(*values, strict=True)]
    return torch.stack(each).mean()


def _scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim:
        received = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"term {name!r}: its loss must return a scalar tensor, got {received}; use reduction='mean'")
    return value


def _look_up(value: Any, sources: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        source, dot, path = value.partition(".")
        if dot and source in sources:
            return select(path, sources[source])[0]
    if type(value) in (tuple, list):
        return type(value)(_look_up(item, sources) for item in value)
    return value


def _default_name(loss: Callable[..., Any]) -> str:
    while isinstance(loss, functools.partial):
        loss = loss.func
    if isinstance(loss, nn.Module):
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(loss).__name__).lower()  # ChannelKD → channel_kd
    return getattr(loss, "__name__", type(loss).__name__).strip("<>")
