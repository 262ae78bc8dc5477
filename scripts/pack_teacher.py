"""Convert a trained model to fp16 for shipping: ``python scripts/pack_teacher.py runs/teacher/best DEST``.

Loading casts the weights back to the model's dtype.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastkd.models import RISModel

LIMIT = 6 * 2**20


def main(source: str, destination: str) -> None:
    model = RISModel.from_pretrained(source)
    model.half().save_pretrained(destination)
    for name in ("README.md", "training.json"):  # model card for a hub, record of the run
        Path(destination, name).unlink(missing_ok=True)
    size = sum(file.stat().st_size for file in Path(destination).iterdir())
    print(f"{destination}: {sum(p.numel() for p in model.parameters())} parameters, {size / 2**20:.2f} MiB")
    if size > LIMIT:
        sys.exit(f"{destination} exceeds {LIMIT / 2**20:.0f} MiB, the limit of the package")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
