"""The answer on the wire: prices that pass every validator, and its encodings.

Two rules about the digits of a price are in the field, and a price must pass
both:

- the older one counts the characters of `str(price)` without the point, and
  accepts eight. The zero of `0.5` counts, so does the `.0` of `5.0`, so does
  every character of `1e-05`;
- the newer one wants a number that float32 can hold and that equals itself
  rounded to eight significant digits.

The first is the tighter one everywhere, and Python's notation makes it a
function of magnitude alone:

    price               prints as         most decimals that fit
    below 1e-4          1.234e-05         four significant digits
    1e-4 up to 1        0.1234567         7: the leading zero counts
    1 up to 10          1.2345678         7
    10^k up to 10^(k+1) 96123.456         7 - k
    1e6 up to 1e7       1234567.8         1
    1e7 up to 1e8       12345678          0, and sent as an int: 12345678.0 has nine
    1e8 and more        123456789         none: nine characters at least

A decimal with at most 15 digits and a power of ten up to 10^22 are exact in
float64, so `integer / power` is the double nearest to the decimal, and Python
prints exactly that decimal.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from domain import FloatArray, Forecast, ForecastRequest
from errors import InvalidAnswer, RequestError

MAX_CHARACTERS: Final = 8  # of str(price), the point not counted
SIGNIFICANT_DIGITS: Final = 8
SMALLEST_PRICE: Final = 1e-18  # below it, four digits need a power of ten beyond 10^22
WHOLE_FROM: Final = 1e7  # from here on a price is sent as an int, which prints no ".0"
PRICE_LIMIT: Final = 1e8  # from here on, even a whole number prints nine characters

# Prices in [edge[i], edge[i + 1]) are rounded to multiples of 1 / power[i].
# Literals, because 10.0**-5 is not the double nearest to 1e-5.
_EDGES: Final = np.array(
    [float(f"1e{exponent}") for exponent in (*range(-18, -3), *range(1, 8))], dtype=np.float64
)
_POWERS: Final = np.array(
    [float(f"1e{decimals}") for decimals in (*range(21, 7, -1), 7, *range(6, -1, -1))],
    dtype=np.float64,
)


# ---------------------------------------------------------------- digits


def round_prices(paths: FloatArray) -> FloatArray:
    """Round prices to the nearest ones that pass both digit rules.

    `paths` may have any shape and mix magnitudes; prices are in quote currency.
    A price never becomes 0, and rounding twice changes nothing.

    Returns: float64 of the same shape, contiguous.
    Raises: InvalidAnswer for a price that is not finite, not positive, or
        outside [1e-18, 1e8), where no rounding passes.
    """
    prices = np.ascontiguousarray(paths, dtype=np.float64)
    if not prices.size:
        return prices
    power = _power_of(prices)
    rounded = np.rint(prices * power) / power
    _refuse_unprintable(rounded, rounded >= PRICE_LIMIT)
    return rounded


def _power_of(prices: FloatArray) -> FloatArray | np.float64:
    """The power of ten that turns each price into the integer to be rounded.

    Prices of one answer nearly always share a magnitude; then one number does.
    """
    lowest, *higher = _magnitudes(prices)
    if not higher:
        power: np.float64 = _POWERS[lowest]
        return power
    powers = np.full(prices.shape, _POWERS[lowest])
    for magnitude in higher:
        np.copyto(powers, _POWERS[magnitude], where=prices >= _EDGES[magnitude])
    return powers


def _magnitudes(prices: FloatArray) -> range:
    """The places in _EDGES of the prices, from the lowest to the highest."""
    low, high = prices.min(), prices.max()  # NaN passes through both
    if not (low >= SMALLEST_PRICE and high < PRICE_LIMIT):
        _refuse_unprintable(prices, ~((prices >= SMALLEST_PRICE) & (prices < PRICE_LIMIT)))
    first, last = np.searchsorted(_EDGES, (low, high), side="right")
    return range(int(first) - 1, int(last))


def _refuse_unprintable(prices: FloatArray, bad: npt.NDArray[np.bool_]) -> None:
    if bad.any():
        first = float(prices.ravel()[int(np.argmax(bad))])
        raise InvalidAnswer(
            f"price {first!r} cannot be sent: a price must be finite, positive and within "
            f"{SMALLEST_PRICE:g} to {PRICE_LIMIT - 1:.0f} to pass the validator's digit rules."
        )


# ---------------------------------------------------------------- checks


def check_paths(paths: FloatArray, request: ForecastRequest) -> None:
    """Refuse paths that a validator would refuse; fast enough for every answer.

    Agrees with `validate_answer` for every price that `round_prices` can return,
    and refuses all others. `paths` has shape (num_paths, n_points), float64.

    Raises: InvalidAnswer with the first violation.
    """
    expected = (request.num_paths, request.n_points)
    if paths.shape != expected or paths.dtype != np.float64:
        raise InvalidAnswer(
            f"paths are {paths.dtype} of shape {paths.shape}; the prompt asks for float64 of "
            f"shape {expected}."
        )
    # A price passes both rules exactly if there is nothing left to round.
    excess = round_prices(paths) != paths
    if excess.any():
        path, point = np.unravel_index(int(np.argmax(excess)), expected)
        raise InvalidAnswer(
            f"path {path}, point {point}: price {float(paths[path, point])!r} has too many "
            f"digits; round it with round_prices."
        )


def validate_answer(answer: object, request: ForecastRequest) -> None:
    """Judge an encoded answer as a validator does, number by number.

    Written from the validator's rules and independent of `round_prices`; takes
    about a second for a thousand paths of a day.

    Raises: InvalidAnswer with the first violation.
    """
    if not isinstance(answer, list | tuple) or len(answer) < 2:
        raise InvalidAnswer("the answer is not a list of start, increment and paths.")
    _validate_header("start timestamp", answer[0], request.start_ts)
    _validate_header("time increment", answer[1], request.increment_s)
    paths = answer[2:]
    if len(paths) != request.num_paths:
        raise InvalidAnswer(f"{len(paths)} paths were given; {request.num_paths} were asked for.")
    for number, path in enumerate(paths):
        _validate_path(number, path, request.n_points)


def _validate_header(name: str, got: object, expected: int) -> None:
    if type(got) is not int:
        raise InvalidAnswer(f"{name} is of type {type(got).__name__}; it must be a plain int.")
    if got != expected:
        raise InvalidAnswer(f"{name} is {got}; the prompt says {expected}.")


def _validate_path(number: int, path: object, n_points: int) -> None:
    if type(path) is not list:
        raise InvalidAnswer(f"path {number} is of type {type(path).__name__}, not a plain list.")
    if len(path) != n_points:
        raise InvalidAnswer(f"path {number} has {len(path)} points; {n_points} were asked for.")
    for point, price in enumerate(path):
        fault = price_fault(price)
        if fault:
            raise InvalidAnswer(f"path {number}, point {point}: price {price!r} {fault}.")


def price_fault(price: object) -> str | None:
    """What a validator would say about one price; None if nothing."""
    if type(price) is not int and type(price) is not float:
        return f"is of type {type(price).__name__}, not a plain int or float"
    return _range_fault(price) or _digits_fault(price)


def _range_fault(price: float) -> str | None:
    try:
        as_float32 = struct.unpack("<f", struct.pack("<f", float(price)))[0]
    except OverflowError:
        return "exceeds the range of float32"
    if not math.isfinite(as_float32):
        return "is not finite"
    return None if as_float32 > 0 else "is not positive in float32"


def _digits_fault(price: float) -> str | None:
    if len(str(price).replace(".", "")) > MAX_CHARACTERS:
        return f"prints more than {MAX_CHARACTERS} characters besides the point"
    if float(f"{price:.{SIGNIFICANT_DIGITS - 1}e}") != price:
        return f"has more than {SIGNIFICANT_DIGITS} significant digits"
    return None


# ---------------------------------------------------------------- encodings


def encode_prompt_answer(forecast: Forecast) -> list[Any]:
    """The answer to a validator's prompt: `[start, increment, path, path, …]`.

    Everything in it is a plain Python number; each path has n_points prices.

    Raises: InvalidAnswer if the paths cannot be sent.
    """
    request = forecast.request
    paths = round_prices(forecast.paths)
    check_paths(paths, request)
    return [request.start_ts, request.increment_s, *_plain_rows(paths)]


def _plain_rows(prices: FloatArray) -> list[list[float]]:
    """Rounded prices (rows, points) as plain numbers, large ones as int."""
    rows: list[list[float]] = prices.tolist()
    if prices.max() < WHOLE_FROM:
        return rows
    return [[int(price) if price >= WHOLE_FROM else price for price in row] for row in rows]


def encode_prompt_json(forecast: Forecast) -> bytes:
    """`encode_prompt_answer` as JSON bytes, fifty times as fast as by way of lists.

    Raises: InvalidAnswer if the paths cannot be sent.
    """
    request = forecast.request
    paths = round_prices(forecast.paths)
    check_paths(paths, request)
    return b"".join((b"[%d,%d," % (request.start_ts, request.increment_s), _rows_json(paths)))


def _rows_json(prices: FloatArray) -> bytes | memoryview:
    """Rounded prices (rows, points) as a JSON array of arrays, from after its first bracket.

    From 1 on, prices have eight digits. They are written as whole numbers, which takes
    a sixth of the time, and get their points after; zeros at the end stay. The numbers
    are the same to the bit.
    """
    if prices.max() >= WHOLE_FROM:
        return orjson.dumps(_plain_rows(prices))[1:]
    digits = np.rint(prices * _power_of(prices))
    if digits.min() < 1e7 or digits.max() >= 1e8:
        return orjson.dumps(prices, option=orjson.OPT_SERIALIZE_NUMPY)[1:]
    lowest, *higher = _magnitudes(prices)
    point = SIGNIFICANT_DIGITS - round(math.log10(_POWERS[lowest]))
    numbers = orjson.dumps(digits.astype(np.int32), option=orjson.OPT_SERIALIZE_NUMPY)
    # A row is "[", then digits and a comma or bracket for every price, then one more of these.
    width = SIGNIFICANT_DIGITS + 1
    rows, points = prices.shape
    written = np.frombuffer(numbers, np.uint8)[1:].reshape(rows, 1 + width * points + 1)
    text = np.full((rows, 1 + (width + 1) * points + 1), ord("."), np.uint8)
    text[:, 0], text[:, -1] = written[:, 0], written[:, -1]
    columns = [text[:, 1 + place : -1 : width + 1] for place in range(width + 1)]
    for place, column in enumerate(columns[:point] + columns[point + 1 :]):
        column[:] = written[:, 1 + place : -1 : width]
    for place, magnitude in enumerate(higher, start=point):
        above = prices >= _EDGES[magnitude]
        np.copyto(columns[place], columns[place + 1], where=above)
        np.copyto(columns[place + 1], ord("."), where=above)
    return text.reshape(-1).data


def encode_shadow_answer(forecast: Forecast) -> bytes:
    """The answer to `POST /predict` as JSON bytes.

    Every path is scaled by its own point 0, so that it begins exactly at
    `current_price`, the last known price. The diagnostics tell how old that price
    is at the start of the paths, not now: a request asked twice gets the same bytes.

    Raises: InvalidAnswer if the paths cannot be sent.
    """
    request, diagnostics = forecast.request, forecast.diagnostics
    current_price = round_prices(np.array([[diagnostics.anchor_price]]))
    with np.errstate(all="ignore"):  # what cannot be scaled is refused by name below
        scaled = forecast.paths / forecast.paths[:, :1] * current_price
    paths = round_prices(scaled)
    check_paths(paths, request)
    timestamps = [format_iso(ts) for ts in request.grid_ts.tolist()]
    answer = {
        "asset": request.asset,
        "model_version": diagnostics.model_id or "none",
        "data_cutoff": timestamps[0],
        "current_price": _plain_rows(current_price)[0][0],
        "paths": orjson.Fragment(b"".join((b"[", _rows_json(paths)))),
        "timestamps": timestamps,
        "diagnostics": {
            **{key: value for key, value in asdict(diagnostics).items() if key != "price_age_s"},
            "anchor_age_s": forecast.anchor_age_s,
        },
        "metadata": {
            "horizon_seconds": request.length_s,
            "interval_seconds": request.increment_s,
            "num_paths": request.num_paths,
        },
    }
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


@dataclass(frozen=True, slots=True)
class Encoder:
    """A way to write an answer; equal formats give equal bytes."""

    format: str  # names it among all encoders
    encode: Callable[[Forecast], bytes]  # pure; called on threads


PROMPT_JSON: Final = Encoder("prompt", encode_prompt_json)
SHADOW_JSON: Final = Encoder("shadow", encode_shadow_answer)


# ---------------------------------------------------------------- times


def format_iso(ts: int) -> str:
    """Unix seconds as ISO 8601 in UTC, e.g. `2025-12-01T00:05:00+00:00`."""
    return datetime.fromtimestamp(ts, UTC).isoformat()


def parse_iso_minute(text: str) -> int:
    """Unix seconds of an ISO 8601 time on a whole minute; without offset it is UTC.

    Raises: RequestError if it cannot be read or is not on a whole minute.
    """
    try:
        moment = datetime.fromisoformat(text)
        aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        seconds = aware.astimezone(UTC).timestamp()  # refuses what UTC cannot express
    except (ValueError, OverflowError):
        raise RequestError(
            f"time {_clipped(text)} cannot be read; write it like 2025-12-01T00:05:00+00:00."
        ) from None
    if seconds % 60:
        raise RequestError(
            f"time {_clipped(text)} is {seconds % 60:g} s past a whole minute; "
            "prompts start on whole minutes."
        )
    return int(seconds)


def _clipped(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")
