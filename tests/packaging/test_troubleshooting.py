"""docs/troubleshooting.md quotes only messages that the code contains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
FOREIGN = (
    "operator torchvision::nms",
    "CUDA out of memory",
    "Inference tensors cannot be saved",
)  # from other packages


def quoted() -> list[str]:
    """Return the quotes that open an entry: ``- `one`, `another` ...``."""
    page = PAGE.read_text("utf-8").replace("\n  ", " ")
    openings = re.findall(r"^- ((?:(?:, | and )?`[^`]+`)+)", page, re.MULTILINE)
    return [quote for text in openings for quote in re.findall(r"`([^`]+)`", text) if not quote.startswith(FOREIGN)]


@pytest.fixture(scope="module")
def sources() -> str:
    files = [*ROOT.glob("fastkd/**/*.py"), *ROOT.glob("csrc/**/*.cmake"), *ROOT.glob("csrc/**/*.h"), ROOT / "setup.py"]
    text = "\n".join(file.read_text("utf-8") for file in files)
    joined = re.sub(r"[\"']\s*\n\s*f?[\"']", "", text)  # adjacent literals are one message
    return joined.replace("{{", "{").replace("}}", "}")


def test_page_has_entries() -> None:
    assert len(quoted()) > 40


@pytest.mark.parametrize("quote", quoted())
def test_quoted_message_is_in_the_code(quote: str, sources: str) -> None:
    for piece in re.split(r"\s*…\s*|torch\.int64", quote):
        assert piece.strip("() ") in sources, (
            f"no message in the code contains {piece!r}: update docs/troubleshooting.md"
        )
