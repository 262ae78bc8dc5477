#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command, in less than 9 minutes:
#
#     scripts/gpu_check.sh OUT_DIR [PART...] [--seconds 530] [--cache FOLDER] [--resume OLD_OUT_DIR]
#
# builds and installs fastkd into a cache folder (nothing else on the machine changes; CUDA kernels for this chip alone),
# then runs its parts: first_light, tests, benchmarks, sanitizer; autotune only by name. A second call with the same
# sources goes on where the first one ended. docs/benchmarks.md says what each part does and writes. Needs python with
# torch and Triton, nvcc and a C++ compiler; no network: missing packages come from the folder that `make wheelhouse`
# fills on a connected machine.
#
# Exit status: 0 all parts passed, 1 some failed or did not end, 2 wrong use, 3 no NVIDIA GPU.
# Variables: PYTHON (default python3), WHEELHOUSE (default wheelhouse/ here), and those of docs/environment.md.
set -euo pipefail

PYTHON=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
if ! "$PYTHON" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))'; then
    echo "gpu_check: $PYTHON does not run, or is older than Python 3.11; set PYTHON to one that has torch" >&2
    exit 2
fi
# What is printed and logged is UTF-8, whatever the terminal can show: no character of it ends a check.
export PYTHON PYTHONUTF8=1 PYTHONIOENCODING=utf-8
exec "$PYTHON" "$root/scripts/gpu/check.py" "$@"
