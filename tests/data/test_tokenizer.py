"""The tokenizer, from the shipped vocabulary and from files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.data import Tokenizer, load_tokenizer
from fastkd.errors import FastKDWarning


def pieces_of(ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    from fastkd.data.shapes import vocabulary

    return [vocabulary()[i] for i in ids[mask]]


def test_pads_splits_and_lower_cases() -> None:
    tokenizer = load_tokenizer("shapes")
    with pytest.warns(FastKDWarning, match="cannot represent 'wok,'"):
        ids, mask = tokenizer(["the RED circle", "a wok, please"], 20)
    assert ids.shape == mask.shape == (2, 20)
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert pieces_of(ids[0], mask[0]) == ["[CLS]", "the", "red", "circle", "[SEP]"]
    expected = ["[CLS]", "a", "w", "##o", "##k", "[UNK]", "p", "##l", "##e", "##a", "##s", "##e", "[SEP]"]
    assert pieces_of(ids[1], mask[1]) == expected
    assert (ids[~mask] == 0).all()
    assert tokenizer.name == "shapes"
    assert 100 < tokenizer.vocab_size < 200
    assert ids.max() < tokenizer.vocab_size


def test_truncates_long_sentences_with_one_warning(recwarn: pytest.WarningsRecorder) -> None:
    tokenizer = load_tokenizer("shapes")
    sentence = " ".join(["red"] * 7) + " small circle"
    with pytest.warns(
        FastKDWarning, match=r"11 word pieces was truncated to max_words=5: 'red red.*lost 'red red red small circle'"
    ):
        ids, mask = tokenizer([sentence], 5)
    assert pieces_of(ids[0], mask[0]) == ["[CLS]", *["red"] * 4]
    with pytest.warns(FastKDWarning, match=r"lost '\[SEP\]'"):
        load_tokenizer("shapes")(["red red"], 3)
    tokenizer([sentence], 5)  # a second warning would fail the test
    assert not [w for w in recwarn if issubclass(w.category, FastKDWarning)]


def test_warns_once_about_unknown_words(recwarn: pytest.WarningsRecorder) -> None:
    tokenizer = load_tokenizer("shapes")
    with pytest.warns(FastKDWarning, match=r"'shapes' cannot represent 'кружка 💥' in 'the кружка 💥 left' .* \[UNK\]"):
        tokenizer(["the red circle", "the кружка 💥 left"], 20)
    tokenizer(["💥"], 20)
    assert not [w for w in recwarn if issubclass(w.category, FastKDWarning)]


def test_special_tokens_in_a_sentence_are_read_as_text(tmp_path: Path) -> None:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*specials, "[", "]", "sep", "pad", "mask", "red"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    tokenizer = load_tokenizer(tmp_path)
    tokenizer._inner.save_pretrained(tmp_path / "saved")
    for one in (tokenizer, load_tokenizer(tmp_path / "saved")):
        ids, mask = one(["red [SEP] red", "[PAD]", "[MASK] red"], 10)
        assert [[pieces[i] for i in row[real]] for row, real in zip(ids, mask, strict=True)] == [
            ["[CLS]", "red", "[", "sep", "]", "red", "[SEP]"],
            ["[CLS]", "[", "pad", "]", "[SEP]"],
            ["[CLS]", "[", "mask", "]", "red", "[SEP]"],
        ]


CASED = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Bath", "bath", "Left", "left", "mug", "##s"]
LOWER = [piece.lower() if piece[0] != "[" else piece for piece in (*CASED[:6], *"xyz", "left", "mug", "##s")]


def tokenize(tokenizer: Tokenizer, pieces: list[str], sentence: str = "Left Bath mugs") -> list[str]:
    ids, mask = tokenizer([sentence], 10)
    return [pieces[i] for i in ids[0][mask[0]]]


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize(
    ("pieces", "configuration", "cased"),
    [
        (CASED, {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}, True),
        (CASED, None, True),  # detected from the pieces
        (CASED, {"model_max_length": 512}, True),
        (CASED, {"do_lower_case": True}, False),
        (LOWER, None, False),
        ([*LOWER, "ℂ", "[unused1]", "[X]"], None, False),  # special tokens and symbols do not count
        ([*LOWER, *(f"w{number}" for number in range(200)), "A"], None, False),  # a single cased piece
    ],
)
def test_casing_follows_configuration_or_vocabulary(
    tmp_path: Path, pieces: list[str], configuration: dict[str, Any] | None, cased: bool, by_file: bool
) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    if configuration is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(configuration))
    tokenizer = load_tokenizer(tmp_path / "vocab.txt" if by_file else tmp_path)
    words = ["Left", "Bath", "mug", "##s"] if cased else ["left", "bath", "mug", "##s"]
    assert tokenize(tokenizer, pieces) == ["[CLS]", *words, "[SEP]"]
    assert tokenizer.lower_case is not cased
    tokenizer.save(tmp_path / "saved")
    assert tokenize(load_tokenizer(tmp_path / "saved"), pieces) == ["[CLS]", *words, "[SEP]"]
    other = load_tokenizer(tmp_path, lower_case=cased)
    assert other.lower_case is cased


def test_accents_follow_the_configuration(tmp_path: Path) -> None:
    pieces = [*LOWER, "café", "cafe"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    assert tokenize(load_tokenizer(tmp_path), pieces, "Café")[1] == "cafe"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"strip_accents": False}))
    assert tokenize(load_tokenizer(tmp_path), pieces, "Café")[1] == "café"
    for content in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json .*remove it"):
            load_tokenizer(tmp_path)


def test_padding_id_may_differ_from_0(tmp_path: Path) -> None:
    pieces = ["red", "[UNK]", "[CLS]", "[PAD]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_id == 3
    ids, mask = tokenizer(["red", "red red"], 5)
    assert ids.tolist() == [[2, 0, 4, 3, 3], [2, 0, 0, 4, 3]]
    assert mask.sum(1).tolist() == [3, 4]
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.pad_id, again(["red"], 5)[0].tolist()) == (3, [[2, 0, 4, 3, 3]])


@pytest.mark.parametrize("special", [("[PAD]", "[UNK]", "[CLS]", "[SEP]"), ("<pad>", "<unk>", "<s>", "</s>")])
def test_loads_a_folder_with_only_tokenizer_json(tmp_path: Path, special: tuple[str, ...]) -> None:
    """No other file declares the roles of special tokens."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, pre_tokenizers, processors

    pieces = ["red", special[1], special[2], special[3], special[0], "mug", *"[]<>/s", "SEP"]
    inner = Inner(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token=special[1]))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.add_special_tokens(list(special))
    around = [(mark, pieces.index(mark)) for mark in special[2:]]
    inner.post_processor = processors.TemplateProcessing(single=f"{special[2]} $A {special[3]}", special_tokens=around)
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"backbone": "resnet18"}))  # a model's config.json is ignored
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_id == 4
    ids, mask = tokenizer(["red mug", f"red {special[3]}"], 8)
    assert ids[0].tolist() == [2, 0, 5, 3, 4, 4, 4, 4]
    assert mask[0].tolist() == [True] * 4 + [False] * 4
    assert (ids[1][mask[1]] == pieces.index(special[3])).sum() == 1  # a special token in the sentence is read as text
    with pytest.warns(FastKDWarning, match=f"cannot represent 'blue'.*replaces it by {re.escape(special[1])}"):
        tokenizer(["blue"], 8)
    with pytest.raises(ValueError, match=r"lower_case applies to a vocab\.txt only"):
        load_tokenizer(tmp_path, lower_case=True)


