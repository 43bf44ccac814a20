#!/usr/bin/env bash
# Runs Python tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer; arguments go to pytest. PYTHON
# names the interpreter. GCC's runtime is preloaded, for the interpreter itself knows of no sanitizer.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
# The sanitizer has an allocator of its own, which cannot be tuned.
[ $# -gt 0 ] || set -- tests/test_battery.py tests/test_native.py -k "not allocator"

folder=build/sanitize/python
# -O1 comes after the library's own -O3, which would take minutes here.
cmake -S csrc/test -B "$folder" -DCMAKE_CXX_COMPILER="${CXX:-g++}" -DEMBAX_SANITIZE=address,undefined > /dev/null
cmake --build "$folder" --parallel 2 --target embax_cpu
runtime=$("${CXX:-g++}" -print-file-name=libasan.so)
cxx=$("${CXX:-g++}" -print-file-name=libstdc++.so.6)
# Without libstdc++ loaded first the runtime cannot see the exceptions of libraries that bring their own.
LD_PRELOAD="$runtime $cxx" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 JAX_PLATFORMS=cpu \
  EMBAX_NATIVE_LIBRARY="$PWD/$folder/embax/libembax_cpu.so" "$python" -m pytest -p no:cacheprovider "$@"
