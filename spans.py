"""Sets of time: sorted, disjoint half-open spans of Unix seconds."""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np

from domain import IntArray

Span: TypeAlias = tuple[int, int]  # from the first second to before the second one


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """The union: sorted, disjoint, nothing empty; spans that touch become one."""
    merged: list[Span] = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def clip_spans(spans: Iterable[Span], start: int, end: int) -> list[Span]:
    """What of the spans lies between two moments."""
    return merge_spans((max(low, start), min(high, end)) for low, high in spans)


def subtract_spans(spans: Iterable[Span], others: Iterable[Span]) -> list[Span]:
    """What of the spans lies in none of the others."""
    taken = merge_spans(others)
    return [part for span in merge_spans(spans) for part in _outside(span, taken)]


def _outside(span: Span, taken: list[Span]) -> Iterator[Span]:
    start, end = span
    for low, high in taken:
        if start < low < end:
            yield start, low
        if low < end and high > start:
            start = high
    if start < end:
        yield start, end


def empty_slots(open_ts: IntArray, *, bar_s: int, start: int, end: int) -> list[Span]:
    """Runs of grid slots between two moments of the grid in which no bar opens."""
    inside = open_ts[(open_ts >= start) & (open_ts < end)]
    edges = np.concatenate(([start - bar_s], inside, [end]))
    gaps = np.flatnonzero(np.diff(edges) > bar_s)
    return [(int(edges[at]) + bar_s, int(edges[at + 1])) for at in gaps]
