"""Whatever is taken away, answers go on: valid, with the rung named, better than the reference.

A trained miner on real bars, served by loopback venues. What is removed is removed
under the running process first, and then it starts anew without it.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from baselines import ConstantSigma
from config import DAY_S, FREQUENCIES, Frequency, asset_spec
from data_fetcher import ArchiveSource
from domain import Bars, FloatArray, Forecast, ForecastRequest
from errors import NoPriceError
from feed_plans import FeedHost
from loopback_venues import Fault, FaultRule, LoopbackVenues
from market_view import Rung
from protocol import competition_like
from protocol import protocol_profile as profile_named
from scoring import score_paths
from tests.faults.live_world import Hand, LiveWorld, live_settings, live_world, served, truth_of
from tests.faults.small_sets import publish_small_set
from tests.faults.tally import count

PROFILE = profile_named("2026-09")
# A weekend: a constant sigma is so far off then that a few prompts tell.
WEEKEND = int(datetime(2025, 12, 13, 6, tzinfo=UTC).timestamp())
# And an evening of New York's, when the market is as lively as the reference takes it to be.
WEEKDAY = int(datetime(2025, 12, 10, 21, tzinfo=UTC).timestamp())
HELD_DAYS = 9
ASSETS = ("BTC", "XAU")
N_PATHS = 300
VALID = "Whatever is missing, every prompt has a valid answer that names its rung"
REFUSED = "An asset without any history and without any feed is refused by name, others go on"


# ---------------------------------------------------------------- a trained miner


@dataclass
class Standing:
    """Loopback venues of real bars, and the folders of a trained miner beside them."""

    venues: LoopbackVenues
    hand: Hand
    market: Mapping[str, Bars]
    root: Path
    truth: Mapping[str, Mapping[int, float]]
    now: int


@pytest.fixture(scope="module")
def standing(
    request: pytest.FixtureRequest, real_bars: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Standing]:
    """Nine days collected, BTC trained on both frequencies up to a day ago."""
    now = getattr(request, "param", WEEKEND)
    archive, hand = ArchiveSource(real_bars / "recent"), Hand(now + 2)
    market = {
        asset: archive.load_bars(asset, 60)[0].between(now - (HELD_DAYS + 1) * DAY_S, None)
        for asset in ASSETS
    }
    root = tmp_path_factory.mktemp("standing")
    with served(market, hand) as venues:
        chosen = live_settings(root, venues, ASSETS, days=float(HELD_DAYS))
        with live_world(chosen, hand) as world:
            world.collector.backfill()
            world.collector.collect()
            _train(world, chosen.model_dir, now - DAY_S)
            world.engine.refresh()
            world.engine.checkpoint()
        truth = {asset: truth_of(bars, 60) for asset, bars in market.items()}
        yield Standing(venues, hand, market, root, truth, now)


def _train(world: LiveWorld, model_dir: Path, until: int) -> None:
    for frequency in (Frequency.HF, Frequency.LF):
        history = world.source.load("BTC", frequency).history
        publish_small_set(model_dir, history.known_at(until))


# ---------------------------------------------------------------- what is removed


def _files(pattern: str) -> Callable[[Path, LoopbackVenues], None]:
    def remove(root: Path, _venues: LoopbackVenues) -> None:
        found = list(root.glob(pattern))
        assert found, pattern
        for path in found:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    return remove


def _host(*hosts: FeedHost) -> Callable[[Path, LoopbackVenues], None]:
    def cut(_root: Path, venues: LoopbackVenues) -> None:
        for host in hosts:
            venues.faults.add(FaultRule(fault=Fault.REFUSE, host=host))

    return cut


PYTH: Final = (FeedHost.PYTH_HISTORY, FeedHost.PYTH_ROUTER, FeedHost.PYTH_LATEST)
REMOVALS: Final = {
    "trees": _files("models/*/*/*.txt"),
    "manifests": _files("models/*/*/manifest.json"),
    "calibrations": _files("models/*/*/calibration.json"),
    "pointers": _files("models/*/current.json"),
    "models": _files("models"),
    "market states": _files("state/market"),
    "history of BTC": _files("state/bars/*/BTC_*"),
    "all history": _files("state/bars"),
    "binance": _host(FeedHost.BINANCE),
    "hyperliquid": _host(FeedHost.HYPERLIQUID),
    "pyth": _host(*PYTH),
}
# What a new start makes of it for BTC; without anything else it has its models.
RUNGS: Final = {
    "trees": Rung.CALIBRATED_EWMA,
    "manifests": Rung.PROFILE_EWMA,
    "calibrations": Rung.PROFILE_EWMA,
    "pointers": Rung.PROFILE_EWMA,
    "models": Rung.PROFILE_EWMA,
}
SINGLES: Final = [(name,) for name in REMOVALS]
NESTED: Final = [
    {"models", "trees"}, {"models", "manifests"}, {"models", "calibrations"},
    {"models", "pointers"}, {"all history", "history of BTC"},
]  # fmt: skip
PAIRS: Final = [pair for pair in combinations(REMOVALS, 2) if set(pair) not in NESTED]
MORE: Final = [
    ("binance", "hyperliquid", "pyth"),
    ("models", "market states", "binance", "hyperliquid", "pyth"),
    ("models", "market states", "all history"),
    ("all history", "binance", "hyperliquid"),
    ("all history", "hyperliquid", "pyth"),
    ("models", "market states", "all history", "binance", "hyperliquid", "pyth"),
    ("history of BTC", "binance", "pyth"),  # and XAU goes on
]


FEEDS_OF: Final = {"BTC": {"binance", "pyth"}, "XAU": {"hyperliquid", "pyth", "binance"}}


def _is_blind(removed: tuple[str, ...], asset: str) -> bool:
    """Whether nothing is left to know a price of the asset from."""
    gone = "all history" in removed or (asset == "BTC" and "history of BTC" in removed)
    return gone and FEEDS_OF[asset] <= set(removed)


# ---------------------------------------------------------------- answers and their scores


def _prompt(world: LiveWorld, asset: str, frequency: Frequency) -> ForecastRequest:
    spec = FREQUENCIES[frequency]
    return ForecastRequest(
        asset=asset,
        start_ts=(int(world.hand.ts) // 60 + 1) * 60,
        increment_s=spec.prompt_increment_s,
        length_s=spec.prompt_length_s,
        num_paths=N_PATHS,
    )


def _scores(standing: Standing, world: LiveWorld, answer: Forecast) -> tuple[float, float]:
    """Our score of an answer and the reference miner's, on what then happened."""
    request = answer.request
    frequency = Frequency(answer.diagnostics.frequency)
    truth = standing.truth[request.asset]
    realised = np.array([truth.get(int(ts), np.nan) for ts in request.grid_ts])
    competition = competition_like(PROFILE, request.asset, frequency)
    known = world.engine.history(request.asset, frequency)
    reference = ConstantSigma().paths(request, known, np.random.default_rng(1))

    def total(paths: FloatArray) -> float:
        card = score_paths(paths, realised, competition, increment_s=request.increment_s)
        return card.total

    return total(answer.paths), total(reference)


