"""Read damaged and hostile datasets: every input must be read, or rejected by one of the documented errors.

    python -m benchmarks.fuzz_data [--inputs 50000] [--seed 0] [--out FILE]

Hypothesis damages a small set: the bytes and the content of refs pickles, instances.json, JSONL files and images, and
the segmentations of masks. Whatever a reader accepts is read completely. A reader may raise only ValueError (which
includes UnpicklingError) or OSError; another exception, or the end of the process, is a failure. Each kind of input
runs in a process with limited memory. Writes the numbers of inputs read and rejected; exits with status 1 after a
failure.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import PIL
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastkd.data import RefCOCO, ReferFolder, ReferringSet, check_set
from fastkd.data.images import read_image
from fastkd.data.masks import decode_mask, rasterise

HEIGHT, WIDTH = 12, 20
DOCUMENTED = (ValueError, OSError)
MEMORY = 6 * 2**30  # bytes of address space per process; torch itself takes about half
BOX = [1, 2, 7, 2, 7, 8, 1, 8]
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000")

Draw = Callable[[st.SearchStrategy[Any]], Any]

numbers = st.one_of(
    st.integers(-3, 30),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**32 - 1, 2**63, -(2**63), 10**30, 10**400]),
    st.floats(allow_nan=True),
    st.sampled_from([1e9, -1e300, 0.5]),
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    st.text(max_size=8),
    st.sampled_from(["", "\0", "../x.jpg", "/etc/passwd", "a\\b", "train", "testAB", "\ud800", "x" * 20_000]),
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


def reference_refs() -> list[dict[str, Any]]:
    """Return two valid refs."""
    sentences = [{"sent_id": n, "sent": f"circle {n}", "raw": f"Circle {n}.", "tokens": ["circle"]} for n in range(2)]
    fields = {"category_id": 7, "split": "train", "file_name": "a_1.jpg", "sent_ids": [0]}
    return [
        {"ref_id": n, "ann_id": n + 1, "image_id": 1, **fields, "sentences": [sentences[n]]}
        for n in range(2)
    ]  # fmt: skip


def reference_instances() -> dict[str, Any]:
    """Return the annotations of `reference_refs`: a polygon and an RLE."""
    rle = {"size": [HEIGHT, WIDTH], "counts": [30, 40, HEIGHT * WIDTH - 70]}
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [
            {"id": n + 1, "image_id": 1, "category_id": 7, "segmentation": parts}
            for n, parts in enumerate(([BOX], rle))
        ],
        "categories": [{"id": 7, "name": "circle"}],
    }


def encoded_image(kind: str) -> bytes:
    """Return a small valid image."""
    pixels = np.arange(HEIGHT * WIDTH * 3).reshape(HEIGHT, WIDTH, 3).astype(np.uint8)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    options |= {"compression": "tiff_lzw"} if kind == "TIFF" else {}
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@st.composite
def damaged(draw: Draw, original: Any) -> Any:
    """Return a copy of nested data in which some parts are replaced, removed or repeated."""
    content = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(content))
        if not places:
            break
        container, key = places[draw(st.integers(0, len(places) - 1))]
        action = draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
        if action == "replace":
            container[key] = draw(values)
        elif action == "remove":
            del container[key]
        elif isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
    return content


def _places(content: Any) -> Any:
    """Yield every (container, key) inside nested data."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield content, key
        yield from _places(value)


