"""The page that an operator keeps open: one look says whether all is well.

Rendered here from facts, records and log lines that lie in memory, on a thread
of the caller and never on an event loop; a page is good for some seconds, and a
picture for as long as the bars behind it. Everything that comes from outside is
escaped by the template; only our own figures are not. Callers are named, wallets,
keys and settings never.
"""

import logging
import statistics
import threading
import time
from base64 import b64encode
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Final

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from answer_desk import ANSWERED, AnswerRecord, DeskLoad, Outcome
from config import DAY_S, FREQUENCIES, Frequency
from errors import MinerError
from log_lines import without_secrets
from miner_facts import FactSource, MarketFacts
from own_scores import OwnScore, Pair
from plots import CSS_COLOURS, small_fan, svg_markup

TEMPLATE: Final = "status_page.html.j2"
PAGE_S: Final = 5.0  # a rendered page is good for so long
REFRESH_S: Final = 15  # the page asks for a new one so often
SHOWN_REQUESTS: Final = 12
SHOWN_NOT_ALLOWED: Final = 4  # of them: callers, each with its latest request
SHOWN_LINES: Final = 12
KEPT_REQUESTS: Final = 4_000
KEPT_LINES: Final = 50
LINE_LENGTH: Final = 300
COURSE_POINTS: Final = 24
STALE_PRICE_S: Final = 120.0
COURSE_RANGE: Final = (0.05, 0.25)  # of ratios around 1 that fill the picture
WIDEST_GAIN: Final = 0.08  # against ewma_t: the full width of a bar
FREQUENCY_NAMES: Final = {Frequency.HF: "1 hour", Frequency.LF: "24 hours"}
RUNG_NAMES: Final = {
    "lightgbm": "LightGBM",
    "calibrated_ewma": "EWMA, calibrated",
    "profile_ewma": "EWMA, no models",
    "prior": "documented volatility",
}
BEST_RUNG: Final = "lightgbm"
# Anybody can cause them, so there may be a flood: they are counted apart from the others.
FLOODS: Final = {Outcome.NOT_ALLOWED: "not allowed", Outcome.TURNED_AWAY: "turned away unread"}
NO_PRICE: Final = "No price is known yet, so its prompts are refused."

log = logging.getLogger(__name__)


# ---------------------------------------------------------------- what happened lately


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """A warning or an error, and how often it came in a row."""

    at: float  # real Unix seconds, of the last one
    level: str
    text: str
    count: int = 1


