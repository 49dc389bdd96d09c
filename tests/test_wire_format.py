"""Answers as validators judge them: digit rules, shapes, encodings, times."""

import json
import operator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal, localcontext

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from domain import Diagnostics, Forecast, ForecastRequest
from errors import InvalidAnswer, RequestError
from wire_format import (
    SMALLEST_PRICE,
    check_paths,
    encode_prompt_answer,
    encode_prompt_json,
    encode_shadow_answer,
    format_iso,
    parse_iso_minute,
    price_fault,
    round_prices,
    validate_answer,
)

LARGEST_PRICE = 99_999_999.0
START = 1_766_102_400  # 2025-12-19T00:00:00Z

prices = st.one_of(
    st.floats(SMALLEST_PRICE, LARGEST_PRICE),
    st.floats(-17.99, 7.99).map(lambda exponent: 10.0**exponent),
    # just around every change of magnitude, where rounding carries
    st.builds(
        lambda exponent, step: float(f"1e{exponent}") * (1 + step),
        st.integers(-17, 7),
        st.floats(-1e-6, 1e-6),
    ),
)


def as_sent(price: float) -> float:
    """Prices of eight digits before the point are sent as int: a float would print nine."""
    return int(price) if 1e7 <= price < 1e8 and price == int(price) else price


def oracle_error(price: float) -> Decimal:
    """How far away the nearest acceptable price is, found by trying all decimals."""
    exact = Decimal(repr(price))
    with localcontext(prec=60):
        candidates = (exact.quantize(Decimal(1).scaleb(-places)) for places in range(25))
        accepted = [c for c in candidates if price_fault(as_sent(float(c))) is None]
        return min(abs(candidate - exact) for candidate in accepted)


def request(*, length_s=1500, num_paths=4) -> ForecastRequest:
    return ForecastRequest(
        asset="BTC", start_ts=START, increment_s=300, length_s=length_s, num_paths=num_paths
    )


def walk(shape=(4, 6), level=96_000.0, seed=1):
    rng = np.random.default_rng(seed)
    return level * np.exp(np.cumsum(rng.normal(0, 1e-3, shape), axis=1))


def forecast(paths=None, prompt=None, anchor=96_123.4567) -> Forecast:
    paths = walk() if paths is None else paths
    return Forecast(
        request=prompt or request(num_paths=len(paths), length_s=300 * (paths.shape[1] - 1)),
        paths=paths,
        diagnostics=Diagnostics(
            rung="full",
            frequency="lf",
            anchor_price=anchor,
            anchor_ts=START - 60,
            price_age_s=60,
            model_id="BTC-lf-1",
            trained_until=START - 86_400,
            models_saw_later_bars=False,
            notes=("one note",),
        ),
    )


# ---------------------------------------------------------------- the digit rules


@pytest.mark.parametrize(
    ("price", "accepted"),
    [
        (0.51234568, False),  # nine characters: the leading zero counts
        (0.5123457, True),
        (1.2345678, True),
        (1.23456789, False),
        (96123.456, True),
        (96123.4567, False),
        (1234567.0, True),  # "12345670": the printed .0 counts
        (12345678.0, False),
        (12345678, True),  # an int prints no .0
        (1e-05, True),  # "1e-05": five characters
        (1.234e-05, True),
        (1.2345e-05, False),
        (0.0001234, True),
        (0.00012345, False),
        (1e16, True),
        (1e15, False),
        (0, False),
        (0.0, False),
        (-1.5, False),
        (float("nan"), False),
        (float("inf"), False),
        (1e39, False),  # beyond float32
        (1e-46, False),  # float32 makes it 0
        (True, False),
        ("1.5", False),
        (None, False),
        (np.float64(1.5), False),
    ],
)
def test_prices_are_judged_as_validators_do(price, accepted):
    assert (price_fault(price) is None) is accepted


def test_an_integer_too_long_to_print_is_judged_as_well():
    assert price_fault(10**5000) == "exceeds the range of float32"


