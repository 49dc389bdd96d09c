"""Round trip of a day's answer over the axon: prepared response against stock synapse.

    python -m benchmarks.axon --source archive --archive-dir bars --model-dir models

Real axons on loopback answer the same real dendrite in turn, from the same engine,
none of them from a cache: the way bittensor means it, a filled synapse returned from the
forward function; the same behind the gzip of the reference miner; and the miner's,
prepared bytes behind the gate.

The round trip is the dendrite's own `process_time`, what a validator holds against
the deadline: from signing the prompt to the decoded answer. A plain HTTP client
that leaves the paths undecoded shows the miner's part of it.
"""

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import httpx
import numpy as np
from starlette.middleware.gzip import GZipMiddleware

from answer_desk import AnswerDesk
from axon_adapter import AxonServer, SimulationInput, bt
from benchmarks.measuring import Row, bench_parser, bench_settings, finish, milliseconds, ratio_row
from caller_rules import CallerPolicy
from chain import StaticChain
from config import NUM_PATHS
from console import run_script, table
from data_fetcher import open_source
from domain import ForecastRequest
from forecast_engine import ForecastEngine
from operator_flags import AxonSettings
from wire_format import encode_prompt_answer, format_iso, parse_iso_minute

HERE = "127.0.0.1"
WAIT_S = 60.0
TURNS = 15
MOST_OF_STOCK = 0.5


class Simulation(bt.Synapse):  # type: ignore[misc]  # bittensor comes without types
    """The network's synapse as its public protocol defines it, nothing made faster."""

    simulation_input: SimulationInput
    simulation_output: tuple[list[float | int] | int, ...] | None = None


def main() -> int:
    """Time all ways in turn."""
    args = bench_parser("Time LF answers over the axon.", "axon").parse_args()
    settings = bench_settings(args)
    engine = ForecastEngine.open(open_source(settings), settings)
    with TemporaryDirectory() as folder, _bench(Path(folder), engine, args.asset.upper()) as bench:
        asyncio.run(bench.run())
        table(
            f"Round trip of an LF answer on loopback, ms, {NUM_PATHS} paths, median of {TURNS}",
            ("way", "round trip", "min", "max", "undecoded", "kB sent", "× stock"),
            [way.row(bench.ways[0]) for way in bench.ways],
        )
        rows = [_row(*bench.ways)]
    return finish("Round trip over the axon", rows, args.rows)


def _row(stock: "Way", _gzipped: "Way", prepared: "Way") -> Row:
    """Wall seconds, as the validator's deadline is: the work is that of several threads."""
    ours, theirs = np.array(prepared.dendrite_s), np.array(stock.dendrite_s)
    return ratio_row(
        ours / theirs,
        what="LF answer to a dendrite",
        against="stock synapse",
        reach=MOST_OF_STOCK,
        at_least=False,
        detail=milliseconds(ours, theirs),
    )


@dataclass
class Way:
    """One axon, and how long its answers took."""

    name: str
    target: Any  # bittensor.AxonInfo
    dendrite_s: list[float] = field(default_factory=list)
    http_s: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)

    def row(self, stock: "Way") -> tuple[str, ...]:
        """The medians, as a line of the table."""
        return (
            self.name,
            f"{1e3 * np.median(self.dendrite_s):.0f}",
            f"{1e3 * min(self.dendrite_s):.0f}",
            f"{1e3 * max(self.dendrite_s):.0f}",
            f"{1e3 * np.median(self.http_s):.0f}",
            f"{np.median(self.sent) / 1e3:.0f}",
            f"{np.median(self.dendrite_s) / np.median(stock.dendrite_s):.2f}",
        )


