"""What a rehearsal asks, and whether an answer would have counted.

The prompts follow the cadence that validators keep since 2026-07: HF prompts every
minute of the market, LF prompts every minute over all assets, now and then the
same prompt from several validators. Answers are judged by the validator's rules.
Everything here is pure.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeAlias

import numpy as np
import orjson

from config import FREQUENCIES, NUM_PATHS, Frequency
from domain import ForecastRequest
from errors import InvalidAnswer
from protocol import ProtocolProfile
from wire_format import check_paths, format_iso, validate_answer

Pair: TypeAlias = tuple[str, Frequency]

# Minutes between two prompts of one asset; the first entry is everybody else's.
CADENCE_MIN: Final[Mapping[Frequency, Mapping[str | None, int]]] = {
    Frequency.HF: {None: 5, "BTC": 1, "HYPE": 1},
    Frequency.LF: {None: 12, "BTC": 4},
}
# A prompt is asked so many market seconds before its start, and its answer must be
# there within as many real seconds of the ask.
DEADLINE_S: Final[Mapping[Frequency, int]] = {Frequency.HF: 50, Frequency.LF: 60}
REPEATED_SHARE: Final = 0.1  # of prompts that several validators ask
VALIDATORS: Final = 3


# ---------------------------------------------------------------- prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt, and how many validators ask it at the same moment."""

    frequency: Frequency
    request: ForecastRequest
    callers: int

    @property
    def pair(self) -> Pair:
        """Asset and frequency."""
        return self.request.asset, self.frequency

    @property
    def asked_ts(self) -> int:
        """When it is asked, market time in Unix seconds."""
        return self.request.start_ts - DEADLINE_S[self.frequency]

    @property
    def deadline_s(self) -> int:
        """Real seconds from the ask in which the answer must be there."""
        return DEADLINE_S[self.frequency]

    def body(self) -> dict[str, Any]:
        """What is posted to `/predict`."""
        return request_body(self.request) | {
            "prompt_start_time": format_iso(self.request.start_ts),
            "generated_at": format_iso(self.asked_ts),
        }


def request_body(request: ForecastRequest) -> dict[str, Any]:
    """The fields of a body that do not say when."""
    return {
        "asset": request.asset,
        "horizon_seconds": request.length_s,
        "interval_seconds": request.increment_s,
        "num_paths": request.num_paths,
    }


def usual_request(asset: str, frequency: Frequency, start_ts: int) -> ForecastRequest:
    """What a validator asks at the frequency."""
    spec = FREQUENCIES[frequency]
    return ForecastRequest(
        asset=asset,
        start_ts=start_ts,
        increment_s=spec.prompt_increment_s,
        length_s=spec.prompt_length_s,
        num_paths=NUM_PATHS,
    )


def asked_pairs(profile: ProtocolProfile, assets: Sequence[str]) -> list[Pair]:
    """The assets and frequencies that the profile asks of those assets, in the profile's order."""
    return [
        (asset, competition.frequency)
        for competition in profile.competitions.values()
        for asset in competition.assets
        if asset in assets
    ]