@pytest.mark.parametrize(
    ("price", "rounded"),
    [
        (96123.45678, 96123.457),
        (0.512345678, 0.5123457),
        (9.99999996, 10.0),
        (999999.996, 1000000.0),
        (2.00049e-5, 2e-5),
        (1.23456e-12, 1.235e-12),
        (0.99999999, 1.0),
        (4321.0, 4321.0),
        (9_999_999.97, 1e7),
        (12_345_678.4, 12_345_678.0),
    ],
)
def test_known_prices_round_to_known_prices(price, rounded):
    assert round_prices(np.array([price]))[0] == rounded


@given(prices)
def test_rounding_gives_the_nearest_price_that_validators_accept(price):
    got = float(round_prices(np.array([price]))[0])
    assert price_fault(as_sent(got)) is None
    with localcontext(prec=60):
        error = abs(Decimal(repr(got)) - Decimal(repr(price)))
        # the product with a power of ten may tip an exact half either way
        assert error <= oracle_error(price) * Decimal("1.000001")


@given(arrays(np.float64, array_shapes(min_dims=1, max_dims=2, max_side=6), elements=prices))
def test_magnitudes_mix_freely_in_one_array(mixed):
    together = round_prices(mixed)
    alone = [float(round_prices(np.array([price]))[0]) for price in mixed.ravel()]
    assert together.ravel().tolist() == alone
    assert together.shape == mixed.shape
    assert np.array_equal(round_prices(together), together)


def test_rounding_leaves_its_input_alone():
    original = walk()
    copy = original.copy()
    round_prices(original)
    assert np.array_equal(original, copy)


@pytest.mark.parametrize(
    "price", [np.nan, np.inf, -np.inf, 0.0, -1.0, 1e-19, 1e-300, 99_999_999.7, 1e8, 1e15, 1e16]
)
def test_prices_that_no_rounding_saves_are_refused_by_name(price):
    paths = np.full((2, 3), 50.0)
    paths[1, 2] = price
    with pytest.raises(InvalidAnswer, match="cannot be sent") as refusal:
        round_prices(paths)
    assert "50.0 " not in str(refusal.value)


# ---------------------------------------------------------------- the two checks


def answer_of(paths, prompt):
    sent = [[as_sent(price) for price in path] for path in paths.tolist()]
    return [prompt.start_ts, prompt.increment_s, *sent]


def refuses(check, *arguments) -> bool:
    try:
        check(*arguments)
    except (InvalidAnswer, RequestError):
        return True
    return False


troubled = st.one_of(
    prices,
    prices.map(lambda price: float(round_prices(np.array([price]))[0])),
    st.sampled_from([0.0, -1.0, np.nan, np.inf, -np.inf, 1e-46, 1e39, 0.51234568, 1e7, 1e8, 1e15]),
    st.integers(-20, 20).map(lambda exponent: 1.2345678 * 10.0**exponent),
)


@given(
    values=arrays(np.float64, (2, 3), elements=prices),
    trouble=troubled,
    place=st.tuples(st.integers(0, 1), st.integers(0, 2)),
    shape=st.sampled_from([(2, 3), (2, 3), (2, 3), (3, 2), (1, 6), (6, 1)]),
)
def test_the_fast_check_agrees_with_the_validators(values, trouble, place, shape):
    paths = round_prices(values)
    paths[place] = trouble
    paths = paths.reshape(shape)
    prompt = request(num_paths=2, length_s=600)
    assert refuses(check_paths, paths, prompt) == refuses(
        validate_answer, answer_of(paths, prompt), prompt
    )


@pytest.mark.parametrize("price", [1.234e16, 1e20, 1e-19, 1e-30])
def test_the_fast_check_also_refuses_what_rounding_never_returns(price):
    paths = np.full((4, 6), price)
    validate_answer(answer_of(paths, request()), request())
    with pytest.raises(InvalidAnswer, match="cannot be sent"):
        check_paths(paths, request())


def test_the_fast_check_names_the_first_excess_digit():
    paths = np.full((4, 6), 50.0)
    paths[2, 3] = paths[3, 1] = 0.51234568
    with pytest.raises(InvalidAnswer, match=r"path 2, point 3: price 0\.51234568 has"):
        check_paths(paths, request())


def test_the_fast_check_wants_float64():
    with pytest.raises(InvalidAnswer, match="float32"):
        check_paths(np.full((4, 6), 50.0, dtype=np.float32), request())


