"""The word-piece vocabulary of the procedural set, which ships as ``assets/shapes_vocab.txt``."""

from __future__ import annotations

from string import ascii_lowercase, digits

from fastkd.data._assets import SHAPES_VOCABULARY_FILE
from fastkd.data.shapes.language import further_words, words

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def vocabulary() -> list[str]:
    """Return the pieces in order of their ids, starting with ``[PAD]`` = 0.

    Every word of the generators is one piece; letters and digits, alone and with ``##``, spell any other word. Words
    that only `shapesref` uses come last, so that they did not change the ids of the others. After changing the
    language, run ``python -m fastkd.data.shapes.vocab`` to rewrite the shipped file.
    """
    letters = list(ascii_lowercase + digits)
    spelling = [*letters, *(f"##{letter}" for letter in letters)]
    return [*SPECIAL, *sorted(words() - set(letters)), *spelling, *sorted(further_words() - set(letters))]


if __name__ == "__main__":
    SHAPES_VOCABULARY_FILE.write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    print(f"{SHAPES_VOCABULARY_FILE}: {len(vocabulary())} pieces")
