"""Small model sets of whatever market a test has: trained in a second, and real ones."""

from pathlib import Path
from typing import Final

import pytest

import lgbm_trainer
import path_fitting
from config import Frequency
from domain import MarketHistory
from model_store import publish_set
from protocol import protocol_profile

_DAYS: Final = {Frequency.HF: 4.0, Frequency.LF: 8.0}


def publish_small_set(model_dir: Path, history: MarketHistory) -> None:
    """Train on the last days of a history, trying few path shapes, and publish the set."""
    frequency = history.frequency
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lgbm_trainer, "SHAPE_PROMPTS", dict.fromkeys(Frequency, 3))
        for module in (path_fitting, lgbm_trainer):
            patch.setattr(module, "VARIATIONS", path_fitting.VARIATIONS[:2])
        result = lgbm_trainer.train(
            history, days=_DAYS[frequency], seed=0, profile=protocol_profile("2026-09")
        )
    publish_set(model_dir, history.asset, frequency, result.model_id, result.files)
