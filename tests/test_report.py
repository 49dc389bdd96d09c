"""The page of a back-test: complete, self-contained, true to its document, safe to open."""

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import attribution
import report
from attribution import Attribution, Loss, Part
from config import FREQUENCIES, Frequency
from domain import Bars, MarketHistory
from errors import StateError
from market_view import prior_view
from protocol import protocol_profile
from report import EXPLAIN_STEPS, Insight, explain_market, render, write_report
from tests.test_report_numbers import START_TS, entry, totals

SETTINGS = {"source": "archive", "profile": "2026-09", "seed": 0, "baselines": ["ewma_t", "har"]}
HEADINGS = (
    "When",
    "Where in the score",
    "Calibration",
    "What the score is lost to",
    "The worst prompts",
)
VOID = {"meta", "br", "link", "img", "input", "hr"}


def document(*markets, **settings):
    return {"schema": 1, "settings": SETTINGS | settings, "markets": list(markets)}


def insight(source, words="× 1.00"):
    losses = tuple(
        Loss(part=part, lost_bp=12.3, error_bp=2.0, expected_bp=1.5, hindsight=words)
        for part in Part
    )
    fans = {prompt["start_ts"]: "<svg><title>fan</title></svg>" for prompt in source["prompts"]}
    return Insight(attribution=Attribution(prompts=24, score=500.0, losses=losses), fans=fans)


class Page(HTMLParser):
    """What a browser would find: tags, texts by section, attributes; complains of bad nesting."""

    def __init__(self, text):
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.sections: dict[str, list[str]] = {}
        self.section = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
            self.sections[self.section] = []

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.section and data.strip():
            self.sections[self.section].append(data.strip())


@pytest.fixture(scope="module")
def sources():
    return tuple(
        entry(prompts=60, spacing_s=3 * 3600, asset=asset, frequency=frequency)
        for asset, frequency in (("BTC", "hf"), ("ETH", "lf"))
    )


@pytest.fixture(scope="module")
def text(sources):
    hour, day = sources
    return render(document(hour, day), {"BTC hf": insight(hour), "ETH lf": insight(day)})


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.mark.parametrize("name", ["btc-hf", "eth-lf"])
def test_every_market_has_every_section(page, name):
    texts = page.sections[name]
    assert [heading for heading in HEADINGS if heading not in texts] == []
    for words in ("by hour of the start", "by weekday", "by interval", "over time", "(PIT)"):
        assert any(words in found for found in texts), words


def test_the_page_has_a_summary_rewards_and_a_guide(page):
    assert {"summary", "rewards", "reading"} <= set(page.sections)
    assert "crypto-1h" in page.sections["rewards"]
    assert "crypto-24h" in page.sections["rewards"]


def test_the_page_loads_nothing(text, page):
    assert not re.search(r"https?:|//[a-z]", text)
    assert page.tags.keys().isdisjoint({"script", "link", "iframe", "object", "embed", "img"})
    refers = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert all(value.startswith("#") for value in refers)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "@import" not in text


def test_every_reference_has_its_target_and_no_name_is_given_twice(page, text):
    names = Counter(value for name, value in page.attributes if name == "id")
    assert [name for name, count in names.items() if count > 1] == []
    targets = {value[1:] for name, value in page.attributes if name == "href"}
    assert targets | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(names)


def test_every_colour_is_defined_light_and_dark(text):
    light, dark = re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL)
    used = set(re.findall(r"var\(--([a-z0-9-]+)", text))
    assert used <= set(re.findall(r"--([a-z0-9-]+):", light))
    assert used <= set(re.findall(r"--([a-z0-9-]+):", dark))
    # A colour that has no variable would not follow.
    drawn = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text))
    assert drawn == set()


def test_numbers_of_the_summary_are_those_of_the_document(page, sources):
    for source, name in zip(sources, ("BTC hf", "ETH lf"), strict=True):
        texts = page.sections["summary"]
        row = texts[texts.index(name) :]
        engine = totals(source, "engine").mean()
        assert row[1] == "60"
        assert row[2] == f"{engine:,.1f}"
        means = [totals(source, base).mean() for base in ("reference", "ewma_t", "har", "oracle")]
        assert [cell.split(" ± ")[0] for cell in row[3:7]] == [f"{engine / m:.4f}" for m in means]
        gap = (means[1] - engine) / (means[1] - means[3])
        assert row[7] == f"{100 * gap:.0f} %"
        assert row[8].startswith("beats ewma_t")


def test_few_prompts_are_called_too_few_wherever_they_are_judged():
    text = render(document(entry(prompts=12)), {})
    page = Page(text)
    assert "too few prompts" in page.sections["summary"]
    assert "(too few prompts)" in text
    assert "beats ewma_t" not in text
    assert not {"better", "worse"} & {
        word for name, value in page.attributes if name == "class" for word in value.split()
    }


def test_losses_are_shown_and_what_stands_out_is_named(page):
    texts = page.sections["btc-hf"]
    assert texts.count("+12.3 ± 2.0") == len(Part)
    assert any(found.startswith("What stands out: drift (12.3 ± 2.0 bp") for found in texts)


