"""Entries of the ledger, where a test does not care what most of them says."""

from typing import Any

import numpy as np

from domain import ForecastRequest
from ledger import AnswerEntry, PromptEntry
from protocol import protocol_profile

HOUR = protocol_profile("2026-09").competitions["crypto-1h"]


def prompt_entry(request: ForecastRequest, **changes: Any) -> PromptEntry:
    """A prompt of a validator that was answered by the models."""
    values: dict[str, Any] = {
        "at": request.start_ts - 50.5,
        "caller": "5Validator",
        "transport": "axon",
        "request": request,
        "origin": None,
        "outcome": "computed",
        "rung": "lightgbm",
        "price_age_s": 7,
        "ms": 41.5,
        "size": 60_000,
        "reason": None,
    }
    return PromptEntry(**(values | changes))


def hour_answer(seed: int, n_paths: int) -> AnswerEntry:
    """An answer to an HF prompt: random walks."""
    steps = np.random.default_rng(seed).normal(0, 1e-3, (n_paths, 61))
    return AnswerEntry(
        frequency="hf",
        rung="lightgbm",
        model_id="BTC-hf-1",
        paths=98_000 * np.exp(np.cumsum(steps, axis=1)),
        competition=HOUR,
    )
