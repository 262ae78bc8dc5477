"""Build fastkd and install it into the cache folder, unless that holds the same build already.

    python scripts/gpu/build.py CACHE --wheels FOLDER [--targets 90]

CACHE/build gets the package, CACHE/tools the packages that the build and the tests lack here, out of the folder of
wheels. If the CUDA kernels cannot be built, the package without them is installed, so that Triton's can be checked; it
counts as a failure. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import wheels  # noqa: E402
from records import PACKAGE, digest, replace  # noqa: E402

ROOT = HERE.parents[1]
STAMP = "gpu_check_build.json"


def stamp(targets: str, root: Path = ROOT) -> dict[str, str]:
    """Return what a build is of."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"sources": digest(root, PACKAGE), "targets": targets, "python": python, "cuda": cuda()}


def cuda() -> str:
    return os.environ.get("FASTKD_CUDA", "1")


def same(folder: Path, want: dict[str, str]) -> bool:
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8")) == want
    except (OSError, ValueError):
        return False


def packages(folder: Path, target: Path) -> bool:
    """Install what is lacking; return whether the build has what it needs (the tests state what they lack)."""
    ready = []
    for wanted in wheels.requirements():
        why = None
        if lacks := wheels.lacking(wanted):
            print(f"installing from {folder}: " + "; ".join(map(str, lacks)), flush=True)
            why = wheels.install(lacks, folder, target)
        ready.append(why is None)
        if why is not None:
            print(why, flush=True)
    return ready[0]


def install(folder: Path, targets: str, with_cuda: str) -> bool:
    """Install the checkout into ``folder``, whole or not at all."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--upgrade", "--target", str(partial), "-v"]
    env = os.environ | {"FASTKD_CUDA": with_cuda} | ({"FASTKD_CUDA_TARGETS": targets} if targets else {})
    done = subprocess.run([wheels.PYTHON, "-m", "pip", "install", *options, "."], cwd=ROOT, env=env, check=False)
    if done.returncode != 0:
        return False
    partial.rename(folder)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheelhouse")
    parser.add_argument("--targets", default="", help="FASTKD_CUDA_TARGETS")
    args = parser.parse_args()
    folder, tools = args.cache.resolve() / "build", args.cache.resolve() / "tools"
    # For this process and those that it starts, whether or not the caller has set them.
    sys.path.insert(0, str(tools))
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(tools), os.environ.get("PYTHONPATH")) if p)
    os.environ["PATH"] = os.pathsep.join([str(tools / "bin"), os.environ.get("PATH", "")])
    ready = packages(args.wheels, tools)
    want = stamp(args.targets)
    if same(folder, want):
        print("this build is in the cache")
        return 0
    shutil.rmtree(folder, ignore_errors=True)  # of other sources: if these cannot be built, nothing is to be checked
    if not ready:
        return 1
    built = install(folder, args.targets, cuda())
    if built:
        replace(folder / STAMP, want)
    elif cuda() != "0":
        print("the CUDA kernels cannot be built; without them, for the other checks:", flush=True)
        if not install(folder, args.targets, "0"):
            return 1
    shown = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])}
    ask = "import fastkd; print(fastkd.info())"
    works = subprocess.run([sys.executable, "-P", "-c", ask], env=shown, check=False).returncode == 0
    return 0 if built and works else 1


if __name__ == "__main__":
    sys.exit(main())
