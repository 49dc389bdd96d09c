"""Tells in the log of feeds that fail: once while it lasts, and once when it is over.

Several who ask the same hosts, for bars and for prices, share one log. Feeds that
fail for one reason are told in one line: a host that is down takes all of its feeds
along, and most of them were not even asked.
"""

import logging
from collections.abc import Collection, Mapping
from threading import Lock
from typing import Final

log = logging.getLogger(__name__)

_NAMED: Final = 3  # of the other feeds of a line


class FaultLog:
    """What fails now, by who asked. Safe between threads."""

    def __init__(self) -> None:
        self._failing: dict[str, dict[str, str]] = {}  # by event: feed → one sentence
        self._lock = Lock()

    def report(
        self,
        event: str,
        failures: Mapping[str, str],
        asked: Collection[str],
        *,
        over: str = "feed works again",
    ) -> None:
        """Take in what came of the feeds asked, and log what is news.

        `event` is who asked, in the words of the log line, and `over` its end; `failures`
        says of each feed that failed why, in one sentence. Feeds that were not asked stay
        as they were.
        """
        with self._lock:
            mine = self._failing.setdefault(event, {})
            told = self._sentences()
            for sentence, feeds in _by_sentence(failures, failures.keys() - mine.keys()):
                if sentence not in told:
                    log.warning(event, extra=_named(feeds) | {"reason": sentence})
            before = dict(mine)
            for feed in asked:
                mine.pop(feed, None)
            mine |= failures
            told = self._sentences()
            for sentence, feeds in _by_sentence(before, before.keys() - mine.keys()):
                if sentence not in told:
                    log.info(over, extra=_named(feeds))

    def failing(self, event: str) -> dict[str, str]:
        """The feeds that failed when this one last asked them, each with its sentence."""
        with self._lock:
            return dict(self._failing.get(event, {}))

    def _sentences(self) -> set[str]:
        return {sentence for feeds in self._failing.values() for sentence in feeds.values()}


def _by_sentence(
    failures: Mapping[str, str], feeds: Collection[str]
) -> list[tuple[str, list[str]]]:
    """Every sentence with those of the feeds that share it, in their order."""
    sharing: dict[str, list[str]] = {}
    for feed, sentence in failures.items():
        if feed in feeds:
            sharing.setdefault(sentence, []).append(feed)
    return list(sharing.items())


def _named(feeds: list[str]) -> dict[str, str]:
    first, *others = feeds
    if not others:
        return {"feed": first}
    more = len(others) - _NAMED
    return {
        "feed": first,
        "also": ", ".join(others[:_NAMED]) + (f" and {more} more" if more > 0 else ""),
    }