def test_the_ten_worst_prompts_have_their_pictures(text):
    assert text.count("<svg><title>fan</title></svg>") == 20


def test_what_comes_from_data_is_escaped(sources):
    evil = "<script>alert(1)</script>&\"'$x$"
    source = entry(prompts=20, asset=evil)
    source["competition"] = evil
    for prompt in source["prompts"]:
        prompt["rung"] = prompt["model_id"] = evil
        for card in prompt["scores"].values():
            card["intervals"][evil] = 1.0
    source["pit_histogram"][evil] = [1] * 20
    results = document(source, archive_dir=evil)
    found = Page(render(results, {f"{evil} hf": insight(source, words=evil)}))
    assert found.tags["script"] == 0
    assert sum(evil in texts for texts in found.sections.values()) >= 1


def test_a_simulated_market_is_labelled(sources):
    label = "These prices are made up"
    assert label in render(document(sources[0], source="simulated"), {})
    assert label not in render(document(sources[0]), {})


def test_markets_without_insight_or_baselines_or_outcomes_still_make_a_page():
    alone = entry(prompts=3, levels={"engine": 1.0})
    for prompt in alone["prompts"]:
        prompt["pit"] = {"60": None}
    alone["pit_histogram"] = {}
    found = Page(render(document(alone), {}))
    texts = " ".join(found.sections["btc-hf"])
    assert "Not measured in this run." in texts
    assert "Nothing is known of the calibration." in texts
    assert "nothing to beat" in " ".join(found.sections["summary"])


def test_answers_below_the_best_rung_and_misses_are_told():
    source = entry()
    source["prompts"][0]["rung"] = "prior"
    source["prompts"][1]["scores"]["har"]["total"] = None
    texts = " ".join(Page(render(document(source), {})).sections["btc-hf"])
    assert "1 prompts were answered on the rung “prior”" in texts
    assert "1 prompts are left out" in texts


def test_a_market_that_no_competition_pays_is_named():
    found = Page(render(document(entry(), entry(asset="XAU")), {}))
    assert any("pays XAU hf" in words for words in found.sections["rewards"])


def test_the_page_is_written_whole_and_replaces_an_older_one(sources):
    path = write_report(Path("out/deep"), document(sources[0]), {})
    first = path.read_text(encoding="utf-8")
    assert path == Path("out/deep/report.html")
    assert first.rstrip().endswith("</html>")
    assert write_report(Path("out/deep"), document(sources[1]), {}) == path
    assert path.read_text(encoding="utf-8") != first
    assert [found.name for found in path.parent.iterdir()] == ["report.html"]


def test_a_folder_that_cannot_be_written_is_refused_in_one_sentence(sources):
    Path("out").write_text("a file, not a folder", encoding="utf-8")
    with pytest.raises(StateError, match=r"report\.html cannot be written"):
        write_report(Path("out"), document(sources[0]), {})


# ---------------------------------------------------------------- what needs a replay


def history(frequency):
    """Two days before the first prompt and two after, at the frequency's bars."""
    bar_s = FREQUENCIES[frequency].bar_s
    open_ts = np.arange(START_TS - 172_800, START_TS + 259_200, bar_s, dtype=np.int64)
    moves = np.random.default_rng(3).normal(0, 5e-4, len(open_ts))
    nan = np.full(len(open_ts), np.nan)
    bars = Bars(
        open_ts=open_ts, open=nan, high=nan, low=nan, close=90_000 * np.exp(np.cumsum(moves)),
        volume=nan, bar_s=bar_s, feed="test",
    )  # fmt: skip
    return MarketHistory(
        asset="BTC", frequency=frequency, bars=bars, price_bars=bars, source="archive"
    )


@pytest.mark.parametrize("frequency", list(Frequency))
def test_a_market_is_explained_from_its_history(frequency, monkeypatch):
    monkeypatch.setattr(report, "EXPLAINED", 2)
    for name, few in (
        ("FACTORS", (1.0, 1.5)),
        ("DRIFTS", (0.0, 0.4)),
        ("TAILS", (4.0,)),
        ("DISPERSIONS", ((0.2, 0.2),)),
    ):
        monkeypatch.setattr(attribution, name, few)
    past = history(frequency)
    source = entry(prompts=3, spacing_s=3 * 3_600, frequency=frequency.value)
    seen: list[int] = []
    steps: list[None] = []

    def see(known):
        seen.append(known.anchor_ts)
        return prior_view(known, "test")

    competition = protocol_profile("2026-09").competitions[source["competition"]]
    found = explain_market(
        past, see, competition, source, seed=0, on_step=lambda: steps.append(None)
    )
    assert seen == sorted(seen)
    starts = [prompt["start_ts"] for prompt in source["prompts"]]
    # What a miner knows: closed before the start, not what follows.
    assert seen == [start - past.scored_lag_s for start in starts]
    assert sorted(found.fans) == starts
    assert all(svg.startswith("<svg ") for svg in found.fans.values())
    assert found.attribution.prompts == 2
    assert len(steps) == EXPLAIN_STEPS - (13 - 2) - (9 - 2) - (5 - 1) - (9 - 1)
    Page(render(document(source), {f"BTC {frequency.value}": found}))
