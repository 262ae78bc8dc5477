"""Open an HTML page in headless Chromium, where there is one, and look at the result."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROBE = """<!doctype html><meta charset="utf-8"><title>probe</title>
<iframe id="frame" style="width:{width}px; height:800px; border:0" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const inner = document.getElementById("frame").contentDocument, found = {{}};
  found.images = [...inner.images].map(image => image.complete && image.naturalWidth > 0);
  found.width = inner.documentElement.scrollWidth;
  found.text = inner.body.innerText;
  found.elements = [...new Set([...inner.querySelectorAll("*")].map(element => element.localName))];
  const pre = document.createElement("pre");
  pre.id = "found";
  pre.textContent = JSON.stringify(found);
  document.body.append(pre);
}});
</script>
"""


@dataclass
class Seen:
    """Page as Chromium shows it.

    Attributes:
        images: of each picture, whether it was loaded.
        width: pixels that the content needs.
        text: the visible text.
        elements: names of the elements.
        console: messages on the console.
    """

    images: list[bool]
    width: int
    text: str
    elements: list[str]
    console: list[str]


def see(html: str, folder: Path, width: int) -> Seen:
    """Render a page in a frame of this width; skip the test where Chromium is missing."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("needs Chromium: none of " + ", ".join(NAMES) + " is on PATH (Debian: apt install chromium)")
    probe = folder / f"probe-{width}.html"
    probe.write_text(PROBE.format(width=width, page=escape(html)), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    options += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", probe.as_uri()]
    done = subprocess.run([program, *options], capture_output=True, text=True, timeout=300)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-3000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(**json.loads(unescape(found[1])), console=console)
