"""Models and datasets inside wrappers: compiled and averaged models, Subset and ConcatDataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset

pytest.importorskip("accelerate", reason="needs the [ris] extra")

from safetensors.torch import load_file, save_file

from fastkd import Distiller, Taps, Term
from fastkd._wrappers import plain_names, unwrap, unwrapped
from fastkd.data._nested import declared_values, set_epoch
from fastkd.errors import FastKDWarning
from fastkd.evaluate import evaluate
from fastkd.models.checkpoint import load_strictly, read_state_dict
from fastkd.models.inputs import table_size
from fastkd.train import TrainConfig, segmentation_loss, train
from fastkd.train.checkpoint import save_student
from fastkd.train.host import check_tokenizers

SIZE = 4
NAMES = ["body.weight", "head.bias", "head.weight"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image))


def _counting(graphs: list[Any]) -> Callable[..., Any]:
    """Return a compiler that lists the graphs it gets and runs them as they are."""

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return compiler


class Marked(Dataset[dict[str, Any]]):
    """Dataset that records its epochs."""

    def __init__(self, sentences: str | None = "all", **facts: Any) -> None:
        self.epochs: list[int] = []
        if sentences is not None:
            self.sentences = sentences
        vars(self).update(facts)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(i))
        return {"image": image, "mask": image[0] > 0, "ref_id": i}

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class Augmented(Dataset[Any]):
    """User-defined wrapper around a dataset."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Any:
        return self.source[i]


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    tensors = {key: torch.stack([s[key] for s in samples]) for key in ("image", "mask")}
    return {**tensors, "ref_id": [s["ref_id"] for s in samples]}


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def in_part(model: nn.Module) -> nn.Module:
    model.body = compiled(model.body)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "data-parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "twice": lambda model: compiled(nn.DataParallel(model)),
    "in part": in_part,
}


class TestModels:
    @pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
    def test_saved_names_are_the_models(self, wrap: Any, tmp_path: Path) -> None:
        model = wrap(Net())
        before = list(model.state_dict())
        save_student(model, tmp_path / "last")
        state = load_file(tmp_path / "last" / "model.safetensors")
        assert sorted(state) == NAMES
        assert list(model.state_dict()) == before
        again = wrap(Net())
        load_strictly(again, state, "file")  # into a wrapped model as well
        for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    def test_child_named_module_is_not_a_wrapper(self) -> None:
        class Holder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.module = Net()

        holder = Holder()
        assert unwrap(holder) is holder
        with unwrapped(holder) as inner:
            assert sorted(inner.state_dict()) == [f"module.{name}" for name in NAMES]

    def test_names_read_from_files(self, tmp_path: Path) -> None:
        state = Net().state_dict()
        for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
            save_file({prefix + name: value for name, value in state.items()}, tmp_path / "a.safetensors")
            assert sorted(read_state_dict(tmp_path / "a.safetensors")) == NAMES
        partly = {"module.a": 1, "b": 2}
        assert plain_names(partly) == partly
        assert plain_names({"stem._orig_mod.weight": 1}) == {"stem.weight": 1}
        with pytest.raises(ValueError, match=r"two tensors are named 'a\.weight'"):
            plain_names({"a.weight": 1, "a._orig_mod.weight": 2})

    def test_train_saves_a_compiled_student_under_its_own_names(self, tmp_path: Path) -> None:
        config = TrainConfig(steps=2, batch_size=4, device="cpu")
        plain, wrapped = Net(), Net()
        wrapped.load_state_dict(plain.state_dict())
        train(plain, Marked(), config, collate=collate, progress=False)
        distiller = Distiller(compiled(wrapped), None, segmentation_loss)
        train(compiled(distiller), Marked(), config, collate=collate, progress=False, out_dir=tmp_path)
        state = load_file(tmp_path / "last" / "model.safetensors")
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(state[name], value)

    @pytest.mark.parametrize("in_place", [False, True])
    def test_gradient_shares_of_a_compiled_student_are_computed_eagerly(self, in_place: bool) -> None:
        """Compiled code reuses its graph's memory, and each term needs a separate backward."""
        graphs: list[Any] = []
        student = Net()
        if in_place:
            student.compile(backend=_counting(graphs))
        module = student if in_place else torch.compile(student, backend=_counting(graphs))
        teacher = Net().eval().requires_grad_(False)
        distiller = Distiller(
            module, teacher, segmentation_loss, [Term(F.mse_loss, lambda y: y, name="kd")], inputs=("image",)
        )
        batch = collate([Marked()[0], Marked()[1]])
        plain = Distiller(student, teacher, segmentation_loss, list(distiller.terms.values()), inputs=("image",))
        assert distiller.check(batch).norms == plain.check(batch).norms
        assert graphs == []
        distiller(batch)
        assert len(graphs) == 1

    def test_taps_and_word_tables_of_wrapped_models(self) -> None:
        model = Net()
        with Taps(AveragedModel(model), {"x": "body"}) as taps:
            assert taps.paths == {"x": "body"}
        model.text_encoder = SimpleNamespace(vocab_size=7)
        assert table_size(compiled(nn.DataParallel(model))) == 7
        model.text_encoder = None
        model.head.vocab_size = 9
        assert table_size(nn.Sequential(model)) == 9  # a user-defined wrapper

    def test_rejects_a_wrapped_student_as_teacher(self) -> None:
        model = Net()
        with pytest.raises(ValueError, match="are the same object"):
            Distiller(model, compiled(model), segmentation_loss)

    def test_wrapped_teacher_with_its_own_tokenizer(self) -> None:
        class Clip(Net):
            has_own_tokenizer = True

        class Resized(nn.Module):
            def __init__(self, network: nn.Module) -> None:
                super().__init__()
                self.network = network

            def forward(self, image: Tensor) -> Tensor:
                return self.network(image)

        batch = collate([Marked()[0]])
        for wrap in (AveragedModel, Resized):
            teacher = wrap(Clip()).eval().requires_grad_(False)
            distiller = Distiller(Net(), teacher, segmentation_loss, [Term(nn.MSELoss(), lambda logits: logits)])
            with pytest.raises(ValueError, match="reads token ids of its own tokenizer"):
                distiller(batch)
        teacher.has_own_tokenizer = False  # the wrapper's attribute overrides
        assert distiller(batch).loss.isfinite()


