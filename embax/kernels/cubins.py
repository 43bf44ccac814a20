"""Compiled kernels on disk: each is made once per machine, and what cannot be kept is made again.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     made = Cubins(folder).get("a key", lambda: b"a cubin")
...     kept = Cubins(folder).get("a key", lambda: b"never asked for")
>>> made == kept == b"a cubin"
True
"""

import contextlib
import hashlib
import os
import struct
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

FOLDER_VARIABLE = "EMBAX_CACHE_DIR"
"""Environment variable that names the folder for compiled kernels."""

_MAGIC = b"embax cubin 1\n"
_LENGTH = struct.Struct("<Q")
_DIGEST_BYTES = hashlib.sha256().digest_size


def default_folder() -> Path | None:
    """Returns where compiled kernels are kept: ``EMBAX_CACHE_DIR``, or embax in the user's folder for caches.

    None if the user has no home; then nothing is kept on disk.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME")
    if caches and os.path.isabs(caches):  # relative ones are to be ignored, says the standard
        return Path(caches) / "embax"
    try:
        return Path.home() / ".cache" / "embax"
    except RuntimeError:
        return None


class Cubins:
    """Compiled kernels by key: in memory, and as files of one folder. Threads and processes may share a folder.

    A folder that cannot be read or written costs speed, never an error. A file that is cut, damaged or of another key
    is made anew. Who can write to the folder can have their code run on the card.

    Args:
        folder: Where the files are, made when first needed; None keeps nothing on disk.
    """

    def __init__(self, folder: str | os.PathLike[str] | None):
        self.folder = None if folder is None else Path(folder)
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._memory: dict[str, bytes] = {}

    def get(self, key: str, make: Callable[[], bytes]) -> bytes:
        """Returns what a key stands for.

        Args:
            key: Says everything that the content depends on.
            make: Makes the content; called if it is not kept, once per key whatever the number of threads.

        Raises:
            Exception: What ``make`` raises; then nothing is kept.
        """
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            content = self._memory.get(key)
            if content is None:
                content = self._read(key)
            if content is None:
                content = make()
                self._write(key, content)
            self._memory[key] = content
            return content

    def _file(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"

    def _read(self, key: str) -> bytes | None:
        file = self._file(key)
        if file is None:
            return None
        try:
            return _unpacked(key, file.read_bytes())
        except OSError:
            return None

    def _write(self, key: str, content: bytes) -> None:
        file = self._file(key)
        if file is None:
            return
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            # Renamed when it is whole: another process sees all of a file or none.
            descriptor, temporary = tempfile.mkstemp(prefix=".new-", dir=file.parent)
            try:
                with open(descriptor, "wb") as stream:
                    stream.write(_packed(key, content))
                os.replace(temporary, file)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise


def _head(key: str) -> bytes:
    text = key.encode()
    return _MAGIC + _LENGTH.pack(len(text)) + text


def _packed(key: str, content: bytes) -> bytes:
    """A file: the magic line, the key with its length, the content's length and digest, the content."""
    return _head(key) + _LENGTH.pack(len(content)) + hashlib.sha256(content).digest() + content


def _unpacked(key: str, data: bytes) -> bytes | None:
    """The content of a file; None if it is not the whole file of this key."""
    start = len(_head(key)) + _LENGTH.size + _DIGEST_BYTES
    content = data[start:]
    return content if data == _packed(key, content) else None
