"""Whatever feeds do: no detectable lie is stored, and every prompt has a valid answer.

The miner under test is whole but for its transport, over real HTTP to loopback
venues; what is stored is held against the bars that the venues were given.
"""

import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from config import DAY_S, Frequency, Venue
from feed_plans import FeedHost, HttpPolicy
from feed_seams import HOLE_S
from loopback_venues import Fault, FaultRule, LoopbackVenues
from tests.faults.live_world import (
    HASTY,
    PATIENT,
    Hand,
    LiveWorld,
    live_settings,
    live_world,
    served,
    walk,
)
from tests.faults.tally import count

T0 = 1_764_590_400  # 2025-12-01 12:00 UTC, a Monday
START = T0 - 26 * 3600
ASSETS = ("BTC", "XAU")
HOSTS = {
    Venue.BINANCE: (FeedHost.BINANCE,),
    Venue.HYPERLIQUID: (FeedHost.HYPERLIQUID,),
    Venue.PYTH: (FeedHost.PYTH_HISTORY, FeedHost.PYTH_ROUTER, FeedHost.PYTH_LATEST),
}
MARKET = {
    "BTC": walk(1, 90_000, START, 6 * 1440),
    "XAU": walk(2, 4000, START, 6 * 1440, 2e-4),
}
Running = Callable[..., AbstractContextManager[LiveWorld]]
SLOW = {Fault.TIME_OUT, Fault.DRIP_HEAD, Fault.DRIP_BODY}
UNDETECTABLE = {Fault.FROZEN}


@pytest.fixture(scope="module")
def hand() -> Hand:
    return Hand(T0)


@pytest.fixture(scope="module")
def venues(hand: Hand) -> Iterator[LoopbackVenues]:
    with served(MARKET, hand) as opened:
        yield opened