@st.composite
def damaged_bytes(draw: Draw, content: bytes) -> bytes:
    """Return bytes in which some are changed, inserted, repeated or cut off."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        action = draw(st.sampled_from(["set", "set", "number", "insert", "repeat", "delete", "cut"]))
        if action == "set":
            content = content[:at] + draw(st.binary(min_size=1, max_size=2)) + content[at + 1 :]
        elif action == "number":  # the size or offset of a field
            value = draw(st.sampled_from([0, 1, 2**15, 2**31 - 1, 2**32 - 1]))
            content = content[:at] + value.to_bytes(4, draw(st.sampled_from(["little", "big"]))) + content[at + 4 :]
        elif action == "insert":
            content = content[:at] + draw(st.binary(max_size=12)) + content[at:]
        elif action == "repeat":
            content = content[:at] + content[at : at + 20] * draw(st.integers(1, 3)) + content[at:]
        elif action == "delete":
            content = content[:at] + content[at + draw(st.integers(1, 20)) :]
        else:
            content = content[:at]
    return content


def _pickled(refs: Any, protocol: int) -> bytes:
    return pickle.dumps(refs, protocol=protocol)


refs_files = st.one_of(
    st.builds(_pickled, damaged(reference_refs()), st.integers(0, 5)),
    *(damaged_bytes(_pickled(reference_refs(), protocol)) for protocol in (0, 2, 4)),
    st.binary(max_size=60).map(lambda tail: b"\x80\x02" + tail),
)
instances_files = st.one_of(
    damaged(reference_instances()).map(lambda content: json.dumps(content).encode()),
    damaged_bytes(json.dumps(reference_instances()).encode()),
    st.integers(100, 100_000).map(lambda depth: b"[" * depth),
)
polygons = st.lists(st.lists(numbers, max_size=10) | st.just(BOX), max_size=3)
rles = st.fixed_dictionaries(
    {},
    optional={
        "size": st.just([HEIGHT, WIDTH]) | st.lists(numbers, max_size=3) | leaves,
        "counts": st.lists(numbers, max_size=6) | st.text("0123456789:;<=>?@ABCNOPQX`abcno", max_size=20) | leaves,
    },
)
segmentations = st.one_of(
    polygons, rles, st.lists(rles, max_size=3), values, damaged([BOX]), damaged([[BOX], {"size": [12, 20]}])
)
ROW = {"image": "images/train2014/a.jpg", "mask": [BOX], "sentence": ["circle"], "id": 3}
rows_files = st.one_of(
    damaged([ROW, {**ROW, "id": 4, "mask": None}]).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    damaged_bytes(json.dumps(ROW).encode()),
)
images = st.one_of(*(damaged_bytes(encoded_image(kind)) for kind in FORMATS), st.binary(max_size=40))


def read_set(data: ReferringSet) -> None:
    """Read everything in a set."""
    for ref in data:
        mask = data.mask(ref.ref_id)
        assert mask.dtype == bool
        assert mask.shape == data.image(ref.image_id).shape[:2]
        assert mask.any() == bool(ref.targets)
        assert all(sentence.text.strip() and sentence.text.encode() for sentence in ref.sentences)


class Targets:
    """Functions that read one input of each kind, and the strategies that make the inputs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.set = folder, folder / "refcoco"
        self.set.mkdir(parents=True)
        (folder / "images/train2014").mkdir(parents=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images/train2014/a.jpg")
        self.kinds: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
            "refs": (refs_files, self.refs),
            "instances": (instances_files, self.instances),
            "masks": (st.tuples(segmentations, st.sampled_from(["union", "lavt"])), self.masks),
            "images": (images, self.images),
            "rows": (rows_files, self.rows),
            "check": (st.tuples(refs_files, instances_files, rows_files), self.check),
        }

    def refs(self, content: bytes) -> None:
        """Read a set with this refs file."""
        (self.set / "refs(unc).p").write_bytes(content)
        (self.set / "instances.json").write_text(json.dumps(reference_instances()))
        read_set(RefCOCO(self.folder))

    def instances(self, content: bytes) -> None:
        """Read a set with this instances.json."""
        (self.set / "refs(unc).p").write_bytes(_pickled(reference_refs(), 2))
        (self.set / "instances.json").write_bytes(content)
        read_set(RefCOCO(self.folder))

    def check(self, contents: tuple[bytes, bytes, bytes]) -> None:
        """List what is wrong with a set in which every file may be damaged."""
        for name, content in zip(
            ("refcoco/refs(unc).p", "refcoco/instances.json", "train.jsonl"), contents, strict=True
        ):
            (self.folder / name).write_bytes(content)
        report = check_set(self.folder)
        assert all(line.isprintable() for line in str(report).split("\n"))
        json.dumps(report.to_dict())

    def rows(self, content: bytes) -> None:
        """Read a folder with this JSONL file."""
        (self.folder / "train.jsonl").write_bytes(content)
        read_set(ReferFolder(self.folder))

    def masks(self, given: tuple[Any, str]) -> None:
        """Rasterise a segmentation."""
        mask = rasterise(given[0], HEIGHT, WIDTH, rule=given[1])
        assert mask.shape == (HEIGHT, WIDTH)
        assert mask.dtype == bool

    def images(self, content: bytes) -> None:
        """Decode an image, also as a mask."""
        pixels = read_image(content)
        assert pixels.ndim == 3
        assert pixels.dtype == np.uint8
        decode_mask(content)


def fuzz(kind: str, inputs: int, seed: int, folder: Path) -> Counter[str]:
    """Read this many inputs of a kind; return the numbers of those read, and of those rejected per error type."""
    strategy, read = Targets(folder).kinds[kind]
    counts: Counter[str] = Counter()

    @hypothesis.seed(seed)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def attempt(content: Any) -> None:
        try:
            read(content)
        except DOCUMENTED as error:
            message = str(error)
            counts["rejected"] += 1
        else:
            message = "read"
            counts["read"] += 1
        assert 0 < len(message) < 2000

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attempt()
    return counts


def _in_process(kind: str, inputs: int, seed: int) -> dict[str, Any]:
    """Run `fuzz` in a separate process with limited memory; return its counts and exit status."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.fuzz_data",
        "--kind",
        kind,
        "--inputs",
        str(inputs),
        "--seed",
        str(seed),
    ]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode != 0:
        print(done.stdout[-3000:], done.stderr[-6000:], file=sys.stderr)
    counts = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    return {"kind": kind, "exit": done.returncode, **counts, "seconds": round(time.perf_counter() - start, 1)}


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=50_000, help="number of inputs of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.kind is not None:
            if sys.platform == "linux":
                import resource

                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            print(json.dumps(fuzz(given.kind, given.inputs, given.seed, Path(folder) / "set")))
            return 0
        kinds = list(Targets(Path(folder) / "set").kinds)
    shares = [given.inputs // len(kinds) + (n < given.inputs % len(kinds)) for n in range(len(kinds))]
    rows = [_in_process(kind, share, given.seed) for kind, share in zip(kinds, shares, strict=True)]
    for row in rows:
        print(row, flush=True)
    versions = {"python": platform.python_version(), "numpy": np.__version__, "pillow": PIL.__version__}
    if given.out is not None:
        kept = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
        total = sum(row.get("read", 0) + row.get("rejected", 0) for row in kept)
        report = {"inputs": total, "seed": given.seed, "versions": versions, "kinds": kept}
        given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(row["exit"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
