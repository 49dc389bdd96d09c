"""Keys that name what a file's content depends on: settings, bars and the program itself.

Work that is kept under such a key is found again as long as nothing that it depends on
has changed, and never mixed with the work of other settings or of other code.
"""

import ast
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from domain import Bars, MarketHistory

PROGRAM: Final = Path(__file__).resolve().parent
LIBRARIES: Final = ("lightgbm", "numpy", "scipy")
KEY_LENGTH: Final = 16


def content_key(*parts: Any) -> str:
    """A short hash of plain values."""
    data = orjson.dumps(parts, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    return sha256(data).hexdigest()[:KEY_LENGTH]


def bars_key(history: MarketHistory) -> str:
    """A short hash of every bar of a history."""
    digest = sha256()
    for bars in (history.bars, history.price_bars):
        digest.update(f"{bars.feed} {bars.bar_s} {len(bars)}".encode())
        for column in _columns(bars):
            digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()[:KEY_LENGTH]


def _columns(bars: Bars) -> tuple[Any, ...]:
    return (bars.open_ts, bars.open, bars.high, bars.low, bars.close, bars.volume)


@cache
def program_key(module: str) -> str:
    """A short hash of a module's source and data, of all it imports here, and of libraries.

    The data file of a module has its name and ends in `.toml`.
    """
    digest = sha256()
    for name in sorted(_imported_from(module)):
        digest.update(name.encode())
        digest.update((PROGRAM / f"{name}.py").read_bytes())
        data = PROGRAM / f"{name}.toml"
        digest.update(data.read_bytes() if data.exists() else b"")
    digest.update(repr([(name, version(name)) for name in LIBRARIES]).encode())
    return digest.hexdigest()[:KEY_LENGTH]


def _imported_from(module: str) -> set[str]:
    """The module and every project module that it reaches by imports."""
    reached, waiting = set[str](), {module}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        named = _names_imported((PROGRAM / f"{name}.py").read_bytes())
        waiting |= {found for found in named if (PROGRAM / f"{found}.py").exists()} - reached
    return reached


def _names_imported(source: bytes) -> set[str]:
    names = set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names