@dataclass
class Sums:
    """Scores over the prompts of one process, by asset and frequency."""

    ours: dict[tuple[str, str], float] = field(default_factory=dict)
    reference: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def worse(self) -> dict[tuple[str, str], tuple[float, float]]:
        """Where the reference is at least as good: both scores."""
        return {
            key: (ours, self.reference[key])
            for key, ours in self.ours.items()
            if ours >= self.reference[key]
        }


def _ask_and_score(standing: Standing, world: LiveWorld, sums: Sums) -> dict[str, str]:
    """Ask every asset at every frequency; returns BTC's rungs by frequency."""
    rungs = {}
    for plan in world.plans.values():
        for frequency in plan.frequencies:
            answer = world.ask(_prompt(world, plan.asset, frequency))
            if answer is None:
                continue
            ours, reference = _scores(standing, world, answer)
            key = plan.asset, frequency.value
            sums.ours[key] = sums.ours.get(key, 0.0) + ours
            sums.reference[key] = sums.reference.get(key, 0.0) + reference
            if plan.asset == "BTC":
                rungs[frequency.value] = answer.diagnostics.rung
    return rungs


MOMENTS: Final = (60, 9000, 14400, 10800)  # seconds from prompt to prompt


@pytest.fixture
def case(standing: Standing, tmp_path: Path) -> Iterator[Standing]:
    """The standing miner's folders as a copy of one's own, at the same moment."""
    shutil.copytree(standing.root, tmp_path, dirs_exist_ok=True)
    standing.venues.faults.clear()
    standing.hand.ts = standing.now + 2
    yield replace(standing, root=tmp_path)
    standing.venues.faults.clear()


