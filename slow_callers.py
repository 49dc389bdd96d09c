"""HTTP connections that do not wait for ever, nor without number: for what strangers reach.

A connection costs memory and a file handle. One that never sends a whole request,
sends it drop by drop, or never reads its answer would keep both for good; and as many
as anybody likes would leave none for an honest caller.
"""

import asyncio
from collections import Counter
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S: Final = 30.0  # without a whole request, or with an unread answer, for that long: closed
MOST_CONNECTIONS: Final = 512  # of one server at once; a process may usually open 1024 files
MOST_UNREAD_BYTES: Final = 384 * 1024 * 1024  # of answers: a hundred and more of the largest usual
_BODY: Final = b'{"error": "too many connections are open at this moment; come again later."}'
_REFUSAL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 5\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(_BODY), _BODY)
)


class PatientConnection(H11Protocol):
    """Hangs up on who asks nothing, sends or reads too slowly, or has connections to spare.

    Of uvicorn's two kinds it is built on the one that bounds the size of headers.
    Bodies are for the application to time.
    """

    def connection_made(self, transport: Any) -> None:
        """Watch a connection from its first moment on, or refuse it if there are too many."""
        super().connection_made(transport)
        self._since = self._unread_since = self.loop.time()
        self._host = self.client[0] if self.client else ""
        self._next_look: asyncio.TimerHandle | None = None
        if len(self.connections) > MOST_CONNECTIONS and not self._make_room():
            transport.write(_REFUSAL)
            transport.close()
            return
        self._watch(0)

    def connection_lost(self, exc: Exception | None) -> None:
        """Be forgotten at once: one that waits for its next look takes memory till then."""
        super().connection_lost(exc)
        if self._next_look is not None:
            self._next_look.cancel()

    def data_received(self, data: bytes) -> None:
        """Nothing more is read of a connection that is being closed."""
        if not self.transport.is_closing():
            super().data_received(data)

    def _watch(self, unread: int) -> None:
        self._next_look = self.loop.call_later(HEADERS_S, self._look, self.cycle, unread)

    def _look(self, last: object, was_unread: int) -> None:
        if self not in self.connections:
            return
        unread = self.transport.get_write_buffer_size()
        if self.cycle is last and unread and was_unread:
            self.transport.abort()
            return
        is_idle = self.cycle is last and (last is None or self.cycle.response_complete)
        if is_idle and not self.transport.is_closing():
            self.transport.close()
        self._watch(unread)

    def pause_writing(self) -> None:
        """An answer begins to wait to be read: see that not too much does.

        Cut is what has waited longest, of the host for which most is waiting.
        """
        super().pause_writing()
        self._unread_since = self.loop.time()
        waiting = Counter[str]()
        unread = [other for other in self._all() if other.flow.write_paused]
        for other in unread:
            waiting[other._host] += other.transport.get_write_buffer_size()
        if waiting.total() > MOST_UNREAD_BYTES:
            (most, _), *_ = waiting.most_common(1)
            slowest = [other for other in unread if other._host == most]
            min(slowest, key=lambda other: other._unread_since).transport.abort()

    def _make_room(self) -> bool:
        """Cut a connection on which it is the caller's turn; whether there is one.

        The oldest of the host that has the most, if that has no fewer than the
        newcomer's: who opens hundreds closes his own, and who has one keeps it.
        """
        share = Counter(other._host for other in self._all())
        spare = [
            other
            for other in self._all()
            if other is not self and other._is_callers and share[other._host] >= share[self._host]
        ]
        if not spare:
            return False
        oldest = max(spare, key=lambda other: (share[other._host], -other._since))
        self.connections.discard(oldest)
        oldest.transport.abort()
        return True

    def _all(self) -> "list[PatientConnection]":
        return [other for other in self.connections if isinstance(other, PatientConnection)]

    @property
    def _is_callers(self) -> bool:
        """Whether the caller is to act: no answer is being made."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body
