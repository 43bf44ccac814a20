"""NVRTC: found where it should be, compiles or says why not; what it made is kept, and a bad file is never used."""

import pathlib
import re
import subprocess
import sys
import threading

import pytest

from embax.kernels import cubins, nvrtc

HEADERS = {"scaled.h": "#pragma once\n__device__ inline float scaled(float x, float by) { return x * by; }\n"}
SOURCE = """
#include "scaled.h"
extern "C" __global__ void scale(float* x) { x[threadIdx.x] = scaled(x[threadIdx.x], 3.0f) + 1.0f; }
"""
PACKAGES = {12: "cuda_nvrtc/lib/libnvrtc.so.12", 13: "cu13/lib/libnvrtc.so.13"}
SECONDS = 120


def _package(major):
    for entry in sys.path:
        file = pathlib.Path(entry) / "nvidia" / PACKAGES[major]
        if file.exists():
            return file
    pytest.skip(f"NVRTC {major} is not installed: pip install 'embax[dev]' brings it on Linux")


@pytest.fixture(params=sorted(PACKAGES))
def compiler(request):
    return nvrtc.Nvrtc(_package(request.param))


@pytest.fixture
def elsewhere(monkeypatch):
    """A machine where nothing but sys.path leads to an NVRTC, and JAX has loaded no plugin."""
    for variable in (nvrtc.LIBRARY_VARIABLE, "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(nvrtc, "_NAMES", ())
    monkeypatch.setattr(nvrtc, "_TOOLKITS", ())
    monkeypatch.setattr(nvrtc, "_mapped_files", lambda: iter(()))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return monkeypatch


def _site(folder, major, library=None):
    """A folder of sys.path with a package of NVRTC: a link to a real library, or a file that is none."""
    file = folder / "nvidia" / PACKAGES[major]
    file.parent.mkdir(parents=True)
    if library is None:
        file.write_bytes(b"no library")
    else:
        file.symlink_to(library)
    return str(folder)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_a_kernel(compiler, architecture):
    if architecture not in compiler.architectures():
        pytest.skip(f"{compiler!r} does not know sm_{architecture}")
    cubin = compiler.compile(SOURCE, HEADERS, architecture)
    assert cubin.startswith(b"\x7fELF") and b"scale" in cubin
    assert compiler.compile(SOURCE, HEADERS, architecture) == cubin


def test_both_majors_in_one_process():
    loaded = {major: nvrtc.Nvrtc(_package(major)) for major in PACKAGES}
    for major, compiler in loaded.items():
        assert compiler.version[0] == major
        assert compiler.path == str(_package(major).resolve())
        assert compiler.compile(SOURCE, HEADERS, 90).startswith(b"\x7fELF")


def test_products_are_not_fused(compiler):
    fused = SOURCE.replace("scaled(x[threadIdx.x], 3.0f) + 1.0f", "fmaf(x[threadIdx.x], 3.0f, 1.0f)")
    assert fused != SOURCE
    assert compiler.compile(SOURCE, HEADERS, 90) != compiler.compile(fused, HEADERS, 90)


def test_what_the_kernels_are_told(compiler):
    told = """
    #define TEXT_OF(x) #x
    #define TEXT(x) TEXT_OF(x)
    static_assert(TEXT(EMBAX_ISA)[0] == 'c' && sizeof(TEXT(EMBAX_ISA)) == 5, "cuda");
    static_assert(__cplusplus == 201703L && __CUDA_ARCH__ == 900, "C++17 for 9.0");
    """
    assert compiler.compile(told, {}, 90).startswith(b"\x7fELF")


def test_errors_of_the_compiler(compiler):
    wrong = 'extern "C" __global__ void scale(float* x) { *x = missing; }\n'
    with pytest.raises(nvrtc.NvrtcError) as caught:
        compiler.compile(wrong, HEADERS, 90)
    assert re.search(r"NVRTC 1\d\.\d+ \(.*\) failed to compile for sm_90: NVRTC_ERROR_COMPILATION", str(caught.value))
    assert 'embax.cu(1): error: identifier "missing" is undefined' in str(caught.value)
    with pytest.raises(nvrtc.NvrtcError) as caught:
        compiler.compile(wrong + "int x = 1;\n" * 200, HEADERS, 90)
    assert len(str(caught.value)) < 2500
    assert compiler.compile(SOURCE, HEADERS, 90)  # as if nothing had happened


def test_only_headers_that_are_given(compiler, tmp_path, monkeypatch):
    (tmp_path / "scaled.h").write_text("#error of the folder where the process runs\n")
    (tmp_path / "other.h").write_text("\n")
    monkeypatch.chdir(tmp_path)
    assert compiler.compile(SOURCE, HEADERS, 90)
    with pytest.raises(nvrtc.NvrtcError, match=r'could not open source file "other\.h"'):
        compiler.compile('#include "other.h"\n', HEADERS, 90)


def test_unknown_architectures(compiler, monkeypatch):
    known = compiler.architectures()
    assert list(known) == sorted(known) and {80, 90} <= set(known)
    package = "nvidia-cuda-nvrtc-cu12" if compiler.version[0] == 12 else "nvidia-cuda-nvrtc"
    text = rf"sm_9999 is too new: NVRTC {compiler.version[0]}\..* to sm_{known[-1]}; pip install --upgrade {package}$"
    with pytest.raises(nvrtc.NvrtcError, match=text):
        compiler.compile(SOURCE, HEADERS, 9999)
    with pytest.raises(nvrtc.NvrtcError, match=rf"sm_20 is too old: NVRTC .* compiles for sm_{known[0]} to"):
        compiler.compile(SOURCE, HEADERS, 20)
    monkeypatch.setattr(compiler, "architectures", lambda: (80, 87, 120))
    with pytest.raises(nvrtc.NvrtcError, match=r"sm_100 is like none of its own: NVRTC .* for 80, 87, 120; try"):
        compiler.compile(SOURCE, HEADERS, 100)
    assert compiler._fitting(89) == 80  # 87 is of other machines


def test_a_card_between_two_that_are_known(compiler):
    assert compiler._fitting(90) == 90 and 98 not in compiler.architectures()
    assert compiler._fitting(98) == max(one for one in compiler.architectures() if one // 10 == 9)
    assert compiler.compile(SOURCE, HEADERS, 98).startswith(b"\x7fELF")


def test_threads_compile_at_once(compiler):
    alone = compiler.compile(SOURCE, HEADERS, 90)
    made = []
    _in_threads(lambda: made.append(compiler.compile(SOURCE, HEADERS, 90)), 4)
    assert made == [alone] * 4


def test_a_file_that_is_named(compiler, monkeypatch):
    monkeypatch.setenv(nvrtc.LIBRARY_VARIABLE, compiler.path)
    assert (nvrtc.find().path, nvrtc.find().version) == (compiler.path, compiler.version)


def test_a_file_that_is_named_wrongly(tmp_path, monkeypatch):
    monkeypatch.setenv(nvrtc.LIBRARY_VARIABLE, str(tmp_path / "libnvrtc.so"))
    with pytest.raises(nvrtc.NvrtcError, match=r"EMBAX_NVRTC=.*libnvrtc\.so: there is no such file; name a"):
        nvrtc.find()
    (tmp_path / "libnvrtc.so").write_bytes(b"no library")
    with pytest.raises(nvrtc.NvrtcError, match="NVRTC failed to load: .*libnvrtc.so"):
        nvrtc.find()


def test_nothing_found(elsewhere, tmp_path):
    elsewhere.setattr(sys, "path", ["", str(tmp_path), _site(tmp_path / "broken", 13)])
    with pytest.raises(nvrtc.NvrtcError) as caught:
        nvrtc.find()
    text = str(caught.value)
    assert text.startswith("no NVRTC found: looked for nvidia/cu1*/lib and nvidia/cuda_nvrtc/lib on sys.path, ")
    assert "broken" in text and 'pip install "jax[cuda13]"' in text and "nvidia-cuda-nvrtc" in text


def test_the_newest_package_that_loads(elsewhere, tmp_path):
    twelve = _site(tmp_path / "twelve", 12, _package(12))
    thirteen = _site(tmp_path / "thirteen", 13, _package(13))
    elsewhere.setattr(sys, "path", [twelve, _site(tmp_path / "broken", 13)])
    assert nvrtc.find().version[0] == 12
    elsewhere.setattr(sys, "path", [twelve, thirteen])
    assert nvrtc.find().version[0] == 13
    assert nvrtc.find().compile(SOURCE, HEADERS, 90)


@pytest.mark.parametrize("major", sorted(PACKAGES))
def test_the_major_version_of_jax(elsewhere, major):
    for other in PACKAGES:
        _package(other)
    plugin = f"/usr/lib/python3/jax_plugins/xla_cuda{major}/xla_cuda_plugin.so"
    elsewhere.setattr(nvrtc, "_mapped_files", lambda: iter(["/usr/lib/libc.so.6", plugin]))
    assert nvrtc.find().version[0] == major


def test_a_toolkit(elsewhere, tmp_path):
    package = _package(12)
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / package.name).symlink_to(package)
    elsewhere.setattr(sys, "path", [])
    elsewhere.setenv("CUDA_HOME", str(tmp_path))
    assert nvrtc.find().path == str(package.resolve())


LOADS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("module", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
COMPILES = """
compiler = module.Nvrtc(sys.argv[2])
assert compiler.compile("__global__ void nothing() {}", {}, 90).startswith(b"\\x7fELF")
"""


def _process(program, *arguments):
    """A process that runs a program on one module of embax, without JAX."""
    command = [sys.executable, "-c", LOADS + program, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def _errors(process):
    _, errors = process.communicate(timeout=SECONDS)
    return errors if process.returncode else ""


def test_a_library_that_does_not_look_in_its_own_folder(compiler, tmp_path):
    # As in the wheels of CUDA 13.0. In another process: in this one the builtins are loaded.
    path = pathlib.Path(compiler.path)
    lost, builtins = tmp_path / path.name, "libnvrtc-builtins.so.{}.{}".format(*compiler.version)
    (tmp_path / builtins).symlink_to(path.parent / builtins)
    try:
        lost.write_bytes(path.read_bytes().replace(b"\0$ORIGIN", b"\0/nowher"))
        assert not _errors(_process(COMPILES, nvrtc.__file__, lost))
        (tmp_path / builtins).unlink()
        assert f"failed to open {builtins}" in _errors(_process(COMPILES, nvrtc.__file__, lost))
    finally:
        lost.unlink()  # it is large, and pytest keeps folders


def test_what_is_no_nvrtc(compiler):
    with pytest.raises(nvrtc.NvrtcError, match="NVRTC failed to load: .*libembax_nowhere"):
        nvrtc.Nvrtc("libembax_nowhere.so")
    (builtins, *_) = pathlib.Path(compiler.path).parent.glob("libnvrtc-builtins.so.*")
    with pytest.raises(nvrtc.NvrtcError, match=r"libnvrtc-builtins\.so.* is no NVRTC, or one before CUDA 11\.2: "):
        nvrtc.Nvrtc(builtins)


def _never():
    raise AssertionError("made anew")


def _in_threads(work, count):
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()


def _only_file(folder):
    (file,) = folder.iterdir()
    return file


def test_made_once(tmp_path):
    kept = cubins.Cubins(tmp_path / "not" / "yet")
    assert kept.get("key", lambda: b"cubin") == b"cubin"
    _only_file(tmp_path / "not" / "yet").unlink()
    assert kept.get("key", _never) == b"cubin"
    assert kept.get("another", lambda: b"") == b"" and kept.get("another", _never) == b""


def test_a_file_is_found_again(tmp_path):
    content = bytes(range(256)) * 9
    cubins.Cubins(tmp_path).get("Schlüssel\n90", lambda: content)
    assert cubins.Cubins(tmp_path).get("Schlüssel\n90", _never) == content
    assert _only_file(tmp_path).suffix == ".cubin"
    assert cubins.Cubins(tmp_path).get("Schlüssel\n100", lambda: b"other") == b"other"


def _flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES = {
    "content": lambda data: _flip(data, len(data) - 1),
    "digest": lambda data: _flip(data, data.index(b"cubin of") - 1),
    "length": lambda data: _flip(data, data.index(b"cubin of") - 40),
    "key": lambda data: data.replace(b"the key", b"The key"),
    "magic": lambda data: _flip(data, 0),
    "cut": lambda data: data[:-1],
    "cut_before_the_content": lambda data: data[:30],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "foreign": lambda data: b"\x7fELF" + bytes(1000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_file_is_made_anew(tmp_path, damage):
    cubins.Cubins(tmp_path).get("the key", lambda: b"cubin of the first")
    file = _only_file(tmp_path)
    damaged = DAMAGES[damage](file.read_bytes())
    assert damaged != file.read_bytes()
    file.write_bytes(damaged)
    assert cubins.Cubins(tmp_path).get("the key", lambda: b"cubin of the second") == b"cubin of the second"
    assert cubins.Cubins(tmp_path).get("the key", _never) == b"cubin of the second"


def test_the_file_of_another_key(tmp_path):
    cubins.Cubins(tmp_path).get("one", lambda: b"1")
    one = _only_file(tmp_path)
    cubins.Cubins(tmp_path).get("two", lambda: b"2")
    (two,) = set(tmp_path.iterdir()) - {one}
    two.write_bytes(one.read_bytes())
    assert cubins.Cubins(tmp_path).get("two", lambda: b"again") == b"again"


def test_folders_that_cannot_be_used(tmp_path):
    in_place = tmp_path / "file"
    in_place.write_bytes(b"")
    unwritable = ["/proc"] if sys.platform == "linux" else []  # to root, too
    for folder in (None, in_place, in_place / "below", *unwritable):
        kept = cubins.Cubins(folder)
        assert kept.get("key", lambda: b"cubin") == b"cubin" == kept.get("key", _never)
    assert in_place.read_bytes() == b""

    cubins.Cubins(tmp_path / "taken").get("key", lambda: b"cubin")
    file = _only_file(tmp_path / "taken")
    file.unlink()
    file.mkdir()
    assert cubins.Cubins(tmp_path / "taken").get("key", lambda: b"cubin") == b"cubin"
    assert _only_file(tmp_path / "taken") == file  # and nothing temporary


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cubins.os, "replace", full)
    assert cubins.Cubins(tmp_path).get("key", lambda: b"cubin") == b"cubin"
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_made_is_not_kept(tmp_path):
    kept = cubins.Cubins(tmp_path)
    with pytest.raises(AssertionError, match="made anew"):
        kept.get("key", _never)
    assert kept.get("key", lambda: b"cubin") == b"cubin"


def test_threads_make_it_once(tmp_path):
    kept, made, got = cubins.Cubins(tmp_path), [], []
    begin = threading.Barrier(4)

    def work():
        begin.wait(SECONDS)
        got.append(kept.get("key", lambda: made.append(1) or b"cubin"))

    _in_threads(work, 4)
    assert got == [b"cubin"] * 4 and made == [1]


def test_one_key_does_not_wait_for_another(tmp_path):
    kept, second = cubins.Cubins(tmp_path), threading.Event()
    first = threading.Thread(target=lambda: kept.get("one", lambda: second.wait(SECONDS) and b"1" or b"late"))
    first.start()
    assert kept.get("two", lambda: b"2") == b"2"
    second.set()
    first.join(SECONDS)
    assert kept.get("one", _never) == b"1"


SHARES = """
for turn in range(200):
    content = str(turn % 10).encode() * 100_000
    assert module.Cubins(sys.argv[2]).get(str(turn % 10), lambda: content) == content
    if turn % 7 == 0:
        for file in module.Path(sys.argv[2]).glob("*.cubin"):
            file.unlink(missing_ok=True)
"""


def test_processes_share_a_folder(tmp_path):
    processes = [_process(SHARES, cubins.__file__, tmp_path) for _ in range(2)]
    assert [_errors(process) for process in processes] == ["", ""]
    assert all(file.suffix == ".cubin" for file in tmp_path.iterdir())


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("EMBAX_CACHE_DIR", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cubins.default_folder() == tmp_path / "named"
    monkeypatch.delenv("EMBAX_CACHE_DIR")
    assert cubins.default_folder() == tmp_path / "embax"
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path / "home")
    for ignored in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cubins.default_folder() == tmp_path / "home" / ".cache" / "embax"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", homeless)
    assert cubins.default_folder() is None
