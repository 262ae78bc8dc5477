"""The training loop: reproducibility, accumulation, log, checkpoints, and errors that end a run."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("accelerate", reason="needs the [ris] extra")

from safetensors.torch import load_file
from train_tools import Scenes, Toy, collate, distiller, read_log, run, same, toy

from fastkd import Distiller, Term, losses
from fastkd.distill import Schedule
from fastkd.errors import FastKDWarning
from fastkd.train import TrainConfig, segmentation_loss, train
from fastkd.train.split import warn_of_micro_batches


class TestReproducibility:
    def test_same_seed_same_weights(self) -> None:
        a, b, c = (distiller(dropout=0.5) for _ in range(3))
        run(a)
        torch.rand(17)  # the caller's random state has no effect
        run(b, eval_every=2, val_dataset=Scenes())  # nor has evaluation
        run(c, seed=1)
        assert same(a.student, b.student)
        assert not same(a.student, c.student)

    def test_result_does_not_depend_on_workers(self) -> None:
        a, b = toy(), toy()
        run(a)
        run(b, workers=1)
        assert same(a, b)

    def test_student_alone_and_distilled_see_the_same_data(self) -> None:
        one, two = Scenes(), Scenes()
        run(toy(), one, check=False)
        run(distiller(), two)
        assert one.served == two.served

    def test_each_epoch_has_its_own_order(self) -> None:
        data = Scenes(20)
        run(toy(), data, steps=4)
        first, second = data.served[:16], data.served[16:32]
        assert data.epochs == [0, 1]
        assert len(set(first)) == len(set(second)) == 16  # without replacement; the last 4 of 20 are dropped
        assert first != second

    def test_weight_zero_equals_the_student_alone(self) -> None:
        alone, distilled = toy(), distiller()
        distilled.set_weights({"kd": 0.0})
        run(alone)
        run(distilled)
        assert same(alone, distilled.student)


class TestAccumulation:
    @pytest.mark.parametrize("parts", [2, 4])
    def test_micro_batches_equal_the_whole_batch(self, parts: int) -> None:
        whole, split = distiller(), distiller()
        a, b = run(whole, log_every=1), run(split, accumulate=parts, log_every=1)
        for x, y in zip(whole.student.state_dict().values(), split.student.state_dict().values(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        for x, y in zip(a.history, b.history, strict=True):  # terms are divided in the loss, not in the log
            assert x["terms"]["kd"] == pytest.approx(y["terms"]["kd"], rel=1e-4)
            assert x["gradient_norm"] == pytest.approx(y["gradient_norm"], rel=1e-4)

    def test_warns_of_layers_and_terms_that_mix_samples(self) -> None:
        model = distiller()
        model.student.norm = torch.nn.BatchNorm2d(4)
        with pytest.warns(FastKDWarning, match=r"1 BatchNorm layers \(norm\) normalise within each micro-batch of 2"):
            run(model, accumulate=4, steps=1)
        model.train()
        with pytest.warns(FastKDWarning, match="normalise within each micro-batch of 4"):  # of both processes
            warn_of_micro_batches(model, TrainConfig(batch_size=8, accumulate=2, sync_batchnorm=True), 2)
        with pytest.warns(FastKDWarning, match="normalise within the 15 samples of each process"):
            warn_of_micro_batches(model, TrainConfig(batch_size=30), 2)
        warn_of_micro_batches(model, TrainConfig(batch_size=32), 2)
        warn_of_micro_batches(model, TrainConfig(batch_size=8, sync_batchnorm=True), 2)
        pooled = distiller()
        pooled.terms["kd"] = replace(pooled.terms["kd"], kwargs={"cross_image": True})
        with pytest.warns(FastKDWarning, match=r"accumulate=2: 'kd' compares samples with each other within"):
            warn_of_micro_batches(pooled, TrainConfig(batch_size=8, accumulate=2))
        model.eval()  # frozen BatchNorm: no warning
        warn_of_micro_batches(model, TrainConfig(batch_size=8, accumulate=4))
        warn_of_micro_batches(pooled, TrainConfig(batch_size=8))

        with pytest.warns(FastKDWarning, match=r"'kd' .* within the 4 samples of each process, .* group='world'"):
            warn_of_micro_batches(pooled, TrainConfig(batch_size=8), processes=2)
        words = replace(pooled.terms["kd"], name="words", loss=losses.cross_modal_kd)
        pooled.terms["words"] = replace(words, kwargs={"terms": {"word_channel": 1.0}})
        with pytest.warns(FastKDWarning, match="'kd', 'words' compare .* group='world' among the options of 'kd'"):
            warn_of_micro_batches(pooled, TrainConfig(batch_size=8), processes=2)
        pooled.terms["kd"] = replace(pooled.terms["kd"], kwargs={"cross_image": True, "group": "world"})
        with pytest.warns(FastKDWarning, match="'words' compares .* it has no group"):
            warn_of_micro_batches(pooled, TrainConfig(batch_size=8), processes=2)
        del pooled.terms["words"]
        warn_of_micro_batches(pooled, TrainConfig(batch_size=8), processes=2)
        with pytest.warns(FastKDWarning, match="within each micro-batch of 4"):  # of both processes
            warn_of_micro_batches(pooled, TrainConfig(batch_size=8, accumulate=2), processes=2)


def test_term_before_its_schedule_neither_counts_nor_runs_the_teacher() -> None:
    model, alone = distiller(), toy()
    forwards: list[int] = []
    model.teacher.register_forward_hook(lambda *call: forwards.append(1))  # type: ignore[union-attr]
    model.terms = {name: replace(term, schedule=Schedule(start=4)) for name, term in model.terms.items()}
    with pytest.warns(FastKDWarning, match="kd never counts: its schedule starts after the last of 4 steps"):
        result = run(model, steps=4, check=False, log_every=4)
    run(alone, steps=4, check=False)
    assert same(model.student, alone)
    assert forwards == []
    assert result.history[0]["terms"] == {"kd": 0}
    run(model, steps=5, check=False)
    assert len(forwards) == 1


class TestLogAndCheckpoints:
    def test_log(self, tmp_path: Path) -> None:
        result = run(distiller(), out=tmp_path, eval_every=2, log_every=2, val_dataset=Scenes(9))
        log = read_log(tmp_path)
        events = [line["event"] for line in log]
        assert events == ["start", "train", "eval", "train", "eval", "train", "eval", "checkpoint", "end"]
        start = log[0]
        assert start["config"]["lr"] == 1e-2
        assert start["environment"]["torch"] == torch.__version__
        assert start["parameters"]["student"] == sum(p.numel() for p in Toy().parameters())
        assert start["weights"] == {"kd": 0.5}
        assert start["gradients"]["norms"]["kd"] > 0
        assert [line["step"] for line in log if line["event"] == "eval"] == [2, 4, 6]
        for line in log:
            if line["event"] == "train":
                assert line["loss"] == pytest.approx(line["task"] + 0.5 * line["terms"]["kd"], rel=1e-5)
        assert log[-1]["reason"] == "steps"
        assert log[-1]["step"] == result.steps == 6
        assert [step for step, _ in result.evaluations] == [2, 4, 6]
        assert result.best.miou == max(r.miou for _, r in result.evaluations)
        assert result.last is result.evaluations[-1][1]

    def test_checkpoints_hold_the_student(self, tmp_path: Path) -> None:
        model = distiller()
        result = run(model, out=tmp_path, eval_every=1, val_dataset=Scenes(), lr=0.3)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "checkpoints", "last", "log.jsonl"]
        last = load_file(tmp_path / "last" / "model.safetensors")
        assert last.keys() == model.student.state_dict().keys()
        assert all(torch.equal(v, last[k]) for k, v in model.student.state_dict().items())
        from fastkd.evaluate import evaluate

        best = Toy()
        best.load_state_dict(load_file(tmp_path / "best" / "model.safetensors"))
        assert evaluate(best, Scenes(), collate=collate).miou == pytest.approx(result.best.miou)

    def test_failed_save_pretrained_keeps_the_old_checkpoint(self, tmp_path: Path) -> None:
        class Saved(Toy):
            fail = False

            def save_pretrained(self, folder: Path) -> None:
                (Path(folder) / "config.json").write_text("{}")
                if self.fail:
                    raise OSError("disk full")
                (Path(folder) / "model.txt").write_text("whole")

        torch.manual_seed(0)
        model = Saved()
        run(model, out=tmp_path)
        Saved.fail = True
        with pytest.raises(OSError, match="disk full"):
            run(model, out=tmp_path, overwrite=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "last", "log.jsonl"]
        assert (tmp_path / "last" / "model.txt").read_text() == "whole"
        assert read_log(tmp_path)[-1]["reason"] == "OSError"

    def test_overwrites_an_earlier_run_only_on_request(self, tmp_path: Path) -> None:
        run(toy(), out=tmp_path)
        before = (tmp_path / "log.jsonl").read_text()
        with pytest.raises(FileExistsError, match=r"holds an earlier run.*overwrite=True"):
            run(toy(), out=tmp_path)
        assert (tmp_path / "log.jsonl").read_text() == before
        run(toy(), out=tmp_path, overwrite=True)

    def test_best_of_an_overwritten_run_is_removed(self, tmp_path: Path) -> None:
        run(toy(), out=tmp_path, val_dataset=Scenes(8))
        assert (tmp_path / "best").is_dir()
        run(toy(), out=tmp_path, overwrite=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "last", "log.jsonl"]

    def test_rejects_a_bad_out_dir_or_config(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(FileExistsError, match=r"out_dir .*file' is a file; pass a folder"):
            run(toy(), out=tmp_path / "file")
        with pytest.raises(TypeError, match="config must be a TrainConfig or None, got dict"):
            train(toy(), Scenes(), {"steps": 2}, collate=collate)

    def test_training_time_excludes_evaluation(self) -> None:
        class Slow(Scenes):
            def __getitem__(self, i: int) -> dict[str, Any]:
                time.sleep(0.02)
                return super().__getitem__(i)

        start, cpu = time.perf_counter(), time.process_time()
        result = run(toy(), val_dataset=Slow(20), eval_every=2)
        assert 0 < result.cpu_seconds < time.process_time() - cpu
        assert result.eval_seconds > 3 * 20 * 0.02
        assert result.seconds + result.eval_seconds < time.perf_counter() - start
        assert result.samples_per_second == pytest.approx(48 / result.seconds)

    def test_max_seconds(self, tmp_path: Path) -> None:
        result = run(toy(), out=tmp_path, steps=1_000_000, max_seconds=0.5, log_every=1)
        assert result.stopped == read_log(tmp_path)[-1]["reason"] == "max_seconds"
        assert 0.5 <= result.seconds < 5
        assert 0 < result.steps < 1_000_000
        assert result.history[-1]["lr"] < 0.5 * 1e-2  # it also decays with time

    def test_the_last_line_of_the_log_is_that_of_the_last_step(self, tmp_path: Path) -> None:
        result = run(toy(), out=tmp_path, steps=1_000_000, max_seconds=0.2, log_every=1_000_000)
        [line] = [line for line in read_log(tmp_path) if line["event"] == "train"]
        assert line["step"] == result.history[-1]["step"] == result.steps


class TestEarlyEnd:
    def test_interrupt_saves_the_student(self, tmp_path: Path) -> None:
        class Interrupt(Scenes):
            def __getitem__(self, i: int) -> dict[str, Any]:
                if len(self.served) == 24:
                    raise KeyboardInterrupt
                return super().__getitem__(i)

        model = distiller()
        with pytest.raises(KeyboardInterrupt):
            run(model, Interrupt(), tmp_path)
        end = read_log(tmp_path)[-1]
        assert (end["event"], end["reason"], end["step"]) == ("end", "KeyboardInterrupt", 3)
        saved = load_file(tmp_path / "last" / "model.safetensors")
        assert all(torch.equal(v, saved[k]) for k, v in model.student.state_dict().items())
        whole = distiller()
        run(whole, steps=3, power=0.0)
        again = distiller()
        with pytest.raises(KeyboardInterrupt):
            run(again, Interrupt(), power=0.0)
        assert same(whole.student, again.student)

    def test_checks_run_before_training(self, tmp_path: Path) -> None:
        model = distiller()
        model.teacher.train()
        with pytest.raises(ValueError, match="teacher is in train mode"):
            run(model, out=tmp_path)
        validation = Scenes()
        validation.sentences = "random"
        with pytest.raises(ValueError, match="use sentences='all'"):
            run(toy(), val_dataset=validation)
        with pytest.raises(ValueError, match="has 5 samples, fewer than one batch of 8"):
            run(toy(), Scenes(5))
        with pytest.raises(ValueError, match="this Distiller has its own"):
            run(distiller(), task_loss=F.mse_loss)
        with pytest.raises(ValueError, match=r"torch sees no GPU|device must be"):
            run(toy(), device="cuda" if not torch.cuda.is_available() else "gpu")


class TestLearning:
    def test_bf16_and_channels_last(self) -> None:
        result = run(distiller(), precision="bf16", channels_last=True, threads=1)
        assert all(torch.isfinite(torch.tensor(line["loss"])) for line in result.history)

    def test_learns_the_toy_task(self) -> None:
        model = toy(width=8)
        result = run(model, steps=150, lr=3e-2, val_dataset=Scenes(), log_every=50)
        assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
        assert result.last.miou > 80
        assert not model.training

    @pytest.mark.gpu
    def test_trains_on_the_gpu(self, tmp_path: Path) -> None:
        model = distiller(width=8)
        result = run(model, out=tmp_path, device="auto", steps=60, val_dataset=Scenes(), channels_last=True)
        assert read_log(tmp_path)[0]["environment"]["precision"] == "bf16"
        assert next(model.teacher.parameters()).is_cuda
        assert next(model.student.parameters()).dtype == torch.float32
        assert result.history[-1]["loss"] < result.history[0]["loss"]

    @pytest.mark.gpu
    def test_step_that_is_not_finite_is_skipped_on_the_gpu(self) -> None:
        model = toy()
        with pytest.warns(FastKDWarning, match="the task loss is nan; after 10 in a row"):
            result = run(model, Scenes(poison=3), check=False, device="cuda", steps=40, log_every=20)
        assert result.skipped == 10  # once per epoch
        assert all(torch.isfinite(p).all() for p in model.parameters())


class Stored(Scenes):
    """Masks of 0 and 255, as in image files."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample = super().__getitem__(i)
        return {**sample, "mask": sample["mask"].to(torch.uint8) * 255}


