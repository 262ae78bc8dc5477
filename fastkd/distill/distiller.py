"""The distiller: a student, a frozen teacher, a task loss and distillation terms as one module."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastkd._messages import suggestion
from fastkd._wrappers import is_sharded, uncompiled, unwrap
from fastkd.distill import checks, words
from fastkd.distill.forward import normalisation, renormalise, run_model
from fastkd.distill.gradients import GradientReport, balanced_weights, preserve_state, report_gradients
from fastkd.distill.recorded import RecordedTeacher
from fastkd.distill.schedules import Schedule
from fastkd.distill.selectors import select
from fastkd.distill.taps import Taps
from fastkd.distill.terms import (
    Term,
    check_relational,
    loss_and_options,
    named_parameters,
    teacher_paths,
    term_value,
)


@dataclass
class DistillOutput:
    """Output of a `Distiller`: the loss to call ``backward`` on, and its parts.

    Attributes:
        loss: task + Σ weight · term, a scalar, with the weights of the step where there are schedules.
        task: the task loss.
        terms: name to unweighted term; 0 for one whose schedule is 0 at this step, which is not computed.
        student: the student's output.
        teacher: the teacher's output; None without a teacher, or if no term is computed at this step.
    """

    loss: Tensor
    task: Tensor
    terms: dict[str, Tensor]
    student: Any
    teacher: Any


class Distiller(nn.Module):
    """A student that learns from its task and from a frozen teacher, as one module for any training loop.

    The teacher is kept outside the module tree: ``parameters()``, ``state_dict()``, ``train()`` and data-parallel
    wrappers skip it, but ``.to()`` and ``.cuda()`` move it. It runs under ``torch.no_grad()``. Parameters of loss
    modules (aligners) are in ``parameters()`` and never in the student.

    Args:
        student: the model that learns.
        teacher: the model to learn from, in ``eval()`` mode and with ``requires_grad_(False)``; None trains the
            student alone.
        task_loss: ``task_loss(student_output, batch)`` → scalar.
        terms: the distillation terms, `Term`.
        inputs: keys of the batch to pass to the models as keyword arguments, where the batch has them. If it has
            ``teacher_input_ids`` (``teacher_`` plus a key), the teacher receives that instead: the sentence tokenised
            by its own tokenizer. Words then differ between the two sides, so the only cross-modal term accepted is
            ``"pixel_pixel"``, with a pair of word masks. ``image`` is normalised for the student and converted for
            a teacher with another normalisation, if both models declare theirs. A model whose weights are not float32
            computes in their dtype.
        student_taps: name to module path (or a `Taps`) for features missing from the student's output; terms select
            them by name.
        teacher_taps: the same for the teacher.
        task_schedule: factor of the task loss by step, like `Term.schedule`; ``Schedule(start=1000)`` with terms that
            stop there first distils and then trains on the task alone.

    Raises:
        ValueError: teacher = student, terms without a teacher, two terms of one name, an unknown tap path.
        TypeError: a model that is not a module, a task loss that is not callable, a term that is not a `Term`, or a
            schedule that is not a `Schedule`.

    Attributes:
        timer: None, or a function from "student", "teacher" or "losses" to a context in which `forward` runs that part.

    Example:
        >>> teacher = RISModel.from_pretrained("teacher").eval().requires_grad_(False)
        >>> distiller = fastkd.Distiller(student, teacher, segmentation_loss, [
        ...     fastkd.Term(losses.channel_distribution_kd, "decoder_features", weight=4.0),
        ...     fastkd.Term(losses.cross_modal_kd_from_logits, "pixel_word_logits.*", weight=0.2,
        ...                 kwargs={"word_mask": "batch.word_mask"}),
        ... ])
        >>> print(distiller.check(batch))  # finds silent mistakes, shows each term's gradient norm
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
        task_schedule: Schedule | None = None,
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
                raise ValueError(f"terms: two terms are named {term.name!r}; give each Term its own name=")
            self.terms[term.name] = replace(term)
        losses = {t.name: loss_and_options(t)[0] for t in terms}
        self.term_modules = nn.ModuleDict({name: loss for name, loss in losses.items() if isinstance(loss, nn.Module)})
        parameters = {name: value for t in terms for name, value in named_parameters(t).items()}
        if parameters:
            self.term_parameters = nn.ParameterDict(parameters)
        self._student_taps = _as_taps(student, student_taps)
        self._teacher_taps = _as_taps(teacher, teacher_taps)
        if not isinstance(task_schedule, Schedule | None):
            raise TypeError(f"task_schedule must be a Schedule or None, got {task_schedule!r}")
        self.task_schedule = task_schedule
        self._step: int | None = None
        self._factors: dict[str, float] | None = None  # "task" and term name to factor at the step
        self.timer: Callable[[str], AbstractContextManager[Any]] | None = None

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher."""
        return self._teacher[0]

    @property
    def teacher_tap_targets(self) -> dict[str, tuple[str, int | str | None]]:
        """The teacher's taps: name to module path and index."""
        if isinstance(self.teacher, RecordedTeacher):
            return dict(self.teacher.taps)
        return {} if self._teacher_taps is None else dict(self._teacher_taps.targets)

    @property
    def weights(self) -> dict[str, float]:
        """Term name to weight."""
        return {name: term.weight for name, term in self.terms.items()}

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the weights of the named terms."""
        for name in weights:
            if name not in self.terms:
                raise ValueError(f"weights: no term named {name!r}.{suggestion(name, self.terms)}")
        self.terms |= {name: replace(self.terms[name], weight=weight) for name, weight in weights.items()}

    @property
    def schedules(self) -> dict[str, Schedule]:
        """``"task"`` and term name to schedule, where there is one."""
        named = {"task": self.task_schedule, **{name: term.schedule for name, term in self.terms.items()}}
        return {name: schedule for name, schedule in named.items() if schedule is not None}

    def set_step(self, step: int) -> None:
        """Set the step, counted from 0, whose schedules apply from now on; needed before each step if there are any.

        A term whose factor is 0 is not computed, and the teacher does not run while there is no other term.

        Raises:
            ValueError: a negative step, or one that is not an integer.
        """
        if isinstance(step, bool) or not isinstance(step, numbers.Integral) or step < 0:
            raise ValueError(f"step: expected an integer >= 0, counted from 0, got {step!r}")
        self._step = step
        scheduled = self.schedules
        if scheduled:
            names = ("task", *self.terms)
            self._factors = {name: scheduled[name].factor(step) if name in scheduled else 1.0 for name in names}

    def weights_at(self, step: int) -> dict[str, float]:
        """Return the weights at a step, counted from 0: ``"task"`` and term name to weight times schedule."""
        weights, scheduled = {"task": 1.0, **self.weights}, self.schedules
        return {n: w * scheduled[n].factor(step) if n in scheduled else w for n, w in weights.items()}

    def with_teacher(self, teacher: nn.Module) -> Distiller:
        """Return a distiller with the same student, terms, weights and aligners, but another teacher.

        Taps of the present teacher are not kept: they watch its modules.
        """
        terms = list(self.terms.values())
        return Distiller(
            self.student,
            teacher,
            self.task_loss,
            terms,
            inputs=self.inputs,
            student_taps=self._student_taps,
            task_schedule=self.task_schedule,
        )

    def forward(self, batch: Mapping[str, Any]) -> DistillOutput:
        """Run both models and every loss on one batch."""
        factors = self._factors
        if factors is None and self.schedules:
            raise ValueError(
                f"{next(iter(self.schedules))!r} has a schedule: call distiller.set_step(step), counted from 0, before "
                "each step (fastkd.train.train does)"
            )
        skipped = [] if factors is None else [name for name in self.terms if factors[name] == 0]
        with self._timed("student"):
            student = run_model(self.student, **self.model_inputs(batch))
        with self._timed("teacher"):
            teacher = self.run_teacher(batch) if not skipped or len(skipped) < len(self.terms) else None
        words_differ = words.has_teacher_words(self.inputs, batch)
        terms: dict[str, Tensor] = {}
        taps = self._student_taps, self._teacher_taps
        parameters = dict(self.term_parameters.items()) if hasattr(self, "term_parameters") else None
        with self._timed("losses"):
            task = self.task_loss(student, batch)
            loss = task if factors is None or self.task_schedule is None else factors["task"] * task
            for name, term in self.terms.items():
                if name in skipped:
                    terms[name] = torch.zeros_like(task)
                    continue
                if words_differ:
                    words.check_term(name, *loss_and_options(term))
                terms[name] = value = term_value(term, student, teacher, batch, *taps, parameters)
                weight = term.weight if factors is None else term.weight * factors[name]
                loss = loss + weight * value
        for each in taps:
            if each is not None:
                each.clear()
        return DistillOutput(loss, task, terms, student, teacher)

    def _timed(self, part: str) -> AbstractContextManager[Any]:
        if torch.compiler.is_compiling() or self.timer is None:
            return nullcontext()
        return self.timer(part)

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the student's inputs from a batch."""
        checks.check_batch(batch, self.inputs)
        return {key: batch[key] for key in self.inputs if key in batch}

    def run_teacher(self, batch: Mapping[str, Any]) -> Any:
        """Return the teacher's output, computed without a graph."""
        if self.teacher is None:
            return None
        checks.check_batch(batch, self.inputs)
        if unwrap(self.teacher).training:
            raise ValueError("teacher is in train mode: its dropout and batch statistics are on; call teacher.eval()")
        if isinstance(self.teacher, RecordedTeacher):
            return self.teacher.output(batch)
        with torch.no_grad():
            return run_model(self.teacher, **self._teacher_inputs(batch))

    def record_teacher(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Run the teacher and return what the terms read from its output, by path: tensors or lists of tensors.

        Raises:
            ValueError: a term selects by a function, or something that does not exist.
        """
        paths = [path for term in self.terms.values() for path in teacher_paths(term)]
        output = self.run_teacher(batch)
        found = {path: select(path, output, self._teacher_taps)[0] for path in dict.fromkeys(paths)}
        if self._teacher_taps is not None:
            self._teacher_taps.clear()
        return found

    def _teacher_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the teacher's inputs from a batch, the image converted to the teacher's normalisation."""
        assert self.teacher is not None
        inputs = words.teacher_inputs(self.teacher, self.inputs, batch)
        source, target = normalisation(self.student), normalisation(self.teacher)
        image = inputs.get("image")
        if source and target and isinstance(image, Tensor) and words.PREFIX + "image" not in batch:
            inputs["image"] = renormalise(image, source, target)
        return inputs

    def check(self, batch: Mapping[str, Any]) -> GradientReport:
        """Look for mistakes that would go unnoticed in training, and raise a clear error for the first one found.

        Those are: NaN or Inf in the models' inputs; a teacher in train mode, with parameters that require a gradient,
        without weights, on another device, with NaN in its output or taps, or with values that change between two
        passes; a term or task loss that is not a finite scalar or sends no finite gradient to the student; a term that
        is exactly 0; a tap that never fires; a loss that calls torch.distributed in a process that joined no others.
        Models, gradients and random state are left unchanged. Schedules are ignored: every term is checked.

        Args:
            batch: a training batch on the distiller's device; the student should be in train mode.

        Returns:
            Values, gradient norms and shares of the terms on this batch.

        Raises:
            ValueError: one of the above.
            RuntimeError: a tap that never fires.
        """
        checks.check_batch(batch, self.inputs)
        given = (key for name in self.inputs for key in (name, words.PREFIX + name))
        checks.check_inputs({key: batch[key] for key in given if key in batch})
        if self.teacher is not None:
            checks.check_frozen(self.teacher, self.student)
            with preserve_state(self):
                checks.check_deterministic(lambda: self._teacher_tensors(batch))
        with checks.process_group_explained():
            report = self.gradient_report(batch)
        weights = batch.get("label_weight")  # of `fastkd.data.PartlyLabelled`
        checks.check_gradients(report, labelled=weights is None or bool(weights.any()))
        return report

    def gradient_report(self, batch: Mapping[str, Any], step: int | None = None, scale: float = 1.0) -> GradientReport:
        """Return values and gradient norms of the task and of every term on one batch, without side effects.

        With ``step``, schedules apply, and only the terms that are computed at that step are reported. ``scale`` is the
        loss scale of fp16.
        """
        parameters = [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("student has no parameter that requires a gradient: nothing can train")
        weights = self.weights if step is None else self.weights_at(step)
        with preserve_state(self), torch.enable_grad(), uncompiled(), self.at_step(step):
            computed = [name for name in self.terms if self._factors is None or self._factors[name]]
            output = self(batch)
            losses = {"task": output.task, **{name: output.terms[name] for name in computed}}
            return report_gradients(losses, parameters, {name: weights[name] for name in computed}, scale)

    @contextmanager
    def at_step(self, step: int | None) -> Iterator[None]:
        """Apply the schedules of another step inside the block; None ignores schedules."""
        before = self._step, self._factors
        try:
            if step is None:
                self._factors = dict.fromkeys(("task", *self.terms), 1.0) if self.schedules else None
            else:
                self.set_step(step)
            yield
        finally:
            self._step, self._factors = before

    def gradient_shares(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Return term name to gradient share: the norm of its weighted gradient divided by that of the task's."""
        return self.gradient_report(batch).shares

    def balance(
        self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]], shares: Mapping[str, float]
    ) -> dict[str, float]:
        """Set the weights of the named terms so that these batches give them the requested gradient shares.

        Args:
            batch: one batch, or several whose gradient norms are averaged.
            shares: term name to r; the weighted gradient's norm becomes r times the task's.

        Returns:
            The new weights of all terms.

        Example:
            >>> distiller.balance(batch, {"channel_distribution_kd": 0.5})
        """
        batches = [batch] if isinstance(batch, Mapping) else list(batch)
        if not batches:
            raise ValueError("balance: batch is an empty sequence; pass at least one batch")
        unknown = sorted(set(shares) - set(self.terms))
        if unknown:
            raise ValueError(f"balance: no term named {unknown[0]!r}; terms are {list(self.terms)}")
        self.set_weights(balanced_weights([self.gradient_report(one) for one in batches], shares))
        return self.weights

    def _teacher_tensors(self, batch: Mapping[str, Any]) -> checks.NamedTensors:
        """Run the teacher and return every tensor of its output and of its taps."""
        found = list(checks.named_tensors(self.run_teacher(batch)))
        if self._teacher_taps is not None:
            for name in self._teacher_taps:
                found += checks.named_tensors(self._teacher_taps[name], f"tap {name!r}")
            self._teacher_taps.clear()
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.teacher is not None and recurse and not is_sharded(unwrap(self.teacher)):  # its shards have their place
            self.teacher._apply(fn)
        return self

    def extra_repr(self) -> str:
        """Return teacher and weights, for ``print``."""
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
    if isinstance(teacher, RecordedTeacher):
        for term in terms:
            teacher.check_paths(f"term {term.name!r}", teacher_paths(term))
        check_relational(terms, teacher.reduced)
    if teacher is None and terms:
        raise ValueError(f"terms need a teacher, got {[t.name for t in terms]} and teacher=None")


def _as_taps(model: nn.Module | None, taps: Taps | Mapping[str, Any] | None) -> Taps | None:
    if isinstance(model, RecordedTeacher):
        model.check_taps(taps.targets if isinstance(taps, Taps) else taps or {})
        return None
    if taps is None or isinstance(taps, Taps):
        return taps
    if model is None:
        raise ValueError("teacher_taps need a teacher, got teacher=None")
    return Taps(model, taps)
