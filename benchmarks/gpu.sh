#!/usr/bin/env bash
# On a machine with a GPU: the GPU tests, every tuned row against the reference, and the most telling points.
#
#   benchmarks/gpu.sh OUTDIR
#
# Needs Python with JAX, jax-triton and Triton, and nothing installed besides; takes under 9 minutes. Everything is
# written to OUTDIR as it comes (log.txt, tests.txt, gpu.csv), so a run that is cut off leaves what it had; one more
# run with the same OUTDIR goes on with the points. PYTHON names another interpreter; DRY_RUN=1 goes through it all on
# a CPU, with a few small points.
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUTDIR}
mkdir -p "$out"
out=$(cd "$out" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
began=$SECONDS
points=(--resume --out "$out")
if [[ -n ${DRY_RUN:-} ]]; then
    export JAX_PLATFORMS=cpu
    points+=(--tiny --seconds 0)
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
cd "$site"

left() { echo $((525 - (SECONDS - began))); } # seconds, of 525
part() { echo; echo "== $1 ($((SECONDS - began)) s)"; }

part "machine"
date -u
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
"$python" -c 'import sys, jax; print(sys.version.split()[0], "jax", jax.__version__, jax.devices())'
"$python" -c 'import triton, jax_triton; print("triton", triton.__version__)'

part "tests/test_gpu.py"
if "$python" -c 'import pytest, hypothesis' 2>/dev/null; then
    timeout -k 5 170 "$python" -m pytest -v -p no:cacheprovider --rootdir "$root" -c "$root/pyproject.toml" \
        "$root/tests/test_gpu.py" > "$out/tests.txt" 2>&1
    status=$?
    grep -E '^(FAILED|ERROR)' "$out/tests.txt" | head -40
    tail -n 1 "$out/tests.txt"
    [[ $status -eq 124 ]] && echo "stopped after 170 s; $(grep -c PASSED "$out/tests.txt") had passed by then"
else
    echo "not run: pytest and hypothesis are not there"
fi

part "tuned rows and points"
timeout -k 5 "$(left)" "$python" -m benchmarks gpu "${points[@]}" --timeout 60 --deadline "$(($(left) - 25))"
status=$?
part "done, exit status $status"
exit $status
