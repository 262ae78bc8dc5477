"""One process equals two and equals accumulated micro-batches; BatchNorm over all, sharded teachers, compilation."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("accelerate", reason="needs the [ris] extra")
from parallel_tools import Blocks, normed, trained, with_teacher
from safetensors.torch import load_file
from stream_tools import pictures
from train_tools import Scenes, distiller, processes, read_log, run, same, toy

from fastkd import Distiller, Term
from fastkd.data import write_shards
from fastkd.errors import FastKDWarning
from fastkd.train import TrainConfig, segmentation_loss
from fastkd.train.optim import BatchOrder
from fastkd.train.shard import _blocks
from fastkd.train.sync_norm import synchronised_norms

PROGRAM = """
    import pathlib, warnings
    import parallel_tools as p
    folder = pathlib.Path(FOLDER) / str(rank)
    folder.mkdir()
    write = lambda line: os.write(1, (str(rank) + " " + line + chr(10)).encode())
    p.trained(folder, "plain", p.with_teacher(t.toy()))
    p.trained(folder, "accumulated", p.with_teacher(t.toy()), accumulate=2)
    model = p.normed()
    p.trained(folder, "synchronised", model, sync_batchnorm=True)
    write(f"kinds {type(model.norm).__name__} {type(model.last).__name__}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.run(p.normed(), steps=1)
    write(f"alone {[str(w.message) for w in caught if 'BatchNorm' in str(w.message)]}")
    shard = fastkd.train.shard.shard_teacher
    fastkd.train.run.shard_teacher = lambda *args: shard(*args, smallest=590)
    model = p.with_teacher(t.toy())
    p.trained(folder, "sharded", model, shard_teacher=True)
    local = sum(q.to_local().numel() for q in model.teacher.parameters())
    write(f"elements {local} {sum(q.numel() for q in model.teacher.parameters())}")
    p.trained(folder, "again", model, shard_teacher=True, steps=1)
    p.trained(folder, "offloaded", p.with_teacher(t.toy()), shard_teacher=True, offload_teacher=True)
    t.run(p.with_teacher(t.toy()), shard_teacher=True, steps=2, out=pathlib.Path(FOLDER) / "run")
    t.run(p.with_teacher(t.toy()), steps=3, out=pathlib.Path(FOLDER) / "run", resume=True, resume_allow=["steps"])
    r = t.run(t.distiller(), out=pathlib.Path(FOLDER) / "evaluated", log_every=2, val_dataset=t.Scenes(15))
    write(f"scored {r.last.sentences} {r.last.refs} {len(r.last.sent_ids)}")
    broken = {"accumulate": 4, "steps": 12, "check": False, "shard_teacher": True, "seed": 4}
    p.refused(write, "broken", lambda: t.run(p.with_teacher(t.toy()), p.HalfBroken(), **broken))
    p.refused(write, "few", lambda: t.run(t.toy(), t.Scenes(1), batch_size=2))
    p.refused(write, "odd", lambda: t.run(t.toy(), batch_size=3))
"""
STREAMS = all(importlib.util.find_spec(name) is not None for name in ("webdataset", "pyarrow"))
if STREAMS:
    PROGRAM += """
    p.streamed(pathlib.Path(FOLDER), rank)
"""


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], str]]:
    """Run all checks that need two processes in one start, which takes seconds."""
    folder = tmp_path_factory.mktemp("parallel")
    if STREAMS:
        write_shards(pictures(12), folder / "shards", samples_per_shard=3)
    out = processes(2, PROGRAM.replace("FOLDER", repr(str(folder))), "parallel_tools")
    lines = [line.split(" ", 2) for line in out.splitlines() if line[:2] in ("0 ", "1 ")]
    return folder, {(rank, name): text for rank, name, text in lines}


def weights(folder: Path, rank: int, name: str) -> dict[str, Any]:
    return torch.load(folder / str(rank) / f"{name}.pt", weights_only=True)


def test_one_process_equals_two_and_equals_accumulated(parallel: Any, tmp_path: Path) -> None:
    folder, _ = parallel
    (tmp_path / "0").mkdir()
    trained(tmp_path / "0", "plain", with_teacher(toy()))
    trained(tmp_path / "0", "accumulated", with_teacher(toy()), accumulate=4)
    whole = weights(tmp_path, 0, "plain")
    others = [weights(tmp_path, 0, "accumulated")]
    others += [weights(folder, rank, name) for rank in (0, 1) for name in ("plain", "accumulated")]
    for other in others:
        torch.testing.assert_close(other["weights"], whole["weights"], rtol=1e-5, atol=1e-6)
        assert other["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    for name in ("plain", "accumulated"):
        ranks = [weights(folder, rank, name)["weights"] for rank in (0, 1)]
        assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])


def test_one_process_equals_three(tmp_path: Path) -> None:
    processes(
        3,
        f"""
    import parallel_tools as p
    folder = Path({str(tmp_path)!r}) / str(rank)
    folder.mkdir()
    p.trained(folder, "plain", p.with_teacher(t.toy()), batch_size=12)
    p.trained(folder, "synchronised", p.normed(), batch_size=12, sync_batchnorm=True)
""",
        "parallel_tools",
    )
    (tmp_path / "alone").mkdir()
    trained(tmp_path / "alone", "plain", with_teacher(toy()), batch_size=12)
    trained(tmp_path / "alone", "synchronised", normed(), batch_size=12)
    for name in ("plain", "synchronised"):
        whole = torch.load(tmp_path / "alone" / f"{name}.pt", weights_only=True)
        for rank in range(3):
            torch.testing.assert_close(weights(tmp_path, rank, name), whole, rtol=1e-5, atol=2e-6)


def test_evaluation_and_log_of_two_processes(parallel: Any) -> None:
    folder, lines = parallel
    assert [lines[rank, "scored"] for rank in "01"] == ["15 15 15", "15 15 15"]  # every rank has the scores of all
    single = distiller()
    result = run(single, log_every=2, val_dataset=Scenes(15))
    log = read_log(folder / "evaluated")
    assert log[0]["environment"]["processes"] == 2
    trained_lines = [line for line in log if line["event"] == "train"]
    for ours, theirs in zip(result.history, trained_lines, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        assert theirs["terms"]["kd"] == pytest.approx(ours["terms"]["kd"], rel=1e-4)
    saved = load_file(folder / "evaluated" / "last" / "model.safetensors")
    for name, value in single.student.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-3, atol=1e-4)
    [evaluation] = [line for line in log if line["event"] == "eval"]
    assert evaluation["metrics"]["mIoU"] == pytest.approx(result.last.miou, abs=1.0)


def test_batch_norm_over_all_processes_equals_the_whole_batch(parallel: Any, tmp_path: Path) -> None:
    folder, lines = parallel
    (tmp_path / "0").mkdir()
    trained(tmp_path / "0", "whole", normed())
    whole = weights(tmp_path, 0, "whole")
    for rank in (0, 1):
        found = weights(folder, rank, "synchronised")
        torch.testing.assert_close(found["weights"], whole["weights"], rtol=1e-5, atol=2e-6)
        assert found["losses"] == pytest.approx(whole["losses"], rel=1e-6)
        assert lines[str(rank), "kinds"] == "BatchNorm2d BatchNorm2d"  # again, after the run
    assert "2 BatchNorm layers (norm, last) normalise within the 4 samples of each process" in lines["0", "alone"]
    assert lines["1", "alone"] == "[]"


def test_activation_of_a_batch_norm_of_timm_is_kept() -> None:
    norm_act = pytest.importorskip("timm.layers.norm_act", reason="needs the [ris] extra")
    model = norm_act.BatchNormAct2d(4, act_layer=nn.SiLU)
    x = torch.randn(2, 4, 3, 3)
    expected = model(x)
    for device in ("cpu", "cuda"):  # with one process both classes are those of torch
        with synchronised_norms(model, torch.device(device)):
            assert type(model) is not norm_act.BatchNormAct2d
            assert torch.equal(model(x), expected)
    assert type(model) is norm_act.BatchNormAct2d


def test_unknown_batch_norm_is_refused() -> None:
    class Own(nn.BatchNorm2d):
        pass

    with (
        pytest.raises(ValueError, match=r"cannot replace the forward of 1 \(Own\)"),
        synchronised_norms(nn.Sequential(nn.BatchNorm2d(2), Own(2)), torch.device("cpu")),
    ):
        pass


def test_sharded_teacher_gives_the_same_loss(parallel: Any) -> None:
    folder, lines = parallel
    for rank in (0, 1):
        plain = weights(folder, rank, "plain")
        for name in ("sharded", "offloaded"):
            assert weights(folder, rank, name)["losses"] == plain["losses"]
        held, total = map(int, lines[str(rank), "elements"].split())
        assert 0.45 * total < held < 0.55 * total


def test_a_broken_step_is_searched_by_all_processes_together(parallel: Any) -> None:
    """A sharded teacher runs for all or for none, although the first broken micro-batch differs."""
    _, lines = parallel
    config = TrainConfig(batch_size=8, accumulate=4, seed=4)
    found = []
    for rank in (0, 1):
        micros = BatchOrder(32, config, rank, 2).indices(9)
        first = next(n for n, numbers in enumerate(micros) if numbers[0] % 2 == 0)
        assert f"samples {micros[first][0]} (" in lines[str(rank), "broken"]
        found.append(first)
    assert found[0] != found[1]


def test_blocks_of_a_teacher_leave_shared_weights_to_the_root() -> None:
    model = Blocks()
    assert _blocks(model, 590) == [model.blocks[1]]
    assert _blocks(model, 10_000) == []
    model.blocks[2][0].weight = nn.Parameter(torch.zeros(8, 8, 3, 3))
    assert _blocks(model, 590) == [model.blocks[2], model.blocks[1], model.blocks[0]]


def test_batches_that_cannot_be_divided_are_refused(parallel: Any) -> None:
    _, lines = parallel
    for rank in "01":
        assert "the training set has 1 samples, fewer than one batch of 2" in lines[rank, "few"]
        assert "got batch_size=3, accumulate=1 and 2 processes" in lines[rank, "odd"]


def test_sharding_needs_processes_and_a_teacher() -> None:
    with pytest.raises(ValueError, match="shard_teacher=True with one process"):
        run(distiller(), shard_teacher=True)
    with pytest.raises(ValueError, match="offload_teacher=True needs shard_teacher=True"):
        TrainConfig(offload_teacher=True)


def test_compiled_student_equals_the_eager_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With taps, checks and evaluation; without code generation, which takes seconds."""
    calls: list[bool] = []

    class Observed(type(toy())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            if not torch.compiler.is_compiling():
                calls.append(self.training)
            return super().forward(*args, **kwargs)

    def model() -> Distiller:
        torch.manual_seed(0)
        student, teacher = Observed(), toy(100, width=4).eval().requires_grad_(False)
        term = Term(F.mse_loss, "early", weight=0.5, name="kd")
        taps = {"early": "norm"}
        return Distiller(student, teacher, segmentation_loss, [term], student_taps=taps, teacher_taps=taps)

    eager, compiled = model(), model()
    run(eager)
    calls.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    run(compiled, compile_student=True, val_dataset=Scenes(8), out=tmp_path)
    assert same(eager.student, compiled.student)
    assert calls == [True, True, False]  # two of the check and the evaluation; the 6 steps run the compiled graph
    assert type(compiled.student) is Observed
    names = set(load_file(tmp_path / "last" / "model.safetensors"))
    names |= set(load_file(tmp_path / "checkpoints" / "step-000006" / "student.safetensors"))
    assert names == set(eager.student.state_dict())
    with pytest.raises(ValueError, match="the model is compiled already"):
        run(torch.compile(toy()), compile_student=True)


def test_parameters_without_a_gradient_are_listed() -> None:
    model = distiller()
    model.student.spare, model.student.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    with pytest.warns(
        FastKDWarning, match=r"^2 parameters get no gradient .*: student.spare.weight, student.spare.bias"
    ):
        run(model, steps=2)


if STREAMS:

    def test_two_processes_share_the_shards(parallel: Any) -> None:
        folder, _ = parallel
        served = [(folder / str(rank) / "served").read_text().split() for rank in (0, 1)]
        assert all(len(ids) == 12 for ids in served)
        for first in (0, 6):  # a pass is 3 steps
            assert sorted(served[0][first : first + 6] + served[1][first : first + 6]) == sorted(
                f"s{n}" for n in range(12)
            )