def official_cadence(
    profile: ProtocolProfile, assets: Sequence[str], start: float, end: float, *, seed: int
) -> list[Prompt]:
    """All prompts that are asked between two moments of the market, in the order of asking.

    Which minute is whose follows from the place of the asset in the profile, so that
    fewer assets are asked no more often.
    """
    rng = np.random.default_rng(seed)
    every_asset = {frequency: _assets_of(profile, frequency) for frequency in Frequency}
    prompts = []
    for minute in range(int(start) // 60, int(end) // 60 + 2):
        for frequency, listed in every_asset.items():
            for place, asset in enumerate(listed):
                if not _is_asked(asset, frequency, place, minute):
                    continue
                callers = VALIDATORS if rng.random() < REPEATED_SHARE else 1
                request = usual_request(asset, frequency, 60 * minute)
                prompts.append(Prompt(frequency=frequency, request=request, callers=callers))
    wanted = [prompt for prompt in prompts if prompt.request.asset in assets]
    return sorted(
        (prompt for prompt in wanted if start <= prompt.asked_ts < end),
        key=lambda prompt: prompt.asked_ts,
    )


def _assets_of(profile: ProtocolProfile, frequency: Frequency) -> list[str]:
    of_it = [entry for entry in profile.competitions.values() if entry.frequency is frequency]
    return [asset for competition in of_it for asset in competition.assets]


def _is_asked(asset: str, frequency: Frequency, place: int, minute: int) -> bool:
    cadence = CADENCE_MIN[frequency]
    every = cadence.get(asset, cadence[None])
    return minute % every == place % every


# ---------------------------------------------------------------- answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What an answer says; `fault` is one sentence if a validator would refuse it."""

    fault: str | None
    rung: str = "none"
    anchor: str = "none"  # where its starting price was taken
    model_version: str = "none"


def read_answer(body: bytes, request: ForecastRequest, *, thoroughly: bool = False) -> Reading:
    """Judge a body of `/predict`: its points in time, its shape, every price.

    `thoroughly` goes number by number, as a validator does, and takes a second for
    a day; otherwise the same rules are checked on arrays.
    """
    try:
        answer = orjson.loads(body)
        _check_frame(answer, request)
        _check_prices(answer, request, thoroughly=thoroughly)
        diagnostics = answer["diagnostics"]
        return Reading(
            fault=None,
            rung=str(diagnostics["rung"]),
            anchor=str(diagnostics["anchor_source"]),
            model_version=str(answer["model_version"]),
        )
    except InvalidAnswer as error:
        return Reading(fault=str(error))
    except (ValueError, KeyError, TypeError) as error:
        return Reading(fault=f"the answer is not of the agreed form ({error!r}).")


def _check_frame(answer: Any, request: ForecastRequest) -> None:
    expected = [format_iso(ts) for ts in request.grid_ts.tolist()]
    if answer["asset"] != request.asset:
        raise InvalidAnswer(f"the answer is for {answer['asset']!r}, asked was {request.asset}.")
    if answer["timestamps"] != expected or answer["data_cutoff"] != expected[0]:
        raise InvalidAnswer(f"the answer's times are not those from {expected[0]} on.")


def _check_prices(answer: Any, request: ForecastRequest, *, thoroughly: bool) -> None:
    given = answer["paths"]
    if thoroughly:
        validate_answer([request.start_ts, request.increment_s, *given], request)
    paths = np.array(given, dtype=np.float64)  # refuses rows of different lengths
    check_paths(paths, request)
    if (paths[:, 0] != answer["current_price"]).any():
        raise InvalidAnswer("not every path begins at the answer's current price.")


# ---------------------------------------------------------------- what came of the asks


class Fate(StrEnum):
    """What became of one ask."""

    IN_TIME = "in time"
    LATE = "late"
    REFUSED = "refused"
    INVALID = "invalid"
    UNHEARD = "unheard"  # no connection, or it broke off


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One ask of one validator, and what came of it."""

    prompt: Prompt
    fate: Fate
    seconds: float  # real, from the ask to the last byte
    digest: str | None = None  # of the answer's bytes
    rung: str | None = None
    anchor: str | None = None
    reason: str | None = None  # why it does not count, one sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class PairAsks:
    """The asks of one asset at one frequency."""

    prompts: int
    asks: int
    fates: Mapping[Fate, int]
    p50_ms: float  # over asks that were answered; NaN if none was
    p95_ms: float
    max_ms: float
    rungs: Mapping[str, int]
    anchors: Mapping[str, int]
    disagreements: int  # prompts whose callers did not all get the same bytes

    @property
    def is_clean(self) -> bool:
        """Whether every ask was answered in time, validly and the same for all callers."""
        return self.asks > 0 and self.fates[Fate.IN_TIME] == self.asks and not self.disagreements


def tally(asks: Sequence[Ask]) -> dict[Pair, PairAsks]:
    """The asks by asset and frequency."""
    pairs: dict[Pair, list[Ask]] = {}
    for ask in asks:
        pairs.setdefault(ask.prompt.pair, []).append(ask)
    return {pair: _tally(of_it) for pair, of_it in sorted(pairs.items())}


def _tally(asks: Sequence[Ask]) -> PairAsks:
    answered = [ask for ask in asks if ask.digest is not None]
    ms = [1e3 * ask.seconds for ask in answered] or [float("nan")]
    p50, p95, most = np.percentile(ms, [50, 95, 100]).tolist()
    versions: dict[Prompt, set[str | None]] = {}
    for ask in answered:
        versions.setdefault(ask.prompt, set()).add(ask.digest)
    fates = Counter(ask.fate for ask in asks)
    return PairAsks(
        prompts=len({ask.prompt for ask in asks}),
        asks=len(asks),
        fates={fate: fates[fate] for fate in Fate},
        p50_ms=p50,
        p95_ms=p95,
        max_ms=most,
        rungs=Counter(ask.rung for ask in asks if ask.rung),
        anchors=Counter(ask.anchor for ask in asks if ask.anchor),
        disagreements=sum(len(found) > 1 for found in versions.values()),
    )
