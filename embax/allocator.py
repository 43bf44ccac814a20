"""An opt-in for large arrays on CPU: memory that a step gave back is kept, large tables lie on huge pages."""

import ctypes
import sys

from embax.kernels import native

# The numbers of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST_MMAP_THRESHOLD = 1 << 30
_LARGEST_KEPT = 2**31 - 1


def tune_allocator() -> bool:
    """Tells the C library to keep freed memory, and the kernels to put large tables on huge pages. CPU only.

    On Linux, glibc gives every array above 32 MB back to the system when it is freed, and the next step's array of that
    size is mapped, zeroed and faulted in page by page again: two to three times the time of a step with 54 MB of
    activations. After this call arrays up to 1 GiB come from one heap that does not shrink: the process keeps the most
    it ever held. Tables of 32 MiB and more are put on huge pages, where the system allows them on request, when a
    kernel first meets them; that first step takes longer. Call it before the first large array is made. It acts on the
    whole process, hence never by itself.

    Returns:
      True if the C library took the settings; False on other systems, where nothing is changed.

    >>> import embax
    >>> embax.tune_allocator() in (True, False)
    True
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # a C library without it, such as musl
        return False
    native.use_huge_pages()
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    # Threads otherwise have heaps of their own, which hold at most 64 MiB and are given back whole.
    taken = [mallopt(_ARENA_MAX, 1), mallopt(_TRIM_THRESHOLD, _LARGEST_KEPT)]
    # Before glibc 2.35 a threshold above 32 MiB is refused.
    taken.append(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) or mallopt(_MMAP_THRESHOLD, 1 << 25))
    return all(taken)
