"""Run the parts of scripts/gpu_check.sh in order, each with a time limit, and keep their results for the next call.

    scripts/gpu_check.sh OUT_DIR [PART...] [--seconds 530] [--cache FOLDER|ARCHIVE] [--resume OLD_OUT_DIR] [--jobs N]

Exit status: 0 all parts passed, 1 some failed or did not finish, 2 usage error, 3 no NVIDIA GPU.
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
BY_NAME = ("autotune",)  # run only if named
SHARES = {"tests": 2.0, "benchmarks": 4.0, "autotune": 4.0, "sanitizer": 0.0}
"""Relative shares of the remaining time. Unused time goes to later parts; the sanitizer gets only unused time."""

BUILD_LIMIT = 200  # seconds
FIRST_LIGHT_LIMIT = 120  # including the build
FIRST_LIGHT_MIN_SECONDS = 80  # even if the build took long
MIN_SECONDS = 10  # do not start a part with less time left
PACKING_SECONDS = 12  # reserved for packing the cache
CHIPS = ("80", "86", "89", "90", "100", "120")  # for any other chip csrc/cmake/CudaTargets.cmake selects the targets


class Check:
    """One call of the script: folders, limits and results of the parts."""

    def __init__(self, args: argparse.Namespace, gpu: dict[str, str]) -> None:
        self.begin = time.monotonic()
        self.end = self.begin + args.seconds - PACKING_SECONDS
        self.out: Path = args.out
        self.cache: Path = args.cache
        self.jobs: int = args.jobs
        self.targets = os.environ.get("FASTKD_CUDA_TARGETS") or (gpu["chip"] if gpu["chip"] in CHIPS else "")
        self.python = os.environ.get("PYTHON", sys.executable)
        self.env = environment(self.cache)
        versions = report.versions(self.python, self.env)
        # Results of checks apply to every GPU with this chip, timings only to this model.
        self.id = "-".join([digest(ROOT, PACKAGE), f"sm{gpu['chip']}", *versions])
        self.timing_id = f"{self.id}-{gpu['name'].replace(' ', '_')}"
        self.log = (self.out / "log.txt").open("a", buffering=1, encoding="utf-8", errors="replace")
        self.rows = report.Rows(self.out / "check.json", self.id, gpu)
        self.failed = False

    def write_line(self, line: str) -> None:
        """Print and log a line."""
        print(line, flush=True)
        self.log.write(line + "\n")

    @property
    def left(self) -> float:
        """Return the seconds left."""
        return self.end - time.monotonic()

    def part(self, name: str, limit: float, command: list[str], env: dict[str, str] | None = None) -> bool:
        """Run a part and add its row; return whether it passed."""
        self.write_line(f"== {name} (at most {limit:.0f} s)")
        begin, lines = time.monotonic(), []

        def on_line(line: str) -> None:
            lines.append(line)
            self.write_line(line)

        try:
            status = processes.run(command, limit, on_line=on_line, env=self.env | (env or {}), cwd=str(ROOT))
        except OSError as error:
            on_line(f"{name} could not be started: {error}")
            status = 127
        seconds = time.monotonic() - begin
        self.write_line(f"== {name}: exit {status} after {seconds:.0f} s")
        self.rows.add(name, status, seconds, lines)
        self.failed |= status != 0
        return status == 0

    def skip(self, name: str, reason: str) -> None:
        """Record a part that was not run as failed."""
        self.write_line(f"== {name}: not run: {reason}")
        self.rows.add(name, None, 0.0, [f"not run: {reason}"])
        self.failed = True

    def run(self, parts: list[str]) -> None:
        """Build, then run the parts within their limits."""
        done = self.part("build", min(BUILD_LIMIT, self.left), self.command("build", 0))
        spent = time.monotonic() - self.begin
        if done:
            self.pack()
        for i, name in enumerate(parts):
            later = sum(SHARES.get(p, 0.0) for p in parts[i:])
            limit = self.left * SHARES.get(name, 0.0) / later if later else self.left
            if name == "first_light":
                limit = min(self.left, max(FIRST_LIGHT_MIN_SECONDS, FIRST_LIGHT_LIMIT - spent))
            if not (self.cache / "build" / "fastkd").exists():
                self.skip(name, "the build failed")
            elif limit < MIN_SECONDS:
                self.skip(name, "no time was left; the next call continues here")
            else:
                env = kernel_caches(self.cache / "tests") if name == "tests" else {}
                self.part(name, limit, self.command(name, limit), env)

    def command(self, part: str, limit: float) -> list[str]:
        """Return the command of a part, which writes its results and stops shortly before the limit."""
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
        """Write the cache archive into the output folder."""
        skipped = cache.pack(self.cache, self.out / "cache.tar.gz")
        size = (self.out / "cache.tar.gz").stat().st_size / 2**20
        self.write_line(f"cache.tar.gz: {size:.1f} MiB" + (f", without {', '.join(skipped)}" if skipped else ""))

    def finish(self) -> None:
        """Pack the cache, and remove its folder if it is inside the output folder."""
        self.pack()
        if self.out in self.cache.parents:
            shutil.rmtree(self.cache, ignore_errors=True)
        written = " ".join(sorted(path.name for path in self.out.iterdir() if path.is_file()))
        self.write_line(f"written to {self.out}: {written}")
        self.log.close()


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of every part: it uses the build, packages and kernel caches of ``folder``."""
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
    """Return the variables that place the caches of compiled kernels in this folder."""
    names = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "cuda"}
    return {variable: str(folder / name) for variable, name in names.items()}


