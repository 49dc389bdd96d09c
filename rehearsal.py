"""One rehearsal: the real miner, venues of recorded bars, and validators who ask.

`Rehearsal.run` goes through the days of a `Script`, with a restart in the middle, and
`findings` says what came of it. Market time runs at the script's speed; deadlines,
trainings and timeouts take real seconds. `rehearse.py` is its command line.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
import requests
from rich.progress import Progress, TaskID

from bar_cleaning import MINUTE_S, bars_from_minutes
from bar_store import BarStore
from clock import RehearsalClock
from collector import Series, scored_series
from config import DAY_S, Frequency
from domain import Bars
from errors import MinerError
from feed_plans import feed_plans
from ledger import KEPT_DAYS
from live_market import PAST_FETCHED
from loopback_venues import serve_venues
from market_view import MarketState
from protocol import protocol_profile
from rehearsal_findings import (
    BarsFound,
    DiskUse,
    Findings,
    Restart,
    compare_bars,
    complaints,
    judge_trainings,
    name_of,
    read_log_line,
)
from rehearsal_plan import (
    Pair,
    Prompt,
    asked_pairs,
    official_cadence,
    request_body,
    tally,
    usual_request,
)
from rehearsal_traces import (
    SetWatch,
    disk_use,
    read_scores,
    read_states,
    states_carried_on,
    with_seconds,
)
from rehearsal_validators import Validators
from rehearsed_miner import RehearsedMiner, log_lines, write_config
from settings import Settings
from wire_format import format_iso

PROFILE: Final = "2026-09"
SOURCE: Final = "venue"
SEED: Final = 0
MARK: Final = "rehearsal.toml"  # the miner's settings; also says whose folder it is

READY_LIMIT_S: Final = 900.0  # real, until the miner can answer for every asset
TAIL_S: Final = 5.0  # real, after the last answer: the last scores are written
LAG_S: Final = 5.0  # real, that the newest bar may be behind at the end
KEPT_AFTER_S: Final = 60.0  # real; what venues drop within that of the start is not expected
# Answers to moments of the past must be the same after a restart: so long before it,
# in market time, and the real seconds in which their bars had come.
CONTROL_AGES_S: Final = (0, 6 * 3600)
SETTLED_S: Final = 15.0
SCORES_LAG_S: Final = 30.0  # real, in which a matured answer is scored


# ---------------------------------------------------------------- what is rehearsed


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What to rehearse. Times are market time, Unix seconds."""

    assets: tuple[str, ...]
    bars: Mapping[str, Bars]
    start: int
    days: float
    speed: float
    restart_at: float  # share of the days; 0: no restart
    history_days: float
    retrain_days: float | None  # for every set; None: the usual cadence
    work_dir: Path

    @property
    def state_dir(self) -> Path:
        """Of the miner."""
        return self.work_dir / "state"

    @property
    def model_dir(self) -> Path:
        """Of the miner."""
        return self.work_dir / "models"

    @property
    def log_file(self) -> Path:
        """Of the miner, all its lives."""
        return self.work_dir / "miner.log"

    @property
    def config_file(self) -> Path:
        """The miner's settings."""
        return self.work_dir / MARK

    @property
    def pairs(self) -> list[Pair]:
        """What validators ask of the assets."""
        return asked_pairs(protocol_profile(PROFILE), self.assets)

    def about(self) -> dict[str, Any]:
        """What a report says of it."""
        return {
            "assets": self.assets,
            "start": format_iso(self.start),
            "days": self.days,
            "speed": self.speed,
            "history_days": self.history_days,
            "retrain_days": self.retrain_days,
        }


def write_settings(script: Script, clock: RehearsalClock, urls: Mapping[str, str]) -> Settings:
    """Write the miner's settings file; returns the same settings."""
    values: dict[str, Any] = {
        "source": SOURCE,
        "profile": PROFILE,
        "state_dir": str(script.state_dir),
        "model_dir": str(script.model_dir),
        "served_assets": list(script.assets),
        "days": script.history_days,
        "rehearsal": str(clock),
        "port": 0,
        **urls,
    } | _cadence(script)
    write_config(script.config_file, values)
    folders = {"state_dir": script.state_dir, "model_dir": script.model_dir}
    return Settings(**values | folders | {"served_assets": script.assets})


def _cadence(script: Script) -> dict[str, Any]:
    if script.retrain_days is None:
        return {}
    return {f"{frequency.value}_retrain_days": script.retrain_days for frequency in Frequency}


# ---------------------------------------------------------------- the rehearsal


