"""Constants and facts of the specification."""

import pytest

import config
from config import ASSETS, FREQUENCIES, Frequency


def test_the_constants_of_the_specification_have_their_names_and_values():
    assert config.HF_RECENCY_HALF_LIFE_DAYS == 14
    assert config.LF_RECENCY_HALF_LIFE_DAYS == 60
    assert config.HF_LEADS == [60, 120, 300, 900, 1800, 3600]
    assert config.LF_LEADS == [300, 1800, 10800, 86400]
    assert config.HF_RETRAIN_INTERVAL_DAYS == 1
    assert config.LF_RETRAIN_INTERVAL_DAYS == 3
    assert config.HISTORY_DAYS == 365
    assert config.NUM_PATHS == 1000


@pytest.mark.parametrize("frequency", Frequency)
def test_the_parts_of_a_frequency_fit_together(frequency):
    spec = FREQUENCIES[frequency]
    assert spec.frequency is frequency
    assert spec.prompt_length_s == spec.leads_s[-1] == spec.horizon_bars * spec.bar_s
    assert spec.prompt_increment_s == spec.bar_s
    assert spec.bucket_ends[-1] == spec.horizon_bars
    assert list(spec.bucket_ends) == sorted(set(spec.bucket_ends))
    assert all(lead % spec.bar_s == 0 for lead in spec.leads_s)
    assert spec.bars_per_day * spec.bar_s == 86_400


def test_feed_identifiers_are_distinct_hexadecimal_numbers():
    ids = [spec.pyth_id for spec in ASSETS.values() if spec.pyth_id]
    assert len(set(ids)) == len(ids)
    assert all(len(bytes.fromhex(text)) == 32 for text in ids)
