"""Build fastkd and install it into the cache folder, unless the same build is already there.

    python scripts/gpu/build.py CACHE --wheels FOLDER [--targets 90]

The package is installed into CACHE/build, and missing requirements of the build and the tests, from the folder of
wheels, into CACHE/tools. If the CUDA kernels cannot be built, the package is installed without them, so that the Triton
kernels can be checked, and the build counts as failed. No network is needed.
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
from records import PACKAGE, digest, write_json  # noqa: E402

ROOT = HERE.parents[1]
STAMP = "gpu_check_build.json"


def stamp(targets: str, root: Path = ROOT) -> dict[str, str]:
    """Return the identity of a build: sources, targets, Python version and FASTKD_CUDA."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"sources": digest(root, PACKAGE), "targets": targets, "python": python, "cuda": cuda_setting()}


def cuda_setting() -> str:
    return os.environ.get("FASTKD_CUDA", "1")


def is_current(folder: Path, wanted: dict[str, str]) -> bool:
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8")) == wanted
    except (OSError, ValueError):
        return False


def install_requirements(folder: Path, target: Path) -> bool:
    """Install missing requirements; return whether the build's are met (the tests report their own)."""
    ready = []
    for requirements in wheels.requirements():
        error = None
        if missing := wheels.find_missing(requirements):
            print(f"installing from {folder}: " + "; ".join(map(str, missing)), flush=True)
            error = wheels.install(missing, folder, target)
        ready.append(error is None)
        if error is not None:
            print(error, flush=True)
    return ready[0]


def install(folder: Path, targets: str, with_cuda: str) -> bool:
    """Install the checkout into ``folder`` atomically; return whether this succeeded."""
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
    # For this process and its children.
    sys.path.insert(0, str(tools))
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(tools), os.environ.get("PYTHONPATH")) if p)
    os.environ["PATH"] = os.pathsep.join([str(tools / "bin"), os.environ.get("PATH", "")])
    ready = install_requirements(args.wheels, tools)
    wanted = stamp(args.targets)
    if is_current(folder, wanted):
        print("this build is already in the cache")
        return 0
    shutil.rmtree(folder, ignore_errors=True)  # built from other sources
    if not ready:
        return 1
    built = install(folder, args.targets, cuda_setting())
    if built:
        write_json(folder / STAMP, wanted)
    elif cuda_setting() != "0":
        print("the CUDA kernels cannot be built; installing without them for the other checks", flush=True)
        if not install(folder, args.targets, "0"):
            return 1
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])}
    code = "import fastkd; print(fastkd.info())"
    imports = subprocess.run([sys.executable, "-P", "-c", code], env=env, check=False).returncode == 0
    return 0 if built and imports else 1


if __name__ == "__main__":
    sys.exit(main())
