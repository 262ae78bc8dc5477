"""Export students in fp32, fp16 and int8, score the files, and time them together with the teacher.

    python -m benchmarks.evidence.deployment --data data/shapesref --out benchmarks/evidence/deployment.json \
        runs/evidence/runs/main/equal-time/method-*

Every folder is that of a run of ``fastkd experiments``. The student in its last/ is exported, and each file is scored
on testA and testB by onnxruntime. One thread; times are medians over rounds in which all networks take turns, one image
and sentence each. ``python -m benchmarks.evidence`` makes a table from the JSON file.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastkd._atomic import replace_files
from fastkd._console import plain_characters, show

DTYPES = ("fp32", "fp16", "int8")
SPLITS = ("testA", "testB")
CALIBRATION = 256  # samples
ROUNDS, CALLS = 30, 10


def score(model: Any, data: Path) -> dict[str, float]:
    """Return mIoU on all sentences of the test splits together, and oIoU averaged over them."""
    from fastkd.cli._data import DataArgs
    from fastkd.evaluate import evaluate

    results = [evaluate(model, DataArgs(data).open(split, model, sentences="all")) for split in SPLITS]
    sentences = sum(one.sentences for one in results)
    miou = sum(one.miou * one.sentences for one in results) / sentences
    return {"miou": round(miou, 4), "oiou": round(statistics.fmean(one.oiou for one in results), 4)}


def seconds_of(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median seconds of each call, over rounds in which all take turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            if number >= 2:
                found[name].append((time.perf_counter() - start) / CALLS)
    return {name: statistics.median(values) for name, values in found.items()}


def measure(runs: list[Path], data: Path, teacher: str) -> dict[str, Any]:
    """Return scores and sizes by run and dtype, and times of one run's networks and of the teacher."""
    import torch

    from fastkd._info import cpu_name
    from fastkd.cli._data import DataArgs
    from fastkd.cli._models import load_local_model
    from fastkd.cli.export import calibration_batches
    from fastkd.data import collate, load_tokenizer
    from fastkd.models import OnnxModel
    from fastkd.models.export import export_onnx

    torch.set_num_threads(1)
    scores: list[dict[str, Any]] = []
    calls: dict[str, Any] = {}
    words = load_tokenizer("shapes")
    with TemporaryDirectory() as folder:
        networks = [(path.name, path / "last") for path in runs]
        for name, source in [*networks, ("teacher", teacher)]:
            model: Any = load_local_model(str(source))
            row, _, seed = name.partition("-seed")
            row = re.sub(r"-x[\d.]+$", "", row)
            batches = list(calibration_batches(model, DataArgs(data), samples=CALIBRATION))
            for dtype in DTYPES:
                path = Path(folder, f"{name}-{dtype}.onnx")
                done = export_onnx(model, path, tokenizer=words, dtype=dtype, calibration=batches)
                exported = OnnxModel(path)
                line = {"row": row, "seed": int(seed) if seed else None, "dtype": dtype, "bytes": path.stat().st_size}
                line |= {"parameters": done.parameters, "mask_iou_with_fp32": done.agreement, **score(exported, data)}
                scores.append(line)
                show(json.dumps(line))
                if name in (networks[0][0], "teacher"):
                    calls[f"{row} {dtype}"] = exported
            if name in (networks[0][0], "teacher"):
                calls[f"{row} torch"] = model
        one = {key: collate([_first(model, data)])[key] for key in ("image", "input_ids", "word_mask")}
        with torch.inference_mode():
            timed = seconds_of({name: lambda m=network: m(**one) for name, network in calls.items()})
    milliseconds = {name: round(1000 * value, 3) for name, value in timed.items()}
    conditions = {"processor": cpu_name(), "torch": torch.__version__, "onnxruntime": _version(), "threads": 1}
    return {**conditions, "splits": SPLITS, "calibration": CALIBRATION, "scores": scores, "milliseconds": milliseconds}


def _first(model: Any, data: Path) -> Any:
    from fastkd.cli._data import DataArgs

    return DataArgs(data).open("val", model, sentences="all")[0]


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


@plain_characters()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, with their student in last/")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", default="shapesref")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    found = measure(args.runs, args.data, args.teacher)
    with replace_files(args.out) as (partial,):
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