def test_rejects_masks_of_255_unless_the_loss_is_user_defined() -> None:
    with pytest.raises(ValueError, match=r"mask must be bool or hold only 0 and 1, got torch.uint8 with 255"):
        run(toy(), Stored(), check=False)
    with pytest.raises(ValueError, match=r"mask must be bool or hold only 0 and 1, got torch.uint8 with 255"):
        run(toy(), val_dataset=Stored(), steps=1)
    own = lambda output, batch: F.cross_entropy(output, (batch["mask"] > 0).long())
    assert run(toy(), Stored(), steps=1, task_loss=own).steps == 1


def test_rejects_word_ids_beyond_the_table_on_the_host() -> None:
    student = distiller()
    student.student.vocab_size, student.teacher.vocab_size = 8, 8
    assert run(student, steps=1).steps == 1
    student.teacher.vocab_size = 7
    with pytest.raises(ValueError, match=r"input_ids range from \d to 7, but the vocabulary has 7 words"):
        run(student, steps=1)
    data = Scenes()
    data.tokenizer = SimpleNamespace(vocab_size=9, name="other")
    with pytest.raises(ValueError, match=r"tokenizer \('other'\) has 9 entries, the student has 8 word embeddings"):
        run(student, data)


def test_ris_models_on_shapes_with_three_losses(tmp_path: Path) -> None:
    """Train RIS models on shapes with losses of three families."""
    pytest.importorskip("timm", reason="needs the [ris] extra")
    pytest.importorskip("transformers", reason="needs the [ris] extra")
    from fastkd import data, losses, models
    from fastkd.evaluate import evaluate

    data.make_shapes(tmp_path / "shapes", images=20, image_size=64, seed=0)
    tokenizer = data.load_tokenizer("shapes")
    sets = [
        data.ReferDataset(
            data.RefCOCO(tmp_path / "shapes", split=split), tokenizer, image_size=64, cache=True, sentences=sentences
        )
        for split, sentences in (("train", "random"), ("val", "all"))
    ]
    torch.manual_seed(0)
    teacher = models.RISModel(models.preset("shapes-teacher")).eval().requires_grad_(False)
    student = models.RISModel(models.preset("shapes-student"))
    words = {"word_mask": "batch.word_mask"}
    model = Distiller(
        student,
        teacher,
        segmentation_loss,
        [
            Term(losses.channel_distribution_kd, "decoder_features"),
            Term(losses.cross_modal_kd_from_logits, "pixel_word_logits.*", kwargs=words, name="cross_modal"),
            Term(losses.ChannelKD(student_channels=64, teacher_channels=192), "stages.3", name="channel"),
        ],
    )
    count = sum(p.numel() for p in student.parameters())
    first = data.collate([sets[0][i] for i in range(8)])
    model.balance(first, {"channel_distribution_kd": 0.3, "cross_modal": 0.3, "channel": 0.1})
    assert model.gradient_shares(first)["channel"] == pytest.approx(0.1, rel=1e-3)
    config = TrainConfig(steps=4, batch_size=8, log_every=2, device="cpu", allow_untrained_teacher=True)
    result = train(model, sets[0], config, val_dataset=sets[1], out_dir=tmp_path / "run", progress=False)
    assert sum(p.numel() for p in student.parameters()) == count
    log = read_log(tmp_path / "run")
    assert log[0]["parameters"]["aligners"] == 64 * 192
    assert result.last.dataset == "refcoco"
    again = models.RISModel.from_pretrained(tmp_path / "run" / "last")
    score = evaluate(again, sets[1])
    assert score.metrics == pytest.approx(result.last.metrics, abs=0.5)
    assert score.sentences == len(sets[1])
