"""Run the parts of scripts/gpu_check.sh in order, each with a limit, and keep their results for the next call.

    scripts/gpu_check.sh OUT_DIR [PART...] [--seconds 530] [--cache FOLDER|ARCHIVE] [--resume OLD_OUT_DIR] [--jobs N]

Exit status: 0 all parts passed, 1 some failed or did not end, 2 wrong use, 3 no NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import cache  # noqa: E402
import processes  # noqa: E402
import report  # noqa: E402
from records import PACKAGE, digest  # noqa: E402

ROOT = HERE.parents[1]
PARTS = ("first_light", "tests", "benchmarks", "sanitizer")
BY_NAME = ("autotune",)
SHARES = {"tests": 2.0, "benchmarks": 4.0, "autotune": 4.0, "sanitizer": 0.0}
"""Of the remaining time. What a part does not use, the later ones get; the sanitizer gets nothing else."""

BUILD_LIMIT = 200  # seconds: without a build there is nothing to check
FIRST_LIGHT_LIMIT = 120  # including the build
FIRST_LIGHT_LEAST = 80  # however long the build took
LEAST = 10  # seconds with which a part is not worth starting
PACKING = 12  # seconds that the end takes
CHIPS = ("80", "86", "89", "90", "100", "120")  # other chips run what is built for their generation: build all


class Check:
    """One call: its folders, its limits and the results of its parts."""

    def __init__(self, args: argparse.Namespace, gpu: dict[str, str]) -> None:
        self.begin = time.monotonic()
        self.end = self.begin + args.seconds - PACKING
        self.out: Path = args.out
        self.cache: Path = args.cache
        self.jobs: int = args.jobs
        self.targets = os.environ.get("FASTKD_CUDA_TARGETS") or (gpu["chip"] if gpu["chip"] in CHIPS else "")
        self.python = os.environ.get("PYTHON", sys.executable)
        self.env = environment(self.cache)
        versions = report.versions(self.python, self.env)
        # Checks hold for every GPU of a chip, times for one kind of card.
        self.id = "-".join([digest(ROOT, PACKAGE), f"sm{gpu['chip']}", *versions])
        self.timing_id = f"{self.id}-{gpu['name'].replace(' ', '_')}"
        self.log = (self.out / "log.txt").open("a", buffering=1, encoding="utf-8", errors="replace")
        self.rows = report.Rows(self.out / "check.json", self.id, gpu)
        self.failed = False

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.log.write(line + "\n")

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def part(self, name: str, limit: float, command: list[str], env: dict[str, str] | None = None) -> bool:
        """Run a part and add its row; return whether it passed."""
        self.say(f"== {name} (at most {limit:.0f} s)")
        begin, lines = time.monotonic(), []

        def on_line(line: str) -> None:
            lines.append(line)
            self.say(line)

        try:
            status = processes.run(command, limit, on_line=on_line, env=self.env | (env or {}), cwd=str(ROOT))
        except OSError as error:
            on_line(f"{name} could not be started: {error}")
            status = 127
        seconds = time.monotonic() - begin
        self.say(f"== {name}: exit {status} after {seconds:.0f} s")
        self.rows.add(name, status, seconds, lines)
        self.failed |= status != 0
        return status == 0

    def skip(self, name: str, why: str) -> None:
        self.say(f"== {name}: not run: {why}")
        self.rows.add(name, None, 0.0, [f"not run: {why}"])
        self.failed = True

    def run(self, parts: list[str]) -> None:
        done = self.part("build", min(BUILD_LIMIT, self.left), self.command("build", 0))
        spent = time.monotonic() - self.begin
        if done:
            self.pack()
        for i, name in enumerate(parts):
            later = sum(SHARES.get(p, 0.0) for p in parts[i:])
            limit = self.left * SHARES.get(name, 0.0) / later if later else self.left
            if name == "first_light":
                limit = min(self.left, max(FIRST_LIGHT_LEAST, FIRST_LIGHT_LIMIT - spent))
            if not (self.cache / "build" / "fastkd").exists():
                self.skip(name, "the build failed")
            elif limit < LEAST:
                self.skip(name, "no time was left; the next call goes on from here")
            else:
                own = kernel_caches(self.cache / "tests") if name == "tests" else {}
                self.part(name, limit, self.command(name, limit), own)

    def command(self, part: str, limit: float) -> list[str]:
        """Return the command of a part; it ends by itself a little before the limit, having written what it has."""
        seconds, jobs = str(max(1, round(limit - 4))), ["--jobs", str(self.jobs)]
        python = [self.python]
        if part == "build":
            wheels = os.environ.get("WHEELHOUSE", str(ROOT / "wheelhouse"))
            return [*python, str(HERE / "build.py"), str(self.cache), "--wheels", wheels, "--targets", self.targets]
        if part in ("benchmarks", "autotune"):
            sweeps = ["--sweeps", *(["autotune"] if part == "autotune" else ["own", "compile"])]
            options = ["--device", "cuda", "--limit", seconds, "--id", self.timing_id, *sweeps]
            return [*python, str(HERE / "measure_workloads.py"), str(self.out / "benchmarks.jsonl"), *options]
        script = {"first_light": "first_light.py", "tests": "kernel_tests.py", "sanitizer": "sanitizer.py"}[part]
        options = ["--seconds", seconds, "--id", self.id, *(jobs if part != "sanitizer" else [])]
        return [*python, str(HERE / script), str(self.out / f"{part}.jsonl"), *options]

    def pack(self) -> None:
        skipped = cache.pack(self.cache, self.out / "cache.tar.gz")
        size = (self.out / "cache.tar.gz").stat().st_size / 2**20
        self.say(f"cache.tar.gz: {size:.1f} MiB" + (f", without {', '.join(skipped)}" if skipped else ""))

    def finish(self) -> None:
        """Pack the cache, and remove its folder from the output folder, which then has few files."""
        self.pack()
        if self.out in self.cache.parents:
            shutil.rmtree(self.cache, ignore_errors=True)
        written = " ".join(sorted(path.name for path in self.out.iterdir() if path.is_file()))
        self.say(f"written to {self.out}: {written}")
        self.log.close()


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of every part: the build, the packages and the caches of this folder."""
    build_, tools = folder / "build", folder / "tools"
    path = [str(tools / "bin"), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return (
        os.environ
        | {
            "PYTHONPATH": os.pathsep.join(p for p in (str(build_), str(tools), os.environ.get("PYTHONPATH")) if p),
            "PATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
            "FASTKD_TEST_INSTALLED": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_ROOT_USER_ACTION": "ignore",
        }
        | kernel_caches(folder)
    )


def kernel_caches(folder: Path) -> dict[str, str]:
    """Return the variables that have compiled kernels kept in this folder."""
    names = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "cuda"}
    return {variable: str(folder / name) for variable, name in names.items()}


