"""Who may ask: addresses, proofs, ages, stakes and replays, by rule and by property."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axon_adapter import bt
from caller_rules import (
    CLOCK_SKEW_S,
    DEFAULT_WAIT_S,
    LONGEST_WAIT_S,
    NS,
    CallerPolicy,
    Claim,
    Neuron,
    NonceMemory,
    address_fault,
    check_age,
    parse_hotkeys,
    priority_of,
    read_claim,
)
from errors import ConfigError, NotAllowed, NotVerified, Overloaded

ALICE = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
BOB = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"
NOW = 1_766_102_700 * NS
WINDOW_S = CLOCK_SKEW_S + LONGEST_WAIT_S


def claim(nonce_ns=NOW, hotkey=ALICE, wait_s=LONGEST_WAIT_S):
    return Claim(
        hotkey=hotkey,
        nonce_ns=nonce_ns,
        uuid="u",
        signature=f"0x{'0' * 128}",
        body_hash="0" * 64,
        wait_s=wait_s,
    )


def headers(**changes):
    named = {
        "hotkey": ALICE,
        "nonce": str(NOW),
        "uuid": "5ecbd69c-1cec-11ee-b0dc-e29ce36fec1a",
        "signature": f"0x{'ab' * 64}",
    }
    given = {f"bt_header_dendrite_{name}": text for name, text in named.items()}
    return {**given, "computed_body_hash": "c" * 64, "timeout": "30.0"} | changes


# ---------------------------------------------------------------- addresses


@given(key=st.binary(min_size=32, max_size=32))
def test_the_address_of_any_key_passes(key):
    assert address_fault(bt.Keypair(public_key=key.hex(), ss58_format=42).ss58_address) is None


@given(
    place=st.integers(0, 47),
    character=st.sampled_from("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz0OIl"),
)
def test_a_mistyped_address_passes_where_bittensor_lets_it_pass_and_nowhere_else(place, character):
    mistyped = ALICE[:place] + character + ALICE[place + 1 :]
    assert (address_fault(mistyped) is None) == bt.utils.is_valid_ss58_address(mistyped)
    assert (address_fault(mistyped) is None) == (mistyped == ALICE)


@given(text=st.text(max_size=60) | st.from_regex(r"5[1-9A-HJ-NP-Za-km-z]{47}", fullmatch=True))
def test_no_other_text_is_an_address(text):
    assert address_fault(text) is not None
    assert not bt.utils.is_valid_ss58_address(text)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("", "has not the form"),
        (f" {ALICE}", "has not the form"),
        (ALICE[:-1], "has not the form"),
        ("15oF4uVJwmo4TdGW7VfQxNLavjCXviqxT9S1MgbjMNHr6Sp5", "has not the form"),  # Polkadot's
        (ALICE[:-1] + "Z", "wrong checksum"),
        ("5" + "z" * 47, "another network"),
    ],
)
def test_a_bad_address_is_explained(address, words):
    assert words in (address_fault(address) or "")


def test_hotkeys_are_read_from_a_list():
    assert parse_hotkeys(f"{ALICE}, {BOB},{ALICE},") == {ALICE, BOB}
    assert parse_hotkeys("") == frozenset()


def test_a_bad_hotkey_in_a_list_is_named():
    with pytest.raises(ConfigError, match=rf"--whitelist.hotkeys: '{BOB[:-1]}' has not the form"):
        parse_hotkeys(f"{ALICE},{BOB[:-1]}")


# ---------------------------------------------------------------- the proof


def test_a_claim_is_read_from_the_headers_of_a_dendrite():
    read = read_claim(headers())
    assert (read.hotkey, read.nonce_ns, read.wait_s) == (ALICE, NOW, 30.0)
    assert read.message(BOB) == (
        f"{NOW}.{ALICE}.{BOB}.5ecbd69c-1cec-11ee-b0dc-e29ce36fec1a.{'c' * 64}"
    )


@pytest.mark.parametrize("name", sorted(set(headers()) - {"timeout"}))
def test_a_missing_or_empty_part_is_named(name):
    without = {key: text for key, text in headers().items() if key != name}
    for given_headers in (without, headers(**{name: ""})):
        with pytest.raises(NotVerified, match=f"header {name} is missing"):
            read_claim(given_headers)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nonce", "-1"),
        ("nonce", "1e18"),
        ("nonce", "1_000"),
        ("nonce", "١٢٣"),  # Arabic digits are digits to Python
        ("nonce", "9" * 20),
        ("nonce", " 5"),
        ("uuid", "a" * 65),
        ("uuid", "a.b"),  # the dot separates the parts of what is signed
        ("signature", "0x" + "ab" * 63),
        ("signature", "ab" * 65),
        ("signature", "0x" + "zz" * 64),
        ("hotkey", "a" * 65),
        ("hotkey", "\x7f"),
    ],
)
def test_a_part_of_another_form_is_named(name, text):
    full = f"bt_header_dendrite_{name}"
    with pytest.raises(NotVerified, match=f"header {full} has not the form"):
        read_claim(headers(**{full: text}))


def test_a_hotkey_that_is_no_address_is_refused():
    with pytest.raises(NotVerified, match=r"hotkey of header .* wrong checksum"):
        read_claim(headers(bt_header_dendrite_hotkey=ALICE[:-1] + "Z"))


@given(st.dictionaries(st.sampled_from(sorted(headers())), st.text(max_size=150)))
def test_whatever_headers_say_a_claim_is_well_formed_or_refused(changes):
    try:
        read = read_claim(headers(**changes))
    except NotVerified:
        return
    assert address_fault(read.hotkey) is None
    assert 0 < read.wait_s <= LONGEST_WAIT_S
    assert read.message(BOB).count(".") == 4


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5", 5.0),
        ("1e9", LONGEST_WAIT_S),
        ("9" * 300, DEFAULT_WAIT_S),
        ("inf", DEFAULT_WAIT_S),
        ("nan", DEFAULT_WAIT_S),
        ("-3", DEFAULT_WAIT_S),
        ("0", DEFAULT_WAIT_S),
        ("soon", DEFAULT_WAIT_S),
        ("None", DEFAULT_WAIT_S),
    ],
)
def test_the_time_that_a_caller_waits_is_bounded(text, seconds):
    assert read_claim(headers(timeout=text)).wait_s == seconds


# ---------------------------------------------------------------- age


@given(
    age_s=st.floats(-1e6, 1e6),
    wait_s=st.floats(0.001, LONGEST_WAIT_S),
)
def test_a_nonce_is_fresh_exactly_within_skew_and_waiting_time(age_s, wait_s):
    asked = claim(NOW - round(age_s * NS), wait_s=wait_s)
    exact = (NOW - asked.nonce_ns) / NS
    if -CLOCK_SKEW_S <= exact <= CLOCK_SKEW_S + wait_s:
        check_age(asked, NOW)
    else:
        with pytest.raises(NotVerified):
            check_age(asked, NOW)


def test_no_timeout_makes_an_old_nonce_young():
    asked = read_claim(headers(timeout="1e12", bt_header_dendrite_nonce=str(NOW - 3600 * NS)))
    with pytest.raises(NotVerified, match="3600 s old and 130 s are allowed"):
        check_age(asked, NOW)


def test_a_nonce_from_the_future_is_refused():
    with pytest.raises(NotVerified, match="3600 s in the future"):
        check_age(claim(NOW + 3600 * NS), NOW)


# ---------------------------------------------------------------- permission


def neuron(stake, *, permit=True):
    return Neuron(uid=1, stake=stake, validator_permit=permit)


stakes = st.floats(0, 1e9)


@given(
    registered=st.none() | st.builds(neuron, stakes, permit=st.booleans()),
    min_stake=stakes,
    allow=st.booleans(),
    permit=st.booleans(),
    listed=st.booleans(),
)
def test_who_may_ask_follows_from_list_stake_and_permit(
    registered, min_stake, allow, permit, listed
):
    policy = CallerPolicy(
        min_stake=min_stake,
        allow_non_registered=allow,
        force_validator_permit=permit,
        whitelist=frozenset({ALICE}) if listed else frozenset({BOB}),
    )
    if listed:
        may = True
    elif registered is None:
        may = allow
    else:
        may = registered.stake > min_stake and (registered.validator_permit or not permit)
    if may:
        stake = registered.stake if registered else 0.0
        assert priority_of(ALICE, registered, policy) == (
            max(stake, min_stake) if listed else stake
        )
    else:
        with pytest.raises(NotAllowed, match=ALICE):
            priority_of(ALICE, registered, policy)


def test_the_reference_miners_limit_is_the_default():
    with pytest.raises(NotAllowed, match="stake of 65000; more than 65000 is needed"):
        priority_of(ALICE, neuron(65_000.0), CallerPolicy())
    assert priority_of(ALICE, neuron(65_001.0, permit=False), CallerPolicy()) == 65_001.0


def test_a_stake_that_is_no_number_is_none():
    with pytest.raises(NotAllowed):
        priority_of(ALICE, neuron(float("nan")), CallerPolicy(min_stake=0.0))


# ---------------------------------------------------------------- replays


def admit(memory, asked, now=NOW, *, is_stranger=False):
    memory.admit(asked, now, is_stranger=is_stranger)


def test_the_same_request_is_admitted_once():
    memory = NonceMemory()
    admit(memory, claim())
    with pytest.raises(NotVerified, match="answered before"):
        admit(memory, claim())
    assert len(memory) == 1


def test_callers_do_not_get_in_each_others_way():
    memory = NonceMemory()
    admit(memory, claim())
    admit(memory, claim(hotkey=BOB))


seconds = st.floats(0, 400, allow_nan=False)


@given(
    sent=st.lists(st.tuples(st.floats(0, WINDOW_S), seconds), max_size=60),
    most=st.integers(1, 8),
)
def test_no_nonce_is_ever_admitted_twice_and_memory_stays_bounded(sent, most):
    memory = NonceMemory(per_caller=most)
    admitted = []
    clock = 0.0
    for age_s, pause_s in sent:
        clock += pause_s / 10
        now = NOW + round(clock * NS)
        asked = claim(now - round(round(age_s) * NS))
        check_age(asked, now)
        try:
            admit(memory, asked, now)
        except NotVerified:
            continue
        admitted.append(asked.nonce_ns)
        assert len(memory) <= most
    assert len(set(admitted)) == len(admitted)


@given(order=st.permutations(range(20)))
def test_requests_that_overtake_each_other_are_all_admitted(order):
    memory = NonceMemory()
    for step in order:
        admit(memory, claim(NOW - step * NS))


def test_what_is_too_old_to_come_again_is_forgotten():
    memory = NonceMemory()
    for step in range(500):
        now = NOW + step * NS
        admit(memory, claim(now), now)
        admit(memory, claim(now, hotkey=BOB), now)
    assert len(memory) <= 2 * (WINDOW_S + 2)


def test_strangers_are_bounded_and_lock_out_nobody_who_is_known():
    memory = NonceMemory(most_strangers=2)
    keys = [bt.Keypair(public_key=f"{index:064x}", ss58_format=42) for index in range(4)]
    for key in keys[:2]:
        admit(memory, claim(hotkey=key.ss58_address), is_stranger=True)
    with pytest.raises(Overloaded, match="2 unregistered callers"):
        admit(memory, claim(hotkey=keys[2].ss58_address), is_stranger=True)
    admit(memory, claim(hotkey=ALICE))
    admit(memory, claim(NOW + 1, hotkey=keys[0].ss58_address), is_stranger=True)
    later = NOW + round(WINDOW_S + 2) * NS
    admit(memory, claim(later, hotkey=keys[3].ss58_address), later, is_stranger=True)
