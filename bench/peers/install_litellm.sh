#!/bin/sh
# Installs LiteLLM's proxy, the yardstick of bench/vs_litellm.py, into an environment of its own.
#
#   bench/peers/install_litellm.sh [FOLDER]        default: bench/.build
#
# At a fixed version, so that figures from two days can be compared. Takes some minutes and about 750 MB. PYTHON may be set.
set -eu

VERSION=1.106.0
here=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
folder=${1:-$here/.build}
python=${PYTHON:-$here/../.venv/bin/python}
[ -x "$python" ] || python=python3
mkdir -p "$folder"
folder=$(CDPATH='' cd -- "$folder" && pwd)
environment=$folder/litellm-$VERSION

[ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
"$environment/bin/python" -m pip install --quiet "litellm[proxy]==$VERSION"
ln -sfn "$environment/bin/litellm" "$folder/litellm"
echo "$folder/litellm"
