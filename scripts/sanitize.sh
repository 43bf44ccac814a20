#!/usr/bin/env bash
# Runs the kernels' tests (csrc/test) under AddressSanitizer with UndefinedBehaviorSanitizer and under ThreadSanitizer,
# in every copy that this processor runs; under the first two those of the CUDA kernels on the host, too. CXX names
# the compiler; clang builds this several times faster than GCC.
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
  if [ "$sanitizers" != thread ]; then  # its threads are fibers, which ThreadSanitizer does not know
    flags="-g1 -fsanitize=$sanitizers -fno-sanitize-recover=all"
    $CXX -std=c++17 -O1 -ffp-contract=off -DEMBAX_ISA=plain -I csrc $flags csrc/test/emulated_kernels_test.cc \
      csrc/test/emulated_driver.cc -o "$folder/emulated_kernels_test" -ldl -pthread
    # Programs name their kernels alike, and are never looked up but in their own library.
    ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 EMBAX_EMULATED_FLAGS="$flags" "$folder/emulated_kernels_test" csrc 2> "$folder/emulated.log" || {
      cat "$folder/emulated.log"; exit 1; }
  fi
done
