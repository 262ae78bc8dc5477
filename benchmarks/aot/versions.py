"""Write the tables of ``benchmarks.aot`` for the oldest and the newest Triton, each in a separate environment.

    python -m benchmarks.aot.versions [--versions 3.6.0 3.9.0] [--environments DIR] [--out DIR] [-- ARGUMENTS]

Each environment contains only that version of Triton and takes everything else from the current Python, including
torch, which the kernels only import. Complete environments are reused.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from benchmarks.aot.facts import RESULTS

VERSIONS = ("3.6.0", "3.9.0")
"""The oldest and the newest version of Triton: ``fastkd.ops.backends.OLDEST_TRITON`` and the latest release."""


def environment(folder: Path, version: str) -> Path:
    """Return the Python of an environment with this version of Triton, creating it if necessary."""
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    venv.EnvBuilder(clear=True, symlinks=True).create(folder)
    install = (sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps")
    subprocess.run((*install, f"triton=={version}"), check=True)  # before the parent's Triton becomes visible
    # Place the parent's packages after the environment's on sys.path; addsitedir also processes their .pth files.
    parents = "".join(f"import site; site.addsitedir({path!r})\n" for path in sys.path if path.endswith("-packages"))
    site = sysconfig.get_path("purelib", "venv", {"base": str(folder)})
    Path(site, "zz_parent.pth").write_text(parents, encoding="utf-8")
    found = subprocess.run(
        (str(python), "-c", "import triton; print(triton.__version__)"), capture_output=True, text=True
    )
    if found.stdout.strip() != version:
        raise RuntimeError(f"{folder}: expected Triton {version}, found {found.stdout.strip() or found.stderr}")
    (folder / "complete").touch()  # last, so that an interrupted installation is repeated
    return python


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--environments", type=Path, default=Path("build/triton"), help="folder of the environments")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of VERSION.json")
    parser.add_argument(
        "arguments", nargs="*", metavar="-- ARGUMENTS", help="passed to benchmarks.aot, such as --families relation"
    )
    args = parser.parse_args(argv)
    failed = []
    for version in args.versions:
        python = environment(args.environments.resolve() / version, version)
        print(f"== Triton {version}", flush=True)
        command = (str(python), str(Path(__file__).parent), "--json", str(args.out / f"{version}.json"))
        if subprocess.run((*command, *args.arguments)).returncode != 0:
            failed.append(version)
    if failed:
        print(f"some kernels spill or do not compile under Triton {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