@dataclass
class Bench:
    """The axons, and who asks them."""

    asset: str
    wallet: Any
    now: Callable[[], int]
    ways: tuple[Way, ...]
    asked: int = 0

    async def run(self) -> None:
        """Ask all in turn, after one prompt each that is not counted."""
        for number in range(TURNS + 1):
            # Of this turn alone: axons hang up on connections that nobody used for 5 s.
            async with bt.Dendrite(wallet=self.wallet) as dendrite:
                for way in self.ways:
                    taken = await self._through_dendrite(dendrite, way)
                    plain, size = await self._through_http(dendrite, way)
                    if number:
                        way.dendrite_s.append(taken)
                        way.http_s.append(plain)
                        way.sent.append(size)

    async def _through_dendrite(self, dendrite: Any, way: Way) -> float:
        answer = await dendrite.forward(
            way.target, self._prompt(), timeout=WAIT_S, deserialize=False
        )
        if answer.dendrite.status_code != 200 or len(answer.simulation_output) != NUM_PATHS + 2:
            raise RuntimeError(f"{way.name}: {answer.dendrite.status_message}")
        return float(answer.dendrite.process_time)

    async def _through_http(self, dendrite: Any, way: Way) -> tuple[float, int]:
        synapse = dendrite.preprocess_synapse_for_request(way.target, self._prompt(), WAIT_S)
        began = perf_counter()
        url = f"http://{HERE}:{way.target.port}/Simulation"
        content = synapse.model_dump()
        headers = synapse.to_headers()
        async with httpx.AsyncClient(timeout=WAIT_S) as http:
            response = await http.post(url, json=content, headers=headers)
        response.raise_for_status()
        return perf_counter() - began, response.num_bytes_downloaded

    def _prompt(self) -> Any:
        """A day from another minute than the last time."""
        self.asked += 1
        asked = SimulationInput(
            asset=self.asset,
            start_time=format_iso(self.now() // 60 * 60 + 60 * (self.asked % 50 + 1)),
            num_simulations=NUM_PATHS,
        )
        return Simulation(simulation_input=asked)


@contextmanager
def _bench(folder: Path, engine: ForecastEngine, asset: str) -> Iterator[Bench]:
    wallet = bt.Wallet(name="bench", hotkey="bench", path=str(folder))
    wallet.create_new_coldkey(use_password=False, overwrite=True, suppress=True)
    wallet.create_new_hotkey(use_password=False, overwrite=True, suppress=True)
    bt.utils.networking.get_external_ip = lambda: "203.0.113.9"  # dendrites look theirs up
    with (
        _stock(engine, wallet) as stock,
        _stock(engine, wallet, gzipped=True) as gzipped,
        _prepared(engine, wallet, folder) as prepared,
    ):
        yield Bench(asset, wallet, engine.now, (stock, gzipped, prepared))


@contextmanager
def _stock(engine: ForecastEngine, wallet: Any, *, gzipped: bool = False) -> Iterator[Way]:
    """As bittensor's template and the reference miner have it, but for the engine."""

    async def forward(synapse: Simulation) -> Simulation:
        asked = synapse.simulation_input
        request = ForecastRequest(
            asset=asked.asset,
            start_ts=parse_iso_minute(asked.start_time),
            increment_s=asked.time_increment,
            length_s=asked.time_length,
            num_paths=asked.num_simulations,
        )
        forecast = await asyncio.to_thread(engine.answer, request)
        synapse.simulation_output = tuple(encode_prompt_answer(forecast))
        return synapse

    axon = bt.Axon(wallet=wallet, port=_free_port(), ip=HERE, external_ip=HERE)
    axon.attach(forward_fn=forward)
    if gzipped:
        axon.app.add_middleware(GZipMiddleware, minimum_size=1024)
    axon.start()
    while not axon.fast_server.started:
        time.sleep(0.01)
    try:
        yield Way("stock synapse, gzip" if gzipped else "stock synapse", axon.info())
    finally:
        axon.stop()


@contextmanager
def _prepared(engine: ForecastEngine, wallet: Any, folder: Path) -> Iterator[Way]:
    desk = AnswerDesk(engine, cache_bytes=0)  # every answer is computed, as the others are
    settings = AxonSettings(
        wallet_name="bench", wallet_hotkey="bench", wallet_path=folder, ip=HERE, port=0,
        external_ip=HERE,
    )  # fmt: skip
    policy = CallerPolicy(whitelist=frozenset({wallet.hotkey.ss58_address}))
    server = AxonServer(settings)
    try:
        server.start(desk, chain=StaticChain(), policy=policy, now=engine.now)
        yield Way("prepared response", server.axon.info())
    finally:
        server.stop()
        desk.close()


def _free_port() -> int:
    with socket.create_server((HERE, 0)) as listener:
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    run_script(main)