@pytest.fixture(scope="module")
def collected(
    venues: LoopbackVenues, hand: Hand, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """State folders with the last day of every asset, by source."""
    folders = {}
    for source in ("venue", "pyth"):
        root = tmp_path_factory.mktemp(source)
        hand.ts = T0
        with live_world(live_settings(root, venues, ASSETS, source=source), hand) as world:
            world.collector.backfill()
            world.turn(2)
            assert world.kept.lost == []
        folders[source] = root / "state"
    return folders


@pytest.fixture
def running(
    tmp_path: Path, collected: Mapping[str, Path], venues: LoopbackVenues, hand: Hand
) -> Iterator[Running]:
    """Miners that go on from the collected day, at two seconds past twelve."""

    @contextmanager
    def opened(source: str = "venue", policy: HttpPolicy = PATIENT) -> Iterator[LiveWorld]:
        state = tmp_path / "state"
        shutil.rmtree(state, ignore_errors=True)
        shutil.copytree(collected[source], state)
        venues.faults.clear()
        hand.ts = T0 + 2
        chosen = live_settings(tmp_path, venues, ASSETS, source=source)
        with live_world(chosen, hand, policy=policy, truth=MARKET) as world:
            yield world

    yield opened
    venues.faults.clear()


def strike(venues: LoopbackVenues, venue: Venue, fault: Fault, **more: object) -> None:
    for host in HOSTS[venue]:
        venues.faults.add(FaultRule(fault=fault, host=host, **more))  # type: ignore[arg-type]


def heal(world: LiveWorld, venues: LoopbackVenues) -> None:
    """The venues behave again, until the next midnight's look back is over."""
    venues.faults.clear()
    world.turn(60)
    world.turn(DAY_S - world.hand.ts % DAY_S + 5)
    world.turn(60)


def settle(promise: str, world: LiveWorld, *, bars: bool = True) -> None:
    """Count what was lost, and insist that it is nothing."""
    lacking = world.lacking(MARKET, T0 - DAY_S) if bars else []
    count(promise, cases=1, answers_lost=len(world.kept.lost), bars_lost=len(lacking))
    assert (world.kept.lost, lacking) == ([], [])


ONE_FAULT = "A venue that misbehaves costs no answer, no bar and no truth"
VENUES = list(HOSTS)
CASES = [
    *((venue, fault, None) for venue in VENUES for fault in Fault),
    *((venue, Fault.RATE_LIMITED, "0.01") for venue in VENUES),
]


def source_of(venue: Venue) -> str:
    """The source whose scored feeds are at the venue."""
    return "pyth" if venue is Venue.PYTH else "venue"


@pytest.mark.parametrize(("venue", "fault", "retry_after"), CASES)
def test_a_fault_of_one_venue_costs_no_answer_no_bar_and_no_truth(
    running, venues, venue, fault, retry_after
):
    """However a venue misbehaves for minutes: all answers valid, no lie stored, no bar lost."""
    policy = HASTY if fault in SLOW else PATIENT
    with running(source_of(venue), policy) as world:
        strike(venues, venue, fault, retry_after=retry_after, from_ts=T0)
        for _ in range(2 if fault in SLOW else 5):
            world.turn()
            if fault is not Fault.FROZEN:  # which cannot be told from the truth
                assert world.lies(MARKET) == []
        heal(world, venues)
        assert world.lies(MARKET) == []
        settle(ONE_FAULT, world)


BAD_PRICES = [
    Fault.NAN, Fault.NULL, Fault.TEXT, Fault.HUGE, Fault.NEGATIVE, Fault.ZERO, Fault.SPIKE,
]  # fmt: skip
POISONED = {
    "open": BAD_PRICES,
    "high": BAD_PRICES,
    "low": BAD_PRICES,
    "volume": [Fault.NAN, Fault.HUGE, Fault.NEGATIVE],  # any other may be true
    "ts": [Fault.NAN, Fault.HUGE, Fault.NEGATIVE, Fault.ZERO, Fault.SPIKE],
}


@pytest.mark.parametrize("venue", VENUES)
@pytest.mark.parametrize("column", POISONED)
def test_no_lie_about_anything_but_the_close_is_stored_either(running, venues, venue, column):
    """Opens, highs, lows, volumes and times that cannot be: left out, and the rest is kept."""
    with running(source_of(venue)) as world:
        for fault in POISONED[column]:
            venues.faults.clear()
            strike(venues, venue, fault, column=column)
            for _ in range(2):
                world.turn()
                assert world.lies(MARKET) == []
        heal(world, venues)
        assert world.lies(MARKET) == []
        settle(ONE_FAULT, world)


@pytest.mark.parametrize("venue", VENUES)
def test_a_frozen_feed_is_reported(running, venues, venue):
    """A price that stands still for an hour is told, and forgotten once it moves again."""
    with running(source_of(venue)) as world:
        assert world.board.doubts() == ()
        strike(venues, venue, Fault.FROZEN, from_ts=T0)
        for _ in range(12):
            world.turn(300)
        scored = [plan for plan in world.plans.values() if plan.scored.venue is venue]
        told = " ".join(world.board.doubts())
        assert [plan.asset for plan in scored if plan.scored.name not in told] == []
        heal(world, venues)
        assert world.board.doubts() == ()
        assert world.lies(MARKET) == []
        settle("A frozen feed is reported within the hour and read again when it moves", world)


@pytest.mark.parametrize("fault", [Fault.STALE, Fault.CACHED])
@pytest.mark.parametrize("venue", [Venue.BINANCE, Venue.HYPERLIQUID])
def test_a_stale_feed_is_left_for_a_second_source_and_its_age_is_told(
    running, venues, venue, fault
):
    """Quotes of a quarter of an hour ago, dated as such, give way to another feed's."""
    with running() as world:
        world.turn()
        strike(venues, venue, fault)
        for _ in range(6):
            world.turn()
        ages = {answer.request.asset: answer.diagnostics.price_age_s for answer in world.ask_all()}
        assert max(ages.values()) <= 120
        assert world.kept.sources >= {"second_source"}
        heal(world, venues)
        assert world.lies(MARKET) == []
        settle("A stale feed gives way to a second source", world)


def test_a_plausible_wrong_price_is_reported_by_its_divergence(hand, tmp_path):
    """A feed 5 % off the other is believed, being scored, and said to be off."""
    hand.ts = T0
    wrong = MARKET["BTC"]
    off = replace(
        wrong,
        **{name: 1.05 * getattr(wrong, name) for name in ("open", "high", "low", "close")},
    )
    with served(MARKET | {"binance:BTCUSDT": off}, hand) as venues:
        chosen = live_settings(tmp_path, venues, ("BTC",))
        with live_world(chosen, hand) as world:
            world.collector.backfill()
            world.turn(2)
            world.turn(60)
            (doubt,) = world.board.doubts()
            assert "apart" in doubt
            count(
                "A price that another feed denies is reported",
                cases=1,
                answers_lost=len(world.kept.lost),
            )
            assert world.kept.lost == []


def at(listener: socket.socket) -> str:
    host, port = listener.getsockname()
    return f"{host}:{port}"


@contextmanager
def full() -> Iterator[socket.socket]:
    """A host that takes no more connections: who tries gets no answer at all."""
    with ExitStack() as opened:
        listener = opened.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            caller = opened.enter_context(socket.socket())
            caller.settimeout(0)
            caller.connect_ex(listener.getsockname())
        yield listener


def test_nobody_at_the_address_costs_no_answer(running, venues, hand):
    """Refused, no such name, a connection or its encryption that never comes: any host, or all."""
    with running() as world:
        state = world.settings.state_dir
    with socket.socket() as unheard, full() as busy, socket.create_server(("127.0.0.1", 0)) as mute:
        unheard.bind(("127.0.0.1", 0))
        for address in (
            f"http://{at(unheard)}",
            "http://no-such-host.invalid",
            f"http://{at(busy)}",
            f"https://{at(mute)}",
        ):
            for hosts in (*HOSTS.values(), tuple(FeedHost)):
                away = {f"{host.value}_url": address for host in hosts}
                chosen = replace(world.settings, **away)
                with live_world(chosen, hand, policy=HASTY, truth=MARKET) as cut_off:
                    done = cut_off.turn()
                    scored = {plan.scored.venue for plan in cut_off.plans.values()}
                    assert bool(done.failures) == any(
                        set(HOSTS[venue]) <= set(hosts) for venue in scored
                    )
                    assert cut_off.lies(MARKET) == []
                    settle("Hosts that cannot be reached cost no answer", cut_off, bars=False)
    with live_world(replace(world.settings, state_dir=state), hand, truth=MARKET) as back:
        heal(back, venues)
        settle("Hosts that cannot be reached cost no answer", back)


# ---------------------------------------------------------------- mixtures

# Of these at one venue only: two feeds that lie alike agree, and are believed.
WILD = [Fault.SPIKE, Fault.CONTRADICTED]
QUICK = [fault for fault in Fault if fault not in (*SLOW, *WILD, Fault.FROZEN)]
QUICK.remove(Fault.TOO_LARGE)  # seconds of unpacking


def mixtures() -> st.SearchStrategy[list[tuple[int, dict[Venue, Fault | None]]]]:
    """Times, each with what befalls every venue for it; minutes to hours."""
    honest_venue = st.fixed_dictionaries(
        {venue: st.one_of(st.none(), st.sampled_from(QUICK)) for venue in VENUES}
    )
    liar = st.builds(lambda *lie: dict([lie]), st.sampled_from(VENUES), st.sampled_from(WILD))
    weather = st.one_of(honest_venue, st.builds(dict.__or__, honest_venue, liar))
    return st.lists(
        st.tuples(st.sampled_from([1, 1, 2, 5, 30, 61, 150]), weather), min_size=2, max_size=7
    )


def test_any_mixture_of_faults_stores_no_lie_and_loses_nothing(running, venues, size):
    """Faults that come and go at all venues at once: no lie, no lost answer, no lost bar."""

    @seed(5)
    @settings(max_examples=size(8, 400), database=None, phases=[Phase.generate])
    @given(mixture=mixtures(), source=st.sampled_from(["venue", "venue", "pyth"]))
    def holds(mixture, source):
        with running(source) as world:
            for minutes, faults in mixture:
                venues.faults.clear()
                for venue, fault in faults.items():
                    if fault is not None:
                        strike(venues, venue, fault, retry_after="0.01")
                world.turn(60 * minutes)
                assert world.lies(MARKET) == []
            heal(world, venues)
            world.collector.backfill()
            assert world.lies(MARKET) == []
            settle("Any mixture of faults of all venues", world)

    holds()


# ---------------------------------------------------------------- weeks of outage


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.EMPTY, Fault.BLOCKED])
@pytest.mark.parametrize("source", ["venue", "pyth"])
def test_weeks_of_outage_cost_no_answer_and_what_venues_keep_is_fetched_after(
    tmp_path, source, fault
):
    """Three weeks without any feed: every prompt answered, every bar that is kept regained."""
    days, begin = 21, T0 - 2 * DAY_S
    n = (days + 4) * 1440
    market = {"BTC": walk(1, 90_000, begin, n), "XAU": walk(2, 4000, begin, n, 2e-4)}
    hand = Hand(T0)
    promise = "Three weeks of outage cost no answer, and no bar that a venue still keeps"
    with served(market, hand) as venues:
        chosen = live_settings(tmp_path, venues, ASSETS, source=source, days=30.0, memory_days=30)
        with live_world(chosen, hand, truth=market) as world:
            world.collector.backfill()
            world.turn(2)
            for venue in VENUES:
                strike(venues, venue, fault)
            for _ in range(days):
                world.turn(DAY_S)
            assert world.collector.failing() or fault is Fault.EMPTY
            venues.faults.clear()
            world.turn(60)
            world.collector.backfill()
            world.turn(60)
            assert world.lies(market) == []
            kept_from = {Venue.HYPERLIQUID: int(hand.ts) - 4980 * 60}
            since = {
                plan.asset: kept_from.get(plan.scored.venue, begin) for plan in world.plans.values()
            }
            lacking = [
                bar for asset, start in since.items() for bar in world.lacking(market, start, asset)
            ]
            count(promise, 1, len(world.kept.lost), len(lacking))
            assert (world.kept.lost, lacking) == ([], [])
            history = world.engine.history("XAU", Frequency.LF)
            assert np.diff(history.bars.open_ts).max() < HOLE_S  # another feed filled in