class RecentLog(logging.Handler):
    """Keeps the last warnings and errors. Add it to the root logger."""

    _EXTRAS: Final = ("duty", "asset", "frequency", "status", "reason")

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[LogLine] = deque(maxlen=KEPT_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line; the same again only counts. Never raises."""
        try:
            text = self._text(record)
        except Exception:  # noqa: BLE001  # logging must never end the program
            text = f"a line of {record.name} that cannot be put together; the log has it"
        line = LogLine(at=record.created, level=record.levelname.lower(), text=text)
        if self._lines and (self._lines[0].level, self._lines[0].text) == (line.level, text):
            line = replace(line, count=self._lines.popleft().count + 1)
        self._lines.appendleft(line)

    def lines(self) -> list[LogLine]:
        """The latest first."""
        self.acquire()
        try:
            return list(self._lines)
        finally:
            self.release()

    def _text(self, record: logging.LogRecord) -> str:
        parts = [record.getMessage()]
        parts += [str(getattr(record, name)) for name in self._EXTRAS if hasattr(record, name)]
        if record.exc_info and record.exc_info[0]:
            parts.append(f"{record.exc_info[0].__name__}: {record.exc_info[1]}")
        text = without_secrets(" · ".join(parts))
        return text if len(text) <= LINE_LENGTH else f"{text[:LINE_LENGTH]}…"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLine:
    """A request as the page shows it."""

    at: float
    asset: str
    caller: str
    transport: str
    outcome: Outcome
    ms: float
    note: str  # the rung that answered, or why not

    @property
    def answered(self) -> bool:
        """Whether the caller got paths."""
        return self.outcome in ANSWERED


class RecentRequests:
    """Keeps what an hour's figures need. `observe` is an observer of the desk."""

    def __init__(self) -> None:
        self._lines: deque[RequestLine] = deque(maxlen=KEPT_REQUESTS)
        self._not_allowed: tuple[RequestLine, ...] = ()  # by caller, the latest first
        self._floods = {outcome: deque[float](maxlen=KEPT_REQUESTS) for outcome in FLOODS}

    def observe(self, record: AnswerRecord) -> None:
        """Keep one request, without letting a flood of refusals push others out."""
        if record.outcome in self._floods:
            self._floods[record.outcome].append(record.at)
        if record.outcome is Outcome.NOT_ALLOWED:
            line = _request_line(record)
            others = [held for held in self._not_allowed if held.caller != line.caller]
            self._not_allowed = (line, *others[: SHOWN_NOT_ALLOWED - 1])
        elif record.outcome is not Outcome.TURNED_AWAY:
            self._lines.append(_request_line(record))

    def since(self, moment: float) -> list[RequestLine]:
        """Requests since then, the latest first, without the floods."""
        return [line for line in reversed(self._lines.copy()) if line.at >= moment]

    def floods_since(self, moment: float) -> dict[Outcome, int]:
        """How many refusals that anybody can cause there were; each counts to some thousands."""
        return {
            outcome: sum(at >= moment for at in times.copy())
            for outcome, times in self._floods.items()
        }

    def shown(self, moment: float) -> list[RequestLine]:
        """The latest requests, with callers who were not allowed since then."""
        refused = [line for line in self._not_allowed if line.at >= moment]
        lines = [*refused, *self.since(0)[: SHOWN_REQUESTS - len(refused)]]
        return sorted(lines, key=lambda line: line.at, reverse=True)


def _request_line(record: AnswerRecord) -> RequestLine:
    rung = record.diagnostics.rung if record.diagnostics else None
    asset = record.request.asset if record.request else ""
    if record.diagnostics:
        asset = f"{asset} {FREQUENCY_NAMES[Frequency(record.diagnostics.frequency)]}"
    return RequestLine(
        at=record.at,
        asset=_clip(asset, 24),
        caller=_shortened(record.caller.name),
        transport=record.caller.transport,
        outcome=record.outcome,
        ms=record.ms,
        note=RUNG_NAMES.get(rung, rung) if rung else _clip(record.reason or "", 120),
    )


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


def _shortened(name: str) -> str:
    """A hotkey by its ends, as explorers show it."""
    return name if len(name) <= 16 else f"{name[:6]}…{name[-6:]}"


# ---------------------------------------------------------------- what the page shows


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One market: its picture and the facts under it."""

    facts: MarketFacts
    span: str  # "1 hour"
    fan: Markup | None
    rung: str | None
    notes: tuple[str, ...]
    price_age_s: float | None
    bar_age_s: float | None
    model_age_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """Scored answers of one market."""

    name: str
    own: OwnScore
    gain: float  # score over that of ewma_t, minus one; below zero is better
    course: Markup | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hour:
    """Figures of the requests of the last hour."""

    answered: int
    refused: int
    median_ms: float | None
    slowest_ms: float | None
    outcomes: Sequence[tuple[str, int]]


@dataclass(frozen=True, slots=True, eq=False)
class _Drawn:
    key: tuple[object, ...]
    fan: Markup | None
    rung: str | None
    notes: tuple[str, ...]


class StatusPage:
    """Renders the page; thread-safe, one rendering at a time, kept for some seconds."""

    def __init__(
        self,
        source: FactSource,
        load: Callable[[], DeskLoad],
        requests: RecentRequests,
        lines: RecentLog,
        *,
        memory: Callable[[], float | None] = lambda: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._load = load
        self._requests = requests
        self._lines = lines
        self._memory = memory
        self._monotonic = monotonic
        self._began = monotonic()
        self._lock = threading.Lock()
        self._drawn: dict[Pair, _Drawn] = {}
        self._page = b""
        self._good_until = -1.0

    def render(self) -> bytes:
        """The page as UTF-8 HTML; up to seconds of work when pictures must be drawn."""
        with self._lock:
            if self._monotonic() >= self._good_until:
                self._page = self._render().encode()
                self._good_until = self._monotonic() + PAGE_S
            return self._page

    def _render(self) -> str:
        facts = self._source.facts()
        rows = [_score_row(market, market.own) for market in facts.markets if market.own]
        return _template().render(
            facts=facts,
            cards=[self._card(market, facts.now) for market in facts.markets],
            rows=rows,
            gain=_weighted([(row.own.answers, row.gain) for row in rows]),
            covered=_weighted([(row.own.answers, row.own.covered) for row in rows]),
            hour=_hour(self._requests, facts.now - 3600),
            requests=self._requests.shown(facts.now - 3600),
            lines=self._lines.lines()[:SHOWN_LINES],
            load=self._load(),
            memory=self._memory(),
            uptime_s=self._monotonic() - self._began,
            oldest_s=max(
                (facts.now - m.trained_until for m in facts.markets if m.trained_until is not None),
                default=None,
            ),
            colours=CSS_COLOURS,
            refresh_s=REFRESH_S,
            script=Markup(SCRIPT),  # noqa: S704  # our own
        )

    def _card(self, market: MarketFacts, now: float) -> Card:
        drawn = self._draw(market, now)
        return Card(
            facts=market,
            span=FREQUENCY_NAMES[market.frequency],
            fan=drawn.fan,
            rung=drawn.rung,
            notes=drawn.notes,
            price_age_s=None if market.price_ts is None else now - market.price_ts,
            bar_age_s=None if market.last_bar_ts is None else now - market.last_bar_ts,
            model_age_s=None if market.trained_until is None else now - market.trained_until,
        )

    def _draw(self, market: MarketFacts, now: float) -> _Drawn:
        """The market's picture, drawn again with every bar, every model and the first price."""
        has_price = market.price is not None
        key = (now // FREQUENCIES[market.frequency].bar_s, market.trained_until, has_price)
        drawn = self._drawn.get(market.pair)
        if drawn is None or drawn.key != key:
            drawn = self._drawn[market.pair] = self._draw_anew(market, key)
        return drawn

    def _draw_anew(self, market: MarketFacts, key: tuple[object, ...]) -> _Drawn:
        if market.price is None:
            return _Drawn(key, None, None, (NO_PRICE,))
        try:
            forecast, history = self._source.fan(*market.pair)
        except MinerError as error:
            return _Drawn(key, None, None, (str(error),))
        label = f"{_market_name(market)}: known prices and the forecast's bands"
        fan = Markup(svg_markup(small_fan(forecast, history), label=label))  # noqa: S704  # ours
        return _Drawn(key, fan, forecast.diagnostics.rung, forecast.diagnostics.notes)


def _market_name(market: MarketFacts) -> str:
    return f"{market.asset} {FREQUENCY_NAMES[market.frequency]}"


def _hour(requests: RecentRequests, since: float) -> Hour:
    lines, floods = requests.since(since), requests.floods_since(since)
    times = [line.ms for line in lines if line.answered]
    outcomes = Counter(line.outcome.value.replace("_", " ") for line in lines)
    counted = [(FLOODS[outcome], count) for outcome, count in floods.items() if count]
    return Hour(
        answered=len(times),
        refused=len(lines) - len(times) + floods[Outcome.NOT_ALLOWED],
        median_ms=statistics.median(times) if times else None,
        slowest_ms=max(times, default=None),
        outcomes=[*outcomes.most_common(), *counted],
    )


def _weighted(values: Sequence[tuple[int, float]]) -> float | None:
    total = sum(weight for weight, _ in values)
    return sum(weight * value for weight, value in values) / total if total else None


def _score_row(market: MarketFacts, own: OwnScore) -> ScoreRow:
    return ScoreRow(name=_market_name(market), own=own, gain=own.ratio - 1, course=_course(own))


def _course(own: OwnScore) -> Markup | None:
    """The ratio to ewma_t along time as a small line; above the rule it was beaten."""
    if len(own.course) < COURSE_POINTS:
        return None
    parts = np.array_split(np.array(own.course), COURSE_POINTS)
    ratio = np.array([part[:, 1].sum() / max(part[:, 2].sum(), 1e-9) for part in parts])
    half = np.clip(np.abs(ratio - 1).max(), *COURSE_RANGE)
    x = np.linspace(2, 118, COURSE_POINTS)
    y = 13 + 11 * np.clip((ratio - 1) / half, -1, 1)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return Markup(  # noqa: S704  # numbers only
        '<svg class="course" viewBox="0 0 120 26" role="img" aria-label="score over that of '
        f'ewma_t along time, lately {ratio[-1]:.3f}"><path class="rule" d="M0 13H120"/>'
        f'<polyline points="{points}"/></svg>'
    )


# ---------------------------------------------------------------- the template


def _age(seconds: float | None) -> str:
    """E.g. `41 s`, `5 min`, `3.2 h`, `2.1 d`."""
    if seconds is None:
        return "–"
    for unit, name, decimals in ((DAY_S, "d", 1), (3600, "h", 1), (60, "min", 0)):
        if seconds >= 2 * unit or (unit == DAY_S and seconds >= unit):
            return f"{seconds / unit:.{decimals}f} {name}"
    return f"{max(seconds, 0):.0f} s"


def _price(price: float | None) -> str:
    """Six significant digits, thousands apart."""
    if price is None:
        return "–"
    decimals = int(np.clip(5 - np.floor(np.log10(max(price, 1e-9))), 0, 12))
    return f"{price:,.{decimals}f}"


def _percent(share: float | None, decimals: int = 1) -> str:
    return "–" if share is None or not np.isfinite(share) else f"{100 * share:.{decimals}f} %"


def _signed(share: float | None) -> str:
    """A change in per cent with its sign, the minus a real one."""
    if share is None or not np.isfinite(share):
        return "–"
    return f"{round(100 * share, 1) + 0.0:+.1f} %".replace("-", "\N{MINUS SIGN}")


def _clock(ts: float) -> str:
    return f"{datetime.fromtimestamp(ts, UTC):%H:%M:%S}"


def _day(ts: float) -> str:
    return f"{datetime.fromtimestamp(ts, UTC):%-d %b %Y}"


def _bytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 2**20:,.0f} MB"


def _milliseconds(ms: float | None) -> str:
    return "–" if ms is None else f"{ms:,.0f} ms"


def _begun(sentence: str) -> str:
    """With a capital; the rest as it is."""
    return sentence[:1].upper() + sentence[1:]


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "age": _age,
        "price": _price,
        "percent": _percent,
        "signed": _signed,
        "clock": _clock,
        "day": _day,
        "bytes": _bytes,
        "ms": _milliseconds,
        "begun": _begun,
    }
    environment.globals |= {
        "best_rung": BEST_RUNG,
        "rung_names": RUNG_NAMES,
        "stale_price_s": STALE_PRICE_S,
        "widest": WIDEST_GAIN,
    }
    return environment.get_template(TEMPLATE)


# Replaces what is on the page by what a new one says, the reader's place kept; when
# no new one comes, it says since when, for a still page looks like a healthy one.
SCRIPT: Final = """
(() => {
  const every = Number(document.documentElement.dataset.refresh) * 1000;
  const renew = async () => {
    try {
      const answer = await fetch(location.href, {cache: "no-store"});
      if (!answer.ok) throw new Error(answer.status);
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      document.getElementById("live").replaceWith(fresh.getElementById("live"));
      document.title = fresh.title;
      document.getElementById("lost").hidden = true;
    } catch {
      const lost = document.getElementById("lost");
      if (lost.hidden) {
        document.title = "No contact · LGBM Miner";
        lost.textContent = "No contact with the miner since " +
          new Date().toISOString().slice(11, 19) + " UTC; what is below is of before.";
        lost.hidden = false;
      }
    }
    setTimeout(renew, every);
  };
  setTimeout(renew, every);
})();
"""
_SCRIPT_HASH: Final = b64encode(sha256(SCRIPT.encode()).digest()).decode()
HEADERS: Final = {
    "content-security-policy": (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_SCRIPT_HASH}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
