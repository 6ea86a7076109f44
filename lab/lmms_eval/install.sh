#!/usr/bin/env bash
# Makes an environment with lmms-eval, over vLLM and all else of another one; does nothing where that is done.
# Usage: lab/lmms_eval/install.sh VENV TARGET     (from the project's root; VENV is one of docker/cpu/install.sh)
set -euo pipefail
python=$1/bin/python
target=$2
stamp="$target/.vllm-crop-lmms-eval"
want=$(cat "$1/.vllm-crop-setup" lab/lmms_eval/install.sh lab/lmms_eval/constraints.txt | sha256sum | cut -d' ' -f1)

fail() { printf '\nlmms-eval: %s\n' "$*" >&2; exit 1; }
packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

[ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && exit 0
[ ! -e "$target" ] || [ -e "$stamp" ] || fail "$target was not made by this script: name another folder, or remove it"
echo "lmms-eval: installing into $target (about 1 GB, a minute or two)"
rm -rf "$target"
mkdir -p "$target"
touch "$stamp" # what is interrupted from here on may be made again
# Without pip and setuptools of its own: vLLM wants its own setuptools, and finds that of VENV.
"$python" -m venv --without-pip "$target"
# Unlike a plain path, this reads the .pth files there, too: this project, and what lets torchvision load.
echo "import site; site.addsitedir('$(packages "$python")')" >"$(packages "$target/bin/python")/vllm_crop_base.pth"
"$python" -m pip --python "$target/bin/python" --disable-pip-version-check -q install \
    -c lab/lmms_eval/constraints.txt lmms-eval || fail "lmms-eval could not be installed"
echo "$want" >"$stamp"
