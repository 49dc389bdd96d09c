"""Trainings beside a running miner: one at a time, in processes of low priority."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, TypeAlias

from config import Frequency
from settings import Settings

Pair: TypeAlias = tuple[str, Frequency]

FIRST_BACKOFF_S: Final = 600
LONGEST_BACKOFF_S: Final = 6 * 3600
TRAINING_NICENESS: Final = 10
STOP_S: Final = 2  # for a training to end
LIMIT_S: Final = 3600  # a set takes one minute to three; what takes this long hangs

log = logging.getLogger(__name__)


class Training:
    """One run of `train_models.py` in a process group of its own."""

    def __init__(
        self,
        pair: Pair,
        command: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pair = pair
        self._clock = clock
        self._began = clock()
        # A file, because a full pipe would stall the child; open until end().
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(  # noqa: S603  # our own script
            command,
            stdin=subprocess.PIPE,  # never written to: its end tells the child of ours
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

    @property
    def seconds(self) -> float:
        """Since it began."""
        return self._clock() - self._began

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
        with suppress(ProcessLookupError):  # what a killed one left behind, of its group
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._stderr.close()


def training_command(settings: Settings, config_file: Path | None, pair: Pair) -> list[str]:
    """The command that trains one asset at one frequency the way this miner is set up."""
    asset, frequency = pair
    script = Path(__file__).resolve().with_name("train_models.py")
    # Collecting is the miner's own duty.
    command = [
        sys.executable,
        str(script),
        "--asset",
        asset,
        f"--{frequency}-only",
        "--stored-only",
        "--end-with-parent",
    ]
    flags: dict[str, object] = {
        "--source": settings.source,
        "--archive-dir": settings.archive_dir,
        "--state-dir": settings.state_dir,
        "--model-dir": settings.model_dir,
        "--profile": settings.profile,
        "--seed": settings.seed,
        "--days": settings.days,
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
    and helps nothing does not run forever either. One that hangs is ended, so that
    it keeps the other pairs from training for LIMIT_S at most.
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
        """Take note of a training that ended, or end it; start the next one that may run."""
        if self._running is not None:
            if self._running.exit_code() is None and self._running.seconds < LIMIT_S:
                return
            self._conclude(self._running)
        due = self._due()
        self._attempts = {pair: self._attempts[pair] for pair in due if pair in self._attempts}
        pair = next((pair for pair in due if self._may_try(pair)), None)
        if pair is not None:
            self._running = Training(pair, self._command(pair), self._clock)
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
        about["seconds"] = round(training.seconds)
        if training.exit_code() == 0:
            log.info("trained", extra=about)
        else:
            about |= {"reason": _reason(training), "next_try_s": round(wait_s)}
            log.warning("training failed", extra=about)
        self.stop()

    def _put_off(self, pair: Pair) -> float:
        """Count an attempt; returns the seconds until the next one."""
        count = self._attempts[pair].count + 1 if pair in self._attempts else 1
        wait_s = min(FIRST_BACKOFF_S * 2.0 ** (count - 1), LONGEST_BACKOFF_S)
        self._attempts[pair] = _Attempts(count, self._clock() + wait_s)
        return wait_s


def _reason(training: Training) -> str:
    last = training.last_words()
    if training.exit_code() is not None:
        return last
    return f"ended after the limit of {LIMIT_S} s; the last that it said: {last}"