def find_gpu() -> dict[str, str] | None:
    """Return the GPU's name, chip and driver, or None."""
    listed = report.first_line("nvidia-smi", "-L")
    if not listed.startswith("GPU"):
        return None
    fields = report.first_line("nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader")
    name, chip, driver = (*(field.strip() for field in fields.split(",")), "", "", "")[:3]
    return {"name": name or listed, "chip": chip.replace(".", ""), "driver": driver}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all of these) or autotune"
    )
    parser.add_argument("--seconds", type=float, default=530, help="limit of the whole call")
    parser.add_argument(
        "--cache", type=Path, help="folder of the build and of compiled kernels; default: OUT_DIR/cache"
    )
    parser.add_argument("--resume", type=Path, help="OUT_DIR of an earlier call to continue")
    parser.add_argument("--jobs", type=int, default=min(processes.cores(), 14), help="number of processes")
    args = parser.parse_intermixed_args(argv)
    for part in args.parts:
        if part not in (*PARTS, *BY_NAME):
            parser.error(f"unknown part {part!r}; expected {', '.join((*PARTS, *BY_NAME))}")
    chosen = args.parts or PARTS
    args.parts = [part for part in (*PARTS, *BY_NAME) if part in chosen]
    args.parts.sort(key=lambda part: part == "sanitizer")  # last, in the remaining time
    if args.resume is not None and not args.resume.is_dir():
        parser.error(f"--resume: {args.resume} is not a folder")
    return args


def prepare(args: argparse.Namespace) -> None:
    """Create the output folder, with the files of an earlier call and the cache."""
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume is not None and args.resume.resolve() != args.out:
        for path in args.resume.iterdir():
            if path.is_file() and not (args.out / path.name).exists():
                shutil.copyfile(path, args.out / path.name)  # copyfile ignores a read-only mode
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
        print("gpu_check: no NVIDIA GPU found (nvidia-smi -L lists none); nothing was run", file=sys.stderr)
        return 3
    python = os.environ.get("PYTHON", sys.executable)
    command = [python, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    if subprocess.run(command, cwd=tempfile.gettempdir(), check=False).returncode != 0:
        print(
            f"gpu_check: torch of {python} does not see the GPU; set PYTHON to an interpreter whose torch does",
            file=sys.stderr,
        )
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
