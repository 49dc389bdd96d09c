"""Who may ask over the axon: proof of origin, age, replays, stake. Pure rules.

A caller signs `nonce.its_hotkey.our_hotkey.uuid.body_hash`; the nonce is its
clock in nanoseconds. The rules go from cheap to dear, and nothing is remembered
of a request before its signature has been checked, so that nobody can use up or
lock out somebody else's identity:

1. `read_claim`: every part of the proof is there and has its form;
2. `check_age`: the nonce is of now, by our clock and a bounded waiting time;
3. the signature itself (its mathematics are bittensor's: `axon_adapter`);
4. `priority_of`: the hotkey may ask, and how urgent it is;
5. `NonceMemory.admit`: this very request was not answered before.

The body is not covered by the signature, so its fields are judged like those of
a stranger (`axon_gate`).
"""

import heapq
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

from errors import ConfigError, NotAllowed, NotVerified, Overloaded

NS: Final = 1_000_000_000

CLOCK_SKEW_S: Final = 10.0  # how far the caller's clock may be off, either way
# Validators take one nonce for a round of all miners, sign for each, then send; so a
# nonce may be as old as the caller is willing to wait, but never older than this.
LONGEST_WAIT_S: Final = 120.0
DEFAULT_WAIT_S: Final = 12.0  # bittensor's, for a caller that says nothing
NONCES_PER_CALLER: Final = 1024
MOST_STRANGERS: Final = 256  # unregistered callers remembered at a time, where any may ask

# ---------------------------------------------------------------- addresses

SS58_PREFIX: Final = 42  # of generic Substrate addresses, the only one bittensor uses
_BASE58: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_ADDRESS: Final = re.compile(rf"5[{_BASE58}]{{47}}")  # so there is one spelling per key
_ADDRESS_BYTES: Final = 35  # prefix, 32 of the public key, 2 of the checksum


def address_fault(address: str) -> str | None:
    """What is wrong with an ss58 address of a hotkey; None if nothing.

    Only the one spelling that bittensor writes passes, so equal keys are equal text.
    Source: the SS58 registry's format, prefix 42, 32-byte keys.
    """
    if not _ADDRESS.fullmatch(address):
        return "has not the form of an ss58 address (48 letters and digits, beginning with 5)"
    number = 0
    for character in address:
        number = number * 58 + _BASE58.index(character)
    raw = number.to_bytes(_ADDRESS_BYTES, "big")
    if raw[0] != SS58_PREFIX:
        return f"is an ss58 address of another network (prefix {raw[0]}, not {SS58_PREFIX})"
    if raw[-2:] != blake2b(b"SS58PRE" + raw[:-2]).digest()[:2]:
        return "has a wrong checksum, so a character is mistyped"
    return None


def parse_hotkeys(text: str) -> frozenset[str]:
    """Addresses from a comma-separated list. Raises: ConfigError naming the first bad one."""
    hotkeys = [part.strip() for part in text.split(",") if part.strip()]
    for hotkey in hotkeys:
        fault = address_fault(hotkey)
        if fault:
            raise ConfigError(
                f"--whitelist.hotkeys: {hotkey[:60]!r} {fault}; copy it from the wallet's list."
            )
    return frozenset(hotkeys)


# ---------------------------------------------------------------- the proof

