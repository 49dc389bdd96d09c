"""Sets of time, compared with sets of seconds."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from spans import clip_spans, empty_slots, merge_spans, subtract_spans

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8)


def seconds(spans):
    return {second for low, high in spans for second in range(low, high)}


def is_tidy(spans):
    ends = [edge for span in spans for edge in span]
    return ends == sorted(set(ends))


@given(SPANS, SPANS, st.integers(0, 60), st.integers(0, 60))
def test_spans_behave_like_sets_of_seconds(spans, others, low, high):
    for result, expected in (
        (merge_spans(spans), seconds(spans)),
        (subtract_spans(spans, others), seconds(spans) - seconds(others)),
        (clip_spans(spans, low, high), seconds(spans) & set(range(low, high))),
    ):
        assert seconds(result) == expected
        assert is_tidy(result)


@given(st.sets(st.integers(-3, 20)), st.integers(0, 5), st.integers(6, 12))
def test_empty_slots_are_those_without_a_bar(held, start, end):
    open_ts = 60 * np.array(sorted(held), dtype=np.int64)
    spans = empty_slots(open_ts, bar_s=60, start=60 * start, end=60 * end)
    found = {at // 60 for low, high in spans for at in range(low, high, 60)}
    assert found == set(range(start, end)) - held
    assert is_tidy(spans)
