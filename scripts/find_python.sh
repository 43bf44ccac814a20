#!/bin/sh
# find_python.sh first: an interpreter that can run embax.
# find_python.sh newest: a newer one than that (it gets a newer jax); nothing if there is none.
# Looks on PATH, then among pyenv's versions. A pyenv shim may exist and still run nothing: each one is tried.

minor() { "$1" -c 'import sys; print(sys.version_info[1] if sys.version_info >= (3, 11) else 0)' 2>/dev/null || echo 0; }

first=
for name in python3 python python3.11 python3.12 python3.13 "$HOME"/.pyenv/versions/3.1[123]*/bin/python; do
  if [ "$(minor "$name")" -ge 11 ]; then first=$name; break; fi
done

case "$1" in
  first)
    [ -n "$first" ] || { echo "embax needs Python 3.11 or newer; none found on PATH" >&2; exit 1; }
    echo "$first" ;;
  newest)
    [ -n "$first" ] || exit 1
    than=$(minor "$first")
    for name in python3.13 "$HOME"/.pyenv/versions/3.13*/bin/python python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python; do
      if [ "$(minor "$name")" -gt "$than" ]; then echo "$name"; break; fi
    done ;;
esac
