#!/usr/bin/env bash
# Runs the kernels' tests (csrc/test) under AddressSanitizer with UndefinedBehaviorSanitizer and under ThreadSanitizer,
# in every copy that this processor runs. CXX names the compiler; clang builds this several times faster than GCC.
set -euo pipefail
cd "$(dirname "$0")/.."
CXX=${CXX:-$(command -v clang++ || command -v c++)}
export CXX

# ThreadSanitizer wants its shadow at fixed addresses, and some kernels place programs where it would be.
fixed=
if command -v setarch > /dev/null && setarch -R true 2> /dev/null; then fixed="setarch -R"; fi

for sanitizers in ${*:-address,undefined thread}; do
  folder=build/sanitize/${sanitizers%%,*}
  cmake -S csrc/test -B "$folder" -DEMBAX_SANITIZE="$sanitizers" > /dev/null
  cmake --build "$folder" --parallel 2 --target kernels_test
  echo "== $sanitizers"
  UBSAN_OPTIONS=print_stacktrace=1 $fixed "$folder/kernels_test"
done
