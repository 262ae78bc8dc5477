"""First light: check every kernel family on every backend of this GPU within two minutes.

    python scripts/gpu/first_light.py OUT.jsonl [--id TEXT] [--seconds 120] [--jobs N] [--device cuda]
        [--families ...] [--backends ...] [--dtypes ...] [--sizes ...]

Each finished check (first_light_checks.py) is appended to OUT.jsonl at once, with its error if it failed. Checks that
passed under the same --id are skipped and failed ones run again, so a killed run continues where it stopped. Checks run
in child processes: one that crashes, hangs or leaves the GPU unusable does not stop the others. Needs only torch,
Triton, numpy and fastkd.

With --device cpu, Triton's interpreter and the CUDA kernels built for the host run the small size.

Exit status: 0 all checks passed, 1 some failed or did not run in time, 2 usage error.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests" / "helpers")]  # python -P adds neither

import records  # noqa: E402
from processes import cores  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    begin = time.monotonic()
    options = parse(arguments)
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # Keep torch.cuda.is_available() from initialising CUDA here, which would break it in the forked children.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import children
    import first_light_checks as first_light
    import torch

    if options.device == "cpu" and "cuda" in options.backends:
        from emulation import emulated

        try:
            with emulated():  # built once for all children
                pass
        except RuntimeError as error:
            print(f"first light: {error}", file=sys.stderr)
            return 2
    wanted = first_light.checks(options.families, options.backends, options.dtypes, options.sizes)
    names = [check.name for check in wanted]
    passed = {row.get("check") for row in records.read(options.out) if row.get("ok") and row.get("id") == options.id}
    groups: dict[tuple[str, ...], list[first_light.Check]] = {}
    for check in wanted:
        if check.name not in passed:
            # Each process compiles its Triton kernels: one process per dtype. The self-test shares kernels with fp32.
            dtype = (check.dtype or "fp32") if check.backend == "triton" else ""
            groups.setdefault((check.backend, dtype, check.family), []).append(check)

    def order(key: tuple[str, ...]) -> tuple[str, int]:  # all families and backends before the next dtype
        return key[0], ("", "fp32", "bf16", "fp16").index(key[1])

    def run(check: first_light.Check) -> records.Row:
        torch.set_num_threads(max(1, cores() // options.jobs))  # for the oracle
        return first_light.run(check, options.device)

    ended = failed = 0
    for check, result in children.run_all(
        [groups[key] for key in sorted(groups, key=order)],
        run,
        jobs=options.jobs,
        limit=options.check_seconds,
        deadline=begin + options.seconds,
        broken=lambda: first_light.unusable(options.device),
    ):
        ended += 1
        about = {"check": check.name, "family": check.family, "backend": check.backend, "dtype": check.dtype}
        row = about | {"size": check.size or "self-test"} | result | {"id": options.id}
        records.append(options.out, row)
        if not row["ok"]:
            failed += 1
            print(f"FAILED {check.name}: {row['error'].splitlines()[0]}", flush=True)
    skipped = sum(name in passed for name in names)
    missing = len(names) - skipped - ended
    print(
        f"first light: {len(names)} checks, {ended - failed} passed, {failed} failed, {skipped} had passed before, "
        f"{missing} not run within {options.seconds:g} s; {time.monotonic() - begin:.0f} s",
        flush=True,
    )
    return 1 if failed or missing else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument(
        "--id", default="", help="build under test, such as a commit; rows with another id are not reused"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="limit of all checks together")
    parser.add_argument("--check-seconds", type=float, default=60.0, help="limit of one check, including compilation")
    parser.add_argument("--jobs", type=int, default=min(14, cores()), help="number of processes")
    parser.add_argument("--device", default="cuda")
    families, backends = ["softmax_kl", "relation", "pixel_word"], ["cuda", "triton"]
    dtypes, sizes = ["bf16", "fp16", "fp32"], ["small", "odd width", "maps", "bands", "128-tile"]
    for name, choices in (("families", families), ("backends", backends), ("dtypes", dtypes), ("sizes", sizes)):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices)
    options = parser.parse_args(arguments)
    if options.device == "cpu" and options.sizes == sizes:
        options.sizes = ["small"]
    return options


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # do not wait for a process stuck in the GPU driver
