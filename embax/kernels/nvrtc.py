"""NVRTC, CUDA's run-time compiler, by ctypes: find the library that came with JAX's CUDA plugin, compile for one card.

Nothing here needs a GPU or a driver: a program is compiled for the architecture that is named.

>>> try:
...     compiler = find()
... except NvrtcError as error:
...     assert "pip install" in str(error)
... else:
...     assert compiler.version >= (11, 2)
"""

import ctypes
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

LIBRARY_VARIABLE = "EMBAX_NVRTC"
"""Environment variable that names the library file; then no other is looked for."""

# No fused multiply-add: the bits are those of the CPU kernels. Headers are those given, not what lies in the folder
# where the process runs. No fast mathematics, ever: formulas are to round as they are written.
OPTIONS = ("--std=c++17", "--fmad=false", "--no-source-include", "-DEMBAX_ISA=cuda")
"""What every program is compiled with, besides its architecture; a part of a cubin's key in a cache."""

_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")  # for the system's loader
_TOOLKIT_VARIABLES = ("CUDA_HOME", "CUDA_PATH")
_TOOLKITS = ("/usr/local/cuda",)
_HELP = (
    'pip install "jax[cuda13]" or "jax[cuda12]" brings it, pip install nvidia-cuda-nvrtc too; '
    f"{LIBRARY_VARIABLE}=/path/to/libnvrtc.so.13 names one"
)
_LOG_CHARACTERS = 2000
_LOCK = threading.Lock()

_INTEGER, _HANDLE, _TEXT = ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p
_INTEGERS, _HANDLES, _TEXTS = ctypes.POINTER(_INTEGER), ctypes.POINTER(_HANDLE), ctypes.POINTER(_TEXT)
_SIZE = ctypes.POINTER(ctypes.c_size_t)
_SIGNATURES = {
    "nvrtcVersion": (_INTEGERS, _INTEGERS),
    "nvrtcGetNumSupportedArchs": (_INTEGERS,),
    "nvrtcGetSupportedArchs": (_INTEGERS,),
    "nvrtcCreateProgram": (_HANDLES, _TEXT, _TEXT, _INTEGER, _TEXTS, _TEXTS),
    "nvrtcDestroyProgram": (_HANDLES,),
    "nvrtcCompileProgram": (_HANDLE, _INTEGER, _TEXTS),
    "nvrtcGetProgramLogSize": (_HANDLE, _SIZE),
    "nvrtcGetProgramLog": (_HANDLE, ctypes.c_void_p),
    "nvrtcGetCUBINSize": (_HANDLE, _SIZE),
    "nvrtcGetCUBIN": (_HANDLE, ctypes.c_void_p),
}


class NvrtcError(Exception):
    """NVRTC cannot be used, or a program cannot be compiled; the text says why."""