def _go_on_without(case: Standing, removed: tuple[str, ...]) -> None:
    """Remove it all under a running miner, ask on, start a new one, ask on."""
    chosen = live_settings(case.root, case.venues, ASSETS, days=float(HELD_DAYS))
    running = Sums()
    # On a lively evening two prompts are luck; there all of a case are summed.
    anew = running if case.now == WEEKDAY else Sums()
    with live_world(chosen, case.hand) as world:
        healthy = _ask_and_score(case, world, Sums())  # its score says nothing of what follows
        assert set(healthy.values()) == {Rung.LIGHTGBM.value}
        for name in removed:
            REMOVALS[name](case.root, case.venues)
        world.engine.refresh()  # what is gone is seen before feeds can mend it
        for seconds in MOMENTS[:2]:
            world.turn(seconds)
            _ask_and_score(case, world, running)
        _settle(world, removed, blind=())
    for name in removed:
        if not name.startswith(("all history", "history")):
            continue
        for path in case.root.glob("state/bars/*/BTC_*" if "BTC" in name else "state/bars"):
            shutil.rmtree(path)
    with live_world(chosen, case.hand) as world:
        for seconds in MOMENTS[2:]:
            world.turn(seconds)
            rungs = _ask_and_score(case, world, anew)
        blind = tuple(asset for asset in ASSETS if _is_blind(removed, asset))
        _settle(world, removed, blind=blind)
        assert set(rungs.values()) == (set() if "BTC" in blind else {_lowest(removed).value})
    # Each by itself, at the weekend: who runs on still has in memory what is gone.
    assert (running.worse, anew.worse) == ({}, {})


def _lowest(removed: tuple[str, ...]) -> Rung:
    """The rung that is left without all of it, for who starts anew."""
    ladder = list(Rung)
    return max((RUNGS.get(name, Rung.LIGHTGBM) for name in removed), key=ladder.index)


def _settle(world: LiveWorld, removed: tuple[str, ...], blind: tuple[str, ...]) -> None:
    """Count what was lost; only what is blind may be, and is refused by name."""
    lost = (
        [line for line in world.kept.lost if not line.startswith(blind)]
        if blind
        else (world.kept.lost)
    )
    count(VALID, cases=1, answers_lost=len(lost))
    assert lost == [], removed
    if blind:
        count(REFUSED, cases=1)
        assert all("NoPriceError" in line for line in world.kept.lost)
        with pytest.raises(NoPriceError, match=asset_spec(blind[0]).symbol):
            world.engine.answer(_prompt(world, blind[0], Frequency.HF))


@pytest.mark.parametrize("removed", [*SINGLES, *MORE], ids=" and ".join)
def test_without_one_thing_or_nearly_everything_answers_go_on(case, removed):
    """Each artefact and each feed in turn, then nearly all, then all of it."""
    _go_on_without(case, removed)


@pytest.mark.parametrize("number", range(len(PAIRS)))
def test_without_two_things_answers_go_on(case, number, size):
    """Artefacts and feeds in pairs; a seeded few of them unless all are asked for."""
    drawn = np.random.default_rng(7).permutation(len(PAIRS))[: size(5, len(PAIRS))]
    if number not in drawn:
        pytest.skip("in the full run")
    _go_on_without(case, PAIRS[number])


@pytest.mark.parametrize("standing", [WEEKDAY], indirect=True, ids=["a weekday"])
@pytest.mark.parametrize(
    "removed", [("models",), ("market states",), ("all history", "pyth")], ids=" and ".join
)
def test_on_a_weekday_answers_go_on_as_well(case, removed):
    """Where the reference is at its best, what is left still beats it."""
    _go_on_without(case, removed)


STANDS_IN = "With nothing stored and the scored feed down, another feed answers and is named"


@pytest.mark.parametrize(
    ("asset", "down", "feed"),
    [
        ("BTC", ("binance",), "pyth:Crypto.BTC/USD"),
        ("XAU", ("hyperliquid",), "pyth:"),
        ("XAU", ("hyperliquid", "pyth"), "binance:PAXGUSDT"),
    ],
)
def test_a_second_feed_answers_where_nothing_of_the_scored_one_is_known(case, asset, down, feed):
    """From a first start without the scored feed to its return: answered, named, on one level."""
    for name in ("all history", *down):
        REMOVALS[name](case.root, case.venues)
    chosen = live_settings(case.root, case.venues, (asset,), days=float(HELD_DAYS))
    with live_world(chosen, case.hand) as world:
        for _ in range(3):
            world.turn(60)
            for answer in world.ask_all():
                assert str(answer.diagnostics.anchor_feed).startswith(feed)
                assert answer.diagnostics.anchor_source == "second_source"
                assert f"{feed}" in answer.diagnostics.notes[-1]
        case.venues.faults.clear()
        world.turn(60)
        world.collector.backfill()
        world.turn(60)
        for answer in world.ask_all():
            assert answer.diagnostics.anchor_feed == world.plans[asset].scored.name
            assert not any("stands in" in note for note in answer.diagnostics.notes)
        bars = world.engine.history(asset, Frequency.LF).bars
        assert np.abs(np.diff(np.log(bars.close))).max() < 0.02  # no step between levels
        count(STANDS_IN, cases=1, answers_lost=len(world.kept.lost))
        assert world.kept.lost == []
