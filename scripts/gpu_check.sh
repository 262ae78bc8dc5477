#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command, in less than 9 minutes:
#
#     scripts/gpu_check.sh OUT_DIR [PART...]
#
# builds and installs fastkd into a temporary folder (nothing else on the machine changes; CUDA kernels for this chip
# alone), runs the tests marked `gpu`, compute-sanitizer's memcheck, racecheck, synccheck and initcheck on the CUDA
# kernels, and the benchmarks. Those are the parts `tests`, `sanitizer` and `benchmarks`; named ones alone, after the
# build, share the time. `autotune` is the benchmarks with torch.compile(mode="max-autotune") beside the others, which
# takes minutes and is only run by name. Needs python with torch and Triton, nvcc and a C++ compiler; no network. Packages
# that are missing (scikit-build-core, pybind11, cmake, ninja, pytest, ...) are installed from the folder of wheels
# WHEELHOUSE (default: wheelhouse/ here), which `make wheelhouse` fills on a connected machine.
#
# Writes into OUT_DIR, flat: build.json, tests.json, sanitizer.json and one JSON per benchmarked family, all in the
# format of benchmarks/results, and log.txt. A part that fails is a row with "ok": false; the others still run.
# Exit status: 0 all parts passed, 1 some failed, 2 wrong use, 3 no NVIDIA GPU.
# Variables: PYTHON (default python3), WHEELHOUSE, and those of docs/environment.md.
set -uo pipefail

if [ $# -lt 1 ]; then
    echo "usage: scripts/gpu_check.sh OUT_DIR [tests] [sanitizer] [benchmarks] [autotune]" >&2
    exit 2
fi
PYTHON=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit 2
root=$PWD
case $1 in /*) out=$1 ;; *) out=${OLDPWD:-$root}/$1 ;; esac

shift
[ $# -gt 0 ] || set -- tests sanitizer benchmarks
for part in "$@"; do
    case $part in tests | sanitizer | benchmarks | autotune) ;; *)
        echo "gpu_check: unknown part '$part'; there are tests, sanitizer, benchmarks, autotune" >&2
        exit 2
        ;;
    esac
done

if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    echo "gpu_check: no NVIDIA GPU here (nvidia-smi -L lists none); nothing was run" >&2
    exit 3
fi
if ! "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    echo "gpu_check: $PYTHON has no torch that sees the GPU; set PYTHON to one that has" >&2
    exit 2
fi

mkdir -p "$out" || exit 2
log=$out/log.txt
: >"$log"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site
wheels=${WHEELHOUSE:-$root/wheelhouse}
export PYTHONPATH=$site PATH=$site/bin:$PATH TRITON_CACHE_DIR=$work/triton PYTHONUNBUFFERED=1
export PATH=$PATH:/usr/local/cuda/bin PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
failed=0

# part NAME SECONDS COMMAND...: run it, keep its output, write NAME.json unless the command wrote a better one.
part() {
    local name=$1 limit=$2 begin=$SECONDS status
    shift 2
    echo "== $name (at most $limit s)" | tee -a "$log"
    timeout --kill-after=10 "$limit" "$@" >"$work/$name.log" 2>&1
    status=$?
    cat "$work/$name.log" >>"$log"
    tail -n 15 "$work/$name.log"
    echo "== $name: exit $status after $((SECONDS - begin)) s" | tee -a "$log"
    [ "$status" -eq 0 ] || failed=1
    [[ $name =~ ^(benchmarks|autotune)$ ]] && [ "$status" -eq 0 ] ||
        "$PYTHON" -P "$root/scripts/gpu_check_row.py" "$out/$name.json" "$name" "$status" "$((SECONDS - begin))" "$work/$name.log" |
        tee -a "$log"
}

build() {
    local missing=()
    for pair in scikit_build_core:scikit-build-core pybind11:pybind11 pytest:pytest pytest_benchmark:pytest-benchmark \
        pytest_timeout:pytest-timeout hypothesis:hypothesis; do
        "$PYTHON" -c "import ${pair%%:*}" 2>/dev/null || missing+=("${pair##*:}")
    done
    "$PYTHON" -c 'import setuptools as s; raise SystemExit(int(s.__version__.split(".")[0]) < 77)' || missing+=(setuptools)
    command -v cmake >/dev/null || missing+=(cmake)
    command -v ninja >/dev/null || missing+=(ninja)
    if [ ${#missing[@]} -gt 0 ]; then
        echo "installing from $wheels: ${missing[*]}"
        "$PYTHON" -m pip install --quiet --no-index --find-links "$wheels" --target "$site" "${missing[@]}" || return 1
    fi
    local chip
    chip=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
    case $chip in 80 | 86 | 89 | 90 | 100 | 120) ;; *) chip= ;; esac # others run what their generation has: build all
    FASTKD_CUDA_TARGETS=${FASTKD_CUDA_TARGETS:-$chip} FASTKD_CUDA=${FASTKD_CUDA:-1} "$PYTHON" -m pip install --no-index --no-deps --no-build-isolation --upgrade \
        --target "$site" -v . || return 1
    cd "$work" && "$PYTHON" -P -c 'import fastkd; print(fastkd.info())'
}

tests() {
    "$PYTHON" -P -m pytest -q -m gpu --durations=10 -p no:cacheprovider tests
}

# Every tool on every case of the CUDA C++ kernels, forward and backward at its small sizes. Each has a quarter of the
# time that is left; one that fails does not keep the others from running.
sanitizer() {
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed (it comes with CUDA)"; return 1; }
    local failures=0 tools=(memcheck racecheck synccheck initcheck) tool options status summary=()
    for i in "${!tools[@]}"; do
        tool=${tools[$i]}
        # initcheck has to see what torch's kernels write; the others look at fastkd's alone.
        options=(--kernel-name kernel_substring=fastkd)
        [ "$tool" = initcheck ] && options=()
        # Without torch's caching allocator, so that an access beyond a tensor is one beyond an allocation.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=5 $(((SANITIZER_SECONDS - SECONDS) / (4 - i))) \
            compute-sanitizer --tool "$tool" "${options[@]}" --error-exitcode 9 --target-processes all \
            "$PYTHON" -P -m pytest -q -m gpu -p no:cacheprovider tests/test_contract_gradients.py \
            -k "test_each_row_has_its_own_gradient and not triton and not reference"
        status=$?
        summary+=("$tool: exit $status after $SECONDS s")
        [ "$status" -eq 0 ] || failures=1
    done
    printf '%s\n' "${summary[@]}"
    return $failures
}

benchmarks() {
    "$PYTHON" benchmarks/run.py --device cuda --seconds 2 --out "$out"
}

autotune() {
    "$PYTHON" benchmarks/run.py --device cuda --seconds 2 --autotune --out "$out"
}

export -f build tests sanitizer benchmarks autotune
export PYTHON root work site wheels out
part build 140 bash -c build
declare -A weight=([tests]=4 [sanitizer]=4 [benchmarks]=6 [autotune]=13)
whole=0
for name in "$@"; do whole=$((whole + weight[$name])); done
for name in "$@"; do # what a part leaves, the later ones have
    limit=$(((530 - SECONDS) * weight[$name] / whole))
    SANITIZER_SECONDS=$((limit - 5)) part "$name" "$limit" bash -c "$name"
    whole=$((whole - weight[$name]))
done
echo "written to $out: $(ls "$out" | tr '\n' ' ')"
exit $failed