# ---------------------------------------------------------------- lies that last


@pytest.mark.parametrize("denied", [True, False])
@pytest.mark.parametrize("minutes", [4, 10, 60])
def test_a_price_a_hundred_times_too_high_for_long_is_never_stored(tmp_path, minutes, denied):
    """Whether a second feed denies it or none can be asked: no lie, no lost answer or bar."""
    hand, truth = Hand(T0), MARKET["BTC"]
    is_off = (truth.open_ts >= T0 + 600) & (truth.open_ts < T0 + 600 + 60 * minutes)
    names = ("open", "high", "low", "close")
    off = {name: np.where(is_off, 100.0, 1.0) * getattr(truth, name) for name in names}
    promise = "A price a hundred times too high for up to an hour is not believed"
    lying = MARKET | {"binance:BTCUSDT": replace(truth, **off)}
    with served(lying, hand) as venues:
        if not denied:
            strike(venues, Venue.PYTH, Fault.ERROR)
        with live_world(live_settings(tmp_path, venues, ("BTC",)), hand, truth=MARKET) as world:
            world.collector.backfill()
            world.turn(2)
            for _ in range(minutes + 15):
                world.turn()
                assert world.lies(MARKET) == []
            assert world.collector.doubts()
            lost = world.kept.lost
    with (
        served(MARKET, hand) as venues,  # withdrawn
        live_world(live_settings(tmp_path, venues, ("BTC",)), hand, truth=MARKET) as world,
    ):
        world.turn()
        assert world.lies(MARKET) == []
        lost += world.kept.lost
        lacking = world.lacking(MARKET, T0 - DAY_S)
    count(promise, cases=1, answers_lost=len(lost), bars_lost=len(lacking))
    assert (lost, lacking) == ([], [])
