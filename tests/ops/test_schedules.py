"""Values that change from call to call under torch.compile: temperatures, weights and map sizes.

A schedule costs one graph for its first value and one for all others, and each value gives eager's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from contract_cases import BASIC, CASES, PLAIN, Place, Setting
from contract_problems import Problem
from contract_tools import Recorder
from gpu_kernels import require_backend
from torch import Tensor, nn

import fastkd
from fastkd import losses

Step = Callable[[list[Tensor], dict[str, Any], float | Tensor], Tensor]
TEMPERATURES = {"softmax_kl": (4.0, 3.5, 2.0, 0.6), "relation": (0.2, 0.1, 0.03, 0.02), "pixel_word": (1.5, 1.0, 0.3),
                "attention_kl": (1.5, 1.0, 0.3), PLAIN: (0.5, 0.2, 0.1)}  # fmt: skip
"""For relations of cosines both sides of 0.04, below which other statistics are stored."""


class Net(nn.Module):
    """Return the features of an image, as a student outputs them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"f": self.layer(x)}


@pytest.fixture(autouse=True)
def _reset_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_follows(
    step: Step, problem: Problem, numbers: tuple[float | Tensor, ...], graphs: int = 2, **options: Any
) -> None:
    """Assert that ``step``, compiled at most ``graphs`` times, gives eager's loss and gradients for every number."""
    compiled = torch.compile(step, fullgraph=True, **({"backend": "aot_eager"} | options))
    values = set()
    for i, number in enumerate(numbers):
        given = problem.leaves()
        own = given.args[: given.students]
        with torch._dynamo.config.patch(error_on_recompile=i >= graphs):
            loss = compiled(given.args, given.masks, number)
            grads = torch.autograd.grad(loss, own)
        want = step(given.args, given.masks, number)
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-7)
        for a, b in zip(grads, torch.autograd.grad(want, own), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
        values.add(round(loss.item(), 9))
    assert len(values) == len(numbers) > graphs, "the loss must depend on the number"


def step_of(setting: Setting, name: str = "temperature") -> Step:
    """Return the loss of ``setting`` as a function of its option ``name``."""
    case, backend = setting.case, setting.place.backend
    return lambda args, masks, number: Problem(case.at(**{name: number}), args, masks).loss(backend, "mean")


def test_temperature(basic_setting: Any) -> None:
    problem = basic_setting.case.problem(device=basic_setting.place.device)
    assert_follows(step_of(basic_setting), problem, TEMPERATURES[basic_setting.case.family])


def test_temperature_as_a_tensor_costs_one_graph(basic_setting: Any) -> None:
    problem = basic_setting.case.problem(device=basic_setting.place.device)
    numbers = tuple(torch.tensor(number) for number in TEMPERATURES[basic_setting.case.family])
    assert_follows(step_of(basic_setting), problem, numbers, graphs=1)


def test_temperature_under_inductor() -> None:
    """Inductor's constant folding could keep an old value."""
    setting = Setting(BASIC["relation"], Place("cpu", "cpu"))
    with require_backend(setting.place):
        assert_follows(step_of(setting), setting.case.problem(), TEMPERATURES["relation"], backend="inductor")


def test_scheduled_overload_equals_the_default_overload(basic_kernel_setting: Any) -> None:
    """The overload passes opcheck and gives the same bits as the default overload."""
    problem = basic_kernel_setting.case.problem(device=basic_kernel_setting.place.device).leaves()
    with Recorder() as recorder:
        rows = problem.loss(basic_kernel_setting.place.backend)
        torch.autograd.grad(rows.sum(), problem.args[: problem.students])
    for op, args, _ in recorder.calls:
        at = [argument.name for argument in op._schema.arguments].index("temperature")
        args = [x.detach() if isinstance(x, Tensor) else x for x in args]
        given = [*args[:at], torch.tensor(args[at], dtype=torch.float64), *args[at + 1 :]]
        scheduled = op.overloadpacket.scheduled
        assert torch.Tag.cudagraph_unsafe in scheduled.tags
        torch.library.opcheck(scheduled, tuple(given))
        want, got = (x if isinstance(x, tuple) else (x,) for x in (op(*args), scheduled(*given)))
        for a, b in zip(want, got, strict=True):
            assert torch.equal(a, b[: len(a)])  # it may be larger, for other temperatures
            assert not b[len(a) :].any()


def test_guide_temperature() -> None:
    case = next(case for case in CASES if case.options.get("guide") == "own")
    setting = Setting(case, Place("cpu", "cpu"))
    with require_backend(setting.place):
        assert_follows(step_of(setting, "guide_temperature"), case.problem(), (0.5, 0.2, 0.1))


def test_term_weights() -> None:
    case = BASIC["pixel_word"]
    step = lambda args, masks, w: Problem(case.at(terms={"pixel_to_word": w, "word_word": 2.0}), args, masks).loss(
        "cpu", "mean"
    )
    with require_backend(Place("cpu", "cpu")):
        assert_follows(step, case.problem(), (1.0, 0.5, 0.25, 0.0))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_compiled_graph_rejects_numbers_that_eager_rejects(bad: float) -> None:
    s, t = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    compiled = torch.compile(losses.logit_kd, backend="eager")
    for temperature in (2.0, 1.5, 1.0):
        compiled(s, t, temperature=temperature)
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
        compiled(s, t, temperature=bad)


@pytest.mark.parametrize("module", [losses.LogitKD, losses.PixelRelationKD])
def test_module_attribute(module: type[nn.Module]) -> None:
    made = module(backend="reference")
    case = next(case for case in CASES if case.module_class is module)

    def step(args: list[Tensor], masks: dict[str, Any], number: float) -> Tensor:
        made.temperature = number
        return run(*args)

    run = made
    problem = case.problem()
    want = [step(problem.args, {}, number) for number in TEMPERATURES[case.family]]
    run = torch.compile(made, fullgraph=True, backend="aot_eager")
    for i, number in enumerate(TEMPERATURES[case.family]):
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            torch.testing.assert_close(step(problem.args, {}, number), want[i], rtol=1e-5, atol=1e-7)


def test_distiller_term_weight() -> None:
    student, teacher = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1).requires_grad_(False)
    distiller = fastkd.Distiller(
        Net(student), Net(teacher).eval(), lambda out, batch: out["f"].square().mean(),
        [fastkd.Term(losses.logit_kd, "f", name="kd", kwargs={"backend": "reference"})], inputs=("x",),
    )  # fmt: skip
    batch = {"x": torch.randn(2, 3, 5, 5)}
    compiled = torch.compile(lambda: distiller(batch).loss, backend="aot_eager")
    for i, weight in enumerate((1.0, 0.75, 0.5, 0.25)):
        distiller.set_weights({"kd": weight})
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            torch.testing.assert_close(compiled(), distiller(batch).loss)


MAPS = [(12, 12), (16, 12), (20, 16), (14, 18), (30, 22)]


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (losses.channel_distribution_kd, {}),
        (losses.logit_kd, {}),
        (losses.channel_kd, {}),
        (losses.pixel_relation_kd, {"distance": "mse"}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_map_sizes_and_temperature(loss: Callable[..., Tensor], options: dict[str, Any]) -> None:
    """Small maps and narrow relations run in plain torch, so there are up to three graphs."""
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for i, (h, w) in enumerate(MAPS):
        generator = torch.Generator().manual_seed(i)
        s, t = (torch.randn(2, 12, h, w, generator=generator) for _ in range(2))
        s, given = s.requires_grad_(), options | {"temperature": 1 / (1 + i)}
        with torch._dynamo.config.patch(error_on_recompile=i >= 3):
            got = compiled(s, t, **given)
            (grad,) = torch.autograd.grad(got, s)
        want = loss(s, t, **given)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(grad, torch.autograd.grad(want, s)[0], rtol=1e-3, atol=1e-8)
