"""The limits of this machine's memory, measured on the contenders' own tables by plain loops with prefetch.

Forward: every row of the batch is read and summed. Step: besides, the time to read and write as many distinct rows once
in the table and in every slot array as wide as the table: one for SGD and row-wise Adagrad (whose slot is one number
for each row, not counted), two for Adagrad, three for Adam. Those rows lie half a table away from the ones just read,
so that few of them are in a cache, where the table is much larger than one. It is no lower bound where the rows of a
step stay in a cache between the two. Rows below 64 bytes: one 64-byte line for each distinct row, read for the forward,
and read and written once more for the step, whatever the slots.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.cpu.workloads import Batch, Skip, Workload

if TYPE_CHECKING:
    from benchmarks.cpu.memory import Memory

LINE = 16  # floats in 64 bytes
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")


def compile_library(folder: str) -> str:
    """Compiles limits.cc for this machine, and returns the path of the library."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Skip("no C++ compiler to build limits.cc with")
    built = Path(folder) / "limits.so"
    command = [*compiler.split(), *FLAGS, str(Path(__file__).with_name("limits.cc")), "-o", str(built)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Skip(f"the C++ compiler does not run: {error}") from error
    if done.returncode:
        raise Skip(f"limits.cc does not compile: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return str(built)


def load_library(path: str) -> ctypes.CDLL:
    """Returns the functions of limits.cc."""
    loaded = ctypes.CDLL(path)
    pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.gather.argtypes = [pointer, pointer, long, long, long, pointer, number]
    loaded.gather.restype = None
    loaded.read_modify_write.argtypes = [pointer, pointer, long, long, ctypes.c_float, number]
    loaded.read_modify_write.restype = None
    return loaded


def distinct(ids: np.ndarray) -> np.ndarray:
    """Returns the distinct ids in the order in which they first occur."""
    found, first = np.unique(ids, return_index=True)
    return found[np.argsort(first)]


class Limit:
    """The time that memory alone takes."""

    def __init__(self, workload: Workload, memory: "Memory", threads: int, library: str):
        if not library:
            raise Skip("limits.cc is not compiled (see above)")
        self.library, self.workload, self.memory = load_library(library), workload, memory
        self.threads = threads if workload.ids_per_step >= 16_384 else 1
        self.narrow = workload.dim < LINE
        self.width = LINE if self.narrow else workload.dim

    def prepare(self, batches: list[Batch]) -> None:
        """Takes the batches to come: rows of the stacked tables, or lines of them."""
        workload, self.gathered, self.written = self.workload, [], []
        for batch in batches:
            offsets = [workload.offsets[table] for table in workload.features]
            rows = np.stack([ids + offset for ids, offset in zip(batch, offsets, strict=True)]).astype(np.int32)
            written = distinct(rows.ravel())
            valency = workload.valency if workload.pooled else 1
            if self.narrow:
                written = written * workload.dim // LINE  # one line for each row, even if rows share it
                written = np.minimum(written, workload.rows * workload.dim // LINE - 1).astype(np.int32)
                rows, valency = written[: len(written) // valency * valency], valency
            self.gathered.append(np.ascontiguousarray(rows.reshape(-1, valency)))
            lines = workload.rows * workload.dim // self.width
            self.written.append(((written + lines // 2) % lines).astype(np.int32))
        self.out = np.zeros((max(map(len, self.gathered)), self.width), np.float32)

    def forward(self, index: int) -> None:
        ids, table = self.gathered[index], self.memory.views()[0]
        arguments = (len(ids), ids.shape[1], self.width, self.out.ctypes.data, self.threads)
        self.library.gather(table.ctypes.data, ids.ctypes.data, *arguments)

    def step(self, index: int) -> None:
        self.forward(index)
        rows = self.written[index]
        arrays = self.memory.views()
        for array in arrays[:1] if self.narrow else [a for a in arrays if a.shape == arrays[0].shape]:
            arguments = (len(rows), self.width, 0.0, self.threads)
            self.library.read_modify_write(array.ctypes.data, rows.ctypes.data, *arguments)

    def rebind(self) -> None:
        """Nothing to do: the addresses are asked for at every call."""
