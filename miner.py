"""The long-lived process: answers prompts, collects, retrains, saves.

    python miner.py --source archive --archive-dir DIR     # replay an archive
    python miner.py --source simulated --port 8092         # an invented market
    curl -s localhost:8091/healthz

Answers never wait: everything else happens on one background thread, and
trainings run in a low-priority process of their own, one at a time.
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Final, TypeAlias

from starlette.applications import Starlette

from answer_desk import AnswerDesk
from config import DAY_S, Frequency, Settings
from console import (
    add_common_arguments,
    configure_logging,
    run_script,
    script_parser,
    settings_from,
)
from data_fetcher import BarSource, open_source
from errors import MinerError
from forecast_engine import ForecastEngine
from http_service import bind, build_app, server_for
from metrics import Metrics
from miner_facts import EngineFacts
from status_page import RecentLog, RecentRequests, StatusPage

Pair: TypeAlias = tuple[str, Frequency]

REFRESH_S: Final = 5
CHECKPOINT_S: Final = 60
FAILED_DUTY_PAUSE_S: Final = 60  # so that a lasting fault is one log line a minute
FIRST_BACKOFF_S: Final = 600
LONGEST_BACKOFF_S: Final = 6 * 3600
TRAINING_NICENESS: Final = 10
STOP_S: Final = 2  # for a training, and for the background thread, to end

log = logging.getLogger("miner")


# ---------------------------------------------------------------- retraining


class Training:
    """One run of `train_models.py` in a process group of its own."""

    def __init__(self, pair: Pair, command: Sequence[str]) -> None:
        self.pair = pair
        self.began = time.monotonic()
        # A file, because a full pipe would stall the child; open until end().
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(  # noqa: S603  # our own script
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            start_new_session=True,  # its workers end with it, and Ctrl-C reaches us alone
        )
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, TRAINING_NICENESS)

    @property
    def pid(self) -> int:
        """Its process id, and that of its group."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def last_words(self) -> str:
        """The last line on its stderr."""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - 4096))
        lines = self._stderr.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no message")

    def end(self) -> None:
        """Terminate it with its workers if it still runs, and forget its output."""
        if self._process.poll() is None:
            for signal_number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(self._process.pid, signal_number)
                    self._process.wait(STOP_S)
        self._stderr.close()


def training_command(settings: Settings, config_file: Path | None, pair: Pair) -> list[str]:
    """The command that trains one asset at one frequency the way this miner is set up."""
    asset, frequency = pair
    script = Path(__file__).resolve().with_name("train_models.py")
    command = [sys.executable, str(script), "--asset", asset, f"--{frequency}-only"]
    flags: dict[str, object] = {
        "--source": settings.source,
        "--archive-dir": settings.archive_dir,
        "--state-dir": settings.state_dir,
        "--model-dir": settings.model_dir,
        "--profile": settings.profile,
        "--seed": settings.seed,
        "--days": settings.days,
        "--jobs": settings.jobs,
        "--config": config_file,
    }
    for flag, value in flags.items():
        if value is not None:
            command += [flag, str(value)]
    return command


@dataclass(frozen=True, slots=True)
class _Attempts:
    count: int
    next_at: float  # monotonic seconds


