"""Open the datasets named on the command line with the image size, normalisation and tokenizer of a model."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastkd.data._files import absolute

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from fastkd.cli._models import LoadedModel
    from fastkd.data import ReferDataset, ShardDataset
    from fastkd.models import RISModel


@dataclass
class DataArgs:
    """Location of the data.

    Args:
        data: folder that holds ``refcoco/`` and ``images/``, or ``train.jsonl`` and ``val.jsonl`` (or parquet).
        dataset: refcoco, refcoco+, refcocog, grefcoco, refclef or rrsisd; or folder, for JSONL and parquet.
        split_by: author of the splits: unc, google, umd or berkeley; if omitted, the first that the set has.
        tokenizer: path of the vocab.txt (or tokenizer folder) that defines the word ids, or "shapes"; if omitted, the
            one in the model's folder or named by its configuration, else the teacher's.
        image_root: folder of the image files; if omitted, the usual ones under --data.
        mask_rule: union of an object's polygons, or lavt: pixels covered by exactly one, as in LAVT's scores.
        sentence_field: sent (lower-case, no punctuation), raw, or raw.lower.
        skip_unusable: skip refs without a sentence, a mask or a readable image file, and report their number, instead
            of raising an error. Decodes every image once.
        mix: other sets to train on as well (not for ``evaluate``), such as ``refcoco+`` (in --data) or
            ``data/cups:folder``; with a number of passes per epoch, ``grefcoco=0.5``, or of samples,
            ``grefcoco,size=2000``. Validation uses --dataset.
    """

    data: Path
    dataset: str = "refcoco"
    split_by: str | None = None
    tokenizer: str | None = None
    image_root: Path | None = None
    mask_rule: Literal["union", "lavt"] = "union"
    sentence_field: Literal["sent", "raw", "raw.lower"] = "sent"
    skip_unusable: bool = False
    mix: tuple[str, ...] = ()

    def open(
        self, split: str, model: Any, *, sentences: str, seed: int = 0, teacher: dict[str, Any] | None = None
    ) -> ReferDataset:
        """Return one split, prepared for the model; see `open_split`."""
        return open_split(
            self.data,
            split,
            model,
            sentences=sentences,
            seed=seed,
            tokenizer=self.tokenizer,
            teacher=teacher,
            name=self.dataset,
            split_by=self.split_by,
            image_root=self.image_root,
            mask_rule=self.mask_rule,
            sentence_field=self.sentence_field,
            skip_unusable=self.skip_unusable,
        )

    def open_train(
        self, model: Any, *, seed: int, teacher: dict[str, Any] | None = None, announce: bool = True
    ) -> Dataset[Any]:
        """Return the training set: the split train, mixed with those of ``mix``; ``announce`` prints a mixture."""
        from fastkd._console import show
        from fastkd.data import MixedDataset

        sets = self._train_sets(model, sentences="random", seed=seed, teacher=teacher)
        if len(sets) == 1:
            return sets[self.dataset][1]
        weights = {name: mixed.weight for name, (mixed, _) in sets.items()}
        sizes = {name: mixed.size for name, (mixed, _) in sets.items() if mixed.size is not None}
        mixture = MixedDataset(
            {name: part for name, (_, part) in sets.items()}, weights=weights, sizes=sizes, seed=seed
        )
        if announce:
            show(f"samples per epoch: {mixture.summary()}")
        return mixture

    def open_every_sentence(self, model: Any, *, teacher: dict[str, Any] | None = None) -> Dataset[Any]:
        """Return every sentence of the training sets."""
        from torch.utils.data import ConcatDataset

        sets = [part for _, part in self._train_sets(model, sentences="all", teacher=teacher).values()]
        return sets[0] if len(sets) == 1 else ConcatDataset(sets)

    def _train_sets(self, model: Any, **options: Any) -> dict[str, tuple[MixArgs, ReferDataset]]:
        from fastkd.data.opening import author_of

        sets = {self.dataset: (MixArgs(None, self.dataset, self.split_by), self.open("train", model, **options))}
        places: list[Any] = [(absolute(self.data), self.dataset, author_of(self.dataset, self.split_by))]
        for mixed in map(MixArgs.parse, self.mix):
            author = author_of(mixed.dataset, mixed.split_by)
            place = (absolute(mixed.root or self.data), mixed.dataset, author)
            if place in places:
                raise ValueError(
                    f"--mix: {mixed.names()[0]!r} occurs twice; name each set once, with its number of passes"
                )
            places.append(place)
            *_, longest = names = mixed.names()
            name = next((name for name in names if name not in sets), f"{longest} ({len(sets)})")
            changes: dict[str, Any] = {"dataset": mixed.dataset, "split_by": mixed.split_by}
            if mixed.root is not None:
                changes |= {"data": mixed.root, "image_root": None}
            if mixed.dataset == "folder":
                changes["sentence_field"] = "sent"
            sets[name] = mixed, replace(self, **changes).open("train", model, **options)
        return sets

    def open_shards(
        self, folder: Path, model: Any, *, buffer: int, seed: int, teacher: dict[str, Any] | None = None
    ) -> ShardDataset:
        """Return the training set in a folder of shards, prepared for the model; see `ShardDataset`."""
        from fastkd.data import ShardDataset

        return ShardDataset(folder, buffer=buffer, seed=seed, **_transform(model, self.tokenizer, teacher))


@dataclass(frozen=True)
class MixArgs:
    """A set to mix in: ``[ROOT:]DATASET[/SPLIT_BY][=PASSES][,size=SAMPLES]``."""

    root: Path | None
    dataset: str
    split_by: str | None
    weight: float = 1.0
    size: int | None = None

    @classmethod
    def parse(cls, text: str) -> MixArgs:
        """Return the parts of a text.

        Raises:
            ValueError: It has another form.
        """
        match = re.fullmatch(r"(?:(.+):)?([^:/=,]+)(?:/(\w+))?(?:=([^,]+))?(?:,size=(\d+))?", text)
        try:
            if match is None or not match[2].strip():
                raise ValueError
            weight, size = float(match[4] or 1), int(match[5]) if match[5] else None
        except ValueError:
            raise ValueError(
                f"--mix must be [ROOT:]DATASET[/SPLIT_BY][=PASSES][,size=SAMPLES], such as refcoco+ or "
                f"data/cups:folder=0.5, got {text!r}"
            ) from None
        return cls(Path(match[1]).expanduser() if match[1] else None, match[2], match[3], weight, size)

    def names(self) -> list[str]:
        """Return names of the set, from short to long."""
        by = "" if self.split_by is None else f"/{self.split_by}"
        parts = () if self.root is None else absolute(self.root).parts
        roots = ["/".join(parts[-depth:]) + ":" if depth else "" for depth in range(bool(parts), len(parts) + 1)]
        return [f"{root}{self.dataset}{end}" for root in roots for end in ("", by)]

    def absolute(self) -> str:
        """Return the text with an absolute path."""
        root = "" if self.root is None else f"{absolute(self.root)}:"
        by = "" if self.split_by is None else f"/{self.split_by}"
        return f"{root}{self.dataset}{by}={self.weight!r}" + ("" if self.size is None else f",size={self.size}")


Data = Annotated[DataArgs, tyro.conf.arg(name="")]


def open_split(
    root: Path,
    split: str,
    model: Any,
    *,
    sentences: str,
    seed: int = 0,
    tokenizer: str | None = None,
    teacher: dict[str, Any] | None = None,
    **options: Any,
) -> ReferDataset:
    """Return one split with the model's image size and normalisation, and with ``tokenizer`` or the model's own.

    ``teacher`` is the result of `teacher_tokenizer_options`; ``options`` are those of `fastkd.data.open_set`.
    """
    from fastkd.data import ReferDataset, open_set

    transform = _transform(model, tokenizer, teacher)
    return ReferDataset(
        open_set(root, split, **options),
        sentences=sentences,
        seed=seed,
        cache=model.config.image_size <= 128,  # decoded images of a small set fit in memory
        **transform,
    )


def _transform(model: Any, tokenizer: str | None, teacher: dict[str, Any] | None) -> dict[str, Any]:
    """Return a dataset's options that follow from the model."""
    from fastkd.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
    from fastkd.distill.forward import normalisation
    from fastkd.evaluate.prediction import load_tokenizer_for, tokenizer_of
    from fastkd.models.inputs import check_vocabulary, word_limit

    loaded = tokenizer_of(model) if tokenizer is None else load_tokenizer_for(model, tokenizer)
    check_vocabulary(model, loaded)
    image_mean, image_std = normalisation(model) or (IMAGENET_MEAN, IMAGENET_STD)
    transform = {"tokenizer": loaded, "image_size": model.config.image_size, "max_words": word_limit(model)}
    return transform | {"image_mean": image_mean, "image_std": image_std, **(teacher or {})}


