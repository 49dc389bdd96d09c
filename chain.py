"""The chain as the miner needs it: hotkey → uid, stake, permit; and our own address on it.

Answers never wait for the chain: they read the latest frozen snapshot. A
`SyncedChain` takes a new one now and then on a thread of its own, keeps it under
`state/`, goes on with the last known one while the chain cannot be reached, and
publishes our address anew when it differs from what the chain shows. Reading
and publishing are a `ChainReader`'s, bittensor's in `axon_adapter`.
"""

import ipaddress
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Protocol, Self

import numpy as np
import requests

from caller_rules import Neuron
from errors import MinerError, SourceUnavailable, StateError
from state_store import StateStore

STATE_KIND: Final = "chain"
STATE_SCHEMA: Final = 1
SYNC_S: Final = 600.0  # stakes move slowly, and the chain limits how often one may publish
RETRY_S: Final = 60.0
STOP_S: Final = 2.0  # for a reading under way; the thread is then left behind
EXTERNAL_IP_URLS: Final = (
    "https://checkip.amazonaws.com",
    "https://api.ipify.org",
    "https://ipv4.icanhazip.com",
)
LOOKUP_S: Final = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address that callers connect to."""

    ip: str
    port: int

    def __str__(self) -> str:
        return f"{self.ip}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainSnapshot:
    """What the chain said at one moment."""

    taken_at: float  # Unix seconds
    block: int
    neurons: Mapping[str, Neuron]  # by hotkey
    published: Endpoint | None  # where the chain says that we are

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `StateStore` keeps them."""
        neurons = self.neurons.values()
        return {
            "taken_at": self.taken_at,
            "block": self.block,
            "hotkeys": list(self.neurons),
            "uids": np.array([neuron.uid for neuron in neurons], dtype=np.int64),
            "stakes": np.array([neuron.stake for neuron in neurons], dtype=np.float64),
            "permits": np.array([neuron.validator_permit for neuron in neurons], dtype=np.bool_),
            "published": [self.published.ip, self.published.port] if self.published else None,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        columns = zip(
            values["uids"].tolist(),
            values["stakes"].tolist(),
            values["permits"].tolist(),
            strict=True,
        )
        neurons = [
            Neuron(uid=uid, stake=stake, validator_permit=permit) for uid, stake, permit in columns
        ]
        published = values["published"]
        return cls(
            taken_at=values["taken_at"],
            block=values["block"],
            neurons=MappingProxyType(dict(zip(values["hotkeys"], neurons, strict=True))),
            published=Endpoint(*published) if published else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainHealth:
    """How well the chain is known, for a health check."""

    age_s: float | None  # of the latest snapshot; None: none was ever taken
    uid: int | None  # our own there; None: our hotkey is not registered, as far as is known
    fault: str | None  # why the last reading or publishing failed, one sentence

    @property
    def is_registered(self) -> bool | None:
        """Whether our hotkey is; None as long as the chain was never read."""
        return None if self.age_s is None else self.uid is not None


class Chain(Protocol):
    """What answering needs of a chain; called for every request."""

    def snapshot(self) -> ChainSnapshot | None:
        """The latest one; None as long as none was ever taken."""


class ChainReader(Protocol):
    """A connection to a real chain. Used by one thread."""

    def read(self) -> ChainSnapshot:
        """The present state. Raises: ChainUnavailable."""

    def publish(self, endpoint: Endpoint) -> None:
        """Tell the network where we listen. Raises: ChainUnavailable if it refuses."""


class StaticChain:
    """No chain: nobody is registered, so the whitelist alone decides."""

    def snapshot(self) -> ChainSnapshot:
        """The same empty one, always."""
        return _NOBODY


_NOBODY: Final = ChainSnapshot(taken_at=0.0, block=0, neurons=MappingProxyType({}), published=None)


# ---------------------------------------------------------------- a real chain, kept


class SyncedChain:
    """The last known state of a real chain, renewed in the background."""

    def __init__(
        self,
        reader: ChainReader,
        *,
        own_hotkey: str,
        endpoint: Callable[[], Endpoint],
        store: StateStore,
        name: str,
        every_s: float = SYNC_S,
        retry_s: float = RETRY_S,
    ) -> None:
        """`endpoint` says where we can be reached; `name` tells networks apart on disk."""
        self._reader = reader
        self._own_hotkey = own_hotkey
        self._endpoint = endpoint
        self._store = store
        self._name = name
        self._every_s = every_s
        self._retry_s = retry_s
        self._snapshot = self._last_known()
        self._fault: str | None = None
        self._is_registered: bool | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="chain", daemon=True)

    def snapshot(self) -> ChainSnapshot | None:
        """The latest one, however old; None if the chain was never read."""
        return self._snapshot

    @property
    def fault(self) -> str | None:
        """Why the last attempt to renew it failed, one sentence; None if it did not."""
        return self._fault

    def age_s(self) -> float | None:
        """Seconds since the snapshot was taken."""
        return None if self._snapshot is None else time.time() - self._snapshot.taken_at

    def health(self) -> ChainHealth:
        """The chain as it is known now, from memory; any thread may ask."""
        known = self._snapshot
        neuron = known.neurons.get(self._own_hotkey) if known else None
        return ChainHealth(
            age_s=self.age_s(), uid=neuron.uid if neuron else None, fault=self._fault
        )

    def start(self) -> None:
        """Renew now, and again and again."""
        self._thread.start()

    def stop(self) -> None:
        """End, or leave a reading that hangs behind."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_S)

    def sync(self) -> None:
        """Renew once, and publish our address if the chain shows another.

        Raises: ChainUnavailable, SourceUnavailable; the last known snapshot stays.
        """
        snapshot = self._reader.read()
        self._snapshot = snapshot
        self._keep(snapshot)
        self._say_registered(snapshot)
        if self._is_registered:
            endpoint = self._endpoint()
            if snapshot.published != endpoint:
                self._reader.publish(endpoint)
                log.info("published", extra={"endpoint": str(endpoint)})

    def _loop(self) -> None:
        while not self._stopping.is_set():
            self._stopping.wait(self._every_s if self._attempt() else self._retry_s)

    def _attempt(self) -> bool:
        """Renew once; whether it went well. Never raises."""
        try:
            self.sync()
        except MinerError as error:
            fault = str(error)
        except Exception:
            log.exception("chain")
            fault = "the chain could not be read by a fault of the miner."
        else:
            if self._fault is not None:
                log.info("chain is back")
            self._fault = None
            return True
        if fault != self._fault:  # once per outage, not once a minute
            log.warning("%s", fault, extra={"last_known_age_s": self.age_s()})
        self._fault = fault
        return False

    def _say_registered(self, snapshot: ChainSnapshot) -> None:
        neuron = snapshot.neurons.get(self._own_hotkey)
        was, self._is_registered = self._is_registered, neuron is not None
        if neuron is None and was is not False:
            log.warning(
                "hotkey %s is not registered on this subnet, so no validator will ask; register "
                "it with `btcli subnet register`.",
                self._own_hotkey,
            )
        elif neuron is not None and not was:
            log.info("registered", extra={"uid": neuron.uid, "stake": round(neuron.stake)})

    def _keep(self, snapshot: ChainSnapshot) -> None:
        try:
            self._store.save(STATE_KIND, self._name, STATE_SCHEMA, snapshot.to_dict())
        except StateError as error:  # it serves only until the next one
            log.warning("%s", error)

    def _last_known(self) -> ChainSnapshot | None:
        try:
            document = self._store.load(STATE_KIND, self._name, STATE_SCHEMA)
        except StateError as error:
            log.warning("%s", error)
            return None
        return None if document is None else ChainSnapshot.from_dict(document)


# ---------------------------------------------------------------- our own address


def find_external_ip(urls: Sequence[str] = EXTERNAL_IP_URLS, timeout_s: float = LOOKUP_S) -> str:
    """The IPv4 address that the world sees us by, as the first of the services tells.

    Raises: SourceUnavailable if none of them does.
    """
    with requests.Session() as session:
        session.trust_env = False  # a proxy would have its own address told
        for url in urls:
            try:
                answer = session.get(url, timeout=timeout_s)
                answer.raise_for_status()
                return str(ipaddress.IPv4Address(answer.text[:64].strip()))
            except (requests.RequestException, ipaddress.AddressValueError):
                continue
    raise SourceUnavailable(
        f"none of {len(urls)} services told this machine's public address; name it with "
        "--axon.external_ip."
    )
