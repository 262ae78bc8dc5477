"""Tokenize sentences with the shipped vocabulary or local files; never downloads anything."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from fastkd.data._assets import SHAPES_VOCABULARY_FILE
from fastkd.errors import FastKDWarning

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_CONFIG = "tokenizer_config.json"
FILES = ("tokenizer.json", _CONFIG, "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt")
_ROLES = {  # names of special tokens, for a tokenizer.json without a tokenizer_config.json
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}
_CASED = 0.01  # a vocabulary is cased if a larger share of its pieces has capitals


class Tokenizer:
    """Convert sentences to ids of fixed length: ``[CLS]``, word pieces, ``[SEP]``, then ``[PAD]``.

    A longer sentence is truncated to its first ``max_words`` ids (without ``[SEP]``, as in LAVT), with one warning.
    With ``keep_end`` the last id is the end token instead, which CLIP's text encoders need. Another warning, issued
    once, lists the words that the vocabulary cannot represent.

    Attributes:
        name: The source: "shapes" or a path.
        pad_id: Id of ``[PAD]``, not always 0; None if there is none, in which case padding positions hold 0.

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
        # CLIP's unknown token is its end token, and its pieces cover every byte.
        self._unknown = None if inner.unk_token_id in (None, inner.eos_token_id) else inner.unk_token_id

    @property
    def vocab_size(self) -> int:
        """Return the number of ids, equal to the number of word embeddings."""
        return len(self._inner)

    @property
    def lower_case(self) -> bool:
        """Return whether sentences are lower-cased."""
        normalizer = self._inner.backend_tokenizer.normalizer
        return normalizer is not None and normalizer.normalize_str("A") == "a"

    @property
    def form(self) -> str:
        """Return the form of a sentence with its special tokens, such as "[CLS] pieces [SEP]"."""
        found = self._inner("a", return_special_tokens_mask=True)
        tokens = zip(self._inner.convert_ids_to_tokens(found["input_ids"]), found["special_tokens_mask"], strict=True)
        added = [token if special else "pieces" for token, special in tokens]
        return " ".join(name for name, _ in groupby(added))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write vocabulary, special tokens and casing to a folder that `load_tokenizer` reads."""
        self._inner.save_pretrained(str(folder))

    def to_json(self) -> str:
        """Return the files of `save` as one string, for `from_json`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            return json.dumps({path.name: path.read_text("utf-8") for path in sorted(Path(folder).iterdir())})

    @classmethod
    def from_json(cls, text: str, name: str) -> Tokenizer:
        """Build a tokenizer from the string of `to_json`.

        Raises:
            ValueError: The string does not come from `to_json`.
        """
        files = json.loads(text)
        if not isinstance(files, dict) or not set(files) <= set(FILES):
            raise ValueError(f"expected a tokenizer's files by name ({', '.join(FILES)})")
        with tempfile.TemporaryDirectory() as folder:
            for file, content in files.items():
                (Path(folder) / file).write_text(content, encoding="utf-8")
            return cls(load_tokenizer(folder)._inner, name)

    def pieces(self) -> list[str]:
        """Return the vocabulary's pieces in order of their ids."""
        ids = self._inner.get_vocab()
        return sorted(ids, key=ids.__getitem__)

    def __call__(self, sentences: Sequence[str], max_words: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids (B, max_words) int64 and their mask (B, max_words) bool, False at padding.

        Raises:
            TypeError: ``sentences`` is one string, or holds objects other than strings.
            ValueError: There are no sentences, a sentence is empty, or ``max_words`` is below 3.
        """
        if isinstance(sentences, str) or not all(isinstance(sentence, str) for sentence in sentences):
            raise TypeError(f"sentences must be a list of strings, got {sentences!r:.120}")
        if len(sentences) == 0:
            raise ValueError("sentences is empty: pass at least one sentence")
        if not isinstance(max_words, int) or max_words < 3:
            raise ValueError(f"max_words must be an integer of at least 3 ([CLS], a word, [SEP]), got {max_words!r}")
        for number, sentence in enumerate(sentences):
            if not sentence.strip():
                raise ValueError(f"sentence {number} is empty: remove it")
            if not sentence.isascii() and any("\ud800" <= character <= "\udfff" for character in sentence):
                raise ValueError(
                    f"sentence {number} ({sentence!r:.120}) holds a lone surrogate: it is not valid Unicode"
                )
        rows = self._encode(list(sentences), add_special_tokens=True)
        input_ids = torch.full((len(rows), max_words), self.pad_id or 0, dtype=torch.int64)
        word_mask = torch.zeros(len(rows), max_words, dtype=torch.bool)
        special = self._inner.num_special_tokens_to_add()
        for number, row in enumerate(rows):
            if len(row) <= special:  # e.g. a zero-width space
                raise ValueError(f"sentence {number} ({sentences[number]!r}) holds no word: remove it")
            if len(row) > max_words:
                lost = self._inner.decode(row[max_words:], skip_special_tokens=True) or "[SEP]"
                self._warn_once(
                    "truncated",
                    f"a sentence of {len(row)} word pieces was truncated to max_words={max_words}: "
                    f"{_abbreviate(sentences[number], 80)} lost {_abbreviate(lost, 200)}. Increase max_words to keep "
                    "long sentences. Shown once",
                )
            if self._unknown in row:
                unknown = [w for w in sentences[number].split() if self._unknown in self._encode([w])[0]]
                self._warn_once(
                    "unknown",
                    f"tokenizer {self.name!r} cannot represent {_abbreviate(' '.join(unknown), 80)} in "
                    f"{_abbreviate(sentences[number], 80)} and replaces it by {self._inner.unk_token}. Check that it "
                    "is the model's tokenizer and language. Shown once",
                )
            kept = row[:max_words]
            if self.keep_end:
                kept[-1] = row[-1]
            input_ids[number, : len(kept)] = torch.tensor(kept)
            word_mask[number, : len(kept)] = True
        return input_ids, word_mask

    def _encode(self, sentences: list[str], **options: Any) -> list[list[int]]:
        """Return the ids of each sentence; "[SEP]" in a sentence is text, not a special token."""
        return self._inner(sentences, return_attention_mask=False, split_special_tokens=True, **options)["input_ids"]

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, FastKDWarning, stacklevel=3)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size})"


def _abbreviate(text: str, limit: int) -> str:
    """Return the repr of a text, shortened to ``limit`` characters."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."


def load_tokenizer(
    source: str | os.PathLike[str] = "shapes", *, keep_end: bool = False, lower_case: bool | None = None
) -> Tokenizer:
    """Load a tokenizer from local files.

    Args:
        source: ``"shapes"``, the vocabulary of the procedural set that ships with fastkd; the path of a BERT
            ``vocab.txt``; or a folder written by transformers' ``save_pretrained``, or with a ``tokenizer.json``, a
            ``vocab.txt``, or a ``vocab.json`` and ``merges.txt``.
        keep_end: Keep the end token of truncated sentences, as CLIP's text encoders need; see `Tokenizer`.
        lower_case: For a ``vocab.txt``: whether to lower-case sentences. Default: ``do_lower_case`` in the
            ``tokenizer_config.json`` next to it, otherwise True unless the vocabulary is cased (more than 1 % of its
            pieces have capitals).

    Raises:
        FileNotFoundError: ``source`` does not exist, or is a folder without these files.
        ValueError: The vocabulary lacks special tokens or repeats an entry, ``lower_case`` is given for a tokenizer
            that defines its own casing, or a file can't be read.

    Example::

        input_ids, word_mask = load_tokenizer("bert-base-uncased/vocab.txt")(["the left red cup"], 20)  # (1, 20) each
    """
    if source == "shapes":
        return _from_vocabulary(SHAPES_VOCABULARY_FILE, "shapes", keep_end, lower_case)
    path = Path(source).expanduser()
    vocabulary = path / "vocab.txt" if path.is_dir() else path
    if path.is_dir() and has_tokenizer(path) and not _has_only_vocabulary(path):
        if lower_case is not None:
            raise ValueError(
                f"lower_case applies to a vocab.txt only; the tokenizer in {str(path)!r} defines its own casing"
            )
        return Tokenizer(_from_folder(path), str(path), keep_end)
    if path.is_dir() and not vocabulary.is_file():
        raise FileNotFoundError(f"tokenizer folder {str(path)!r} has neither tokenizer.json nor vocab.txt")
    if not vocabulary.is_file():
        raise FileNotFoundError(
            f"tokenizer {str(path)!r} does not exist; pass 'shapes', the path of a vocab.txt, or a folder"
        )
    return _from_vocabulary(vocabulary, str(path), keep_end, lower_case)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder contains a tokenizer's files."""
    present = {name for name in FILES if (folder / name).is_file()}
    return bool(present & {"tokenizer.json", "vocab.txt"}) or {"vocab.json", "merges.txt"} <= present


def locate_tokenizer(named: str | None, folder: Path) -> str | None:
    """Return the source to load a model's tokenizer from.

    The model folder's own files take precedence over ``named``, its configuration's tokenizer, which may be relative to
    the folder.
    """
    if has_tokenizer(folder):
        return str(folder.absolute())
    if named is not None and named != "shapes" and (folder / named).exists():
        return str((folder / named).absolute())
    return named


def _has_only_vocabulary(folder: Path) -> bool:
    return not (folder / "tokenizer.json").is_file() and (folder / "vocab.txt").is_file()


def _from_folder(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        known = inner.get_vocab()
    except Exception as error:  # damaged folders raise many types
        kind, text = type(error).__name__, (str(error).splitlines() or [""])[0]
        raise ValueError(f"tokenizer folder {str(folder)!r} can't be read ({kind}: {text}): save it again") from error
    if not (folder / _CONFIG).is_file():  # transformers then does not know the roles of special tokens
        for role, names in _ROLES.items():
            token = next((name for name in names if name in known), None)
            if getattr(inner, role, None) is None and token is not None:
                setattr(inner, role, token)
    return inner


def _from_vocabulary(path: Path, name: str, keep_end: bool, lower_case: bool | None) -> Tokenizer:
    from transformers import BertTokenizer

    try:
        pieces = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): pass a BERT vocab.txt") from error
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise ValueError(f"{path} repeats an entry: it is not a BERT vocabulary, which has one piece per line")
    missing = [piece for piece in _SPECIAL if piece not in vocabulary]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: it is not a BERT vocabulary, which has one piece per line"
        )
    options = _options(path.parent / _CONFIG)
    if lower_case is None:
        lower_case = options.pop("do_lower_case", not _is_cased(pieces))
    options["do_lower_case"] = lower_case
    return Tokenizer(BertTokenizer(vocab=vocabulary, **options), name, keep_end)


def _options(path: Path) -> dict[str, Any]:
    """Return the text-processing options of the configuration next to a vocab.txt."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again, or remove it") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must hold a JSON object, not a {type(values).__name__}: download it again, or remove it"
        )
    names = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
    return {name: values[name] for name in names if isinstance(values.get(name), bool)}


def _is_cased(pieces: list[str]) -> bool:
    """Return whether more than 1 % of the pieces, not counting special tokens, have capitals."""
    words = [piece for piece in pieces if not (piece.startswith("[") and piece.endswith("]"))]
    return sum(piece != piece.lower() for piece in words) > _CASED * len(words)
