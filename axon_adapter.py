"""The bittensor side: the `Simulation` synapse, the axon that serves it, wallet and chain.

The only module that imports bittensor, and imported only by who needs it: a miner
that answers over HTTP starts without. Verification is `axon_gate`'s, answers are
the desk's; what bittensor's own code still does here is routing and the headers
of an answer.

    axon = AxonServer(operator.axon)      # wallet and port, before any work
    with serving(axon, desk, operator, store, now=engine.now):
        print(axon.port)
"""

# No `from __future__ import annotations` here: bittensor reads them at run time.
import asyncio
import errno
import gzip
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from types import MappingProxyType
from typing import Any, Final, Self

import orjson
import uvicorn
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from answer_desk import AnswerDesk, Caller, prompt_budget
from axon_gate import (
    CALL_KEY,
    MAX_HEADER_BYTES,
    AxonCall,
    AxonGate,
    GateKeeper,
    prompt_fields,
    refusal_response,
    status_of,
)
from caller_rules import CallerPolicy, Claim, Neuron
from chain import (
    Chain,
    ChainSnapshot,
    Endpoint,
    StaticChain,
    SyncedChain,
    find_external_ip,
)
from domain import Forecast
from errors import ChainUnavailable, ConfigError, MinerError, RequestError, TooLate
from miner_facts import AxonFacts
from operator_flags import (
    AXON_REQUIREMENTS,
    AxonSettings,
    ChainKind,
    ChainSettings,
    OperatorSettings,
)
from settings import address_shown
from slow_callers import PatientConnection
from state_store import StateStore
from wire_format import Encoder, encode_prompt_json

log = logging.getLogger(__name__)

TRANSPORT: Final = "axon"
GZIP_LEVEL: Final = 1  # half the bytes for a few hundredths of a second
# Longer than the pools of dendrites (15 s) and of validators (5 s) keep a connection, so
# that none is closed under a prompt that is just being sent.
KEEP_ALIVE_S: Final = 20
GRACE_S: Final = 3  # for answers under way when the axon is told to stop
STOP_MARGIN_S: Final = 2.0
BACKLOG: Final = 256


# ---------------------------------------------------------------- bittensor, tamed


def _import_bittensor() -> Any:
    """Bittensor, without what importing it does to the process around it.

    It would read the command line as its own, silence every other logger, and
    print its log lines to stdout. Raises: ConfigError if it is not installed.
    """
    os.environ["BT_NO_PARSE_CLI_ARGS"] = "1"
    logging.getLogger("bittensor").setLevel(logging.WARNING)  # it speaks while it is imported
    before = {logger: (logger.level, list(logger.handlers)) for logger in _loggers()}
    try:
        import bittensor
    except ImportError as error:
        raise ConfigError(
            f"the axon needs bittensor, and importing it failed ({error}); run "
            f"`python -m pip install -r {AXON_REQUIREMENTS}`."
        ) from error
    for logger in _loggers():
        # its own libraries: warnings concern an operator, their chatter does not
        level, handlers = before.get(logger, (logging.WARNING, []))
        logger.setLevel(level)
        logger.handlers[:] = handlers
    return bittensor


def _loggers() -> list[logging.Logger]:
    known = logging.root.manager.loggerDict.values()
    return [logger for logger in known if isinstance(logger, logging.Logger)]


bt: Any = _import_bittensor()


# ---------------------------------------------------------------- the synapse


class SimulationInput(BaseModel):
    """A prompt as validators write it. The defaults are theirs, for an empty announcement."""

    asset: str = "BTC"
    start_time: str = ""
    time_increment: int = 300
    time_length: int = 86_400
    num_simulations: int = 1


class Simulation(bt.Synapse):  # type: ignore[misc]  # bittensor comes without types
    """The one question of the network, and its answer.

    `simulation_output`: start, increment, then one list of prices per path.
    """

    simulation_input: SimulationInput
    simulation_output: tuple[list[float | int] | int, ...] | None = None

    def deserialize(self) -> Any:
        """What a dendrite returns to its caller."""
        return self.simulation_output

    def get_required_fields(self) -> list[str]:
        """As bittensor's, which derives a JSON schema for it nine times an answer, for 25 ms."""
        return ["simulation_input"]


def _encode(forecast: Forecast) -> bytes:
    """The synapse as JSON, with what depends on the prompt alone: all callers share the bytes."""
    return orjson.dumps(
        {
            "name": Simulation.__name__,
            "simulation_input": prompt_fields(forecast.request),
            "simulation_output": orjson.Fragment(encode_prompt_json(forecast)),
        }
    )