def mutated(change):
    answer = [START, 300, *[[50.0] * 6 for _ in range(4)]]
    change(answer)
    return answer


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (None, "not a list"),
        ({}, "not a list"),
        ([], "not a list"),
        (
            mutated(lambda a: operator.setitem(a, 0, float(START))),
            "start timestamp is of type float",
        ),
        (mutated(lambda a: operator.setitem(a, 0, START + 60)), "start timestamp is"),
        (mutated(lambda a: operator.setitem(a, 0, np.int64(START))), "type int64"),
        (mutated(lambda a: a.__init__([START, True, *a[2:]])), "time increment is of type bool"),
        (mutated(lambda a: a.pop()), "3 paths were given; 4"),
        (mutated(lambda a: a.append([50.0] * 6)), "5 paths were given; 4"),
        (mutated(lambda a: operator.setitem(a, 3, tuple(a[3]))), "path 1 is of type tuple"),
        (mutated(lambda a: operator.setitem(a, 3, np.array(a[3]))), "path 1 is of type ndarray"),
        (mutated(lambda a: a[5].pop()), "path 3 has 5 points; 6"),
        (
            mutated(lambda a: operator.setitem(a[4], 5, "50.0")),
            "path 2, point 5: price '50.0' is of",
        ),
        (mutated(lambda a: a[4].__init__([True, *a[4][1:]])), "path 2, point 0: price True is of"),
        (mutated(lambda a: operator.setitem(a[4], 0, 0.51234568)), "0.51234568 prints more than 8"),
        (mutated(lambda a: operator.setitem(a[4], 0, 0)), "0 is not positive"),
        (mutated(lambda a: operator.setitem(a[4], 0, float("nan"))), "nan is not finite"),
    ],
)
def test_the_validators_check_names_the_first_violation(answer, sentence):
    with pytest.raises(InvalidAnswer, match=sentence):
        validate_answer(answer, request())


def test_a_tuple_of_whole_numbers_is_a_valid_answer():
    validate_answer((START, 300, *[[12345678] * 6 for _ in range(4)]), request())


# ---------------------------------------------------------------- encodings


@given(
    level=st.floats(-15, 7.5).map(lambda exponent: 10.0**exponent),
    shape=st.tuples(st.integers(1, 8), st.integers(2, 12)),
    seed=st.integers(0, 99),
)
def test_every_encoded_answer_passes_the_validators_check(level, shape, seed):
    made = forecast(walk(shape, level, seed), anchor=level)
    validate_answer(encode_prompt_answer(made), made.request)
    assert json.loads(encode_prompt_json(made)) == encode_prompt_answer(made)
    shadow = json.loads(encode_shadow_answer(made))
    validate_answer([START, 300, *shadow["paths"]], made.request)
    assert {path[0] for path in shadow["paths"]} == {shadow["current_price"]}


def test_a_full_day_of_a_thousand_paths_passes_the_validators_check():
    prompt = request(length_s=86_400, num_paths=1000)
    # around 100,000 the number of decimals differs from price to price
    made = forecast(walk((1000, 289), 100_000.0), prompt)
    validate_answer(json.loads(orjson.dumps(encode_prompt_answer(made))), prompt)


def test_a_prompt_answer_keeps_point_zero_of_every_path():
    made = forecast(np.array([[50.0, 51.0], [50.5, 49.0]]))
    assert encode_prompt_answer(made) == [START, 300, [50.0, 51.0], [50.5, 49.0]]


def test_a_shadow_answer_starts_every_path_at_the_current_price():
    made = forecast(np.array([[50.0, 51.0], [100.0, 90.0]]), anchor=200.0)
    assert json.loads(encode_shadow_answer(made)) == {
        "asset": "BTC",
        "model_version": "BTC-lf-1",
        "data_cutoff": "2025-12-19T00:00:00+00:00",
        "current_price": 200.0,
        "paths": [[200.0, 204.0], [200.0, 180.0]],
        "timestamps": ["2025-12-19T00:00:00+00:00", "2025-12-19T00:05:00+00:00"],
        "diagnostics": {
            "rung": "full",
            "frequency": "lf",
            "anchor_price": 200.0,
            "anchor_ts": START - 60,
            "model_id": "BTC-lf-1",
            "trained_until": START - 86_400,
            "models_saw_later_bars": False,
            "anchor_source": "last_bar",
            "anchor_feed": None,
            "notes": ["one note"],
            "anchor_age_s": 60,
        },
        "metadata": {"horizon_seconds": 300, "interval_seconds": 300, "num_paths": 2},
    }


