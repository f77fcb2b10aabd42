#!/usr/bin/env bash
# Build llama.cpp for tests/export/test_llama_cpp.py, from the source package of its Python binding, into .llama.cpp. Takes ten minutes
# or so with one core; does nothing where it is there.
set -euo pipefail
cd "$(dirname "$0")/.."
version=0.3.36
[ ! -f ".llama.cpp/$version" ] || exit 0
for tool in cmake c++; do
  command -v "$tool" >/dev/null || { echo "llama.cpp is built with $tool: install it" >&2; exit 2; }
done
rm -rf .llama.cpp
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
export CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_SERVER=OFF -DGGML_OPENMP=OFF"
.venv/bin/python -m pip install --quiet --no-deps --target .llama.cpp --no-binary llama-cpp-python "llama-cpp-python==$version" diskcache==5.6.3
touch ".llama.cpp/$version"
