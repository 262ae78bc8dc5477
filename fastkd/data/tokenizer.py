"""Sentences to ids: BERT word pieces, from the shipped vocabulary or from files, never from a network."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastkd.errors import FastKDWarning

_SHAPES = Path(__file__).parent / "assets" / "shapes_vocab.txt"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_CONFIG = "tokenizer_config.json"
FILES = ("tokenizer.json", _CONFIG, "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt")
_ROLES = {  # of marks in a tokenizer.json that has nothing next to it to state them
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}
_CASED = 0.01  # share of pieces with capitals above which a vocabulary is a cased one


class Tokenizer:
    """Turns sentences into ids of fixed length: ``[CLS]``, the pieces, ``[SEP]``, then ``[PAD]``.

    A longer sentence keeps its first ``max_words`` ids (its ``[SEP]`` is cut off, as in LAVT) with one warning. With
    ``keep_end`` it keeps its end mark in the last place instead: so do CLIP's text encoders want it, which read a
    sentence from its end mark. One more warning names the words of the first sentence that holds some the vocabulary
    can't spell.

    Attributes:
        name: what it was loaded from: "shapes" or a path.
        pad_id: id of ``[PAD]``, of any value; None where the tokenizer has none and 0 stands in the places that the
            mask takes away.

    Example::

        tokenizer = fastkd.data.load_tokenizer("shapes")
        input_ids, word_mask = tokenizer(["the red circle"], max_words=20)   # (1, 20) int64, (1, 20) bool
    """

    def __init__(self, inner: Any, name: str, keep_end: bool = False) -> None:
        self.name = name
        self.pad_id: int | None = inner.pad_token_id
        self.keep_end = keep_end
        self._inner = inner
        self._warned: set[str] = set()
        # CLIP's is its end mark, and its pieces cover every byte
        self._unknown = None if inner.unk_token_id in (None, inner.eos_token_id) else inner.unk_token_id

    @property
    def vocab_size(self) -> int:
        """Number of ids, which is the number of rows of a word-embedding table."""
        return len(self._inner)

    @property
    def lower_case(self) -> bool:
        """Return whether sentences are lower-cased."""
        normalizer = self._inner.backend_tokenizer.normalizer
        return normalizer is not None and normalizer.normalize_str("A") == "a"

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it into a folder, which `load_tokenizer` then reads: vocabulary, marks and casing."""
        self._inner.save_pretrained(str(folder))

    def to_json(self) -> str:
        """Return the files of :meth:`save` as one text, for `from_json`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            return json.dumps({path.name: path.read_text("utf-8") for path in sorted(Path(folder).iterdir())})

    @classmethod
    def from_json(cls, text: str, name: str) -> Tokenizer:
        """Return the tokenizer of :meth:`to_json`.

        Raises:
            ValueError: another text.
        """
        files = json.loads(text)
        if not isinstance(files, dict) or not set(files) <= set(FILES):
            raise ValueError(f"expected a tokenizer's files by name ({', '.join(FILES)})")
        with tempfile.TemporaryDirectory() as folder:
            for file, content in files.items():
                (Path(folder) / file).write_text(content, encoding="utf-8")
            return cls(load_tokenizer(folder)._inner, name)

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
        input_ids = torch.full((len(rows), max_words), self.pad_id or 0, dtype=torch.int64)
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


def load_tokenizer(
    source: str | os.PathLike[str] = "shapes", *, keep_end: bool = False, lower_case: bool | None = None
) -> Tokenizer:
    """Return a tokenizer from files on this machine.

    Args:
        source: ``"shapes"``, the vocabulary of the procedural set that ships with fastkd; or the path of a BERT
            ``vocab.txt``; or a folder saved by transformers' ``save_pretrained``, or with a ``tokenizer.json``, or
            with a ``vocab.txt``, or with a ``vocab.json`` and ``merges.txt``.
        keep_end: sentences that are cut keep their end mark, as CLIP's text encoders need; see `Tokenizer`.
        lower_case: of a ``vocab.txt``: lower-case sentences, or not. Default: as ``do_lower_case`` in the
            ``tokenizer_config.json`` next to it says, and where there is none, unless the vocabulary is a cased one
            (more than 1 % of its pieces have capitals).

    Raises:
        FileNotFoundError: nothing there, or a folder with none of those files.
        ValueError: a vocabulary without the special pieces or with an entry twice, ``lower_case`` for a tokenizer that
            has its own, or a file or folder that can't be read.
    """
    if source == "shapes":
        return _from_vocabulary(_SHAPES, "shapes", keep_end, lower_case)
    path = Path(source)
    vocabulary = path / "vocab.txt" if path.is_dir() else path
    if path.is_dir() and has_tokenizer(path) and not _vocabulary_alone(path):
        if lower_case is not None:
            raise ValueError(f"lower_case is for a vocab.txt; the tokenizer in {str(path)!r} has its own")
        return Tokenizer(_from_folder(path), str(path), keep_end)
    if path.is_dir() and not vocabulary.is_file():
        raise FileNotFoundError(f"tokenizer folder {str(path)!r} holds neither tokenizer.json nor vocab.txt")
    if not vocabulary.is_file():
        raise FileNotFoundError(
            f"tokenizer {str(path)!r} is no file or folder; give 'shapes', the path of a vocab.txt, or a folder"
        )
    return _from_vocabulary(vocabulary, str(path), keep_end, lower_case)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds the files of a tokenizer."""
    there = {name for name in FILES if (folder / name).is_file()}
    return bool(there & {"tokenizer.json", "vocab.txt"}) or {"vocab.json", "merges.txt"} <= there


