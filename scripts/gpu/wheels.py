"""Find the packages that the GPU check needs in addition to torch, and fetch or install them.

    python scripts/gpu/wheels.py fetch FOLDER [--python-version 3.12] [--machine x86_64]

downloads their wheels for the given Python version (`make wheelhouse`). The bounds come from pyproject.toml.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("PYTHON", sys.executable)
TOOLS = ("cmake", "ninja")  # also accepted as commands on PATH
TESTS = ("hypothesis", "pytest")
MANYLINUX = ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "_2_12", "_2_5", "1")  # pip matches each tag exactly


class Missing(NamedTuple):
    """A package that is missing or too old."""

    requirement: str
    found: str | None

    def __str__(self) -> str:
        name, bound = split(self.requirement)
        found = "not found" if self.found is None else f"found {self.found}"
        return f"{name}: {found}, needs {f'>= {bound}' if bound else 'any version'}"


def requirements(pyproject: Path = ROOT / "pyproject.toml") -> tuple[list[str], list[str]]:
    """Return the requirements of the build and of the kernel tests, from pyproject.toml."""
    data = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    test = {split(r)[0]: r for r in data["project"]["optional-dependencies"]["test"]}
    return [*data["build-system"]["requires"], *(test[n] for n in TOOLS)], [test[n] for n in TESTS]


def split(requirement: str) -> tuple[str, str]:
    """Return the name without extras, and the lower bound or ""."""
    found = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*(?:>=\s*([\w.]+))?", requirement)
    assert found is not None, requirement
    return found[1], found[2] or ""


def find_missing(wanted: Sequence[str]) -> list[Missing]:
    """Return the requirements that are missing or too old in this Python and on PATH."""
    found = {requirement: installed(split(requirement)[0]) for requirement in wanted}
    return [Missing(r, got) for r, got in found.items() if got is None or numbers(got) < numbers(split(r)[1])]


def installed(name: str) -> str | None:
    """Return the version of a package, or of a tool on PATH."""
    if name in TOOLS:
        try:
            text = subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            text = ""
        version = re.search(r"\d+(\.\d+)+", text)
        if version:
            return version[0]  # else look for a package, which scikit-build-core finds too
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> list[int]:
    """Return the release numbers of a version, for comparison."""
    return [int(n) for n in re.findall(r"\d+", re.match(r"[\d.]*", version)[0])]  # type: ignore[index]


def fetch_command(
    folder: str, wanted: Sequence[str], python_version: str, machine: str = platform.machine()
) -> list[str]:
    """Return the pip arguments that download Linux wheels for a Python version, on any connected machine."""
    platforms = [f"--platform=manylinux{glibc}_{machine}" for glibc in MANYLINUX]
    chosen = ["--only-binary=:all:", f"--python-version={python_version}", "--implementation=cp", *platforms]
    return ["-m", "pip", "download", f"--dest={folder}", *chosen, *wanted]


def install(missing: Sequence[Missing], wheels: Path, target: Path) -> str | None:
    """Install missing packages from a folder of wheels into ``target``; return None, or an error with instructions."""
    wanted = [package.requirement for package in missing]
    options = ["--quiet", "--no-index", "--find-links", str(wheels), "--target", str(target), "--upgrade"]
    done = subprocess.run([PYTHON, "-m", "pip", "install", *options, *wanted], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = shlex.join(["python3", *fetch_command("wheelhouse", wanted, version)])
    lines = [
        f"packages missing or too old for Python {version}:",
        *(f"  {package}" for package in missing),
        f"{wheels} does not contain them: {errors[0]}",
        f"fetch them on a connected machine with `make wheelhouse WHEELHOUSE_PYTHON={version}` or",
        f"  {command}",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["fetch"])
    parser.add_argument("folder")
    parser.add_argument("--python-version", default="3.12")
    parser.add_argument(
        "--machine", default=platform.machine(), help="architecture of the machine with the GPU: x86_64, aarch64"
    )
    args = parser.parse_args()
    build, tests = requirements()
    command = fetch_command(args.folder, [*build, *tests], args.python_version, args.machine)
    return subprocess.run([sys.executable, *command], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
