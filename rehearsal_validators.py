"""Validators of a rehearsal: they ask over HTTP, side by side, and judge what they get."""

import hashlib
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

import requests

from rehearsal_plan import Ask, Fate, Pair, Prompt, read_answer

ASKERS: Final = 32  # at one time
THOROUGH_EVERY: Final = 200  # answers between two that are judged number by number


class Validators:
    """Ask, wait, judge: each ask on a thread, as validators do it side by side."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(ASKERS, thread_name_prefix="validator")
        self._pending: set[Future[None]] = set()
        self._lock = threading.Lock()
        self._answers: dict[Pair, int] = {}
        self.asks: list[Ask] = []

    def ask(self, url: str, prompt: Prompt) -> None:
        """Send a prompt off from all its callers at once."""
        self._pending = {entry for entry in self._pending if not entry.done()}
        for _ in range(prompt.callers):
            self._pending.add(self._pool.submit(self._ask, url, prompt))

    def wait(self, seconds: float) -> None:
        """Until every ask under way has its outcome."""
        for done in wait(self._pending, seconds).done:
            done.result()

    def close(self) -> None:
        """Forget what was not sent."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, url: str, prompt: Prompt) -> None:
        began = time.monotonic()
        try:
            response = requests.post(
                f"{url}/predict", json=prompt.body(), timeout=prompt.deadline_s + 10
            )
            seconds = time.monotonic() - began
        except requests.RequestException as error:
            found = Ask(
                prompt=prompt,
                fate=Fate.UNHEARD,
                seconds=time.monotonic() - began,
                reason=type(error).__name__,
            )
        else:
            found = self._judged(prompt, response, seconds)
        with self._lock:
            self.asks.append(found)

    def _judged(self, prompt: Prompt, response: requests.Response, seconds: float) -> Ask:
        if response.status_code != requests.codes.ok:
            reason = f"{response.status_code}: {response.text[:300]}"
            return Ask(prompt=prompt, fate=Fate.REFUSED, seconds=seconds, reason=reason)
        with self._lock:
            number = self._answers[prompt.pair] = self._answers.get(prompt.pair, -1) + 1
        read = read_answer(
            response.content, prompt.request, thoroughly=number % THOROUGH_EVERY == 0
        )
        fate = Fate.LATE if seconds > prompt.deadline_s else Fate.IN_TIME
        return Ask(
            prompt=prompt,
            fate=Fate.INVALID if read.fault else fate,
            seconds=seconds,
            digest=hashlib.sha256(response.content).hexdigest(),
            rung=read.rung,
            anchor=read.anchor,
            reason=read.fault,
        )
