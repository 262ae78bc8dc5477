"""Print the presets as a table: parameters, FLOP and latency of one image and sentence on this CPU.

    python -m benchmarks.model_table --write docs/models.md     # between the markers; without --write it is printed

torch.utils.flop_counter counts the FLOP of matrix products, convolutions and attention (two per multiply-add) for one
image of --size squared and 20 word ids. Latency is the median of --repeats forwards after one warm-up, in eval mode and
fp32 with random weights: CPU time of one thread, which other load on the machine affects much less than wall time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.table import write_between
from fastkd._console import plain_characters
from fastkd.models import RISModel, list_presets, preset

BEGIN, END = "<!-- model table: begin (written by benchmarks/model_table.py) -->", "<!-- model table: end -->"
WORDS = 20


def measure(name: str, size: int, repeats: int) -> tuple[dict[str, int], int, list[float]]:
    """Return the parameters by part, the FLOP of one forward, and the milliseconds of each timed forward."""
    torch.manual_seed(0)
    model = RISModel(preset(name)).eval()
    image, ids = torch.randn(1, 3, size, size), torch.ones(1, WORDS, dtype=torch.int64)
    times = []
    with torch.inference_mode():
        # The counter supports only some kinds of fused attention: use plain products instead.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(image, ids)
        for _ in range(repeats):
            start = time.thread_time()
            model(image, ids)
            times.append(time.thread_time() - start)
    return model.parameter_count(), counter.get_total_flops(), [1e3 * seconds for seconds in times]


def table(names: Sequence[str], size: int, repeats: int) -> str:
    """Measure the presets and return them as a Markdown table."""
    lines = [
        f"| preset | towers | parameters (M): all | backbone | text | FLOP at {size}² (G) | one thread (ms) |",
        "|---|---|---|---|---|---|---|",
    ]
    descriptions = list_presets()
    for name in names:
        parameters, flop, milliseconds = measure(name, size, repeats)
        cells = [f"`{name}`", descriptions[name].split(": ", 1)[-1]]
        cells += [f"{parameters[part] / 1e6:.2f}" for part in ("total", "backbone", "text_encoder")]
        cells += [f"{flop / 1e9:.1f}", f"{statistics.median(milliseconds):.0f}" if milliseconds else "–"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def description(repeats: int) -> str:
    """Return the conditions of the measurement, as text."""
    from importlib.metadata import version

    from fastkd._info import cpu_name

    isa = torch.backends.cpu.get_cpu_capability()
    versions = f"torch {torch.__version__}, timm {version('timm')}, transformers {version('transformers')}"
    return (
        f"{cpu_name()}, {isa}, CPU time of one thread, fp32, one image, median of {repeats}; "
        f"{versions}; {date.today().isoformat()}."
    )


@plain_characters()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help="default: all presets for photographs")
    parser.add_argument("--size", type=int, default=480)
    parser.add_argument("--repeats", type=int, default=5, help="0 skips the latency")
    parser.add_argument("--write", type=Path, help="page with the two markers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.presets or [name for name in list_presets() if not name.startswith("shapes")]
    text = f"{table(names, args.size, args.repeats)}\n\n{description(args.repeats)}"
    if args.write is not None:
        write_between(args.write, BEGIN, END, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
