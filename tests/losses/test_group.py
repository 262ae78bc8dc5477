"""Relations over the batches of a group of processes: values, gradients and collectives on 1, 2 and 4 gloo ranks."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contract_formulas
import group_ranks
import pytest
import torch
import torch.distributed as dist
from group_ranks import CASES, MASKED, SPLITS, Case, Result, Student
from torch import Tensor

from fastkd import losses
from fastkd.cli._settings import TermSettings
from fastkd.cli._terms import build_terms
from fastkd.distill import recipe
from fastkd.errors import BackendUnavailable
from fastkd.ops.collectives import alone
from fastkd.ops.relation.group import TILE_COPIES, tile_shape
from fastkd.ops.relation.group_costs import Collective, channel_flops, channel_traffic, pixel_flops, pixel_traffic

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
ALL = slice(0, group_ranks.SAMPLES)
TOLERANCE = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Return the results of every rank, by the number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    code = f"import pathlib, group_ranks; raise SystemExit(group_ranks.main(pathlib.Path({str(folder)!r})))"
    path = os.pathsep.join([str(Path(group_ranks.__file__).parent), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "FASTKD_WORKSPACE_MIB": "0.02"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
    return {n: [pickle.loads((folder / f"{n}-{r}.pickle").read_bytes()) for r in range(n)] for n in SPLITS}


def formula(student: Tensor, teacher: Tensor, *, weight: Any = None, reduction: str = "mean", **options: Any) -> Tensor:
    """Return a loss of the whole batch by the plain formula."""
    name = "channel_kd" if "across_batch" in options else "pixel_relation_kd"
    attention = isinstance(weight, str)
    if attention:
        options["weight"] = weight
    mask = options.pop("pixel_mask", None)
    if mask is not None:
        options["pixel_mask"] = (mask, mask) if name == "channel_kd" else mask
    rows = getattr(contract_formulas, name)(student, teacher, **options)
    weight = torch.ones_like(rows) if attention or weight is None else weight
    if mask is not None and name == "pixel_relation_kd":
        weight = weight * mask.flatten(1)
    rows = rows * weight
    if attention:
        pixels = teacher if mask is None else teacher.movedim(1, -1)[mask].T[None, :, :, None]
        weight = contract_formulas.attention_weight(contract_formulas.channel_rows(pixels, False, 1, True))
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / weight.sum()}[reduction]


def one_process(case: Case, dtype: torch.dtype, rounded: torch.dtype | None = None) -> Result:
    return Student(case, dtype, rounded).result(ALL, loss=formula)


def assert_equal(got: Result, want: Result) -> None:
    torch.testing.assert_close(got.loss, want.loss, **TOLERANCE)
    for a, b in zip(got.gradients, want.gradients, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_ranks_have_the_loss_and_gradients_of_one_process(name: str, ranks: Any) -> None:
    """Uneven batches too, down to a rank without samples; gradients averaged by hand and by DDP."""
    want = one_process(CASES[name], torch.float64)
    for count, results in ranks.items():
        for found in results:
            for way in (*(f"{split}, torch.float64" for split in SPLITS[count]), "DDP"):
                assert_equal(found[f"{name}, {way}"], want)


@pytest.mark.parametrize("name", MASKED)
def test_masks_and_pairs_of_temperatures_on_ranks(name: str, ranks: Any) -> None:
    want = one_process(MASKED[name], torch.float64)
    for found in ranks[2]:
        for split in SPLITS[2]:
            assert_equal(found[f"{name}, {split}"], want)


@pytest.mark.parametrize("name", group_ranks.CKA)
def test_cka_over_ranks_is_that_of_one_process(name: str, ranks: Any) -> None:
    want = Student(group_ranks.CKA[name], torch.float64).result(ALL)
    for count, results in ranks.items():
        for found in results:
            for split in SPLITS[count]:
                assert_equal(found[f"{name}, {split}"], want)
    for found in ranks[2]:
        assert "debiased=True needs at least 4, got 2" in found["too few samples"]
        assert "the student's samples differ between ranks, [12, 16]" in found["unequal widths"]


@pytest.mark.parametrize("name", CASES)
def test_fp32_errors_are_at_most_twice_those_of_the_plain_formula(name: str, ranks: Any) -> None:
    """The absolute error of a KL, a difference of logarithms of up to 63 summands, is relative to those."""
    exact = one_process(CASES[name], torch.float64, torch.float32)
    plain = one_process(CASES[name], torch.float32)
    logarithm = 2.0 if " kl" in name else 0.0
    error = lambda a, b: (a.double() - b).abs().max().item()
    for results in ranks.values():
        got = results[0][f"{name}, even, torch.float32"]
        for a, b, want in zip(
            (got.loss, *got.gradients), (plain.loss, *plain.gradients), (exact.loss, *exact.gradients), strict=True
        ):
            size = max(4 * want.abs().max().item(), 0.0 if want.dim() else logarithm)
            assert error(a, want) <= 2 * error(b, want) + size * torch.finfo(torch.float32).eps


def test_centring_is_exact_far_from_zero(ranks: Any) -> None:
    exact, plain = (group_ranks.far_from_zero(ALL, d, loss=formula) for d in (torch.float64, torch.float32))
    error = lambda a, b: (a.double() - b).abs().max().item()
    (want,) = exact.gradients
    got = torch.cat([found["far from 0"].gradients[0] for found in ranks[2]]) / 2
    assert error(got, want) <= 2 * error(plain.gradients[0], want)


def test_a_dead_channel_gets_no_gradient(ranks: Any) -> None:
    want = group_ranks.dead_channel(ALL, backend="reference")
    assert want.gradients[0][2].abs().max() == 0
    for found in ranks[2]:
        assert_equal(found["dead channel"], want)


@pytest.mark.parametrize("name", group_ranks.HALF)
def test_features_in_bfloat16(name: str, ranks: Any) -> None:
    """The loss is as exact as in fp32, and the gradient rounded once; under DDP it is that of the mean over ranks."""
    student = Student(CASES[name], torch.float64, torch.float32)
    with torch.no_grad():
        features = Student(CASES[name], torch.float32).map_of(ALL).bfloat16().double()
    student.features = features.requires_grad_()
    loss = student(ALL, loss=formula)
    (want,) = torch.autograd.grad(loss, features)
    for found, part in zip(ranks[2], want.split(4), strict=True):
        got = found[f"bfloat16 {name}"]
        assert (got.loss.dtype, got.gradients[0].dtype) == (torch.float32, torch.bfloat16)
        torch.testing.assert_close(got.loss.double(), loss, rtol=1e-6, atol=3e-7)
        atol = 1e-6 * want.abs().max().item()
        torch.testing.assert_close(got.gradients[0].double() / 2, part, rtol=2**-8, atol=atol)


@pytest.mark.parametrize("name", CASES)
def test_collectives_and_flop_are_those_of_the_formulas(name: str, ranks: Any) -> None:
    options, widths = CASES[name].options, CASES[name].widths
    if "across_batch" in options:
        means = options.get("centered", False) or options.get("similarity") == "mean"
        pixels = 9 if "pixel_mask" in options else 12  # of the teacher's maps
        want, flops = channel_traffic(7, means=means), channel_flops(7, 4 * 9, 4 * pixels)
    else:
        distance = options.get("distance", "kl")
        want = pixel_traffic(4, 9, *widths, 2, distance=distance)
        flops = pixel_flops(4, 8, 9, *widths, distance=distance)
    for found in ranks[2]:
        assert found[f"FLOP of {name}"] == (flops.forward, flops.backward)
        assert [Collective(*one) for one in found[f"collectives of {name}"]] == [*want.forward, *want.backward]


def test_rings_send_the_tensor_once_or_twice() -> None:
    assert Collective("all_reduce", 800).sent(4) == 1200
    assert Collective("all_gather", 800).sent(4) == 600
    traffic = channel_traffic(10, means=False)
    assert traffic.sent(2) == 2 * 400 + 40


@pytest.mark.parametrize("name", ["channel kl", "pixel kl", "pixel mse"])
def test_rows_may_be_reduced_by_the_caller(name: str, ranks: Any) -> None:
    """Each rank weighs its rows in its own way: the gradient is that of the mean over ranks of their sums."""
    student = Student(CASES[name], torch.float64)
    rows = student(ALL, loss=formula, reduction="none")
    parts = [found[f"rows of {name}"] for found in ranks[2]]
    numbers = torch.arange(1.0, parts[0].loss.numel() + 1, dtype=torch.float64).view_as(parts[0].loss)
    if "channel" in name:
        weights = 1.5 * numbers  # the mean of 1 and 2 times the numbers
        for part in parts:
            torch.testing.assert_close(part.loss, rows, **TOLERANCE)
    else:
        weights = torch.cat([numbers, 2 * numbers]) / 2
        torch.testing.assert_close(torch.cat([part.loss for part in parts]), rows, **TOLERANCE)
    (want,) = torch.autograd.grad(rows, student.weight, weights.detach())
    for part in parts:
        torch.testing.assert_close(part.gradients[0], want, **TOLERANCE)


@pytest.mark.parametrize("name", ["channel kl", "pixel kl", "pixel mse"])
def test_no_grad_and_double_backward(name: str, ranks: Any) -> None:
    want = one_process(CASES[name], torch.float64).loss
    for found in ranks[2]:
        loss = found[f"no_grad of {name}"]
        torch.testing.assert_close(loss, want, **TOLERANCE)
        assert not loss.requires_grad
        assert found[f"double backward of {name}"].startswith("RuntimeError: group: a loss over several processes is")


@pytest.mark.parametrize("name", ["channel mse mean weight", "pixel mse", "pixel kl"])
def test_compiled_losses_equal_eager(name: str, ranks: Any) -> None:
    for found in ranks[2]:
        assert_equal(found[f"compiled {name}"], one_process(CASES[name], torch.float64))


def test_one_graph_is_refused_where_batch_sizes_are_read(ranks: Any) -> None:
    assert "it reads the batch sizes of other processes; call the loss outside" in ranks[2][0]["pixel kl in one graph"]


def test_the_recipe_of_a_distiller_takes_a_group(ranks: Any) -> None:
    want = group_ranks.distilled(ALL)
    for found in ranks[2]:
        torch.testing.assert_close(found["distiller"].loss, want.loss)
        for a, b in zip(found["distiller"].gradients, want.gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * b.abs().max().item() + 1e-8)


def test_errors_over_several_ranks(ranks: Any) -> None:
    for rank, found in enumerate(ranks[2]):
        assert found["unequal pixels"] == (
            "ValueError: group: the numbers of pixels differ between ranks, [4, 5]; give all the same"
        )
        assert found["not a member"].startswith(
            "ValueError: group: this process is not a member" if rank else "no error"
        )


# --- in one process ---------------------------------------------------------------------------------------------------


def maps(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_of_one_is_this_process_alone(one_rank: None) -> None:
    student, teacher = maps(2, 3, 4)
    want = losses.channel_kd(student, teacher, across_batch=True)
    for group in ("world", dist.group.WORLD):
        assert torch.equal(losses.channel_kd(student, teacher, across_batch=True, group=group), want)
        assert torch.equal(losses.ChannelKD(across_batch=True, group=group)(student, teacher), want)


def test_the_world_is_this_process_alone_without_torch_distributed() -> None:
    student, teacher = maps(2, 3, 4)
    want = losses.pixel_relation_kd(student, teacher, cross_image=True)
    assert torch.equal(losses.PixelRelationKD(cross_image=True, group="world")(student, teacher), want)


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ("all", ValueError, "group: expected None, 'world' or a torch.distributed.ProcessGroup, got 'all'"),
        (2, TypeError, "group: expected None, 'world' or a torch.distributed.ProcessGroup, got int"),
        (dist.GroupMember.NON_GROUP_MEMBER, ValueError, "group: this process is not a member"),
    ],
)
def test_errors_for_a_group(group: Any, error: type[Exception], message: str) -> None:
    student, teacher = maps(2, 3, 4)
    with pytest.raises(error, match=message):
        losses.channel_kd(student, teacher, across_batch=True, group=group)
    with pytest.raises(error, match=message):
        losses.PixelRelationKD(cross_image=True, group=group)


def test_a_group_needs_a_loss_that_pools_the_batch() -> None:
    student, teacher = maps(2, 3, 4)
    with pytest.raises(ValueError, match=r"group: pools .* needs across_batch=True"):
        losses.ChannelKD(group="world")
    with pytest.raises(ValueError, match=r"group: pools .* needs cross_image=True"):
        losses.pixel_relation_kd(student, teacher, group="world")


def test_unsupported_calls_are_refused(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of one never communicates, so two ranks are reported for the world."""
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    student, teacher = maps(2, 3, 4)
    call = lambda x, **more: losses.channel_kd(x, teacher, across_batch=True, group="world", **more)
    with pytest.raises(BackendUnavailable, match="backend='cpu': over a group of processes"):
        call(student, backend="cpu")
    with pytest.raises(BackendUnavailable, match="no rules for vmap"):
        torch.func.grad(call)(student)
    monkeypatch.setenv("FASTKD_BACKEND", "cpu")
    with pytest.raises(BackendUnavailable, match="FASTKD_BACKEND=cpu: over a group of processes"):
        call(student)
    with alone():
        assert call(student).isfinite()


def test_a_configured_term_takes_a_group() -> None:
    [term] = build_terms({"channel": TermSettings(weight=2.0, options={"group": "world"})}, steps=10)
    assert term.kwargs == {"across_batch": True, "centered": True, "group": "world"}
    assert term.kwargs == recipe(["channel"], group="world")[0].kwargs
    assert "group" not in recipe(["mask"], group="world")[0].kwargs


def test_tiles_fit_the_workspace() -> None:
    for own, samples, pixels, elements in ((800, 16, 100, 50_000), (10, 400, 9, 10_000), (5, 3, 900, 100)):
        rows, width = tile_shape(own, samples, pixels, elements)
        assert 1 <= rows <= own
        assert 1 <= width <= samples
        assert rows * width * pixels * TILE_COPIES <= max(elements, TILE_COPIES * pixels)
