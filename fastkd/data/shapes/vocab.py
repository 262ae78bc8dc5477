"""The word-piece vocabulary of the procedural set, which ships as ``assets/shapes_vocab.txt``."""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase, digits

from fastkd.data.shapes.language import words

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PATH = Path(__file__).parent.parent / "assets" / "shapes_vocab.txt"


def vocabulary() -> list[str]:
    """The pieces in order of their ids: ``[PAD]`` is 0.

    Every word of the generator is one piece; single letters and digits, and their ``##`` twins, spell any other word.

    The shipped file is rewritten by ``python -m fastkd.data.shapes.vocab`` after a change of the language.
    """
    letters = list(ascii_lowercase + digits)
    return [*SPECIAL, *sorted(words() - set(letters)), *letters, *(f"##{letter}" for letter in letters)]


if __name__ == "__main__":
    PATH.write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    print(f"{PATH}: {len(vocabulary())} pieces")
