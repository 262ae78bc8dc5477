"""Findings of a check, and how they are printed."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROBLEM, NOTE = "problem", "note"


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        level: "problem", or "note" for what readers accept.
        kind: What was found, such as "missing image".
        where: The id, file or line.
        text: Details; may be empty.
    """

    level: str
    kind: str
    where: str
    text: str


@dataclass
class SetReport:
    """Counts and findings of one set.

    Attributes:
        name: The set and its file.
        counts: Split to the numbers of refs, sentences, images and refs without a target.
        findings: What was found, in the order of the files.
    """

    name: str
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    findings: list[Finding] = field(default_factory=list)

    def problem(self, kind: str, where: object, text: object = "") -> None:
        """Add a problem."""
        self.findings.append(Finding(PROBLEM, kind, printable(where), printable(text)))

    def note(self, kind: str, where: object, text: object = "") -> None:
        """Add a note."""
        self.findings.append(Finding(NOTE, kind, printable(where), printable(text)))


@dataclass
class CheckReport:
    """Result of a check.

    Attributes:
        root: The folder.
        sets: Its sets.
    """

    root: Path
    sets: list[SetReport]

    @property
    def problems(self) -> int:
        """Return the number of problems."""
        return sum(finding.level == PROBLEM for part in self.sets for finding in part.findings)

    @property
    def notes(self) -> int:
        """Return the number of notes."""
        return sum(finding.level == NOTE for part in self.sets for finding in part.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "root": str(self.root),
            "problems": self.problems,
            "notes": self.notes,
            "sets": [
                {
                    "name": part.name,
                    "counts": {split: dict(counts) for split, counts in part.counts.items()},
                    "findings": [vars(finding) for finding in part.findings],
                }
                for part in self.sets
            ],
        }

    def __str__(self) -> str:
        lines = []
        for part in self.sets:
            lines.append(printable(part.name))
            for split, counts in part.counts.items():
                numbers = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
                lines.append(f"  {printable(split)}: {numbers}")
            for level in (PROBLEM, NOTE):
                kinds: dict[str, list[Finding]] = defaultdict(list)
                for finding in part.findings:
                    if finding.level == level:
                        kinds[finding.kind].append(finding)
                for kind, findings in kinds.items():
                    lines.append(f"  {level}: {kind} ({len(findings)})")
                    lines += [f"    {found.where}" + (f": {found.text}" if found.text else "") for found in findings]
        lines.append(f"{_count(self.problems, PROBLEM)}, {_count(self.notes, NOTE)}")
        return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def printable(value: object) -> str:
    """Return a text without control characters, which a terminal would interpret."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(value))