def _encode_gzip(forecast: Forecast) -> bytes:
    return gzip.compress(_encode(forecast), GZIP_LEVEL, mtime=0)


AXON_JSON: Final = Encoder("axon", _encode)
AXON_GZIP: Final = Encoder("axon-gzip", _encode_gzip)


# ---------------------------------------------------------------- the wallet


def load_wallet(settings: AxonSettings) -> Any:
    """The wallet, its hotkey readable without a question to the terminal.

    Raises: ConfigError if there is none, or it is encrypted or damaged.
    """
    folder = settings.wallet_path.expanduser()
    wallet = bt.Wallet(name=settings.wallet_name, hotkey=settings.wallet_hotkey, path=str(folder))
    where = f"hotkey {settings.wallet_hotkey!r} of wallet {settings.wallet_name!r} in {folder}"
    if not wallet.hotkey_file.exists_on_device():
        raise ConfigError(
            f"{where} does not exist; name it with --wallet.name, --wallet.hotkey and "
            "--wallet.path, or make one with `btcli wallet new_hotkey`."
        )
    if wallet.hotkey_file.is_encrypted():
        raise ConfigError(
            f"{where} is encrypted and nobody is there to type its password; make a hotkey "
            "without one, as hotkeys usually are."
        )
    try:
        _ = wallet.hotkey.ss58_address
    except Exception as error:  # noqa: BLE001  # its kinds of errors are not exported
        raise ConfigError(
            f"{where} cannot be read ({type(error).__name__}); restore it from its mnemonic."
        ) from None  # nothing of the file's content may reach a log
    return wallet


# ---------------------------------------------------------------- the chain


class BittensorReader:
    """A connection to a subnet, made anew after every failure."""

    def __init__(self, axon: Any, settings: ChainSettings) -> None:
        self._axon = axon
        self._settings = settings
        self._subtensor: Any = None

    def read(self) -> ChainSnapshot:
        """The subnet as it is now. Raises: ChainUnavailable."""
        try:
            if self._subtensor is None:
                self._subtensor = bt.Subtensor(network=self._settings.network)
            metagraph = self._subtensor.metagraph(self._settings.netuid)
            return snapshot_of(metagraph, self._axon.wallet.hotkey.ss58_address)
        except Exception as error:
            self._hang_up()
            subnet = f"{self._settings.netuid} of {address_shown(self._settings.network)}"
            raise ChainUnavailable(
                f"subnet {subnet} cannot be read ({self._first_line(error)}); answering goes on "
                "with the last known stakes."
            ) from error

    def publish(self, endpoint: Endpoint) -> None:
        """Publish where we listen. Raises: ChainUnavailable if the chain does not take it."""
        self._axon.external_ip, self._axon.external_port = endpoint.ip, endpoint.port
        try:
            response = self._subtensor.serve_axon(netuid=self._settings.netuid, axon=self._axon)
        except Exception as error:
            self._hang_up()
            raise _unpublished(endpoint, self._first_line(error)) from error
        if not response.success:
            raise _unpublished(endpoint, str(response.message))

    def _first_line(self, error: Exception) -> str:
        """What it says, without the key that an address may hold."""
        network = self._settings.network
        said = f"{type(error).__name__} {error}".replace(network, address_shown(network))
        return said.strip().split("\n")[0][:200]

    def _hang_up(self) -> None:
        subtensor, self._subtensor = self._subtensor, None
        try:
            if subtensor is not None:
                subtensor.close()
        except Exception:
            log.debug("closing a broken connection failed", exc_info=True)


def snapshot_of(metagraph: Any, own_hotkey: str) -> ChainSnapshot:
    """What matters here of a bittensor metagraph."""
    hotkeys = list(metagraph.hotkeys)
    columns = zip(
        metagraph.uids.tolist(),
        metagraph.S.tolist(),
        metagraph.validator_permit.tolist(),
        strict=True,
    )
    neurons = [
        Neuron(uid=int(uid), stake=float(stake), validator_permit=bool(permit))
        for uid, stake, permit in columns
    ]
    published = None
    if own_hotkey in hotkeys:
        axon = metagraph.axons[hotkeys.index(own_hotkey)]
        published = Endpoint(str(axon.ip), int(axon.port)) if axon.port else None
    return ChainSnapshot(
        taken_at=time.time(),
        block=metagraph.block.item(),
        neurons=MappingProxyType(dict(zip(hotkeys, neurons, strict=True))),
        published=published,
    )


