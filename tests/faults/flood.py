"""One process that sends requests as fast as it can, and counts the answers by reason.

    python flood.py 127.0.0.1 8091

Standard input: lines of JSON, each a list of whole requests that take the place of those
before, as fresher ones are overheard; its end is the end. Output: JSON, how often each
status and reason came; "0" where a connection ended without one.
"""

import asyncio
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterable

CONNECTIONS = 16


class Overheard:
    """The requests that are being sent."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.is_over = False

    def listen(self, lines: Iterable[str]) -> None:
        """Take each line's requests as it comes."""
        for line in lines:
            self.requests = [text.encode("latin-1") for text in json.loads(line)]
        self.is_over = True


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> str:
    """Send a request and read its answer whole; status and reason."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    body = await reader.readexactly(int(length.group(1)) if length else 0)
    status = head.split(b" ", 2)[1].decode()
    return f"{status} {json.loads(body)['message']}" if status != "200" else status


async def one_connection(host: str, port: int, overheard: Overheard, counts: Counter[str]) -> None:
    """Ask again and again, by a new connection wherever the old one ended."""
    writer = None
    while not overheard.is_over:
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection(host, port)
            for request in overheard.requests:
                counts[await exchange(reader, writer, request)] += 1
            await asyncio.sleep(0)  # while nothing is overheard yet, too
        except (OSError, EOFError):
            counts["0"] += 1
            if writer is not None:
                writer.close()
            writer = None
    if writer is not None:
        writer.close()


async def flood(host: str, port: int, overheard: Overheard) -> Counter[str]:
    """Statuses and reasons by how often they came."""
    counts: Counter[str] = Counter()
    connections = (one_connection(host, port, overheard, counts) for _ in range(CONNECTIONS))
    await asyncio.gather(*connections)
    return counts


if __name__ == "__main__":
    heard = Overheard()
    threading.Thread(target=heard.listen, args=(sys.stdin,), daemon=True).start()
    print(json.dumps(asyncio.run(flood(sys.argv[1], int(sys.argv[2]), heard))))
