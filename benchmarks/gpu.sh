#!/usr/bin/env bash
# On a machine with a GPU: is it right, how fast is it, and what would be faster. In order of worth, each under 10 minutes:
#
#   benchmarks/gpu.sh OUTDIR right     the first kernels, GPU tests, every tuned row, compute-sanitizer
#   benchmarks/gpu.sh OUTDIR fast      the telling points and decoding, against jax.nn on XLA and cuDNN; a profile of one
#                                      kernel
#   benchmarks/gpu.sh OUTDIR tune      candidates for the tuning table by turns; then the rest of the tests
#
# Needs Python with JAX, jax-triton and Triton, and nothing installed besides. Everything is written to OUTDIR as it
# comes (log.txt, tests/, gpu.csv), so a run that is cut off leaves what it had, and one more with the same OUTDIR goes on
# where it stopped. Ends with 1 if something is wrong. PYTHON names another interpreter; SECONDS_EACH the seconds of a
# stage (540); DRY_RUN=1 goes through it all on a CPU, with a few small points.
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUTDIR right|fast|tune}
stage=${2:?usage: benchmarks/gpu.sh OUTDIR right|fast|tune}
[[ $stage =~ ^(right|fast|tune)$ ]] || { echo "the stages are right, fast and tune, not $stage" >&2; exit 2; }
mkdir -p "$out"
out=$(cd "$out" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
began=$SECONDS
all=${SECONDS_EACH:-540}
options=(--resume --out "$out" --timeout 60)
on_gpu=(--gpu)
if [[ -n ${DRY_RUN:-} ]]; then
    export JAX_PLATFORMS=cpu
    options+=(--tiny --seconds 0)
    on_gpu=(--collect-only -q)
else
    unset JAX_PLATFORMS # "cpu" would hide the GPU
fi
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
exec > >(tee -a "$out/log.txt") 2>&1

# The package as an installation would lay it out, in links: nothing is installed, nothing in the checkout changes.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/jax_flash_attn2"
ln -s "$root"/jax_flash_attn2/* "$site/jax_flash_attn2/"
ln -s "$root/kernels" "$site/jax_flash_attn2/kernels"
ln -s "$root/benchmarks" "$site/benchmarks"
cd "$site" || exit 2

failed=()
left() { echo $((all - (SECONDS - began))); } # seconds of this stage
part() { echo; echo "== $1 ($((SECONDS - began)) s)"; }
within() { # SECONDS NAME COMMAND...: runs it, noting by NAME that it failed
    local seconds=$1 name=$2
    shift 2
    timeout -s INT -k 10 "$seconds" "$@"
    local status=$?
    [[ $status -eq 0 ]] || { failed+=("$name"); echo "$name: exit status $status"; }
}
tests() { # SECONDS: what has not passed yet, in the order of the file; status 2 is that time ran out
    "$python" -c 'import pytest, hypothesis' 2>/dev/null || { failed+=(tests); echo "no pytest or no hypothesis"; return; }
    timeout -s INT -k 10 "$(($1 + 60))" "$python" -m pytest "${on_gpu[@]}" --seconds "$1" --keep "$out/tests" \
        -p no:cacheprovider --rootdir "$root" -c "$root/pyproject.toml" -q --tb=short "$root/tests/test_gpu.py" |
        tee "$out/tests.txt" | tail -n 40
    local status=${PIPESTATUS[0]}
    [[ $status -eq 0 || ($status -eq 2 && ! -s "$out/tests/failed.txt") ]] || failed+=(tests)
    echo "passed so far: $(grep -c . "$out/tests/passed.txt" 2>/dev/null || echo 0)"
}
benchmark() { within "$(left)" "$1" "$python" -m benchmarks gpu "${options[@]}" --what "$1" --deadline "$2"; }

part "machine: $stage"
date -u
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
within 120 import "$python" -c '
import sys, jax, triton, jax_triton
print(sys.version.split()[0], "jax", jax.__version__, "triton", triton.__version__, "jax-triton", jax_triton.__version__)
print(jax.devices())'

case $stage in
right)
    if [[ -z ${DRY_RUN:-} ]]; then
        part "first kernels"
        within 120 first "$python" -m benchmarks gpu_smoke
    fi
    part "tests/test_gpu.py"
    tests $((all * 2 / 5))
    part "tuned rows"
    benchmark rows $((all / 4))
    if command -v compute-sanitizer >/dev/null; then
        part "compute-sanitizer" # with an allocator that hands out each array by itself, or overruns stay in its pool
        within "$(left)" sanitizer env XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_PYTHON_CLIENT_PREALLOCATE=false \
            compute-sanitizer --error-exitcode 9 "$python" -m benchmarks gpu_smoke --widths 64,128 --variants ptr,block
    fi
    ;;
fast)
    part "points"
    benchmark points $((all / 2))
    part "decoding"
    benchmark decode $(($(left) - 90))
    if command -v ncu >/dev/null; then
        part "a profile of the forward kernel"
        within 60 ncu ncu --kernel-name regex:attn_fwd --launch-count 1 --set basic --section WarpStateStats \
            "$python" -m benchmarks gpu_smoke --widths 128 --variants tuned --seqlen 8192
    fi
    ;;
tune)
    part "candidates"
    benchmark candidates $((all * 3 / 5))
    part "the rest of tests/test_gpu.py"
    tests $(($(left) - 60))
    ;;
esac
part "done; failed: ${failed[*]:-nothing}"
[[ ${#failed[@]} -eq 0 ]]
