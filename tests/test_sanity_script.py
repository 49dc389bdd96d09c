"""The root script `test_miner.py`: it passes a sound engine and fails a broken one."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from config import Frequency
from data_fetcher import SimulatedSource
from errors import SourceUnavailable, StateError
from forecast_engine import ForecastEngine
from settings import Settings

ROOT = Path(__file__).resolve().parent.parent
BTC_HF = ("BTC", Frequency.HF)


@cache
def script():
    """The script as a module; by path, for its name is one that pytest would collect."""
    spec = importlib.util.spec_from_file_location("sanity_script", ROOT / "test_miner.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sanity_script"] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@cache
def source():
    return SimulatedSource(assets=("BTC", "XAU"), days=45)


def constant(paths):
    return np.repeat(paths[:, :1], paths.shape[1], axis=1)


def white_noise(paths):
    """Every step starts from the centre again."""
    log_paths = np.log(paths)
    noise = log_paths.copy()
    noise[:, 1:] = np.median(log_paths, axis=0)[1:] + np.diff(log_paths, axis=1)
    return np.exp(noise)


def wider(factor):
    def widen(paths):
        centre = np.median(np.log(paths), axis=0)
        return np.exp(centre + factor * (np.log(paths) - centre))

    return widen


def with_a_hole(paths):
    holed = paths.copy()
    holed[5, 7] = np.nan
    return holed


def run_with(monkeypatch, breakage, pairs, *arguments):
    """Run the script's `main` on an engine whose paths went through `breakage`."""

    class Engine(ForecastEngine):
        """Answers without models (a rung of the ladder) for pairs that it calls trained."""

        def trained(self):
            return pairs

        def answer(self, request, *, origin=None):
            sound = super().answer(request, origin=origin)
            return replace(sound, paths=breakage(sound.paths))

    monkeypatch.setattr(script(), "ForecastEngine", Engine)
    monkeypatch.setattr(script(), "open_source", lambda _: source())
    monkeypatch.setattr(sys, "argv", ["test_miner.py", "--source", "simulated", *arguments])
    return script().main()


def words(text):
    """The text of a table, as one line of words."""
    return " ".join(text.split())


def test_a_sound_engine_passes(monkeypatch, capsys):
    pairs = (BTC_HF, ("XAU", Frequency.LF))
    assert run_with(monkeypatch, lambda paths: paths, pairs) == 0
    shown = capsys.readouterr().out
    assert "SIMULATED MARKET" in shown
    assert "failure " not in shown.replace("failures", "")


@pytest.mark.parametrize(
    ("breakage", "check"),
    [
        (constant, "moving"),
        (white_noise, "growth"),
        (wider(2**0.5), "spread"),
        (wider(2**-0.5), "spread"),
        (wider(3.0), "spread overall"),
        (with_a_hole, "prices"),
        (lambda paths: paths[:, :-1], "shape"),
        (lambda paths: 1.05 * paths, "start price"),
    ],
)
def test_a_broken_engine_fails(monkeypatch, capsys, breakage, check):
    assert run_with(monkeypatch, breakage, (BTC_HF,)) == 1
    shown = words(capsys.readouterr().out)
    assert re.search(f"BTC hf {check}[ a-z,]* failure ", shown)


def test_verbose_shows_what_is_in_order_too(monkeypatch, capsys):
    run_with(monkeypatch, lambda paths: paths, (BTC_HF,), "--verbose")
    assert "BTC hf growth ok" in words(capsys.readouterr().out)


def test_a_named_asset_is_checked_alone(monkeypatch, capsys):
    pairs = (BTC_HF, ("XAU", Frequency.HF))
    run_with(monkeypatch, lambda paths: paths, pairs, "--asset", "XAU")
    assert "BTC" not in capsys.readouterr().out


def test_fan_charts_are_drawn_on_request(monkeypatch):
    run_with(monkeypatch, lambda paths: paths, (BTC_HF,), "--plot", "charts")
    assert [path.name for path in Path("charts").iterdir()] == ["BTC_hf.png"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "models has no usable models of any asset for the source simulated; run train"),
        (("--asset", "XAU"), "models has no usable models of XAU for the source simulated"),
    ],
)
def test_what_cannot_be_checked_is_said_in_one_line(arguments, sentence):
    done = subprocess.run(
        [sys.executable, str(ROOT / "test_miner.py"), "--source", "simulated", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"test_miner.py: {sentence}")


def test_a_place_for_charts_that_is_none_is_known_before_the_work(monkeypatch):
    Path("notes").write_text("no folder")
    with pytest.raises(StateError, match="notes is not a folder; name one with --plot"):
        run_with(monkeypatch, lambda paths: paths, (BTC_HF,), "--plot", "notes")


def test_the_same_seed_finds_the_same(monkeypatch, capsys):
    settings = Settings(source="simulated")
    engine = ForecastEngine.open(source(), settings)
    first, second = (script().examine(engine, *BTC_HF, settings) for _ in range(2))
    assert first.results == second.results


def test_an_unreachable_feed_stops_the_check_with_its_sentence(monkeypatch, tmp_path):
    nowhere = "http://127.0.0.1:1"
    names = ("binance", "hyperliquid", "pyth_history", "pyth_router", "pyth_latest")
    config = tmp_path / "nowhere.toml"
    config.write_text("".join(f'{name}_url = "{nowhere}"\n' for name in names))
    arguments = ["--source", "venue", "--asset", "BTC", "--config", str(config)]
    monkeypatch.setattr(sys, "argv", ["test_miner.py", *arguments])
    with pytest.raises(SourceUnavailable, match=r"binance at http://127\.0\.0\.1:1 cannot be"):
        script().main()