_HEADER: Final = "bt_header_dendrite_"
_FORMS: Final[Mapping[str, re.Pattern[str]]] = {
    f"{_HEADER}hotkey": re.compile(r"[ -~]{1,64}"),
    f"{_HEADER}nonce": re.compile(r"[0-9]{1,19}"),
    f"{_HEADER}uuid": re.compile(r"[0-9A-Za-z-]{1,64}"),
    f"{_HEADER}signature": re.compile(r"0x[0-9a-fA-F]{128}"),
    "computed_body_hash": re.compile(r"[0-9a-f]{64}"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a request says of its origin; true only once the signature is checked."""

    hotkey: str  # a well-formed ss58 address
    nonce_ns: int  # the caller's clock, Unix nanoseconds
    uuid: str
    signature: str  # 0x and 128 hex digits
    body_hash: str  # 64 hex digits
    wait_s: float  # how long the caller waits for an answer, bounded

    def message(self, own_hotkey: str) -> str:
        """The text that the caller signed, if it meant us."""
        return f"{self.nonce_ns}.{self.hotkey}.{own_hotkey}.{self.uuid}.{self.body_hash}"


def read_claim(headers: Mapping[str, str]) -> Claim:
    """The claim of a request with these headers (names in lower case).

    Raises: NotVerified for a part that is missing or has another form.
    """
    parts = {name: _part(headers, name) for name in _FORMS}
    fault = address_fault(parts[f"{_HEADER}hotkey"])
    if fault:
        raise NotVerified(f"the hotkey of header {_HEADER}hotkey {fault}.")
    return Claim(
        hotkey=parts[f"{_HEADER}hotkey"],
        nonce_ns=int(parts[f"{_HEADER}nonce"]),
        uuid=parts[f"{_HEADER}uuid"],
        signature=parts[f"{_HEADER}signature"],
        body_hash=parts["computed_body_hash"],
        wait_s=_waiting_time(headers.get("timeout")),
    )


def _part(headers: Mapping[str, str], name: str) -> str:
    text = headers.get(name, "")
    if not text:
        raise NotVerified(f"header {name} is missing; requests must be signed by a dendrite.")
    if not _FORMS[name].fullmatch(text):
        raise NotVerified(f"header {name} has not the form that a dendrite gives it.")
    return text


def _waiting_time(text: str | None) -> float:
    """Seconds the caller waits; what cannot be one counts as not said."""
    try:
        seconds = float(text) if text is not None and len(text) <= 32 else DEFAULT_WAIT_S
    except ValueError:
        return DEFAULT_WAIT_S
    return (
        min(seconds, LONGEST_WAIT_S) if math.isfinite(seconds) and seconds > 0 else (DEFAULT_WAIT_S)
    )


def check_age(claim: Claim, now_ns: int) -> None:
    """Raises: NotVerified for a nonce from the future or older than the caller can wait."""
    age_s = (now_ns - claim.nonce_ns) / NS
    if age_s < -CLOCK_SKEW_S:
        raise NotVerified(
            f"the nonce lies {-age_s:.0f} s in the future and {CLOCK_SKEW_S:.0f} s are allowed; "
            "set the clock."
        )
    if age_s > CLOCK_SKEW_S + claim.wait_s:
        raise NotVerified(
            f"the nonce is {age_s:.0f} s old and {CLOCK_SKEW_S + claim.wait_s:.0f} s are allowed; "
            "sign anew."
        )


# ---------------------------------------------------------------- permission


@dataclass(frozen=True, slots=True, kw_only=True)
class Neuron:
    """What the chain says of one registered hotkey."""

    uid: int
    stake: float  # as the metagraph weighs it
    validator_permit: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CallerPolicy:
    """Who may ask. The defaults are the reference miner's."""

    min_stake: float = 65_000.0  # more than this
    allow_non_registered: bool = False
    force_validator_permit: bool = False
    whitelist: frozenset[str] = frozenset()  # hotkeys that may ask whatever the chain says


def priority_of(hotkey: str, neuron: Neuron | None, policy: CallerPolicy) -> float:
    """The urgency of a verified caller: its stake.

    A whitelisted one counts as one with just enough stake, if the chain gives it less.
    Raises: NotAllowed with the rule that keeps it out.
    """
    if hotkey in policy.whitelist:
        return max(policy.min_stake, neuron.stake if neuron else 0.0)
    if neuron is None:
        if policy.allow_non_registered:
            return 0.0
        raise NotAllowed(f"hotkey {hotkey} is not registered on this subnet.")
    if not neuron.stake > policy.min_stake:
        raise NotAllowed(
            f"hotkey {hotkey} has a stake of {neuron.stake:.0f}; more than "
            f"{policy.min_stake:.0f} is needed."
        )
    if policy.force_validator_permit and not neuron.validator_permit:
        raise NotAllowed(f"hotkey {hotkey} has no validator permit.")
    return neuron.stake


# ---------------------------------------------------------------- replays


@dataclass(slots=True, eq=False)
class _Seen:
    """The nonces of one caller that may still come again."""

    is_stranger: bool
    nonces: set[int] = field(default_factory=set)
    by_age: list[int] = field(default_factory=list)  # heap of the same, oldest first
    forgotten: int = -1  # nothing up to this nonce is admitted any more

    def forget(self, before_ns: int, most: int) -> None:
        while self.by_age and (self.by_age[0] < before_ns or len(self.by_age) > most):
            self.forgotten = heapq.heappop(self.by_age)
            self.nonces.discard(self.forgotten)


class NonceMemory:
    """Which requests were answered, per caller, in bounded space. Not thread-safe.

    Nonces may arrive in any order: a caller that asks several things at once is
    not refused because the second overtook the first. A nonce is kept until
    `check_age` would refuse it anyway. A caller that sends more than
    `per_caller` in that time loses its oldest, for itself alone.
    """

    def __init__(
        self, *, per_caller: int = NONCES_PER_CALLER, most_strangers: int = MOST_STRANGERS
    ) -> None:
        self._per_caller = per_caller
        self._most_strangers = most_strangers
        self._seen: dict[str, _Seen] = {}

    def __len__(self) -> int:
        """Nonces remembered, of all callers."""
        return sum(len(seen.nonces) for seen in self._seen.values())

    def admit(self, claim: Claim, now_ns: int, *, is_stranger: bool) -> None:
        """Remember a request whose signature and age were checked.

        `is_stranger`: the caller is on no list, so there may be any number of its kind.
        Raises: NotVerified for one seen before; Overloaded for one stranger too many.
        """
        oldest = now_ns - int((CLOCK_SKEW_S + LONGEST_WAIT_S) * NS)
        seen = self._seen.get(claim.hotkey) or self._newcomer(oldest, is_stranger=is_stranger)
        if claim.nonce_ns in seen.nonces or claim.nonce_ns <= seen.forgotten:
            raise NotVerified("this request was answered before; sign a new one.")
        self._seen[claim.hotkey] = seen
        seen.nonces.add(claim.nonce_ns)
        heapq.heappush(seen.by_age, claim.nonce_ns)
        seen.forget(oldest, self._per_caller)

    def _newcomer(self, oldest: int, *, is_stranger: bool) -> _Seen:
        for hotkey, seen in list(self._seen.items()):
            seen.forget(oldest, self._per_caller)
            if not seen.nonces:
                del self._seen[hotkey]
        strangers = sum(seen.is_stranger for seen in self._seen.values())
        if is_stranger and strangers >= self._most_strangers:
            raise Overloaded(
                f"{strangers} unregistered callers asked in the last minutes; ask again later."
            )
        return _Seen(is_stranger)