@pytest.mark.parametrize("exponent", range(-5, 8))
def test_prices_of_every_magnitude_are_written_as_they_are(exponent):
    """From the least to the greatest of a magnitude, and one path beyond them."""
    first, last = float(f"1e{exponent}"), float(f"9.9999999e{exponent}")
    within = round_prices(np.array([[first, last], [3.3 * first, 1.5 * first]]))
    prompt = request(length_s=300, num_paths=2)
    for paths in (within, within * [[1.0, 1.0], [1.0, 0.1]]):
        made = forecast(paths, prompt)
        assert json.loads(encode_prompt_json(made)) == encode_prompt_answer(made)


def test_prices_of_eight_digits_before_the_point_are_sent_as_whole_numbers():
    made = forecast(np.array([[9_650_123.44, 9_999_999.97], [12_345_678.4, 99_999_998.6]]))
    answer = encode_prompt_answer(made)
    assert answer[2:] == [[9_650_123.4, 10_000_000], [12_345_678, 99_999_999]]
    validate_answer(answer, made.request)
    validate_answer(json.loads(encode_prompt_json(made)), made.request)


def test_the_same_answer_a_little_later_is_the_same_bytes():
    made = forecast()
    later = replace(made, diagnostics=replace(made.diagnostics, price_age_s=61))
    assert encode_shadow_answer(later) == encode_shadow_answer(made)


@pytest.mark.parametrize("broken", [np.nan, np.inf, 0.0, -5.0])
@pytest.mark.parametrize("encode", [encode_prompt_answer, encode_prompt_json, encode_shadow_answer])
@pytest.mark.parametrize("point", [0, 3])
def test_broken_paths_do_not_leave(encode, broken, point):
    paths = walk()
    paths[1, point] = broken
    with pytest.raises(InvalidAnswer):
        encode(forecast(paths))


@pytest.mark.parametrize("encode", [encode_prompt_answer, encode_prompt_json, encode_shadow_answer])
def test_paths_of_another_shape_do_not_leave(encode):
    with pytest.raises(InvalidAnswer, match="shape"):
        encode(forecast(walk((4, 7)), request()))


# ---------------------------------------------------------------- times


@pytest.mark.parametrize(
    "text",
    [
        "2025-12-19T00:05:00+00:00",
        "2025-12-19T00:05:00Z",
        "2025-12-19T00:05:00",  # without offset it is UTC
        "2025-12-19T01:05:00+01:00",
        "2025-12-18 19:05-05:00",
        "2025-12-19T00:05:00.000000+00:00",
    ],
)
def test_times_are_read_whatever_their_offset(text):
    assert parse_iso_minute(text) == START + 300


@given(st.datetimes(timezones=st.just(UTC)).map(lambda t: t.replace(second=0, microsecond=0)))
def test_every_minute_survives_printing_and_reading(moment):
    ts = parse_iso_minute(moment.isoformat())
    assert ts == (moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()
    assert parse_iso_minute(format_iso(ts)) == ts


@pytest.mark.parametrize("text", ["", "now", "1766102400", "2025-13-01T00:00:00", "x" * 5000])
def test_unreadable_times_are_refused_in_one_short_sentence(text):
    with pytest.raises(RequestError, match="cannot be read") as refusal:
        parse_iso_minute(text)
    assert len(str(refusal.value)) < 160


@pytest.mark.parametrize("text", ["2025-12-19T00:05:01Z", "2025-12-19T00:05:00.25Z"])
def test_times_between_minutes_are_refused(text):
    with pytest.raises(RequestError, match="past a whole minute"):
        parse_iso_minute(text)


@given(st.text(max_size=30))
def test_no_text_breaks_the_reading_of_times(text):
    assert refuses(parse_iso_minute, text) or parse_iso_minute(text) % 60 == 0
