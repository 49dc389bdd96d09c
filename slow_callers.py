"""HTTP connections that do not wait for ever: for servers that strangers can reach.

A connection costs memory and a file handle. One that never sends a whole request, or
sends it drop by drop, would keep both for good.
"""

from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S: Final = 30.0  # a connection without a whole request for that long is closed


class PatientConnection(H11Protocol):
    """Hangs up on who connects and asks nothing, or sends its headers drop by drop.

    Of uvicorn's two kinds it is built on the one that bounds the size of headers.
    Bodies are for the application to time.
    """

    def connection_made(self, transport: Any) -> None:
        """Watch a connection from its first moment on."""
        super().connection_made(transport)
        self.loop.call_later(HEADERS_S, self._look, None)

    def _look(self, last: object) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is last and (last is None or self.cycle.response_complete):
            self.transport.close()
            return
        self.loop.call_later(HEADERS_S, self._look, self.cycle)
