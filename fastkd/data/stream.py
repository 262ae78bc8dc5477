"""A dataset that reads shards one after another, divided between readers without repetition or loss."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from random import Random
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from fastkd.data._prepare import Prepared
from fastkd.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from fastkd.data.images import read_image, to_square
from fastkd.data.masks import decode_mask
from fastkd.data.shards import Shard, find_shards, read_shard
from fastkd.data.tokenizer import Tokenizer

_TRIES = 10  # if so many samples in a row cannot be decoded, the shards are at fault


class Replaced(NamedTuple):
    """A sample that could not be decoded: its number, and the error."""

    number: int
    error: str


class ShardDataset(Prepared, IterableDataset[dict[str, Any]]):
    """Samples of WebDataset tar shards or parquet files, read in sequence and shuffled in a buffer.

    Each reader (a loading process of a rank) has its own shards: in every pass, the shards are permuted and dealt out
    to the readers, so each sample occurs once per pass. A reader shuffles its samples in a buffer of ``buffer``
    samples. Order and position are functions of the seed, the pass and the number of readers alone, since the number of
    samples in each shard is known; a resumed run reads the shards of the buffer again and continues with the next
    sample.

    `fastkd.train.train` takes it as training set. In a loop of your own, a DataLoader serves one pass per iteration,
    divided between ranks and workers; call ``set_epoch`` before each. For evaluation use a map-style dataset.

    A sample is a dict, with S = ``image_size`` and T = ``max_words``: ``image`` float32 (3, S, S), ``input_ids`` int64
    (T,), ``word_mask`` bool (T,), ``mask`` bool (S, S), ``id`` and ``sentence`` str, and with ``teacher_tokenizer``
    also ``teacher_input_ids`` and ``teacher_word_mask``, as in `ReferDataset`. Of several sentences, one is drawn from
    (seed, pass, sample).

    Args:
        source: a folder of shards or its ``index.json``; see `fastkd.data.write_shards`. An index may list URLs.
        tokenizer: the student's tokenizer, from `load_tokenizer`.
        image_size: side of the square in pixels.
        max_words: length of ``input_ids``, including ``[CLS]`` and ``[SEP]``.
        buffer: samples that a reader shuffles among each other, kept encoded in memory; 1 keeps the order of the
            shards.
        seed: seed of the order and of the sentences.
        fields: field (``image``, ``mask``, ``sentence``, ``id``) to file extension (tar) or column (parquet), where
            they differ from those of `write_shards`.
        teacher_tokenizer: the tokenizer of a teacher that does not use the student's.
        teacher_max_words: length of ``teacher_input_ids``; default: ``max_words``.
        image_mean: mean of red, green and blue, in [0, 1]; use the model's ``config.image_mean``.
        image_std: their standard deviations.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: an invalid argument or index; while reading, a damaged sample, or a shard with another number of
            samples than its index states.
        ImportError: ``pip install 'fastkd[stream]'`` is missing.

    Example:
        >>> train_set = ShardDataset("shards/train", load_tokenizer("shapes"), image_size=64, max_words=20)
        >>> train(model, train_set, TrainConfig(steps=1000, workers=2), val_dataset=val_set)
    """

    sentences = "random"

    def __init__(
        self,
        source: str | os.PathLike[str],
        tokenizer: Tokenizer,
        image_size: int = 480,
        max_words: int = 20,
        buffer: int = 1000,
        seed: int = 0,
        fields: Mapping[str, str] | None = None,
        teacher_tokenizer: Tokenizer | None = None,
        teacher_max_words: int | None = None,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        if not isinstance(buffer, int) or buffer < 1:
            raise ValueError(f"buffer must be an integer >= 1, got {buffer!r}")
        if unknown := set(fields or {}) - {"image", "mask", "sentence", "id"}:
            raise ValueError(f"fields: expected image, mask, sentence or id, got {sorted(unknown)[0]!r}")
        self._set_transform(
            tokenizer, image_size, max_words, teacher_tokenizer, teacher_max_words, image_mean, image_std
        )
        self.shards: list[Shard] = find_shards(source)
        self.buffer, self.seed, self.fields, self.epoch = buffer, seed, dict(fields or {}), 0
        self._first = [0, *accumulate(shard.samples for shard in self.shards)]  # number of each shard's first sample

    def __len__(self) -> int:
        return self._first[-1]

    def set_epoch(self, epoch: int) -> None:
        """Set the pass that the next iteration serves."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        rank, ranks = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        workers = 1 if worker is None else worker.num_workers
        reader, readers = rank * workers + (0 if worker is None else worker.id), ranks * workers
        self.check_readers(readers)
        return (self._sample(raw, self.epoch) for _, raw in self._read_pass(self.epoch, reader, readers, 0))

    def check_readers(self, readers: int) -> None:
        """Raise ``ValueError`` if there are more readers than shards."""
        if readers > len(self.shards):
            raise ValueError(
                f"{len(self.shards)} shards cannot be divided between {readers} readers (ranks times loading "
                "processes): lower workers, or write smaller shards (write_shards(samples_per_shard=...))"
            )

    def read(self, reader: int, readers: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """Yield the samples of one of several readers, pass after pass, from its ``start``-th on."""
        return (sample for sample, _ in self.serve(reader, readers, start))

    def serve(
        self, reader: int, readers: int, start: int = 0, skip_bad: bool = False
    ) -> Iterator[tuple[dict[str, Any], Replaced | None]]:
        """Yield what `read` yields, and which sample each one replaces.

        With ``skip_bad``, a sample that cannot be decoded is replaced by the reader's next one that can, which is also
        served in its own turn, so the order of the others does not change.
        """
        following = self._read_raw(reader, readers, start)
        ahead: deque[tuple[int, int, dict[str, Any]]] = deque()
        while True:
            errors: list[Replaced] = []
            for turn in range(_TRIES):
                if len(ahead) == turn:
                    ahead.append(next(following))
                number, index, raw = ahead[turn]
                try:
                    sample = self._sample(raw, number)
                    break
                except ValueError as error:
                    errors.append(Replaced(index, f"sample {index} (id {raw['id']}): {error}"))
                    if not skip_bad or len(errors) == _TRIES:
                        if skip_bad:
                            error.add_note(f"{_TRIES} samples in a row cannot be decoded, so none is skipped.")
                        raise
            ahead.popleft()
            yield sample, errors[0] if errors else None

    def order(self, reader: int, readers: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield pass and number of the samples that `read` yields, without reading them.

        Samples are numbered through the shards in the order of `shards`.
        """
        number, start = self._locate(reader, readers, start)
        while True:
            numbers = self._numbers(number, reader, readers)
            for position in self._shuffle(number, reader, readers, len(numbers), start):
                yield number, numbers[position]
            number, start = number + 1, 0

    def settings(self) -> dict[str, Any]:
        """Return what determines the samples and their order, for the settings of a run."""
        names = [f"{os.path.basename(shard.path)} {shard.samples}" for shard in self.shards]
        digest = hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()
        return {"shards": len(names), "digest": digest, "buffer": self.buffer, "seed": self.seed}

    def _locate(self, reader: int, readers: int, start: int) -> tuple[int, int]:
        """Return the pass of a reader's ``start``-th sample, and the number of samples before it in that pass."""
        number = 0
        while start >= (length := sum(self.shards[s].samples for s in self._own_shards(number, reader, readers))):
            number, start = number + 1, start - length
        return number, start

    def _own_shards(self, number: int, reader: int, readers: int) -> list[int]:
        """Return the shards of a reader in a pass, in the order of reading."""
        shards = list(range(len(self.shards)))
        Random(f"shards/{self.seed}/{number}").shuffle(shards)
        return shards[reader::readers]

    def _numbers(self, number: int, reader: int, readers: int) -> Sequence[int]:
        """Return the numbers of a reader's samples in a pass, in the order of reading."""
        own = self._own_shards(number, reader, readers)
        return [n for s in own for n in range(self._first[s], self._first[s + 1])]

    def _shuffle(self, number: int, reader: int, readers: int, length: int, start: int) -> _Shuffle:
        order = _Shuffle(length, self.buffer, Random(f"samples/{self.seed}/{number}/{reader}/{readers}"))
        for _ in range(start):
            next(order)
        return order

    def _read_raw(self, reader: int, readers: int, start: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yield pass, number and content of the samples of a reader."""
        number, start = self._locate(reader, readers, start)
        while True:
            for index, raw in self._read_pass(number, reader, readers, start):
                yield number, index, raw
            number, start = number + 1, 0

    def _read_pass(self, number: int, reader: int, readers: int, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield number and content of the samples of a reader in a pass."""
        own = self._own_shards(number, reader, readers)
        ends = list(accumulate(self.shards[s].samples for s in own))
        order, numbers = self._shuffle(number, reader, readers, ends[-1], start), self._numbers(number, reader, readers)
        waiting, unread = set(order.held), order.following  # all others have been served
        first = min(waiting, default=unread)
        skipped = sum(end <= first for end in ends)  # shards that are not needed any more
        sequence = self._raw(own[skipped:], ends[skipped - 1] if skipped else 0)
        held: dict[int, dict[str, Any]] = {}
        for position in order:
            while position not in held:
                at, raw = next(sequence)
                if at >= unread or at in waiting:
                    held[at] = raw
            yield numbers[position], held.pop(position)
        for _ in sequence:  # a shard with more samples than counted is an error
            pass

    def _raw(self, shards: Sequence[int], position: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield position and content of the samples in these shards; the first one has the given position."""
        for shard in shards:
            for raw in read_shard(self.shards[shard], self.fields):
                yield position, {**raw, "shard": self.shards[shard].path}
                position += 1

    def _sample(self, raw: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            pixels = read_image(raw["image"])
            mask = decode_mask(raw["mask"])
        except Exception as error:  # Pillow raises many types for damaged files
            raise ValueError(
                f"sample {raw['id']!r} of {raw['shard']} can't be decoded ({type(error).__name__}: {error}): the shard "
                "is damaged; copy or write it again"
            ) from error
        if mask.shape != pixels.shape[:2]:
            raise ValueError(
                f"sample {raw['id']!r} of {raw['shard']}: its mask is {mask.shape}, its image {pixels.shape[:2]} "
                "(height, width); they must be equal"
            )
        texts = raw["sentence"]
        text = texts[0] if len(texts) == 1 else Random(f"{self.seed}/{number}/{raw['id']}").choice(texts)
        return {
            **self._image_entries(to_square(pixels, self.image_size)),
            **self._tokenise(text),
            "mask": torch.from_numpy(self._square_mask(mask).copy()),
            "id": raw["id"],
            "sentence": text,
        }


class _Shuffle(Iterator[int]):
    """The numbers 0 … length − 1 in the order in which a buffer filled in sequence returns them.

    Attributes:
        held: numbers in the buffer.
        following: the next number to enter it.
    """

    def __init__(self, length: int, buffer: int, random: Random) -> None:
        self._length, self._buffer, self._random = length, buffer, random
        self.held: list[int] = []
        self.following = 0

    def __next__(self) -> int:
        while self.following < self._length and len(self.held) < self._buffer:
            self.held.append(self.following)
            self.following += 1
        if not self.held:
            raise StopIteration
        slot = self._random.randrange(len(self.held))
        self.held[slot], self.held[-1] = self.held[-1], self.held[slot]
        return self.held.pop()
