"""Which embax is measured: the checkout's, an installed one, or one built or unpacked here. Needs no network."""

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "gpu-site"
VARIABLE = "EMBAX_BENCHMARK_SITE"  # tells the workers
LIBRARIES = (".so", ".dylib", ".dll", ".cubin", ".fatbin", ".ptx")


def native_files(folder: Path) -> list[Path]:
    """Returns the native files of the embax in ``folder``."""
    return sorted(path for path in (folder / "embax").rglob("*") if path.suffix in LIBRARIES)


def value(folder: Path) -> int:
    """Returns 2 for an embax with a library of GPU kernels, 1 for one with any library, 0 for plain Python.

    A library of GPU kernels has "cuda" in its name or its folder's.
    """
    files = [str(path.relative_to(folder)) for path in native_files(folder)]
    return 2 if any("cuda" in name for name in files) else 1 if files else 0


def choose() -> Path:
    """Puts the folder of the embax to be measured first among those that Python searches, and returns it.

    ``python -m`` searches the checkout first, which hides an installed embax even where only that one has libraries.
    """
    candidates = [ROOT]
    given = os.environ.get(VARIABLE)
    if given:
        candidates = [Path(given), ROOT]
    else:
        elsewhere = [p for p in sys.path if p and Path(p).resolve() != ROOT]
        installed = importlib.machinery.PathFinder.find_spec("embax", elsewhere)
        if installed and installed.origin:
            candidates.append(Path(installed.origin).parent.parent)
    best = max(candidates, key=value)  # the first of equals
    sys.path[:] = [str(best)] + [p for p in sys.path if p and Path(p).resolve() not in (best.resolve(), ROOT)]
    sys.path.append(str(ROOT))
    return best


def unpack(wheel: Path) -> Path:
    """Unpacks a wheel, which is all that installing one of embax does, and returns its folder."""
    shutil.rmtree(SITE, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(SITE)
    os.environ[VARIABLE] = str(SITE)
    return SITE


def build() -> Path:
    """Builds the checkout into a folder of its own and returns that; SystemExit says what is missing."""
    shutil.rmtree(SITE, ignore_errors=True)
    lacking = [] if shutil.which("cmake") else ["cmake"]
    lacking += [] if any(map(shutil.which, ("c++", "g++", "clang++"))) else ["a C++ compiler"]
    lacking += [] if any(map(shutil.which, ("ninja", "make"))) else ["ninja or make"]
    if lacking:
        raise SystemExit(f"embax cannot be built here: missing {', '.join(lacking)}; give a wheel (--wheel FILE)")
    if importlib.util.find_spec("scikit_build_core") and importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
        done = subprocess.run([*pip, "--target", str(SITE), str(ROOT)])
    else:
        print("note: no scikit-build-core or no pip; built by cmake alone")
        done = _by_cmake()
    if done.returncode or not native_files(SITE):
        raise SystemExit("embax could not be built: see the messages above; give a wheel (--wheel FILE)")
    os.environ[VARIABLE] = str(SITE)
    return SITE


def _by_cmake() -> subprocess.CompletedProcess:
    tree = ROOT / "build" / "gpu-cmake"
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT / "embax", SITE / "embax", ignore=shutil.ignore_patterns("__pycache__", "_native"))
    commands = [
        ["cmake", "-S", str(ROOT), "-B", str(tree), "-DCMAKE_BUILD_TYPE=Release", *ninja],
        ["cmake", "--build", str(tree), "--parallel", str(os.cpu_count() or 2)],
        ["cmake", "--install", str(tree), "--prefix", str(SITE)],
    ]
    for command in commands:
        done = subprocess.run(command)
        if done.returncode:
            break
    return done