def _unpublished(endpoint: Endpoint, reason: str) -> ChainUnavailable:
    return ChainUnavailable(
        f"the chain did not take our address {endpoint} ({reason[:200]}); it is tried again."
    )


# ---------------------------------------------------------------- the axon


class AxonServer:
    """A bittensor axon that listens on a thread of its own, behind the gate."""

    def __init__(self, settings: AxonSettings) -> None:
        """Bind and load the wallet, so that what is wrong with them shows at once.

        Raises: ConfigError.
        """
        self._settings = settings
        self._wallet = load_wallet(settings)
        self._listener = _listen(settings.ip, settings.port)
        # Asked for once: a server that ends closes its socket, and must still be named.
        self._port = int(self._listener.getsockname()[1])
        # Given here, so that bittensor does not ask the internet for it.
        self.axon: Any = bt.Axon(
            wallet=self._wallet,
            port=self.port,
            external_ip=settings.external_ip or "0.0.0.0",  # noqa: S104
        )
        self._chain: Chain | None = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The TCP port it listens on."""
        return self._port

    @property
    def hotkey(self) -> str:
        """Our own address, which callers sign for."""
        return str(self._wallet.hotkey.ss58_address)

    @property
    def is_serving(self) -> bool:
        """Whether prompts are being answered, for a health check."""
        return self._thread is not None and self._thread.is_alive()

    def facts(self) -> AxonFacts:
        """How the axon and its chain are, for a health check; any thread may ask."""
        chain = self._chain.health() if isinstance(self._chain, SyncedChain) else None
        return AxonFacts(port=self.port, is_up=self.is_serving, chain=chain)

    def endpoint(self) -> Endpoint:
        """What to publish. Raises: SourceUnavailable if our address cannot be found."""
        settings = self._settings
        return Endpoint(
            settings.external_ip or find_external_ip(), settings.external_port or self.port
        )

    def start(
        self, desk: AnswerDesk, *, chain: Chain, policy: CallerPolicy, now: Callable[[], float]
    ) -> Self:
        """Serve until `stop`. `now`: the market's present, Unix seconds."""
        self._chain = chain
        self.axon.attach(forward_fn=_forward(desk, self.hotkey, now), verify_fn=_verified)

        def turned_away(who: str, reason: str | MinerError) -> None:
            desk.turn_away(Caller(name=who, transport=TRANSPORT), reason, now=now())

        keeper = GateKeeper(
            own_hotkey=self.hotkey,
            body_hash=Simulation(simulation_input=SimulationInput()).body_hash,
            is_signed=is_signed,
            chain=chain,
            policy=policy,
            turned_away=turned_away,
        )
        self._server = uvicorn.Server(_server_config(AxonGate(self.axon.app, keeper)))
        self._thread = threading.Thread(
            target=self._server.run, args=([self._listener],), name="axon", daemon=True
        )
        self._thread.start()
        log.info("axon listens", extra={"port": self.port, "hotkey": self.hotkey})
        return self

    def stop(self) -> None:
        """Finish the answers under way and close the port; once more does nothing."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(GRACE_S + STOP_MARGIN_S)
        self._listener.close()
        self.axon.thread_pool.shutdown(wait=False)


def _listen(ip: str, port: int) -> socket.socket:
    """A listening socket. Raises: ConfigError."""
    try:
        listener = _bound(ip, port)
    except OSError as error:
        where = f"the axon cannot listen on {ip} port {port}"
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"{where}, another program does; end it (`ss -ltnp 'sport = :{port}'` names it) "
                "or choose another port with --axon.port, which the chain then publishes."
            ) from None
        if error.errno != errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"{where} ({error.strerror or error}); choose another with --axon.ip and "
                "--axon.port."
            ) from None
        # The reference miner listens everywhere, whatever --axon.ip says, so files for
        # machines behind a router may hold an address that is not theirs.
        log.warning("%s is no address of this machine; the axon listens on all of them.", ip)
        return _listen("0.0.0.0", port)  # noqa: S104
    # Inherited by every connection; without it each answer waits 40 ms for an acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _bound(ip: str, port: int) -> socket.socket:
    family = socket.getaddrinfo(ip, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((ip, port), family=family, backlog=BACKLOG)


def _server_config(gate: AxonGate) -> uvicorn.Config:
    return uvicorn.Config(
        gate,
        http=PatientConnection,
        ws="none",
        lifespan="off",
        log_config=None,  # the scripts decide where log lines go
        log_level="critical",  # what strangers send to an open port is no news
        access_log=False,
        server_header=False,
        proxy_headers=False,  # who asks is who connects
        h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )


def is_signed(claim: Claim, message: str) -> bool:
    """Whether the claim's hotkey signed the message."""
    try:
        return bool(bt.Keypair(ss58_address=claim.hotkey).verify(message, claim.signature))
    except Exception:  # noqa: BLE001  # the library raises for keys and signatures off the curve
        return False


