#!/usr/bin/env bash
# Run everything that needs an NVIDIA GPU, in one command and less than 9 minutes:
#
#     scripts/gpu_check.sh OUT_DIR [PART...] [--seconds 530] [--cache FOLDER] [--resume OLD_OUT_DIR]
#
# It builds and installs fastkd into a cache folder (CUDA kernels for this chip only; nothing else on the machine
# changes), then runs its parts: first_light, tests, benchmarks, sanitizer; and autotune, only if named. A second call
# with the same sources continues where the first one stopped. docs/benchmarks.md describes the parts and their output.
# Requires Python with torch and Triton, nvcc and a C++ compiler, but no network: missing packages come from the folder
# that `make wheelhouse` fills on a connected machine.
#
# Exit status: 0 all parts passed, 1 some failed or did not finish, 2 usage error, 3 no NVIDIA GPU.
# Variables: PYTHON (default python3), WHEELHOUSE (default wheelhouse/ here), and those of docs/environment.md.
set -euo pipefail

PYTHON=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
if ! "$PYTHON" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))'; then
    echo "gpu_check: $PYTHON does not run or is older than Python 3.11; set PYTHON to one with torch" >&2
    exit 2
fi
# Print and log in UTF-8 in any locale, so that no character can fail a check.
export PYTHON PYTHONUTF8=1 PYTHONIOENCODING=utf-8
exec "$PYTHON" "$root/scripts/gpu/check.py" "$@"