class TestDataSets:
    def test_set_epoch_reaches_every_part(self) -> None:
        one, two, three = Marked(), Marked(), Marked()
        mixed = ConcatDataset([Subset(one, range(4)), Augmented(two), StackDataset(a=three), one])
        set_epoch(mixed, 3)
        assert one.epochs == two.epochs == three.epochs == [3]
        train(Net(), ConcatDataset([one, two]), TrainConfig(steps=8, batch_size=4, device="cpu"), collate=collate)
        assert one.epochs == two.epochs == [3, 0, 1]

    def test_set_epoch_of_a_wrapper_overrides(self) -> None:
        class Late(Augmented):
            def set_epoch(self, epoch: int) -> None:
                self.source.set_epoch(10 + epoch)

        inner = Marked()
        set_epoch(Subset(Late(inner), range(2)), 1)
        assert inner.epochs == [11]

    @pytest.mark.parametrize("wrap", [lambda d: Subset(d, range(4)), lambda d: ConcatDataset([Marked(), d]), Augmented])
    def test_rejects_random_sentences_inside_wrappers(self, wrap: Any) -> None:
        with pytest.raises(ValueError, match="dataset has sentences='random'"):
            evaluate(Net(), wrap(Marked("random")), collate=collate)

    def test_warns_of_undeclared_sentences(self) -> None:
        with pytest.warns(FastKDWarning, match="Marked does not declare whether it serves every sentence"):
            evaluate(Net(), Subset(Marked(None), range(4)), collate=collate)

    def test_checks_the_image_size_inside_wrappers(self) -> None:
        for wrapped in (Subset(Marked(image_size=SIZE), range(4)), Augmented(Marked())):
            with pytest.raises(ValueError, match=r"defined at 480×480, the (dataset has image_size=4|masks are 4×4)"):
                evaluate(Net(), wrapped, collate=collate, protocol="lavt480")

    def test_result_joins_the_names_of_parts(self) -> None:
        parts = [Marked(refcoco=SimpleNamespace(name=name, split="val")) for name in ("refcoco", "refcocog")]
        result = evaluate(Net(), ConcatDataset([Subset(part, range(4)) for part in parts]), collate=collate)
        assert (result.dataset, result.split, result.sentences) == ("refcoco, refcocog", "val", 8)

    def test_compares_the_tokenizers_of_all_parts(self) -> None:
        def words(name: str, *pieces: str) -> Any:
            return SimpleNamespace(name=name, vocab_size=len(pieces), pieces=lambda: pieces)

        model = Net()
        model.vocab_size = 2
        distiller = Distiller(model, None, segmentation_loss)
        same = [Marked(tokenizer=words(name, "a", "b")) for name in "xy"]
        check_tokenizers(distiller, ConcatDataset(same))
        assert len(declared_values(ConcatDataset(same), "tokenizer")) == 2
        with pytest.raises(ValueError, match=r"different tokenizers .*'x' and 'z'"):
            check_tokenizers(distiller, ConcatDataset([same[0], Marked(tokenizer=words("z", "b", "a"))]))
        with pytest.raises(ValueError, match=r"tokenizer \('long'\) has 3 entries, the student has 2 word embeddings"):
            check_tokenizers(distiller, Subset(Marked(tokenizer=words("long", "a", "b", "c")), range(2)))
