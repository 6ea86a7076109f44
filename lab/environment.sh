#!/usr/bin/env bash
# Makes an environment with other packages over vLLM and all else of another one; does nothing where that is done.
# Usage: lab/environment.sh VENV TARGET CONSTRAINTS PACKAGE...
#        (from the project's root; VENV is one of docker/cpu/install.sh, TARGET is called .venv-NAME)
set -euo pipefail
python=$1/bin/python
target=$2
constraints=$3
packages=("${@:4}")
name=${target#.venv-}
stamp="$target/.vllm-crop-$name"
want=$(cat "$1/.vllm-crop-setup" lab/environment.sh "$constraints" <(echo "${packages[@]}") | sha256sum | cut -d' ' -f1)

fail() { printf '\n%s: %s\n' "$name" "$*" >&2; exit 1; }
folder() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

[ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && exit 0
[ ! -e "$target" ] || [ -e "$stamp" ] || fail "$target was not made by this script: name another folder, or remove it"
echo "$name: installing into $target (up to 1 GB, a minute or two)"
rm -rf "$target"
mkdir -p "$target"
touch "$stamp" # what is interrupted from here on may be made again
# Without pip and setuptools of its own: vLLM wants its own setuptools, and finds that of VENV.
"$python" -m venv --without-pip "$target"
# Unlike a plain path, this reads the .pth files there, too: this project, and what lets torchvision load.
echo "import site; site.addsitedir('$(folder "$python")')" >"$(folder "$target/bin/python")/vllm_crop_base.pth"
"$python" -m pip --python "$target/bin/python" --disable-pip-version-check -q install \
    -c "$constraints" "${packages[@]}" || fail "${packages[*]} could not be installed"
echo "$want" >"$stamp"
