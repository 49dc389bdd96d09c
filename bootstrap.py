"""Standard errors of means over prompts that resemble their neighbours in time.

Whole blocks of neighbouring prompts are drawn again with replacement, so that what
they have in common stays together. Source: Politis & Romano (1992), the circular
block bootstrap, in: Exploring the Limits of Bootstrap, 263-270.
"""

from typing import Final

import numpy as np

from domain import FloatArray, IntArray

RESAMPLES: Final = 1_000


def block_bootstrap_error(
    values: FloatArray, start_ts: IntArray, *, block_s: int, seed: int = 0
) -> float:
    """Standard error of the mean of `values` (n,), NaN ones left out, in time order.

    A block holds as many prompts as start within `block_s` seconds on average, but at
    most a quarter of all: of blocks that hold everything, every draw is the same.
    Infinite with fewer than two values: nothing is known of their spread.
    """
    known = np.isfinite(values)
    found, times = values[known], start_ts[known]
    n = len(found)
    if n < 2:
        return float("inf")
    spacing = max(float(times[-1] - times[0]) / (n - 1), 1.0)
    length = int(np.clip(round(block_s / spacing), 1, max(n // 4, 1)))
    rows = _block_rows(n, length, seed)
    return float(found[rows].mean(axis=1).std(ddof=1))


def _block_rows(n: int, length: int, seed: int) -> IntArray:
    """Rows of every resample, block after block around the circle; (RESAMPLES, n)."""
    blocks = -(-n // length)
    first = np.random.default_rng(seed).integers(0, n, (RESAMPLES, blocks, 1))
    rows = (first + np.arange(length)) % n
    return np.asarray(rows.reshape(RESAMPLES, -1)[:, :n], dtype=np.int64)
