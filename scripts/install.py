"""Install fastkd with pip, showing which files are compiled while they are compiled.

    python scripts/install.py '.[ris,test]'

pip hides the output of a build, or with ``-v`` prints all of it. This script prints what is collected and
compiled, and the end of the output if the installation fails. It needs only the standard library.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import deque

COMPILED = re.compile(r"\[(\d+)/(\d+)\] Building \w+ object CMakeFiles/(\w+)\.dir/(\S+)\.o(?:bj)?$")
LINKED = re.compile(r"\[(\d+)/(\d+)\] Linking .*?(_cpu|_cuda)\.")
SUMMARY = re.compile(r"-- (fastkd build summary| {2}\S.*)$")
PIP = re.compile(r"(Collecting|Downloading|Building wheel|Installing collected|Successfully|WARNING|ERROR|error:)")
SHOWN_ON_FAILURE = 60


def shown(line: str) -> str | None:
    """Return what to print for a line of ``pip install -v``, or None to hide it."""
    text = line.strip()
    if found := COMPILED.match(text):
        number, count, target, source = found.groups()
        variant = f" ({target.removeprefix('cpu_')})" if target.startswith("cpu_") else ""
        return f"[{number}/{count}] compiled {source}{variant}"
    if found := LINKED.match(text):
        return f"[{found[1]}/{found[2]}] linked fastkd.{found[3]}"
    if found := SUMMARY.match(text):
        return found[1].strip()
    return line if PIP.match(line) else None


def main() -> int:
    """Run pip with the given arguments and return its exit status."""
    command = [sys.executable, "-m", "pip", "install", "-v", "--progress-bar", "off", *sys.argv[1:]]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    last: deque[str] = deque(maxlen=SHOWN_ON_FAILURE)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        assert pip.stdout is not None
        for line in map(str.rstrip, pip.stdout):
            last.append(line)
            if text := shown(line):
                print(text, flush=True)
    if pip.returncode != 0:
        print("\n".join(["", f"pip failed; its last {len(last)} lines:", *last]), file=sys.stderr)
    return pip.returncode


if __name__ == "__main__":
    sys.exit(main())