class Nvrtc:
    """A loaded NVRTC.

    Args:
        library: A file, or a name for the system's loader.

    Attributes:
        path: The file; the name, where nobody can say which file the loader took.
        version: CUDA's major and minor version.

    Raises:
        NvrtcError: If it cannot be loaded or is no NVRTC.
    """

    path: str
    version: tuple[int, int]

    def __init__(self, library: str | os.PathLike[str]):
        name = os.fspath(library)
        self.path = os.path.realpath(name) if "/" in name else name
        try:
            self._library = ctypes.CDLL(self.path)
            _declare(self._library)
        except OSError as error:
            raise NvrtcError(f"NVRTC failed to load: {error}") from error
        except AttributeError as error:
            raise NvrtcError(f"{self.path} is no NVRTC, or one before CUDA 11.2: {error}") from error
        if self.path == name and "/" not in name:
            self.path = next((file for file in _mapped_files() if os.path.basename(file).startswith(name)), name)
        numbers = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(*map(ctypes.byref, numbers)), "nvrtcVersion")
        self.version = numbers[0].value, numbers[1].value
        self._load_builtins()

    def __repr__(self) -> str:
        """Returns its version and its file."""
        return f"NVRTC {self.version[0]}.{self.version[1]} ({self.path})"

    def architectures(self) -> tuple[int, ...]:
        """Returns the architectures it compiles for, in ascending order: 90 is sm_90."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
        known = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(known), "nvrtcGetSupportedArchs")
        return tuple(sorted(known))

    def compile(self, source: str, headers: Mapping[str, str], architecture: int) -> bytes:
        """Compiles a program for one architecture.

        Kernels keep their names where they are ``extern "C"``. Any thread may call this.

        Args:
            source: The program, in CUDA C++.
            headers: The text of each header, by the name it is included by; there are no others, of no library.
            architecture: The card's compute capability: 90 for 9.0.

        Returns:
            The cubin, which runs on cards of this architecture.

        Raises:
            NvrtcError: If this NVRTC does not know the architecture, or the program has errors.
        """
        options = [option.encode() for option in (f"--gpu-architecture=sm_{self._fitting(architecture)}", *OPTIONS)]
        with _LOCK:
            program = self._create(source, headers)
            try:
                code = self._library.nvrtcCompileProgram(program, len(options), _strings(options))
                if code:
                    log = _first_errors(self._read(program, "ProgramLog"))
                    raise NvrtcError(f"{self!r} failed to compile for sm_{architecture}: {self._says(code)}\n{log}")
                return self._read(program, "CUBIN")
            finally:
                self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _create(self, source: str, headers: Mapping[str, str]) -> ctypes.c_void_p:
        program = ctypes.c_void_p()
        texts = _strings([text.encode() for text in headers.values()])
        names = _strings([name.encode() for name in headers])
        code = self._library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"embax.cu", len(headers), texts, names
        )
        self._check(code, "nvrtcCreateProgram")
        return program

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"nvrtcGet{what}Size")
        content = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, content), f"nvrtcGet{what}")
        return content.raw

    def _check(self, code: int, function: str) -> None:
        if code:
            raise NvrtcError(f"{self.path}: {function} failed: {self._says(code)}")

    def _says(self, code: int) -> str:
        return (self._library.nvrtcGetErrorString(code) or b"").decode(errors="replace")

    def _fitting(self, architecture: int) -> int:
        """Returns the newest architecture it knows whose machine code runs on a card of that one."""
        known = self.architectures()
        if architecture in known:
            return architecture
        # Code for X.y runs on X.z, z > y; 87 is of other machines.
        older = [one for one in known if one // 10 == architecture // 10 and one < architecture and one != 87]
        if older:
            return older[-1]
        rule = f"{self!r} compiles for sm_{known[0]} to sm_{known[-1]}"
        if architecture > known[-1]:
            package = "nvidia-cuda-nvrtc" if self.version[0] > 12 else f"nvidia-cuda-nvrtc-cu{self.version[0]}"
            raise NvrtcError(f"architecture sm_{architecture} is too new: {rule}; pip install --upgrade {package}")
        if architecture < known[0]:
            raise NvrtcError(f"architecture sm_{architecture} is too old: {rule}; try an older CUDA's NVRTC")
        rule = f"{self!r} compiles for {', '.join(map(str, known))}"
        raise NvrtcError(f"architecture sm_{architecture} is like none of its own: {rule}; try a newer CUDA's NVRTC")

    def _load_builtins(self) -> None:
        # NVRTC opens them by name once it compiles. The wheels of CUDA 13.0 lack the entry that leads it to its own
        # folder; a library that is already loaded is found by its name.
        builtins = Path(self.path).parent / f"libnvrtc-builtins.so.{self.version[0]}.{self.version[1]}"
        if "/" in self.path and builtins.exists():
            try:
                ctypes.CDLL(str(builtins))
            except OSError as error:
                raise NvrtcError(f"{self!r}: its builtins failed to load: {error}") from error


def find() -> Nvrtc:
    """Returns the NVRTC that fits the running JAX best.

    In this order: the file that ``EMBAX_NVRTC`` names; pip's packages, newest first; what the system's loader finds;
    CUDA toolkits. If JAX's CUDA plugin is loaded, libraries of its major version come before all others: cubins of a
    newer CUDA may ask for a newer driver.

    Raises:
        NvrtcError: If there is none.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        if not os.path.isfile(named):
            raise NvrtcError(f"{LIBRARY_VARIABLE}={named}: there is no such file; name a libnvrtc.so or unset it")
        return Nvrtc(os.path.abspath(named))
    refused = []
    for place in _places():
        try:
            return Nvrtc(place)
        except NvrtcError as error:
            if "/" in place:  # of names that the loader does not find there is nothing to say
                refused.append(f"; {error}")
    looked = "nvidia/cu1*/lib and nvidia/cuda_nvrtc/lib on sys.path, "
    looked += f"{', '.join(_NAMES)} by the system's loader, lib64 of {', '.join((*_TOOLKIT_VARIABLES, *_TOOLKITS))}"
    raise NvrtcError(f"no NVRTC found: looked for {looked}{''.join(refused)}; {_HELP}")


def _places() -> list[str]:
    """Where NVRTC may be, in order of preference; files exist, names are for the loader to look up."""
    wanted = _major_of_jax()
    packages = [file for entry in sys.path for file in _files_in_packages(Path(entry) / "nvidia")]
    packages.sort(key=_major, reverse=True)
    toolkits = [os.environ[variable] for variable in _TOOLKIT_VARIABLES if os.environ.get(variable)]
    in_toolkits = [file for folder in (*toolkits, *_TOOLKITS) for file in _libraries(Path(folder) / "lib64")]
    return sorted([*packages, *_NAMES, *in_toolkits], key=lambda place: wanted is not None and _major(place) != wanted)


def _files_in_packages(nvidia: Path) -> Iterator[str]:
    for folder in (*nvidia.glob("cu1*/lib"), nvidia / "cuda_nvrtc" / "lib"):
        yield from _libraries(folder)


def _libraries(folder: Path) -> list[str]:
    """The libraries with a major version in their names; not libnvrtc.alt.so, which the wheels hold too."""
    return sorted(map(str, folder.glob("libnvrtc.so.1[0-9]")), reverse=True)


def _major(library: str) -> int:
    """The major version in a library's name; 0 if there is none."""
    return int(library.rpartition(".so")[2].lstrip(".") or 0)


def _major_of_jax() -> int | None:
    """The major version of CUDA that JAX's plugin in this process is built for."""
    for file in _mapped_files():
        plugin = re.search(r"/xla_cuda(\d+)/", file)
        if plugin:
            return int(plugin[1])
    return None


def _mapped_files() -> Iterator[str]:
    """The files that this process has mapped, where the system tells."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
            yield from dict.fromkeys(line[line.index("/") :].rstrip() for line in lines if "/" in line)
    except OSError:
        return


def _first_errors(log: bytes) -> str:
    """A compiler's log from its first error on, cut to what a person reads."""
    lines = log.rstrip(b"\0").decode(errors="replace").splitlines()
    first = next((number for number, line in enumerate(lines) if "error" in line), 0)
    text = "\n".join(lines[first:]).strip()
    return text if len(text) <= _LOG_CHARACTERS else text[:_LOG_CHARACTERS] + " ..."


def _strings(texts: list[bytes]) -> ctypes.Array:
    return (ctypes.c_char_p * len(texts))(*texts)


def _declare(library: ctypes.CDLL) -> None:
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    library.nvrtcGetErrorString.argtypes, library.nvrtcGetErrorString.restype = (ctypes.c_int,), ctypes.c_char_p
