"""Memory of a long-lived process: what is freed goes back, what only cycles hold is freed."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Where glibc's thresholds end up by themselves once large arrays have come and gone.
GROWN = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}

# Many large blocks in use at once, and all of them freed.
GROW_AND_FREE = """
import sys
from pathlib import Path
import numpy as np
from allocator import give_memory_back

if sys.argv[1] == "held":
    assert give_memory_back()
kept = [np.ones(3 << 17) for _ in range(40)]
del kept
pages = int(Path("/proc/self/statm").read_text().split()[1])
print(pages * 4096 >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_arrays_leave_the_process():
    def resident_mb(way):
        done = subprocess.run(
            [sys.executable, "-c", GROW_AND_FREE, way],
            cwd=ROOT, check=True, capture_output=True, text=True, env={**os.environ, **GROWN},
        )  # fmt: skip
        return int(done.stdout)

    assert resident_mb("held") < resident_mb("as it comes") - 100


# Blocks below the threshold, each beside a small one that stays: no end of a heap is free.
HOLES = """
from pathlib import Path
import numpy as np
from allocator import trim

kept = [(np.ones(1 << 15), bytes(5000)) for _ in range(400)]
small = [pin for _, pin in kept]
del kept

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

before = resident_mb()
assert trim()
print(before - resident_mb())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_holes_between_blocks_in_use_are_given_back():
    done = subprocess.run(
        [sys.executable, "-c", HOLES], cwd=ROOT, check=True, capture_output=True, text=True,
        env={**os.environ, **GROWN},
    )  # fmt: skip
    assert int(done.stdout) > 60


# The miner as a script, as far as its help; then threads that hold what they took, and
# glibc's own report of all heaps, on stderr.
THREADS = """
import ctypes
import runpy
import sys
import threading

sys.argv = ["miner.py", "--help"]
try:
    runpy.run_path("miner.py", run_name="__main__")
except SystemExit:
    pass
ready, over = threading.Barrier(5), threading.Event()

def hold():
    kept = [bytes(5000) for _ in range(100)]
    ready.wait()
    over.wait()

threads = [threading.Thread(target=hold) for _ in range(4)]
for thread in threads:
    thread.start()
ready.wait()
libc = ctypes.CDLL(None)
stream = ctypes.c_void_p.in_dll(libc, "stderr")
libc.malloc_info(0, stream)
libc.fflush(stream)
over.set()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_all_threads_of_the_miner_share_one_heap():
    done = subprocess.run(
        [sys.executable, "-c", THREADS], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stderr.count("<heap nr=") == 1


# A class of its own, for a list cannot be referred to weakly. Python does not look by itself.
CYCLES = """
import gc
import weakref
from allocator import free_cycles

class Node:
    pass

def dropped_cycle():
    node = Node()
    node.self = node
    return weakref.ref(node)

gc.disable()
kept = Node()
for _ in range(3):
    cycle = dropped_cycle()
    assert cycle() is not None
    free_cycles()
    assert cycle() is None
    frozen = gc.get_freeze_count()
    assert frozen > 1000
    held = weakref.ref(kept)
# What was there at the first call is frozen, but goes with its last reference.
del kept
assert held() is None
print(frozen, len(gc.get_objects()))
"""


def test_cycles_are_freed_and_modules_looked_through_once():
    done = subprocess.run(
        [sys.executable, "-c", CYCLES], cwd=ROOT, check=True, capture_output=True, text=True
    )
    frozen, looked_through = map(int, done.stdout.split())
    assert looked_through < frozen / 10