def locate_tokenizer(named: str | None, folder: Path) -> str | None:
    """Return what to load for a model in ``folder`` whose configuration names a tokenizer.

    The folder's own files, else what is named, relative to the folder where it is there.
    """
    if has_tokenizer(folder):
        return str(folder.absolute())
    if named is not None and named != "shapes" and (folder / named).exists():
        return str((folder / named).absolute())
    return named


def _vocabulary_alone(folder: Path) -> bool:
    return not (folder / "tokenizer.json").is_file() and (folder / "vocab.txt").is_file()


def _from_folder(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        known = inner.get_vocab()
    except Exception as error:  # a damaged folder raises almost anything
        kind, text = type(error).__name__, (str(error).splitlines() or [""])[0]
        raise ValueError(f"tokenizer folder {str(folder)!r} can't be read ({kind}: {text}): save it again") from error
    if not (folder / _CONFIG).is_file():  # transformers then knows no mark's role
        for role, names in _ROLES.items():
            mark = next((name for name in names if name in known), None)
            if getattr(inner, role, None) is None and mark is not None:
                setattr(inner, role, mark)
    return inner


def _from_vocabulary(path: Path, name: str, keep_end: bool, lower_case: bool | None) -> Tokenizer:
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
    options = _options(path.parent / _CONFIG)
    if lower_case is None:
        lower_case = options.pop("do_lower_case", not _is_cased(pieces))
    options["do_lower_case"] = lower_case
    return Tokenizer(BertTokenizer(vocab=vocabulary, **options), name, keep_end)


def _options(path: Path) -> dict[str, Any]:
    """Return what the configuration next to a vocab.txt says of the way from text to pieces."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again, or remove it") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(values).__name__}: fetch it again, or remove it")
    names = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
    return {name: values[name] for name in names if isinstance(values.get(name), bool)}


def _is_cased(pieces: list[str]) -> bool:
    """Return whether lower-casing would make pieces unreachable, other than strays and marks such as "[CLS]"."""
    words = [piece for piece in pieces if not (piece.startswith("[") and piece.endswith("]"))]
    return sum(piece != piece.lower() for piece in words) > _CASED * len(words)
