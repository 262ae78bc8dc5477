"""Sentences to ids: BERT word pieces, from the shipped vocabulary or from files, never from a network."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastkd.errors import FastKDWarning

_SHAPES = Path(__file__).parent / "assets" / "shapes_vocab.txt"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class Tokenizer:
    """Turns sentences into ids of fixed length: ``[CLS]``, the pieces, ``[SEP]``, then 0 (``[PAD]``).

    A longer sentence keeps its first ``max_words`` ids (its ``[SEP]`` is cut off, as in LAVT) with one warning. With
    ``keep_end`` it keeps its end mark in the last place instead, and the padding id may be any: so do CLIP's text
    encoders want it, which read a sentence from its end mark. One more warning names the words of the first sentence
    that holds some the vocabulary can't spell.

    Example::

        tokenizer = fastkd.data.load_tokenizer("shapes")
        input_ids, word_mask = tokenizer(["the red circle"], max_words=20)   # (1, 20) int64, (1, 20) bool
    """

    def __init__(self, inner: Any, name: str, keep_end: bool = False) -> None:
        if inner.pad_token_id != 0 and not keep_end:
            raise ValueError(
                f"tokenizer {name!r} has pad id {inner.pad_token_id}; [PAD] must be the first entry, id 0 "
                "(CLIP's, for a teacher: keep_end=True)"
            )
        self.name = name
        self.keep_end = keep_end
        self._inner = inner
        self._warned: set[str] = set()
        # CLIP's is its end mark, and its pieces cover every byte
        self._unknown = None if inner.unk_token_id in (None, inner.eos_token_id) else inner.unk_token_id

    @property
    def vocab_size(self) -> int:
        """Number of ids, which is the number of rows of a word-embedding table."""
        return len(self._inner)

    def pieces(self) -> list[str]:
        """The vocabulary: every piece, in the order of its id."""
        ids = self._inner.get_vocab()
        return sorted(ids, key=ids.__getitem__)

    def __call__(self, sentences: Sequence[str], max_words: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B, max_words) int64 and the mask (B, max_words) bool, True at real ids (special ones included).

        Raises:
            TypeError: ``sentences`` is one string, or holds something else than strings.
            ValueError: no sentences, an empty sentence, or ``max_words`` below 3.
        """
        if isinstance(sentences, str) or not all(isinstance(sentence, str) for sentence in sentences):
            raise TypeError(f"sentences must be a list of strings; got {sentences!r:.120}")
        if len(sentences) == 0:
            raise ValueError("sentences is empty: give at least one")
        if not isinstance(max_words, int) or max_words < 3:
            raise ValueError(f"max_words must be an integer of at least 3 ([CLS], a word, [SEP]); got {max_words!r}")
        for number, sentence in enumerate(sentences):
            if not sentence.strip():
                raise ValueError(f"sentence {number} is empty: leave it out")
            if not sentence.isascii() and any("\ud800" <= sign <= "\udfff" for sign in sentence):
                raise ValueError(f"sentence {number} ({sentence!r:.120}) holds half a character (a lone surrogate)")
        rows = self._encode(list(sentences), add_special_tokens=True)
        input_ids = torch.full((len(rows), max_words), self._inner.pad_token_id or 0, dtype=torch.int64)
        word_mask = torch.zeros(len(rows), max_words, dtype=torch.bool)
        marks = self._inner.num_special_tokens_to_add()
        for number, row in enumerate(rows):
            if len(row) <= marks:  # a space of no width, say
                raise ValueError(f"sentence {number} ({sentences[number]!r}) holds no word: leave it out")
            if len(row) > max_words:
                lost = self._inner.decode(row[max_words:], skip_special_tokens=True) or "[SEP]"
                self._warn_once(
                    "cut",
                    f"a sentence of {len(row)} word pieces was cut to max_words={max_words}: "
                    f"{_brief(sentences[number], 80)} lost {_brief(lost, 200)} "
                    "(said once; raise max_words to keep long sentences whole)",
                )
            if self._unknown in row:
                strange = [w for w in sentences[number].split() if self._unknown in self._encode([w])[0]]
                self._warn_once(
                    "unknown",
                    f"tokenizer {self.name!r} cannot spell all of {_brief(' '.join(strange), 80)} in "
                    f"{_brief(sentences[number], 80)}: the model reads {self._inner.unk_token} there "
                    "(said once; is it the model's tokenizer and language?)",
                )
            kept = row[:max_words]
            if self.keep_end:
                kept[-1] = row[-1]
            input_ids[number, : len(kept)] = torch.tensor(kept)
            word_mask[number, : len(kept)] = True
        return input_ids, word_mask

    def _encode(self, sentences: list[str], **options: Any) -> list[list[int]]:
        """Return the ids of each sentence. "[SEP]" in a sentence is text: only the tokenizer itself sets marks."""
        return self._inner(sentences, return_attention_mask=False, split_special_tokens=True, **options)["input_ids"]

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, FastKDWarning, stacklevel=3)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size})"


def _brief(text: str, limit: int) -> str:
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."


def load_tokenizer(source: str | os.PathLike[str] = "shapes", *, keep_end: bool = False) -> Tokenizer:
    """A tokenizer from files on this machine.

    Args:
        source: ``"shapes"``, the vocabulary of the procedural set that ships with fastkd; or the path of a BERT
            ``vocab.txt`` (uncased); or a folder saved by transformers' ``save_pretrained``, or with a ``vocab.txt``, or
            with a ``vocab.json`` and ``merges.txt``.
        keep_end: sentences that are cut keep their end mark, as CLIP's text encoders need; see `Tokenizer`.

    Raises:
        FileNotFoundError: nothing there, or a folder with none of those files.
        ValueError: a vocabulary without the special pieces, with an entry twice, or with ``[PAD]`` not first; a file or
            folder that can't be read.
    """
    if source == "shapes":
        return _from_vocabulary(_SHAPES, "shapes", keep_end)
    path = Path(source)
    if path.is_dir():
        if (path / "tokenizer.json").is_file() or all((path / name).is_file() for name in ("vocab.json", "merges.txt")):
            from transformers import AutoTokenizer

            try:
                inner = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
            except Exception as error:  # a damaged folder raises almost anything
                kind = type(error).__name__
                raise ValueError(
                    f"tokenizer folder {str(path)!r} can't be read ({kind}: {error}): save it again"
                ) from error
            return Tokenizer(inner, str(path), keep_end)
        if (path / "vocab.txt").is_file():
            return _from_vocabulary(path / "vocab.txt", str(path), keep_end)
        raise FileNotFoundError(f"tokenizer folder {str(path)!r} holds neither tokenizer.json nor vocab.txt")
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer {str(path)!r} is no file or folder; give 'shapes', the path of a vocab.txt, or a folder"
        )
    return _from_vocabulary(path, str(path), keep_end)


def _from_vocabulary(path: Path, name: str, keep_end: bool) -> Tokenizer:
    from transformers import BertTokenizer

    try:
        pieces = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in utf-8 ({error}): give a BERT vocab.txt") from error
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise ValueError(f"{path} has an entry twice: it is not a BERT vocabulary, which has one piece a line")
    missing = [piece for piece in _SPECIAL if piece not in vocabulary]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is not a BERT vocabulary, which has one piece a line")
    return Tokenizer(BertTokenizer(vocab=vocabulary, do_lower_case=True), name, keep_end)
