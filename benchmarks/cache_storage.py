"""Size of a teacher cache, and the error of each term's gradient, by dtype and by rank of reduced maps.

    python -m benchmarks.cache_storage --measure --write docs/teacher_cache.md

The demo's teacher and student (with random weights) at 64², on three batches of 16. ``--measure`` writes
benchmarks/results/cache_storage.json (--out), from which ``--write`` makes the tables between their markers.
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
MARKERS = {
    "dtypes": ("<!-- dtypes: begin -->", "<!-- dtypes: end -->"),
    "ranks": ("<!-- ranks: begin -->", "<!-- ranks: end -->"),
}
TERMS = {
    "dtypes": ("first_order", "guided_channel_distribution", "channel", "pixel_relation", "mask"),
    "ranks": ("channel", "pixel_relation"),
}
CHANNELS = {"decoder_features": 64, "stages.2": 128}  # what the terms of "ranks" read
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "dtypes": [{"dtype": dtype} for dtype in ("teacher", "bf16", "fp16", "int8")],
    "ranks": [{"dtype": "int8"}]
    + [
        {"dtype": dtype, "pca": {path: channels // part for path, channels in CHANNELS.items()}}
        for dtype, part in (("teacher", 2), ("teacher", 4), ("teacher", 8), ("int8", 2), ("int8", 4))
    ],
}


def measure(images: int, root: Path) -> dict[str, list[dict[str, Any]]]:
    """Build a cache in every way; return the options and figures of each, by table."""
    make_shapes(root / "data", images=images, image_size=64)
    refs, tokenizer = RefCOCO(root / "data", split="train"), load_tokenizer("shapes")
    samples = ReferDataset(refs, tokenizer, image_size=64, sentences="all")
    teacher = load_model("shapes")
    found: dict[str, list[dict[str, Any]]] = {}
    for name, variants in VARIANTS.items():
        torch.manual_seed(0)
        distiller = Distiller(RISModel(preset("shapes-student")), teacher, segmentation_loss, recipe(TERMS[name]))
        found[name] = []
        for number, options in enumerate(variants):
            cache = TeacherCache.build(root / f"{name}-{number}", distiller, samples, device="cpu", **options)
            figures = {key: cache.measured[key] for key in ("bytes_per_sample", "errors", "kept")}
            found[name].append({**options, **figures})
    return found


def tables(content: dict[str, Any]) -> dict[str, str]:
    """Return the tables of sizes and errors."""
    found = {}
    for name, terms in TERMS.items():
        lines = [
            f"| stored as | a sentence | {' | '.join(f'`{term}`' for term in terms)} |",
            "|---|---|" + "---|" * len(terms),
        ]
        for row in content["rows"][name]:
            errors = [f"{row['errors'][term]['gradient']:.1e}" if row["errors"] else "0" for term in terms]
            cells = [row["dtype"] if name == "dtypes" else _label(row), with_unit(row["bytes_per_sample"]), *errors]
            lines.append(f"| {' | '.join(cells)} |")
        found[name] = "\n".join([*lines, "", f"Processor: {content['environment']['cpu']}."])
    return found


def _label(row: dict[str, Any]) -> str:
    if "pca" not in row:
        return f"all channels, {row['dtype']}"
    ranks = " and ".join(f"{rank} of {CHANNELS[path]} ({row['kept'][path]:.2%})" for path, rank in row["pca"].items())
    return f"{ranks}, {row['dtype']}"


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
    for name, text in tables(json.loads(args.out.read_text("utf-8"))).items():
        print(text)
        if args.write is not None:
            write_between(args.write, *MARKERS[name], text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
