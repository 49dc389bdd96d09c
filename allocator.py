"""How Python and the C library keep the memory of a process that lives for months.

Python looks for cycles among all objects only when the new ones are a quarter of the old:
beside some hundred modules' that takes hours, and until then every call that a retry
ended keeps its answer.

glibc raises its threshold for blocks of their own with every large block that is
freed, and gives every thread a heap. Arrays of megabytes then lie scattered in many
heaps, which never shrink. With the threshold held still they are given back when they
are freed. The arrays of an answer are smaller, and what they leave free at the end of
the heap stays until the next `trim`: giving it back at once would have every answer
fault its pages in anew, at twice its time. All threads share one heap, because `trim`
gives back the end of the first heap alone: a second one kept up to 32 MB there.
"""

import ctypes
import gc
from typing import Final

# Parameters of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8

BLOCK_BYTES: Final = 5 * 512 * 1024  # from here on a block is the system's own
FREE_BYTES: Final = 32 * 1024 * 1024  # more than an answer's arrays; at the end of the heap
HEAPS: Final = 1


def give_memory_back() -> bool:
    """Hold the thresholds still; False where the C library has none.

    Before any thread is started: NumPy's come with its import, and keep what heap they have.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (
        (_M_ARENA_MAX, HEAPS),
        (_M_MMAP_THRESHOLD, BLOCK_BYTES),
        (_M_TRIM_THRESHOLD, FREE_BYTES),
    )
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)


def trim() -> bool:
    """Give back what lies free between blocks in use; False where there was nothing to give.

    Heaps shrink by themselves at their end alone, and late. Milliseconds, now and then.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return malloc_trim is not None and malloc_trim(0) == 1


def free_cycles() -> None:
    """Free what only cycles of references still hold.

    What lives at the first call, the modules above all, is not looked through again: that
    would hold every thread up for a fifth of a second, now and then.
    """
    gc.collect()
    if not gc.get_freeze_count():
        gc.freeze()
