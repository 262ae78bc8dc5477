"""Define a case of the contract suite (a loss with options) and a problem (a case with inputs)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import contract_formulas as formulas
import torch
from torch import Tensor

from fastkd import losses

Size = tuple[int, ...]
Shapes = Callable[..., list[tuple[int, ...]]]


def no_masks(args: Sequence[Tensor]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Case:
    """One loss with one set of options, at several sizes."""

    name: str
    family: str
    loss: Callable[..., Any]
    module_class: type[torch.nn.Module] | None
    shapes: Shapes  # size -> shapes of the student's inputs, then of as many inputs of the teacher
    sizes: Mapping[str, Size]  # "small", and one for each other path through the kernels
    options: dict[str, Any] = field(default_factory=dict)
    masks: Callable[[Sequence[Tensor]], dict[str, Any]] = no_masks
    pools_the_batch: bool = False  # the loss of a sample depends on the other samples

    @property
    def temperature(self) -> float:
        """Return the temperature, the lower one of a pair."""
        return min(formulas.pair(self.options.get("temperature", 1.0)))

    @property
    def has_masks(self) -> bool:
        return self.masks is not no_masks

    @property
    def is_kl(self) -> bool:
        """Return whether the distance is a KL, which has a temperature."""
        return self.options.get("distance", "kl") == "kl"

    @property
    def has_cosines(self) -> bool:
        return self.options.get("similarity", "cosine" if self.family == "relation" else "") == "cosine"

    @property
    def takes_logits(self) -> bool:
        """Return whether the inputs are logits of a softmax, in which −inf means probability 0."""
        if self.options.get("weight"):
            return False
        return self.loss is losses.cross_modal_kd_from_logits or (
            self.family == "softmax_kl" and not self.options.get("guide")
        )

    @property
    def has_equal_shapes(self) -> bool:
        """Return whether the teacher's inputs have the shapes of the student's."""
        shapes = self.shapes(*self.sizes["small"])
        n = len(shapes) // 2
        return shapes[:n] == shapes[n:]

    @property
    def multiplies_in_torch(self) -> bool:
        """Return whether torch multiplies the inputs before a kernel reads the result."""
        return bool(self.options.get("guide")) or not {"word_descriptor", "word_channel"}.isdisjoint(
            self.options.get("terms", ())
        )

    def at(self, **options: Any) -> Case:
        return replace(self, options=self.options | options)

    def problem(
        self,
        size: str = "small",  # or "tiny", for checks that run once per input element
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        scale: float = 1.0,
        seed: int = 0,
    ) -> Problem:
        chosen = tuple(min(n, 2) for n in self.sizes["small"]) if size == "tiny" else self.sizes[size]
        return self.problem_of(chosen, dtype=dtype, device=device, scale=scale, seed=seed)

    def problem_of(self, size: Size, *, dtype: torch.dtype, device: str, scale: float = 1.0, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda shape: scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        args = [draw(shape).to(device, dtype) for shape in self.shapes(*size)]
        return Problem(self, args, self.masks(args))


@dataclass
class Problem:
    """A case with its inputs."""

    case: Case
    args: list[Tensor]
    masks: dict[str, Any]

    @property
    def students(self) -> int:
        return len(self.args) // 2

    @property
    def options(self) -> dict[str, Any]:
        return self.case.options | self.masks

    def replaced(self, *args: Tensor) -> Problem:
        return Problem(self.case, list(args), self.masks)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Problem:
        return self.replaced(*(change(x) for x in self.args))

    def leaves(self) -> Problem:
        """Return the problem with student inputs that require grad."""
        own = [x.detach().requires_grad_(i < self.students) for i, x in enumerate(self.args)]
        return self.replaced(*own)

    def loss(self, backend: str, reduction: str = "none", **more: Any) -> Tensor:
        return self.case.loss(*self.args, **self.options, reduction=reduction, backend=backend, **more)

    def run(self, backend: str, weight: Tensor | None = None) -> list[Tensor]:
        """Return the per-row losses and the gradient of their weighted sum by each student input."""
        return self._differentiated(lambda p: p.loss(backend), weight)

    def plain(self, weight: Tensor | None = None) -> list[Tensor]:
        """Return the results of the eager formula in the dtype of the inputs."""
        return self._differentiated(Problem.formula, weight)

    def formula(self) -> Tensor:
        return getattr(formulas, self.case.loss.__name__)(*self.args, **self.options)

    def exact(self, weight: Tensor | None = None) -> list[Tensor]:
        """Return the results of the eager formula in fp64 on the CPU, the oracle."""
        masks = {k: tuple(m.cpu() for m in v) if isinstance(v, tuple) else v.cpu() for k, v in self.masks.items()}
        exact = Problem(self.case, [x.detach().cpu().double() for x in self.args], masks)
        return exact.plain(None if weight is None else weight.cpu().double())

    def _differentiated(self, loss: Callable[[Problem], Tensor], weight: Tensor | None) -> list[Tensor]:
        leaves = self.leaves()
        rows = loss(leaves)
        weight = torch.ones_like(rows) if weight is None else weight.to(rows.device, rows.dtype)
        return [rows.detach(), *torch.autograd.grad(rows, leaves.args[: self.students], weight)]

    def weight(self) -> Tensor:
        """Return a different gradient for each row."""
        with torch.no_grad():
            shape = self.formula().shape
        drawn = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return (drawn + 0.25).to(self.args[0].device)

    def assert_near(
        self, got: Sequence[Tensor], want: Sequence[Tensor], ulps: float = 8, min_size: float = 1e-6
    ) -> None:
        """Assert that results differ by at most ``ulps`` fp32 roundings of the largest summand.

        ``got`` and ``want`` are losses and gradients, or gradients alone; ``min_size`` is a lower bound on the summands
        that cancel in a gradient.
        """
        assert len(got) == len(want)
        n = self.students
        largest = max(min_size, *(x.detach().abs().max().item() for x in want[-n:]))
        sizes = [self.magnitude()] * (len(want) - n) + [self.condition() * largest] * n
        for a, b, size in zip(got, want, sizes, strict=True):
            allowed = (
                ulps * size * torch.finfo(torch.float32).eps / 2 + torch.finfo(a.dtype).eps * b.detach().abs().max()
            )
            torch.testing.assert_close(
                a.detach().cpu().double(), b.detach().cpu().double(), rtol=0, atol=allowed.item()
            )

    # Conditioning of the problem, for the absolute error bounds of fp32 arithmetic.

    def condition(self) -> float:
        """Return the magnitude of the logarithms whose difference is a KL; 4 for other distances."""
        peak, entries = self._peak()
        distance = self.case.options.get("distance", "kl")
        return peak / self.case.temperature + math.log(entries) + 1 if distance == "kl" else 4.0

    def slope(self) -> float:
        """Return the largest input divided by τ, which amplifies rounding errors of a softmax in its gradient."""
        return max(x.abs().max().item() for x in self.args) / self.case.temperature

    def magnitude(self) -> float:
        """Return the size of the largest summand of a row's loss."""
        options, loss = self.case.options, self.condition()
        if self.case.loss is losses.channel_attention_kd and options["distance"] != "cosine":
            # −log CKA has a slope of up to 10; attended maps are up to twice as large as their inputs.
            return 40.0 if options["distance"] == "cka" else 16 * max(x.abs().max().item() for x in self.args) ** 2
        if options.get("distance", "kl") != "kl":
            return 4 * self._peak()[0] ** 2 if options["distance"] == "mse" else 4.0
        if self.case.family not in ("relation", "attention_kl"):  # these have no factor τ²
            loss *= max(self.case.temperature**2, 1.0) * sum(options.get("terms", {"": 1.0}).values())
        return loss * (self.args[0].shape[1] if "weight" in options else 1)  # attention weights are at most C

    def _peak(self) -> tuple[float, int]:
        """Return the largest logit or similarity, and the number of entries of a softmax."""
        args, n = [x.double().cpu() for x in self.args], self.students
        if self.case.family == "softmax_kl" or self.case.loss is losses.cross_modal_kd_from_logits:
            return max(x.abs().max().item() for x in args), max(x.numel() // x.shape[0] for x in args)
        if self.case.family == "attention_kl":
            heads = self.case.options.get("relation_heads")
            maps = [formulas.attention_logits(*args[i : i + 2], heads) for i in (0, n)]
            return max(e.abs().max().item() for e in maps), maps[0].shape[-1]
        kind = self.case.options.get("similarity", "cosine" if self.case.family == "relation" else "scaled_dot")
        entries = max(x.numel() // x.shape[0] for x in args)
        if kind == "cosine":
            return 1.0, entries
        if self.case.family == "pixel_word":
            rows = [x.flatten(2).mT if x.dim() == 4 else x for x in args]
            pairs = [(rows[0], rows[1]), (rows[n], rows[n + 1])]
            return max((v @ w.mT).abs().max().item() / v.shape[-1] ** 0.5 for v, w in pairs), entries
        rows = [x.flatten(2) for x in args]
        rows = [x.mT for x in rows] if self.case.loss is losses.pixel_relation_kd else rows
        if self.case.options.get("across_batch"):
            rows = [x.transpose(0, 1).flatten(1) for x in rows]
        return max((x.square().mean if kind == "mean" else x.square().sum)(-1).max().item() for x in rows), entries