@dataclass(eq=False)
class Rehearsal:
    """One rehearsal under way; `run` may be interrupted, `end` always follows."""

    script: Script
    settings: Settings
    clock: RehearsalClock
    watch: SetWatch
    validators: Validators = field(default_factory=Validators)
    lives: list[RehearsedMiner] = field(default_factory=list)
    began: float = 0.0  # market time of the first prompt
    ended: float = 0.0  # and when the miner was told to stop at last
    complete: bool = False
    restart: Restart | None = None
    exit_code: int | None = None
    stopped_after_s: float | None = None
    left_behind: int = 0
    disk: list[DiskUse] = field(default_factory=list)
    _states: dict[Pair, MarketState] = field(default_factory=dict)  # at the restart

    @property
    def miner(self) -> RehearsedMiner:
        """The life under way, or the last one."""
        return self.lives[-1]

    # -- the course of it

    def run(self, bars: Progress) -> None:
        """Start, ask for the days, restart in the middle, wait for the last scores."""
        line = bars.add_task("starting", total=None)
        self.watch.start()
        self._begin_life()
        self._wait_until(self._is_ready, f"was not ready for {self._assets()}")
        self._open_page()
        self.began = self.clock.now()
        self.disk.append(disk_use(self.settings, self.began))
        end = self.began + self.script.days * DAY_S
        profile = protocol_profile(PROFILE)
        prompts = official_cadence(profile, self.script.assets, self.began, end, seed=SEED)
        bars.update(line, description="prompts", total=len(prompts))
        self._ask_all(prompts, bars, line)
        self.validators.wait(120)
        self._rest(TAIL_S)
        self.complete = True

    def _ask_all(self, prompts: Sequence[Prompt], bars: Progress, line: TaskID) -> None:
        share = self.script.restart_at
        restart_ts = self.began + share * self.script.days * DAY_S if share else np.inf
        resumed, skipped = self.began, 0
        for prompt in prompts:
            if prompt.asked_ts >= restart_ts and self._has_past():
                self._restart_miner(bars, line)
                restart_ts, resumed = np.inf, self.clock.now()
            if prompt.asked_ts >= resumed:
                self._rest((prompt.asked_ts - self.clock.now()) / self.script.speed)
                self.validators.ask(self.miner.url, prompt)
            else:
                skipped += 1
            bars.advance(line)
        if restart_ts < np.inf:  # the past took as long as all prompts
            self._wait_until(self._has_past, f"did not fetch the past of {self._assets()}")
            self._restart_miner(bars, line)
        if self.restart is not None:
            self.restart = replace(self.restart, skipped=skipped)

    def _has_past(self) -> bool:
        """Whether the miner says so: answers to moments of the past may change until then."""
        told = (line for line in log_lines(self.script.log_file) if PAST_FETCHED in line)
        return any(read_log_line(line).get("event") == PAST_FETCHED for line in told)

    def _begin_life(self) -> None:
        # Known before it runs, so that an interrupt finds it.
        self.lives.append(RehearsedMiner(self.script.config_file, self.script.log_file, SOURCE))
        self.miner.start()
        self.miner.wait_until_serving()

    def _is_ready(self) -> bool:
        health = self.miner.health() or {}
        return bool(health.get("ready")) and {*self.script.assets} <= {*health.get("assets", ())}

    def _wait_until(self, holds: Callable[[], bool], what_not: str) -> None:
        """Raises: MinerError that the miner `what_not` in time."""
        deadline = time.monotonic() + READY_LIMIT_S
        while not holds():
            if time.monotonic() >= deadline:
                raise MinerError(
                    f"the miner {what_not} within {READY_LIMIT_S:.0f} s; read its log "
                    f"{self.script.log_file}."
                )
            self._rest(0.2)

    def _assets(self) -> str:
        return ", ".join(self.script.assets)

    def _open_page(self) -> None:
        """Before memory is judged: the first look brings in what draws the page."""
        if not self.miner.open_page():
            raise MinerError(f"the status page did not open; read its log {self.script.log_file}.")

    def _rest(self, seconds: float) -> None:
        """Real seconds, unless the miner ends by itself. Raises: MinerError."""
        until = time.monotonic() + seconds
        while True:
            if not self.miner.is_running:
                raise MinerError(f"the miner ended by itself; read its log {self.script.log_file}.")
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, 1.0))

    # -- the restart

    def _restart_miner(self, bars: Progress, line: TaskID) -> None:
        """Stop and start it; answers to moments of the past must stay the same."""
        bars.update(line, description="restarting")
        self.validators.wait(120)
        now = self.clock.now() - SETTLED_S * self.script.speed
        origins = [int(now - age) // 60 * 60 for age in CONTROL_AGES_S]
        controls = [(pair, origin) for pair in self.script.pairs for origin in origins]
        before = {control: self._control(*control) for control in controls}
        code, seconds = self.miner.stop()
        self.left_behind += self.miner.end()
        self._states = read_states(self.settings, self.script.pairs)
        self._begin_life()
        first = self._first_answer(controls[0])
        self._open_page()
        after = {control: self._control(*control) for control in controls}
        comparable = [
            control for control in controls if is_comparable(before[control], after[control])
        ]
        self.restart = Restart(
            exit_code=code,
            stopped_after_s=seconds,
            first_answer_after_s=first,
            compared=len(comparable),
            different=tuple(
                f"{name_of(pair)} at {format_iso(origin)}"
                for pair, origin in comparable
                if before[pair, origin] != after[pair, origin]
            ),
        )
        bars.update(line, description="prompts")

    def _control(self, pair: Pair, origin: int) -> bytes | None:
        """The answer to the usual request from a moment of the past; None if there is none."""
        body = request_body(usual_request(*pair, origin)) | {"origin": format_iso(origin)}
        try:
            response = requests.post(f"{self.miner.url}/predict", json=body, timeout=60)
        except requests.RequestException:
            return None
        return response.content if response.status_code == requests.codes.ok else None

    def _first_answer(self, control: tuple[Pair, int]) -> float | None:
        deadline = self.miner.began + READY_LIMIT_S
        while time.monotonic() < deadline:
            if self._control(*control) is not None:
                return time.monotonic() - self.miner.began
            self._rest(0.05)
        return None

    # -- the end of it

    def end(self) -> None:
        """Stop everything; nothing outlives this."""
        self.validators.close()
        if self.lives:
            self.ended = self.clock.now()
            if self.disk:
                self.disk.append(disk_use(self.settings, self.ended))
            self.exit_code, self.stopped_after_s = self.miner.stop()
            for life in self.lives:
                self.left_behind += life.end()
            self.watch.stop()

    def findings(self) -> Findings:
        """What there is to see after the end."""
        restart = self.restart
        if restart is not None:
            carried, astray = states_carried_on(self.settings, self._states)
            restart = replace(restart, states_carried_on=carried, states_astray=astray)
        lines = log_lines(self.script.log_file)
        start = float(self.script.start)
        return Findings(
            pairs=tuple(self.script.pairs),
            speed=self.script.speed,
            market_days=max(self.ended - self.began, 0.0) / DAY_S if self.began else 0.0,
            complete=self.complete,
            bars={asset: self._bars_of(asset) for asset in self.script.assets},
            trainings={
                pair: judge_trainings(
                    with_seconds(self.watch.published, lines),
                    pair,
                    start,
                    self.ended,
                    closes=self.script.bars[pair[0]].close_ts,
                    interval_days=self.settings.retrain_days(pair[1]),
                    pairs=len(self.script.pairs),
                    speed=self.script.speed,
                )
                for pair in self.script.pairs
            },
            asks=tally(self.validators.asks),
            scores=read_scores(
                self.script.state_dir,
                self.script.pairs,
                self.ended - 600 - SCORES_LAG_S * self.script.speed,
            ),
            lives=tuple(tuple(life.vitals) for life in self.lives),
            disk=tuple(self.disk),
            ledger_days=KEPT_DAYS,
            restart=restart,
            exit_code=self.exit_code,
            stopped_after_s=self.stopped_after_s,
            left_behind=self.left_behind,
            log=complaints(lines),
        )

    def _bars_of(self, asset: str) -> list[BarsFound]:
        plan = feed_plans(SOURCE, protocol_profile(PROFILE))[asset]
        store = BarStore(self.script.state_dir)
        return [self._series_found(series, store) for series in scored_series(plan)]

    def _series_found(self, series: Series, store: BarStore) -> BarsFound:
        served = self.script.bars[series.asset]
        if series.bar_s != MINUTE_S:
            served = bars_from_minutes(served, bar_s=series.bar_s)
        early = int(self.script.start + KEPT_AFTER_S * self.script.speed)
        first = series.oldest(early, self.script.history_days)
        end = int(self.ended - LAG_S * self.script.speed)
        return compare_bars(store.load(*series.key), served, first, end)


def is_comparable(before: bytes | None, after: bytes | None) -> bool:
    """Whether two answers should be the same: not if a new model set came in between."""
    if before is None or after is None:
        return before is not None  # one that is not given again is another one
    return bool(_model_of(before) == _model_of(after))


def _model_of(answer: bytes) -> Any:
    return orjson.loads(answer)["model_version"]


@contextmanager
def rehearsal_of(script: Script) -> Iterator[Rehearsal]:
    """Venues and a rehearsal that is ended with the block, come what may."""
    clock = RehearsalClock(start=script.start, origin=time.time(), speed=script.speed)
    with serve_venues(script.bars, clock) as venues:
        settings = write_settings(script, clock, venues.urls)
        watch = SetWatch(script.model_dir, script.pairs, clock)
        rehearsal = Rehearsal(script=script, settings=settings, clock=clock, watch=watch)
        try:
            yield rehearsal
        finally:
            # A second Ctrl-C must not leave the miner behind.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            rehearsal.end()