def test_loads_from_files(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", *"xyz", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "##dish"]) + "\n")
    for source in (vocabulary, str(tmp_path)):
        tokenizer = load_tokenizer(source)
        assert tokenizer.vocab_size == 10
        assert tokenizer.name == str(source)
        assert tokenizer(["Reddish"], 4)[0].tolist() == [[5, 8, 9, 6]]
    tokenizer._inner.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")(["Reddish"], 4)[0].tolist() == [[5, 8, 9, 6]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("red\ngreen\n", r"lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\]"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\nred\n", "repeats an entry"),
    ],
)
def test_rejects_bad_vocabularies(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "vocab.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "vocab.txt")


def test_rejects_bad_files_and_sentences(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; pass 'shapes'"):
        load_tokenizer(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor vocab\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.bin").write_bytes(b"\xff\xfe\x81")
    with pytest.raises(ValueError, match=r"vocab\.bin is not UTF-8 text"):
        load_tokenizer(tmp_path / "vocab.bin")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer folder .* can't be read"):
        load_tokenizer(tmp_path)
    tokenizer = load_tokenizer("shapes")
    for sentences, max_words, error, message in (
        (["red", "  "], 20, ValueError, "sentence 1 is empty"),
        ([], 20, ValueError, "sentences is empty"),
        ("red circle", 20, TypeError, "sentences must be a list of strings"),
        ([3], 20, TypeError, "sentences must be a list of strings"),
        (["red", "red \udc80"], 20, ValueError, "sentence 1 .* holds a lone surrogate"),
        (["red"], 2, ValueError, "max_words must be an integer of at least 3"),
    ):
        with pytest.raises(error, match=message):
            tokenizer(sentences, max_words)
