"""The real miner as a process under watch: started, asked, stopped, and never left behind.

Its log lines go to a file and its vitals are read from `/proc` once a second. Its
environment carries a mark that every process below it inherits, so that nothing
outlives the rehearsal however it ends. Needs Linux.
"""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import IO, Any, Final
from uuid import uuid4

import requests

from errors import MinerError
from rehearsal_findings import Vitals
from settings import without_settings

SCRIPT: Final = Path(__file__).resolve().with_name("miner.py")
START_LIMIT_S: Final = 60.0  # until it says where it serves
STOP_PATIENCE_S: Final = 30.0  # then it is killed; what it promises is less
WATCH_S: Final = 1.0
WATCH_LOOKS: Final = 10  # at the memory in that time: what a trim gives back is soon taken again
MARK_VARIABLE: Final = "REHEARSAL_MARK"
METRICS_LIMIT_S: Final = 2.0
_KEPT: Final = re.compile(r"^lgbm_miner_cached_bytes (\S+)$", re.MULTILINE)
_SERVING: Final = re.compile(r"serving (.* )?on (?P<url>http://\S+?)[;,.]?(\s|$)")
_PAGE_MB: Final = os.sysconf("SC_PAGE_SIZE") / 2**20


def write_config(file: Path, values: Mapping[str, Any]) -> None:
    """Write a settings file: what JSON writes of text, numbers and lists is TOML as well."""
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()]
    file.write_text("".join(lines), encoding="utf-8")


class RehearsedMiner:
    """One life of the miner, from its start to its end."""

    def __init__(
        self, config_file: Path, log_file: Path, source: str, flags: Sequence[str] = ()
    ) -> None:
        self._config_file = config_file
        self._flags = ["--source", source, *flags]
        self._log: IO[bytes] = log_file.open("ab")
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._stopping, self._over = threading.Event(), threading.Event()
        self._reader = threading.Thread(target=self._read, name="miner-stdout", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="miner-watch", daemon=True)
        self._mark = uuid4().hex
        self.vitals: list[Vitals] = []
        self.began = 0.0  # monotonic seconds
        self.url = ""

    def start(self) -> None:
        """Begin its life."""
        script, config = str(SCRIPT), str(self._config_file)
        self.began = time.monotonic()
        self._process = subprocess.Popen(  # noqa: S603  # our own script
            [sys.executable, script, "--config", config, *self._flags],
            cwd=self._config_file.parent,
            env=_clean_environment(self._mark),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C reaches the rehearsal alone
        )
        self._reader.start()
        self._watcher.start()

    def wait_until_serving(self) -> str:
        """Its address, as it prints it. Raises: MinerError if it does not serve."""
        deadline = time.monotonic() + START_LIMIT_S
        while (left := deadline - time.monotonic()) > 0:
            with suppress(queue.Empty):
                line = self._lines.get(timeout=left)
                if line is None:
                    break
                if found := _SERVING.search(line):
                    self.url = found["url"]
                    return self.url
        raise MinerError(
            f"the miner did not say within {START_LIMIT_S:.0f} s where it serves; read its log "
            f"{self._log.name}."
        )

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id; 0 before its start."""
        return self._process.pid if self._process else 0

    def open_page(self) -> bool:
        """Look at the status page, as an operator does; whether it is there."""
        try:
            page = requests.get(f"{self.url}/", timeout=60)
        except requests.RequestException:
            return False
        return bool(page.status_code == requests.codes.ok)

    def health(self) -> dict[str, Any] | None:
        """What `/healthz` says; None if nobody answers."""
        try:
            found: dict[str, Any] = requests.get(f"{self.url}/healthz", timeout=10).json()
        except (requests.RequestException, ValueError):
            return None
        return found

    def stop(self) -> tuple[int | None, float]:
        """SIGTERM; returns exit code and real seconds. What does not end is killed (None)."""
        began = time.monotonic()
        self._stopping.set()
        code: int | None = None
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(STOP_PATIENCE_S)
        return code, time.monotonic() - began

    def end(self) -> int:
        """Kill whatever is left of it; returns how many processes outlived it."""
        left = 0
        if self._process is not None and not self._over.is_set():
            self._over.set()
            self._watcher.join()
            left = self._kill_left()
            self._process.kill()
            self._process.wait()
            self._reader.join()
        self._log.close()
        return left

    def _kill_left(self) -> int:
        """Kill every process that the mark gives away."""
        left = [pid for pid in marked(self._mark) if self._process and pid != self._process.pid]
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(left)

    # -- threads

    def _read(self) -> None:
        """Everything it prints, and None at the end of it."""
        stdout = self._process.stdout if self._process else None
        with stdout or nullcontext(()) as lines:
            for line in lines:
                self._lines.put(line.decode(errors="replace").rstrip())
        self._lines.put(None)

    def _watch(self) -> None:
        pid, kept_mb = self.pid, 0.0
        while not self._over.is_set():
            least_mb = self._least_memory(pid)
            found = vitals_of(pid, time.monotonic() - self.began)
            before_mb, kept_mb = kept_mb, self._kept_answers()
            if found is not None and not self._stopping.is_set():
                self.vitals.append(
                    replace(
                        found,
                        rss_mb=min(found.rss_mb, least_mb),
                        kept_mb=min(before_mb, kept_mb),  # all the while, not for a moment
                    )
                )

    def _kept_answers(self) -> float:
        """What its answers for those who ask again need, MB; 0 while it does not say."""
        if not self.url:
            return 0.0
        try:
            page = requests.get(f"{self.url}/metrics", timeout=METRICS_LIMIT_S)
        except requests.RequestException:
            return 0.0
        told = _KEPT.search(page.text)
        return float(told[1]) / 2**20 if told else 0.0

    def _least_memory(self, pid: int) -> float:
        """The least that the process held within WATCH_S, MB."""
        least_mb = inf
        for _ in range(WATCH_LOOKS):
            with suppress(OSError):
                least_mb = min(least_mb, resident_mb(pid))
            if self._over.wait(WATCH_S / WATCH_LOOKS):
                break
        return least_mb


def resident_mb(pid: int) -> float:
    """Memory of a process. Raises: OSError if it is gone."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_MB


def vitals_of(pid: int, at_s: float) -> Vitals | None:
    """Memory, threads and handles of a process; None when it is gone."""
    try:
        rss_mb = resident_mb(pid)
        threads = sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())
        handles = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return None
    return Vitals(at_s=at_s, rss_mb=rss_mb, threads=threads, handles=handles)


def marked(mark: str) -> list[int]:
    """Ids of processes that were started with the mark, at whatever remove."""
    entry = f"{MARK_VARIABLE}={mark}".encode()
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError):  # gone meanwhile, or somebody else's
                if entry in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
    return found


def _clean_environment(mark: str) -> dict[str, str]:
    """No setting of the operator's own miner leaks in; the mark does."""
    return without_settings(os.environ) | {MARK_VARIABLE: mark}


def log_lines(log_file: Path) -> Sequence[str]:
    """What it logged so far."""
    try:
        return log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ()
