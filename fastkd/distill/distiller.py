"""The distiller: a student, a frozen teacher, a task loss, and the terms that bind them."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastkd._wrappers import unwrap
from fastkd.distill import checks, words
from fastkd.distill.forward import normalisation, renormalise, run_model
from fastkd.distill.selectors import Selector, hint, select
from fastkd.distill.taps import Taps

_RESERVED = ("task", "loss", "gradient")  # what logs call other things


@dataclass(eq=False)
class Term:
    """One distillation loss: what it compares, and how much it counts.

    The loss is called as ``loss(*student tensors, *teacher tensors, **kwargs)`` and returns a scalar. Where every
    selected value is a list (``"pixel_word_logits.*"``), it is called once per position and the mean is the term.

    Args:
        loss: a function of `fastkd.losses`, one of its modules, or your own. A module's parameters (an aligner) train
            with the student without becoming part of it.
        student: what to take from the student's output: a path (``"decoder_features"``, ``"stages.3"``, ``"stages.*"``,
            ``"stages.1:"``, the name of a tap), a callable that takes the output, or a tuple of those.
        teacher: the same for the teacher; as the student's where left out.
        weight: factor of the term in the loss.
        name: how logs and errors call it; the loss's name where left out.
        kwargs: further arguments of the loss. A string that begins with ``batch.``, ``student.`` or ``teacher.`` is
            looked up there at every step, also within a tuple or list; any other value is passed as it is, and an
            ``nn.Parameter`` trains with the student.

    Raises:
        ValueError: a weight that is not finite or is negative, a name with a dot.
        TypeError: a loss that cannot be called.

    Example:
        >>> Term(losses.channel_distribution_kd, "decoder_features", weight=4.0)
        >>> Term(losses.cross_modal_kd, ("stages.3", "words"), kwargs={"word_mask": "batch.word_mask"})
    """

    loss: Callable[..., Any]
    student: Selector
    teacher: Selector | None = None
    weight: float = 1.0
    name: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise TypeError(f"Term: loss must be a function or a module, got {self.loss!r}")
        self.name = self.name or _name_of(self.loss)
        if "." in self.name or self.name in _RESERVED:
            raise ValueError(
                f"Term: name {self.name!r} must hold no dot and be none of {_RESERVED}; pass another name="
            )
        if not (isinstance(self.weight, int | float) and math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"Term {self.name!r}: weight must be a finite number >= 0, got {self.weight!r}")
        if not isinstance(self.kwargs, Mapping):
            raise TypeError(f"Term {self.name!r}: kwargs must be a dict, got {self.kwargs!r}")
        for side in ("student", "teacher"):
            selector = getattr(self, side)
            if isinstance(selector, list):
                selector = tuple(selector)
                setattr(self, side, selector)
            for one in selector if isinstance(selector, tuple) else (selector,):
                if not (isinstance(one, str) or callable(one) or (one is None and side == "teacher")):
                    raise TypeError(
                        f"Term {self.name!r}: {side} must be a path, a callable or a tuple of them, got {one!r}"
                    )


@dataclass
class DistillOutput:
    """What a `Distiller` returns: the loss to call ``backward`` on, and its parts.

    Attributes:
        loss: task + Σ weight · term, a scalar.
        task: the task loss.
        terms: name to unweighted term.
        student: the student's output.
        teacher: the teacher's output, or None without a teacher.
    """

    loss: Tensor
    task: Tensor
    terms: dict[str, Tensor]
    student: Any
    teacher: Any


class Distiller(nn.Module):
    """A student that learns from its task and from a frozen teacher, as one module for any training loop.

    The teacher is held outside the module tree: it is not in ``parameters()``, ``state_dict()`` or ``train()``, and
    data-parallel wrappers do not see it, but ``.to()`` and ``.cuda()`` move it along. It runs under
    ``torch.no_grad()``. What trains beside the student (aligners of loss modules) is in ``parameters()`` and never in
    the student.

    Args:
        student: the model that learns.
        teacher: the model to learn from, in ``eval()`` mode and with ``requires_grad_(False)``; None trains the
            student alone.
        task_loss: ``task_loss(student_output, batch)`` → scalar.
        terms: the distillation terms, `Term`.
        inputs: the keys of the batch that the models take; the models get those that a batch has, and no others. Where
            a batch has ``teacher_input_ids`` (or ``teacher_`` and another of the keys), the teacher gets that under the
            key's own name: the sentence in the words of its own tokenizer. Words are then not the same on both sides,
            and of the cross-modal terms only ``"pixel_pixel"`` is taken, with a pair of word masks. The ``image`` is
            normalised for the student; a teacher whose images are normalised otherwise gets it converted, where both
            models tell. A model whose weights are not float32 computes in their type.
        student_taps: name to module path (or a `Taps`) for features that the student's output does not hold; terms
            select them by name.
        teacher_taps: the same for the teacher.

    Raises:
        ValueError: teacher = student, terms without a teacher, two terms of one name, an unknown tap path.
        TypeError: a model that is no module, a task loss that cannot be called, a term that is no `Term`.

    Example:
        >>> teacher = RISModel.from_pretrained("teacher").eval().requires_grad_(False)
        >>> distiller = fastkd.Distiller(student, teacher, segmentation_loss, [
        ...     fastkd.Term(losses.channel_distribution_kd, "decoder_features", weight=4.0),
        ...     fastkd.Term(losses.cross_modal_kd_from_logits, "pixel_word_logits.*", weight=0.2,
        ...                 kwargs={"word_mask": "batch.word_mask"}),
        ... ])
        >>> print(distiller.check(batch))  # refuses what would fail silently, shows what each term weighs
        >>> distiller(batch).loss.backward()
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        task_loss: Callable[[Any, Mapping[str, Any]], Tensor],
        terms: Sequence[Term] = (),
        *,
        inputs: Sequence[str] = ("image", "input_ids", "word_mask"),
        student_taps: Taps | Mapping[str, Any] | None = None,
        teacher_taps: Taps | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        terms = [terms] if isinstance(terms, Term) else list(terms)
        _check_arguments(student, teacher, task_loss, terms, inputs)
        self.student = student
        self._teacher = (teacher,)  # a tuple keeps it out of the module tree
        self.task_loss = task_loss
        self.inputs = tuple(inputs)
        self.terms: dict[str, Term] = {}
        for term in terms:
            if term.name in self.terms:
                raise ValueError(f"terms: two are named {term.name!r}; give each Term its own name=")
            self.terms[term.name] = replace(term)
        self.term_modules = nn.ModuleDict({t.name: t.loss for t in terms if isinstance(t.loss, nn.Module)})
        learned = {
            f"{t.name}_{key}": value
            for t in terms
            for key, value in t.kwargs.items()
            if isinstance(value, nn.Parameter)
        }
        if learned:
            self.term_parameters = nn.ParameterDict(learned)
        self._student_taps = _as_taps(student, student_taps)
        self._teacher_taps = _as_taps(teacher, teacher_taps)

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher."""
        return self._teacher[0]

    @property
    def weights(self) -> dict[str, float]:
        """Term name to weight."""
        return {name: term.weight for name, term in self.terms.items()}

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the weights of the named terms."""
        for name in weights:
            if name not in self.terms:
                raise ValueError(f"weights: no term named {name!r}.{hint(name, self.terms)}")
        self.terms |= {name: replace(self.terms[name], weight=weight) for name, weight in weights.items()}

    def forward(self, batch: Mapping[str, Any]) -> DistillOutput:
        """Run both models and every loss on one batch."""
        student = run_model(self.student, **self.model_inputs(batch))
        teacher = self.run_teacher(batch)
        apart = words.tokenised_apart(self.inputs, batch)
        task = self.task_loss(student, batch)
        loss = task
        terms: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            if apart:
                words.check_term(name, term.loss, term.kwargs)
            terms[name] = value = self._term_value(term, student, teacher, batch)
            loss = loss + term.weight * value
        for taps in (self._student_taps, self._teacher_taps):
            if taps is not None:
                taps.clear()
        return DistillOutput(loss, task, terms, student, teacher)

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of the batch goes into the student."""
        return {key: batch[key] for key in self.inputs if key in batch}

    def run_teacher(self, batch: Mapping[str, Any]) -> Any:
        """The teacher's output, without a graph."""
        if self.teacher is None:
            return None
        if unwrap(self.teacher).training:
            raise ValueError("teacher is in train mode: its dropout and batch statistics are on; call teacher.eval()")
        with torch.no_grad():
            return run_model(self.teacher, **self._teacher_inputs(batch))

    def _teacher_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of the batch goes into the teacher, the student's image as the teacher wants it normalised."""
        assert self.teacher is not None
        inputs = words.teacher_inputs(self.teacher, self.inputs, batch)
        ours, theirs = normalisation(self.student), normalisation(self.teacher)
        image = inputs.get("image")
        if ours and theirs and isinstance(image, Tensor) and words.PREFIX + "image" not in batch:
            inputs["image"] = renormalise(image, ours, theirs)
        return inputs

    def check(self, batch: Mapping[str, Any]) -> checks.GradientReport:
        """Refuse, before training, what would otherwise fail silently; see `fastkd.distill.checks.check`."""
        return checks.check(self, batch)

    def gradient_shares(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Term name to the norm of its weighted gradient over that of the task, both with respect to the student."""
        return checks.gradient_report(self, batch).shares

    def balance(
        self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]], shares: Mapping[str, float]
    ) -> dict[str, float]:
        """Set the weights of the named terms so that their gradient shares on these batches are as asked.

        Args:
            batch: one batch, or several whose gradient norms are averaged.
            shares: term name to r; the weighted gradient's norm becomes r times the task's.

        Returns:
            The weights of all terms.

        Example:
            >>> distiller.balance(batch, {"channel_distribution_kd": 0.5})
        """
        return checks.balance(self, batch, shares)

    def _term_value(self, term: Term, student: Any, teacher: Any, batch: Mapping[str, Any]) -> Tensor:
        where = "student"
        try:
            ours = select(term.student, student, self._student_taps)
            where = "teacher"
            theirs = select(term.student if term.teacher is None else term.teacher, teacher, self._teacher_taps)
            where = "kwargs"
            sources = {"batch": batch, "student": student, "teacher": teacher}
            kwargs = {key: _look_up(value, sources) for key, value in term.kwargs.items()}
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"term {term.name!r}, {where}: {error}") from error
        except Exception as error:  # a selector of the caller's own
            error.add_note(f"This is term {term.name!r} of the Distiller, selecting for {where}.")
            raise
        try:
            return self._reduced(term, (*ours, *theirs), kwargs)
        except Exception as error:
            error.add_note(f"This is term {term.name!r} of the Distiller.")  # two terms may share one loss
            raise

    def _reduced(self, term: Term, values: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        lengths = {len(value) for value in values if isinstance(value, list | tuple)}
        if not lengths:
            return _scalar(term.name, term.loss(*values, **kwargs))
        if len(lengths) > 1 or 0 in lengths or not all(isinstance(value, list | tuple) for value in values):
            shapes = [len(value) if isinstance(value, list | tuple) else "one tensor" for value in values]
            none = "; an empty list is what a network computes none of" if 0 in lengths else ""
            raise ValueError(
                f"term {term.name!r}: lists of tensors must have one length on both sides, got {shapes}{none}"
            )
        each = [_scalar(term.name, term.loss(*tensors, **kwargs)) for tensors in zip(*values, strict=True)]
        return torch.stack(each).mean()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.teacher is not None and recurse:
            self.teacher._apply(fn)
        return self

    def extra_repr(self) -> str:
        """Teacher and weights, for ``print``."""
        teacher = "None" if self.teacher is None else type(unwrap(self.teacher)).__name__
        return f"teacher={teacher}, weights={self.weights}"


def _check_arguments(student: Any, teacher: Any, task_loss: Any, terms: Sequence[Any], inputs: Any) -> None:
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be an nn.Module, got {student!r}")
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be an nn.Module or None, got {teacher!r}")
    if not callable(task_loss):
        raise TypeError(f"task_loss must be a function of (student_output, batch), got {task_loss!r}")
    for term in terms:
        if not isinstance(term, Term):
            raise TypeError(f"terms must be a list of fastkd.Term, got {term!r} in it; wrap a loss as Term(loss, ...)")
    if isinstance(inputs, str):
        raise TypeError(f"inputs must be a sequence of keys, got the string {inputs!r}; pass ({inputs!r},)")
    if teacher is not None and unwrap(teacher) is unwrap(student):
        raise ValueError("teacher and student are the same object: there is nothing to learn; pass another model")
    if teacher is None and terms:
        raise ValueError(f"terms need a teacher, got {[t.name for t in terms]} and teacher=None")


def _as_taps(model: nn.Module | None, taps: Taps | Mapping[str, Any] | None) -> Taps | None:
    if taps is None or isinstance(taps, Taps):
        return taps
    if model is None:
        raise ValueError("teacher_taps need a teacher, got teacher=None")
    return Taps(model, taps)


def _scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"term {name!r}: its loss must return a scalar tensor, got {got}; use reduction='mean'")
    return value


def _look_up(value: Any, sources: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        source, dot, path = value.partition(".")
        if dot and source in sources:
            return select(path, sources[source])[0]
    if type(value) in (tuple, list):
        return type(value)(_look_up(one, sources) for one in value)
    return value


def _name_of(loss: Callable[..., Any]) -> str:
    while isinstance(loss, functools.partial):
        loss = loss.func
    if isinstance(loss, nn.Module):
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(loss).__name__).lower()  # ChannelKD → channel_kd
    return getattr(loss, "__name__", type(loss).__name__).strip("<>")