def teacher_tokenizer_options(student: RISModel, teacher: LoadedModel, tokenizer: str | None) -> dict[str, Any]:
    """Return `ReferDataset`'s options for a teacher with its own tokenizer; empty if it shares the student's.

    Raises:
        ValueError: the teacher's word ids differ from the student's and its tokenizer is unknown or does not match, so
            the teacher would read another sentence.
    """
    from fastkd.evaluate.prediction import load_tokenizer_for
    from fastkd.models import RISModel, TextPromptedTeacher

    if isinstance(teacher, TextPromptedTeacher):
        tokenizer = tokenizer or teacher.config.tokenizer
        if tokenizer is None:
            raise ValueError(
                f"the teacher's folder holds no tokenizer, and a {type(teacher).__name__} has its own token ids: save "
                "its tokenizer there too, or pass --teacher-tokenizer with that tokenizer's folder"
            )
    else:
        theirs = teacher.text_encoder.vocab_size if isinstance(teacher, RISModel) else teacher.vocab_size
        ours = student.text_encoder.vocab_size
        if tokenizer is None and theirs is not None and theirs != ours:
            raise ValueError(
                f"the student's vocabulary has {ours} words, the teacher's {theirs}: they read the same word ids, so "
                "they need the same tokenizer; choose a student with the teacher's tokenizer, or pass "
                "--teacher-tokenizer and use no term that compares them word by word"
            )
        if tokenizer is None:
            return {}
    loaded = load_tokenizer_for(teacher, tokenizer)
    if isinstance(teacher, TextPromptedTeacher) and loaded.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer!r} has {loaded.vocab_size} entries, but the teacher's vocabulary "
            f"{teacher.vocab_size}: it is another tokenizer; pass --teacher-tokenizer with the one "
            "published with its weights"
        )
    return {"teacher_tokenizer": loaded, "teacher_max_words": teacher.config.max_words}