class Retrainer:
    """Trains what is due, one pair at a time.

    Every attempt makes its pair wait longer for the next one, until the pair is
    due no more: that is what success means here, so a training that ends well
    and helps nothing does not run forever either.
    """

    def __init__(
        self,
        due: Callable[[], Sequence[Pair]],
        command: Callable[[Pair], Sequence[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._due = due
        self._command = command
        self._clock = clock
        self._attempts: dict[Pair, _Attempts] = {}
        self._running: Training | None = None

    def step(self) -> None:
        """Take note of a training that ended; start the next one that may run."""
        if self._running is not None:
            if self._running.exit_code() is None:
                return
            self._conclude(self._running)
        due = self._due()
        self._attempts = {pair: self._attempts[pair] for pair in due if pair in self._attempts}
        pair = next((pair for pair in due if self._may_try(pair)), None)
        if pair is not None:
            self._running = Training(pair, self._command(pair))
            log.info(
                "training",
                extra={"asset": pair[0], "frequency": pair[1], "pid": self._running.pid},
            )

    def stop(self) -> None:
        """End the training under way, if there is one."""
        if self._running is not None:
            self._running.end()
            self._running = None

    def _may_try(self, pair: Pair) -> bool:
        attempts = self._attempts.get(pair)
        return attempts is None or self._clock() >= attempts.next_at

    def _conclude(self, training: Training) -> None:
        asset, frequency = training.pair
        wait_s = self._put_off(training.pair)
        about: dict[str, object] = {"asset": asset, "frequency": frequency}
        about["seconds"] = round(time.monotonic() - training.began)
        if training.exit_code() == 0:
            log.info("trained", extra=about)
        else:
            about |= {"reason": training.last_words(), "next_try_s": round(wait_s)}
            log.warning("training failed", extra=about)
        self.stop()

    def _put_off(self, pair: Pair) -> float:
        """Count an attempt; returns the seconds until the next one."""
        count = self._attempts[pair].count + 1 if pair in self._attempts else 1
        wait_s = min(FIRST_BACKOFF_S * 2.0 ** (count - 1), LONGEST_BACKOFF_S)
        self._attempts[pair] = _Attempts(count, self._clock() + wait_s)
        return wait_s


# ---------------------------------------------------------------- background


@dataclass(slots=True)
class Duty:
    """Something to do again and again."""

    name: str
    every_s: float
    run: Callable[[], object]
    next_at: float = 0.0  # monotonic seconds


class Upkeep:
    """The background thread: does its duties in turn until it is stopped.

    A duty that fails is logged and tried again later; the others go on.
    """

    def __init__(self, duties: Sequence[Duty], tick_s: float = 1.0) -> None:
        self._duties = duties
        self._tick_s = tick_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="upkeep", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the duty under way, or leave it behind if that takes too long."""
        self._stopping.set()
        self._thread.join(STOP_S)

    def _loop(self) -> None:
        while not self._stopping.is_set():
            for duty in self._duties:
                if time.monotonic() >= duty.next_at and not self._stopping.is_set():
                    pause_s = duty.every_s if attempt(duty) else FAILED_DUTY_PAUSE_S
                    duty.next_at = time.monotonic() + pause_s
            self._stopping.wait(self._tick_s)


def attempt(duty: Duty) -> bool:
    """Do it once; whether it went well. Never raises."""
    try:
        duty.run()
    except MinerError as error:
        log.warning("duty failed", extra={"duty": duty.name, "reason": str(error)})
    except Exception:
        log.exception("duty failed", extra={"duty": duty.name})
    else:
        return True
    return False


# ---------------------------------------------------------------- the process


def serving_line(
    url: str,
    source: str,
    assets: Sequence[str],
    *,
    trained: Mapping[Pair, int],
    due: Sequence[Pair],
    now: int,
) -> str:
    """The one line printed at the start: what is served, where, from models how old."""
    held = {*trained, *due}  # what has no models is due
    served = [
        f"{asset} {'+'.join(frequency for frequency in Frequency if (asset, frequency) in held)}"
        for asset in assets
    ]
    old = len(set(trained) & set(due))
    market = "a SIMULATED market" if source == "simulated" else f"source {source}"
    where = f"serving {', '.join(served)} on {url} from {market}"
    if not trained:
        return f"{where}; none of {len(held)} model sets is trained yet."
    age_days = (now - min(trained.values())) / DAY_S
    return (
        f"{where}; {len(trained)} of {len(held)} model "
        f"sets are trained, the oldest {age_days:.1f} days ago, {old or 'none'} of them due again."
    )


def main() -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code."""
    args = _arguments()
    settings = settings_from(args)
    configure_logging(settings.log_level)
    _on_stop_signals(lambda *_: sys.exit(0))  # nothing to save yet
    listener = bind(settings.host, settings.port)  # a busy port is known at once
    source = open_source(settings)
    engine = ForecastEngine.open(source, settings)
    desk, app = _open_desk(engine, source)
    server = server_for(app)
    _on_stop_signals(lambda *_: setattr(server, "should_exit", True))
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    line = serving_line(
        url,
        source.name,
        engine.assets(),
        trained=engine.trained(),
        due=engine.due(),
        now=engine.now(),
    )
    print(line, flush=True)
    with _kept_up(engine, settings, args.config):
        server.run(sockets=[listener])
    desk.close()
    log.info("stopped")
    return 0


def _open_desk(engine: ForecastEngine, source: BarSource) -> tuple[AnswerDesk, Starlette]:
    """The desk of an engine and its web application, with all that watches them."""
    lines, requests = RecentLog(), RecentRequests()
    logging.getLogger().addHandler(lines)
    desk = AnswerDesk(engine, observers=[requests.observe])
    facts = EngineFacts(engine, source=source.name, is_live=source.live)
    metrics = Metrics(facts.facts, desk.load)
    desk.watch(metrics.observe)
    page = StatusPage(facts, desk.load, requests, lines, memory=metrics.memory_bytes)
    return desk, build_app(desk, now=engine.now, facts=facts, metrics=metrics, page=page)


@contextmanager
def _kept_up(
    engine: ForecastEngine, settings: Settings, config_file: Path | None
) -> Iterator[None]:
    """Refresh, retrain and save in the background; save once more at the end."""
    retrainer = Retrainer(engine.due, partial(training_command, settings, config_file))
    checkpoint = Duty("checkpoint", CHECKPOINT_S, engine.checkpoint)
    upkeep = Upkeep(
        [
            Duty("refresh", REFRESH_S, engine.refresh),
            Duty("retrain", REFRESH_S, retrainer.step),
            checkpoint,
        ]
    )
    upkeep.start()
    try:
        yield
    finally:
        upkeep.stop()
        retrainer.stop()
        attempt(checkpoint)


def _on_stop_signals(handler: Callable[[int, FrameType | None], object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _arguments() -> Namespace:
    parser = script_parser(
        "Answer prompts over HTTP, retrain when models are due, and keep what was collected.",
        examples=[
            "python miner.py --source archive --archive-dir bars --port 8091",
            "python miner.py --source simulated --model-dir build/models --state-dir build/state",
        ],
    )
    add_common_arguments(parser)
    group = parser.add_argument_group("serving")
    defaults = {entry.name: entry.default for entry in fields(Settings)}
    group.add_argument(
        "--host", metavar="ADDRESS", help=f"listen here (default: {defaults['host']})"
    )
    group.add_argument(
        "--port", metavar="N", help=f"TCP port, 0 for a free one (default: {defaults['port']})"
    )
    group.add_argument(
        "--jobs", metavar="N", help="processes of a retraining (default: one per core)"
    )
    group.add_argument(
        "--log-level",
        metavar="{debug,info,warning,error}",
        help=f"least important lines to log (default: {defaults['log_level']})",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