def _verified(synapse: Simulation) -> None:
    """Nothing is left to verify behind the gate.

    Given because bittensor's own check would take its place: it refuses a prompt
    that another one overtook, and remembers callers without bound.
    """


def _forward(desk: AnswerDesk, hotkey: str, now: Callable[[], float]) -> Callable[..., Any]:
    """The function that bittensor routes prompts to."""

    async def forward(synapse: Simulation, request: Request) -> Response:  # noqa: ARG001  # names the route
        call: AxonCall = request.scope[CALL_KEY]
        try:
            body = await _answer(desk, call, now())
        except MinerError as error:
            return _refused(status_of(error), str(error), call, hotkey)
        except Exception:  # noqa: BLE001  # the desk has logged it
            reason = "the answer failed by a fault of the miner; its log has more."
            return _refused(500, reason, call, hotkey)
        response = Response(body, media_type="application/json")
        response.headers["vary"] = "accept-encoding"
        if call.accepts_gzip:
            response.headers["content-encoding"] = "gzip"
        return _prepared(response, 200, "Success", call, hotkey)

    return forward


async def _answer(desk: AnswerDesk, call: AxonCall, now: float) -> bytes:
    """The encoded answer. Raises: MinerError, TooLate also if the caller has stopped waiting."""
    caller = Caller(name=call.claim.hotkey, transport=TRANSPORT)
    try:
        budget_s = prompt_budget(call.request.start_ts, now)
    except RequestError as error:
        desk.turn_away(caller, error, now=now, request=call.request)
        raise
    answer = desk.answer(
        call.request,
        encoder=AXON_GZIP if call.accepts_gzip else AXON_JSON,
        caller=caller,
        now=now,
        priority=call.priority,
        budget_s=budget_s,
    )
    wait_s = call.claim.wait_s
    try:
        return (await asyncio.wait_for(answer, wait_s)).body
    except TimeoutError:
        raise TooLate(
            f"the answer took longer than the {wait_s:g} s that the caller waits."
        ) from None


def _refused(status: int, reason: str, call: AxonCall, hotkey: str) -> Response:
    return _prepared(refusal_response(status, reason), status, reason, call, hotkey)


def _prepared(
    response: Response, status: int, message: str, call: AxonCall, hotkey: str
) -> Response:
    """The response with a synapse whose headers bittensor adds; its output stays empty.

    A filled one would be encoded once more, number by number.
    """
    readable = "".join(character if " " <= character <= "~" else "?" for character in message)
    response.synapse = Simulation(  # type: ignore[attr-defined]  # bittensor looks for it there
        name=Simulation.__name__,
        timeout=call.claim.wait_s,
        simulation_input=SimulationInput(),
        dendrite=bt.TerminalInfo(hotkey=call.claim.hotkey, nonce=call.claim.nonce_ns),
        axon=bt.TerminalInfo(hotkey=hotkey, status_code=status, status_message=readable[:200]),
    )
    return response


# ---------------------------------------------------------------- all together


@contextmanager
def serving(
    server: AxonServer,
    desk: AnswerDesk,
    operator: OperatorSettings,
    store: StateStore,
    *,
    now: Callable[[], float],
) -> Iterator[None]:
    """The axon answers for as long as the block runs, with its chain kept in `store`."""
    synced = None
    try:
        if operator.chain.kind is ChainKind.BITTENSOR:
            synced = SyncedChain(
                BittensorReader(server.axon, operator.chain),
                own_hotkey=server.hotkey,
                endpoint=server.endpoint,
                store=store,
                name=f"{_file_name(operator.chain.network)}_{operator.chain.netuid}",
            )
            synced.start()
        server.start(desk, chain=synced or StaticChain(), policy=operator.policy, now=now)
        yield
    finally:
        server.stop()
        if synced is not None:
            synced.stop()


def _file_name(network: str) -> str:
    """A network's name or URL as part of a file's name, which must not tell a key."""
    shown = address_shown(network)
    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in shown).strip("-")
    return plain if shown == network else f"{plain}-{sha256(network.encode()).hexdigest()[:8]}"
