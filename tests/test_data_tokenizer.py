"""The tokenizer, from the shipped vocabulary and from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastkd.data import load_tokenizer
from fastkd.errors import FastKDWarning


def pieces_of(ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    from fastkd.data.shapes import vocabulary

    return [vocabulary()[i] for i in ids[mask]]


def test_tokenizer_pads_splits_and_lower_cases() -> None:
    tokenizer = load_tokenizer("shapes")
    with pytest.warns(FastKDWarning, match="cannot spell all of 'wok,'"):
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


def test_a_long_sentence_is_cut_with_one_warning(recwarn: pytest.WarningsRecorder) -> None:
    tokenizer = load_tokenizer("shapes")
    sentence = " ".join(["red"] * 7) + " small circle"
    with pytest.warns(
        FastKDWarning, match=r"11 word pieces was cut to max_words=5: 'red red.*lost 'red red red small circle'"
    ):
        ids, mask = tokenizer([sentence], 5)
    assert pieces_of(ids[0], mask[0]) == ["[CLS]", *["red"] * 4]
    with pytest.warns(FastKDWarning, match=r"lost '\[SEP\]'"):
        load_tokenizer("shapes")(["red red"], 3)
    tokenizer([sentence], 5)  # said once: a second warning would be an error here
    assert not [w for w in recwarn if issubclass(w.category, FastKDWarning)]


def test_words_that_the_vocabulary_cannot_spell_are_named_once(recwarn: pytest.WarningsRecorder) -> None:
    tokenizer = load_tokenizer("shapes")
    with pytest.warns(
        FastKDWarning, match=r"'shapes' cannot spell all of 'кружка 💥' in 'the кружка 💥 left': .* \[UNK\]"
    ):
        tokenizer(["the red circle", "the кружка 💥 left"], 20)
    tokenizer(["💥"], 20)
    assert not [w for w in recwarn if issubclass(w.category, FastKDWarning)]


def test_marks_that_are_typed_are_text(tmp_path: Path) -> None:
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


def test_tokenizer_from_files(tmp_path: Path) -> None:
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
        ("[UNK]\n[PAD]\n[CLS]\n[SEP]\n", r"\[PAD\] must be the first entry"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\nred\n", "an entry twice"),
    ],
)
def test_bad_vocabularies(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "vocab.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "vocab.txt")


def test_tokenizer_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no file or folder; give 'shapes'"):
        load_tokenizer(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor vocab\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.bin").write_bytes(b"\xff\xfe\x81")
    with pytest.raises(ValueError, match=r"vocab\.bin is not text in utf-8"):
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
        (["red", "red \udc80"], 20, ValueError, "sentence 1 .* holds half a character"),
        (["red"], 2, ValueError, "max_words must be an integer of at least 3"),
    ):
        with pytest.raises(error, match=message):
            tokenizer(sentences, max_words)
