#!/usr/bin/env bash
# fuzz.sh SECONDS [TARGET ...]: fuzzes the kernels and the host's preprocessing (csrc/test/fuzz_*.cc), all at once, with
# libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer. Needs clang. What was found interesting stays in build/fuzz,
# and the next run begins there; an input that fails is left there too, its name printed.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-600}
shift || true
[ $# -gt 0 ] || set -- fuzz_kernels fuzz_host
CXX=${CXX:-$(command -v clang++)} || { echo "fuzz: needs clang++" >&2; exit 1; }
export CXX

cmake -S csrc/test -B build/fuzz -DEMBAX_SANITIZE=address,undefined -DEMBAX_FUZZ=ON > /dev/null
cmake --build build/fuzz --parallel 2 --target "$@"
cd build/fuzz
running=
for target in "$@"; do
  mkdir -p "corpus_$target"
  # Short inputs say little about arrays: libFuzzer begins with long ones.
  [ -n "$(ls "corpus_$target")" ] || for i in $(seq 64); do head -c $((i * 32)) /dev/urandom > "corpus_$target/seed_$i"; done
  ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 "./$target" "corpus_$target" -max_total_time="$seconds" \
    -max_len=4096 -len_control=0 -timeout=60 -print_final_stats=1 -artifact_prefix="$target-" > "$target.log" 2>&1 &
  running="$running $target:$!"
done
failed=0
for one in $running; do
  if wait "${one#*:}"; then
    echo "${one%:*}: clean, $(sed -n 's/^stat::number_of_executed_units: *//p' "${one%:*}.log") inputs"
  else
    failed=1
    tail -60 "${one%:*}.log"
  fi
done
exit $failed
