"""Build the terms of a distiller from their settings."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fastkd import losses
from fastkd._messages import suggestion
from fastkd.cli._settings import TapTarget, TermSettings
from fastkd.distill.attention_taps import AttentionTap, tapped_attention_kd
from fastkd.distill.recipes import TERMS, recipe
from fastkd.distill.terms import Term


def build_terms(settings: Mapping[str, TermSettings], steps: int) -> list[Term]:
    """Return the terms of a run of this many steps; those with a share have weight 1 and are to be balanced.

    Raises:
        ValueError: an unknown term, loss or option, or a loss without the tensors that it compares.
    """
    return [_build(name, term, steps) for name, term in settings.items()]


def shares_of(settings: Mapping[str, TermSettings]) -> dict[str, float]:
    """Return the terms that are weighted by a gradient share: name to share.

    Raises:
        ValueError: no term, or one with neither share nor weight.
    """
    if not settings:
        raise ValueError("terms: none is given, so there is nothing to distil; fastkd train trains without a teacher")
    for name, term in settings.items():
        if term.share is None and term.weight is None:
            raise ValueError(f"terms: {name!r} needs a share or a weight: name=share ({name}=0.5), or {name},weight=2")
    return {name: term.share for name, term in settings.items() if term.share is not None}


def attention_taps(taps: Mapping[str, TapTarget]) -> dict[str, TapTarget | AttentionTap] | None:
    """Return the targets of taps for a `Distiller`, ``path[tokens]`` as an `AttentionTap`; None for no tap."""
    found: dict[str, TapTarget | AttentionTap] = {}
    for name, target in taps.items():
        path, bracket, tokens = target.partition("[") if isinstance(target, str) else ("", "", "")
        found[name] = AttentionTap(path, tokens.removesuffix("]")) if bracket else target
    return found or None


def check_attention(terms: Iterable[Term], **taps: Mapping[str, Any] | None) -> None:
    """Raise ``ValueError`` if a term compares attention taps that a network does not have; ``taps`` by setting."""
    for term in terms:
        for setting, given in taps.items():
            selector = term.teacher if setting == "teacher_taps" and term.teacher is not None else term.student
            if term.loss is tapped_attention_kd and not isinstance((given or {}).get(str(selector)), AttentionTap):
                flag = f"--{setting.replace('_', '-')}"
                raise ValueError(
                    f"terms.{term.name}: compares taps of attention modules, and {setting} has none named "
                    f"{selector!r}: give {flag} {selector}=PATH[:], such as "
                    f"{selector}=text_encoder.model.encoder.layer.0.attention.self[:]"
                )


def _build(name: str, settings: TermSettings, steps: int) -> Term:
    given = dict(settings.options)
    if settings.temperature is not None:
        given["temperature"] = settings.temperature
    if settings.loss is None:
        if name not in TERMS:
            raise ValueError(
                f"terms: no term named {name!r}.{suggestion(name, TERMS)} For another one give its loss, student and "
                "teacher"
            )
        [term] = recipe([name])
    else:
        if settings.student is None:
            raise ValueError(f"terms.{name}: loss={settings.loss!r} needs student, a path or the name of a tap")
        loss = _loss(name, settings.loss)
        if inspect.isclass(loss):
            _check_options(name, loss, given)
            loss, given = loss(**given), {}
        term = Term(loss, settings.student, name=name)
    _check_options(name, term.loss, given)
    return replace(
        term,
        student=term.student if settings.student is None else settings.student,
        teacher=term.teacher if settings.teacher is None else settings.teacher,
        weight=1.0 if settings.weight is None else settings.weight,
        kwargs={**term.kwargs, **given},
        schedule=settings.resolve(steps, f"terms.{name}"),
    )


def _loss(term: str, name: str) -> Any:
    """Return a function or module class of `fastkd.losses`."""
    known = [each for each in losses.__all__ if callable(getattr(losses, each))]
    if name not in known:
        raise ValueError(f"terms.{term}.loss: fastkd.losses has no {name!r}.{suggestion(name, known)}")
    return getattr(losses, name)


def _check_options(term: str, loss: Any, given: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless a loss function, module or module class accepts these keyword arguments."""
    called = loss.forward if isinstance(loss, nn.Module) else loss
    parameters = inspect.signature(called).parameters.items()
    # Positional ones of a function are the tensors it compares; of a class, options such as student_channels.
    known = [name for name, one in parameters if inspect.isclass(loss) or one.kind is one.KEYWORD_ONLY]
    for name in given:
        if name not in known:
            label = getattr(loss, "__name__", type(loss).__name__)
            raise ValueError(f"terms.{term}: {label} has no option {name!r}.{suggestion(name, known)}")
