"""One process that sends the same requests as fast as it can, and counts the answers.

    echo '["POST / HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n"]' | python flood.py 127.0.0.1 8091 5

Standard input: a JSON list of whole requests. Output: JSON, how often each status came;
"0" where a connection ended without one.
"""

import asyncio
import json
import re
import sys
import time
from collections import Counter

CONNECTIONS = 16


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> int:
    """Send a request and read its answer whole; the status."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    await reader.readexactly(int(length.group(1)) if length else 0)
    return int(head.split(b" ", 2)[1])


async def one_connection(
    host: str, port: int, requests: list[bytes], until: float, counts: Counter[int]
) -> None:
    """Ask again and again, by a new connection wherever the old one ended."""
    writer = None
    while time.monotonic() < until:
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection(host, port)
            for request in requests:
                counts[await exchange(reader, writer, request)] += 1
        except (OSError, EOFError):
            counts[0] += 1
            if writer is not None:
                writer.close()
            writer = None
    if writer is not None:
        writer.close()


async def flood(host: str, port: int, seconds: float, requests: list[bytes]) -> Counter[int]:
    """Statuses by how often they came."""
    counts: Counter[int] = Counter()
    until = time.monotonic() + seconds
    await asyncio.gather(
        *(one_connection(host, port, requests, until, counts) for _ in range(CONNECTIONS))
    )
    return counts


if __name__ == "__main__":
    sent = [text.encode("latin-1") for text in json.load(sys.stdin)]
    told = asyncio.run(flood(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sent))
    print(json.dumps(told))