def find_gpu() -> dict[str, str] | None:
    """Return the GPU's name, chip and driver, or None."""
    listed = report.first_line("nvidia-smi", "-L")
    if not listed.startswith("GPU"):
        return None
    asked = report.first_line("nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader")
    name, chip, driver = (*(field.strip() for field in asked.split(",")), "", "", "")[:3]
    return {"name": name or listed, "chip": chip.replace(".", ""), "driver": driver}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all of these), or autotune")
    parser.add_argument("--seconds", type=float, default=530, help="limit of the whole call")
    parser.add_argument("--cache", type=Path, help="folder of the build and of compiled kernels (OUT_DIR/cache)")
    parser.add_argument("--resume", type=Path, help="an earlier call's OUT_DIR: its files come first")
    parser.add_argument("--jobs", type=int, default=min(processes.cores(), 14), help="processes at a time")
    args = parser.parse_intermixed_args(argv)
    for part in args.parts:
        if part not in (*PARTS, *BY_NAME):
            parser.error(f"unknown part {part!r}; there are {', '.join((*PARTS, *BY_NAME))}")
    chosen = args.parts or PARTS
    args.parts = [part for part in (*PARTS, *BY_NAME) if part in chosen]
    args.parts.sort(key=lambda part: part == "sanitizer")  # last, in the remaining time
    if args.resume is not None and not args.resume.is_dir():
        parser.error(f"--resume: {args.resume} is not a folder")
    return args


def prepare(args: argparse.Namespace) -> None:
    """Make the output folder, with an earlier call's files and the cache in place."""
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume is not None and args.resume.resolve() != args.out:
        for path in args.resume.iterdir():
            if path.is_file() and not (args.out / path.name).exists():
                shutil.copyfile(path, args.out / path.name)  # the copy can be written whatever the file's mode
    archives = [args.out / "cache.tar.gz"]
    folder = args.cache.resolve() if args.cache is not None else args.out / "cache"
    if folder.is_file():
        archives, folder = [folder, *archives], args.out / "cache"
    args.cache = folder
    folder.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        if archive.exists():
            cache.unpack(archive, folder)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    gpu = find_gpu()
    if gpu is None:
        print("gpu_check: no NVIDIA GPU here (nvidia-smi -L lists none); nothing was run", file=sys.stderr)
        return 3
    python = os.environ.get("PYTHON", sys.executable)
    sees = [python, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    if subprocess.run(sees, cwd=tempfile.gettempdir(), check=False).returncode != 0:
        print(f"gpu_check: {python} has no torch that sees the GPU; set PYTHON to one that has", file=sys.stderr)
        return 2
    processes.end_on_sigterm()
    prepare(args)
    check = Check(args, gpu)
    try:
        check.run(args.parts)
    finally:
        check.finish()
    return int(check.failed)


if __name__ == "__main__":
    sys.exit(main())
