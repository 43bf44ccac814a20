"""The CUDA backend on the host: its library built with an emulated driver, its kernels by the host's compiler.

Where there is no card this runs the very sources that a card would run: plans of launches, index arithmetic, barriers
and formulas. `install` makes the backend "cuda" available in this process; it has to be named, nothing chooses it.
"""

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
LIBRARY = ("ffi_cuda_lookup.cc", "ffi_cuda_update.cc", "cuda_modules.cc", "cuda_queries.cc", "test/emulated_driver.cc")


def why_not():
    """Returns why kernels cannot be run here, or None."""
    if not sys.platform.startswith("linux"):
        return "the CUDA kernels' host side is for Linux"
    return None if _compiler() else "there is no C++ compiler to run the CUDA kernels on the host"


def install(monkeypatch):
    """Makes the backend "cuda" available until ``monkeypatch`` is undone."""
    from embax.kernels import cubins, cuda_library, nvrtc

    monkeypatch.setenv(cuda_library.LIBRARY_VARIABLE, str(library()))
    monkeypatch.setattr(nvrtc, "find", HostCompiler)
    monkeypatch.setattr(cuda_library._compiled, "kept", cubins.Cubins(None))


@functools.cache
def library():
    """Returns the library with the emulated driver, built once for each state of its sources."""
    out = _folder() / f"libembax_cuda_emulated_{_digest(*_sources())}.so"
    if not out.exists():
        generated = _folder() / "sources"
        generated.mkdir(exist_ok=True)
        (generated / "cuda_sources.h").write_text(_no_sources())
        flags = ["-O0", "-DEMBAX_EMULATED", "-isystem", str(ROOT / "third_party/xla_ffi"), "-I", str(generated)]
        _run([*flags, "-I", str(CSRC), *(str(CSRC / name) for name in LIBRARY), "-ldl"], out)
    return out


class HostCompiler:
    """What NVRTC is to a card: makes images of programs, which the emulated driver loads."""

    version = (0, 0)

    def compile(self, source, headers, architecture):
        """Returns the image of a program: where a library lies that has it."""
        assert architecture == 90 and not headers
        header = CSRC / "test/emulated.h"
        out = _folder() / f"{_digest(source.encode(), *_sources())}.so"
        if not out.exists():
            program = out.with_suffix(".cu")
            program.write_text(source)
            flags = ["-O1", "-D__CUDACC__", "-DEMBAX_ISA=cuda", "-include", str(header), "-I", str(CSRC)]
            _run([*flags, "-Wno-unknown-pragmas", "-x", "c++", str(program)], out)
        return b"embax-emulated " + str(out).encode() + b"\0"


def _run(arguments, out):
    """Compiles into ``out``, which is there whole or not at all."""
    part = out.with_name(f"{out.name}.{os.getpid()}")
    command = [*_compiler(), "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", *arguments, "-o", str(part)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:4000]
    os.replace(part, out)


@functools.cache
def _compiler():
    named = shlex.split(os.environ.get("CXX", ""))
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    return tuple(named) or ((found,) if found else ())


@functools.cache
def _folder():
    """Returns where compiled programs are kept from run to run, beside other things that a build makes."""
    folder = ROOT / "build" / "emulated"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError:
        return Path(tempfile.mkdtemp())


@functools.cache
def _sources():
    files = [*CSRC.glob("*.h"), *CSRC.glob("*.cc"), *CSRC.glob("cuda/*.h"), *CSRC.glob("test/emulated*")]
    return tuple(file.read_bytes() for file in sorted(files))


def _digest(*texts):
    whole = hashlib.sha256()
    for text in (*texts, *(part.encode() for part in _compiler())):
        whole.update(len(text).to_bytes(8, "little") + text)
    return whole.hexdigest()[:24]


def _no_sources():
    return (
        "#pragma once\nnamespace embax::cuda {\nconstexpr int kSources = 0;\n"
        "constexpr const char* const* kSourceNames = nullptr;\n"
        "constexpr const char* const* kSourceTexts = nullptr;\n}\n"
    )
