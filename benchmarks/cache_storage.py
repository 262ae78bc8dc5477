"""Size of a teacher cache, and the error of each term's gradient, for every way to store it.

    python -m benchmarks.cache_storage --measure --write docs/teacher_cache.md

The demo's teacher and student (with random weights) at 64², on three batches of 16. ``--measure`` writes
benchmarks/results/cache_storage.json (--out), from which ``--write`` makes the table between its markers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import write_between
from fastkd import Distiller
from fastkd._atomic import replace_files
from fastkd._console import plain_characters
from fastkd._info import environment
from fastkd._messages import with_unit
from fastkd.cli._models import load_model
from fastkd.data import RefCOCO, ReferDataset, load_tokenizer, make_shapes
from fastkd.distill import recipe
from fastkd.models import RISModel, preset
from fastkd.train import TeacherCache, segmentation_loss

RESULTS = Path("benchmarks/results/cache_storage.json")
MARKERS = ("<!-- storage: begin -->", "<!-- storage: end -->")
TERMS = ("first_order", "guided_channel_distribution", "channel", "pixel_relation", "mask")
VARIANTS: tuple[dict[str, Any], ...] = ({"dtype": "teacher"}, {"dtype": "bf16"}, {"dtype": "fp16"}, {"dtype": "int8"})


def measure(images: int, root: Path) -> list[dict[str, Any]]:
    """Build a cache in every way; return the options and figures of each."""
    make_shapes(root / "data", images=images, image_size=64)
    refs, tokenizer = RefCOCO(root / "data", split="train"), load_tokenizer("shapes")
    samples = ReferDataset(refs, tokenizer, image_size=64, sentences="all")
    torch.manual_seed(0)
    student, teacher = RISModel(preset("shapes-student")), load_model("shapes")
    distiller = Distiller(student, teacher, segmentation_loss, recipe(TERMS))
    rows = []
    for number, options in enumerate(VARIANTS):
        cache = TeacherCache.build(root / str(number), distiller, samples, device="cpu", **options)
        rows.append({**options, "bytes": cache.measured["bytes_per_sample"], "errors": cache.measured["errors"]})
    return rows


def table(content: dict[str, Any]) -> str:
    """Return the table of sizes and errors."""
    lines = [
        f"| stored as | a sentence | {' | '.join(f'`{term}`' for term in TERMS)} |",
        "|---|---|" + "---|" * len(TERMS),
    ]
    for row in content["rows"]:
        errors = [f"{row['errors'][term]['gradient']:.1e}" if row["errors"] else "0" for term in TERMS]
        lines.append(f"| {row['dtype']} | {with_unit(row['bytes'])} | {' | '.join(errors)} |")
    return "\n".join([*lines, "", f"Processor: {content['environment']['cpu']}."])


@plain_characters()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="build the caches and write the results")
    parser.add_argument("--images", type=int, default=24, help="images of the procedural set")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path, help="page that holds the table between markers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(args.images, Path(folder))
        content = {"environment": environment(torch.device("cpu")), "rows": rows}
        with replace_files(args.out) as (partial,):
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = table(json.loads(args.out.read_text("utf-8")))
    print(text)
    if args.write is not None:
        write_between(args.write, *MARKERS, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
