"""The map of the modules, and that imports run downward only."""

import ast
import sys
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS: dict[int, tuple[str, ...]] = {
    0: ("errors", "config", "protocol", "feed_plans", "settings", "domain"),
    1: (
        "spans",
        "feed_seams",
        "growing_bars",
        "level_changes",
        "seasonality",
        "features",
        "uncertainty_engine",
        "path_simulator",
        "quantile_matching",
        "ensemble",
        "scoring",
        "answer_sketch",
        "comparison",
        "pit",
        "closed_form",
        "rewards",
        "backtest_results",
        "report_numbers",
        "bootstrap",
        "path_fitting",
        "pooled_prior",
        "pooling",
        "training_rows",
        "model_selection",
        "baselines",
        "garch_baseline",
        "market_baselines",
        "wire_format",
        "caller_rules",
        "bar_cleaning",
        "simulated_market",
        "realised_spread",
        "path_checks",
        "rehearsal_plan",
        "rehearsal_findings",
    ),
    2: (
        "allocator",
        "log_lines",
        "clock",
        "quarantine",
        "bar_store",
        "state_store",
        "chain",
        "ledger",
        "data_fetcher",
        "feed_faults",
        "feed_http",
        "feeds",
        "content_keys",
        "scheduled_events",
        "pool_store",
        "backtest_store",
        "task_pool",
        "model_store",
        "lgbm_predictor",
        "lgbm_trainer",
    ),
    3: (
        "collector",
        "price_board",
        "live_market",
        "set_review",
        "market_view",
        "forecast_engine",
        "replay",
        "set_training",
        "walk_forward",
        "attribution",
        "own_scores",
        "miner_facts",
    ),
    4: (
        "upkeep",
        "retraining",
        "answer_desk",
        "record_keeping",
        "metrics",
        "status_page",
        "operator_flags",
        "slow_callers",
        "axon_gate",
        "axon_adapter",
        "http_service",
        "loopback_venues",
        "rehearsed_miner",
        "rehearsal_validators",
        "rehearsal_traces",
        "rehearsal_tables",
        "rehearsal",
        "preflight",
        "console",
        "backtest_tables",
        "plots",
        "report",
    ),
    5: ("train_models", "miner", "test_miner", "backtest", "import_bars", "demo", "rehearse"),
}

# Within a layer a module imports its neighbours only as listed here, and why.
WITHIN_LAYER: dict[str, tuple[frozenset[str], str]] = {
    "config": (frozenset({"errors"}), "layer 0 stands in a row"),
    "protocol": (frozenset({"errors", "config"}), "layer 0 stands in a row"),
    "feed_plans": (frozenset({"config", "protocol"}), "layer 0 stands in a row"),
    "settings": (
        frozenset({"errors", "config", "protocol", "feed_plans"}),
        "layer 0 stands in a row",
    ),
    "domain": (frozenset({"errors", "config"}), "layer 0 stands in a row"),
    "features": (frozenset({"seasonality"}), "features are made of de-seasonalised returns"),
    "uncertainty_engine": (frozenset({"features"}), "the scale is predicted from features"),
    "quantile_matching": (
        frozenset({"path_simulator"}),
        "sums are matched to the law that the simulator draws from",
    ),
    "ensemble": (
        frozenset({"path_simulator", "quantile_matching"}),
        "steps are drawn, then matched",
    ),
    "path_fitting": (
        frozenset({"ensemble", "features", "path_simulator", "scoring", "uncertainty_engine"}),
        "shapes are chosen by the score of simulated paths",
    ),
    "pooled_prior": (
        frozenset({"seasonality", "uncertainty_engine"}),
        "what is pooled are clocks and blends",
    ),
    "training_rows": (
        frozenset({"features", "pooled_prior", "seasonality"}),
        "rows are made of features, under a clock that leans on the pool",
    ),
    "pooling": (
        frozenset(
            {"features", "pooled_prior", "seasonality", "training_rows", "uncertainty_engine"}
        ),
        "the pool is fitted the way a market is",
    ),
    "pool_store": (
        frozenset(
            {"content_keys", "data_fetcher", "model_store", "scheduled_events", "state_store"}
        ),
        "pools are fitted to a source's bars, kept by content and sealed as models are",
    ),
    "model_selection": (
        frozenset({"features", "path_fitting", "uncertainty_engine"}),
        "weights are chosen for the engine as it will run",
    ),
    "baselines": (
        frozenset({"features", "path_simulator"}),
        "they read the same return grid, and say what their paths are drawn from",
    ),
    "garch_baseline": (frozenset({"features"}), "they read the same return grid"),
    "market_baselines": (
        frozenset(
            {
                "baselines",
                "features",
                "path_simulator",
                "seasonality",
                "training_rows",
                "uncertainty_engine",
            }
        ),
        "yardsticks of the same make as the forecast, held still",
    ),
    "answer_sketch": (frozenset({"scoring"}), "it keeps what is scored"),
    "pit": (frozenset({"scoring"}), "calibration of what is scored"),
    "closed_form": (
        frozenset({"path_simulator", "pit", "quantile_matching", "scoring"}),
        "the laws that ensembles are drawn from, scored and placed as ensembles are",
    ),
    "backtest_results": (frozenset({"comparison", "pit"}), "figures are drawn from both"),
    "realised_spread": (
        frozenset({"features", "scoring", "seasonality"}),
        "the clock is divided out, intervals are the scored ones",
    ),
    "path_checks": (
        frozenset({"realised_spread", "wire_format"}),
        "the yardstick of spreads, the digit rules of answers",
    ),
    "rehearsal_plan": (frozenset({"wire_format"}), "answers are judged by the digit rules"),
    "rehearsal_findings": (
        frozenset({"rehearsal_plan"}),
        "what was asked is part of what was found",
    ),
    "rehearsal_tables": (frozenset({"console"}), "tables are printed through it"),
    "rehearsal": (
        frozenset(
            {"loopback_venues", "rehearsal_traces", "rehearsal_validators", "rehearsed_miner"}
        ),
        "it puts venues, miner and validators on one stage, and reads what they left",
    ),
    "chain": (frozenset({"state_store"}), "what it last knew survives a restart"),
    "axon_gate": (frozenset({"answer_desk"}), "a refusal has one status on every transport"),
    "axon_adapter": (
        frozenset({"answer_desk", "axon_gate", "operator_flags", "slow_callers"}),
        "it puts the gate before bittensor's axon, as the flags say",
    ),
    "preflight": (
        frozenset({"axon_adapter", "operator_flags"}),
        "it examines what the flags name, the wallet as the axon opens it",
    ),
    "price_board": (frozenset({"collector"}), "both spare a venue that cannot be reached"),
    "feed_seams": (frozenset({"bar_cleaning"}), "coarser bars are made of minutes"),
    "growing_bars": (frozenset({"feed_seams"}), "both take bars apart"),
    "level_changes": (
        frozenset({"bar_cleaning", "feed_seams"}),
        "it goes on where spikes end, and takes bars apart",
    ),
    "data_fetcher": (
        frozenset({"bar_store", "clock"}),
        "a live source reads what was stored, as of the market's clock",
    ),
    "bar_store": (frozenset({"state_store"}), "bars are documents of the state folder"),
    "feeds": (frozenset({"clock", "feed_http"}), "a feed asks its host, by the market's clock"),
    "task_pool": (frozenset({"content_keys"}), "workers of another program are refused"),
    "backtest_store": (frozenset({"state_store"}), "both write files that survive crashes"),
    "model_store": (frozenset({"state_store"}), "both write files that survive crashes"),
    "lgbm_predictor": (frozenset({"model_store"}), "a set is loaded from where it was published"),
    "forecast_engine": (
        frozenset({"market_view", "price_board"}),
        "a forecast is drawn from a view and starts from the freshest price",
    ),
    "replay": (
        frozenset({"forecast_engine", "market_view"}),
        "a replay runs what answers live",
    ),
    "own_scores": (
        frozenset({"forecast_engine", "replay"}),
        "live answers are scored as replayed ones are",
    ),
    "miner_facts": (
        frozenset({"forecast_engine", "own_scores"}),
        "facts are read off the engine, and scores are among them",
    ),
    "metrics": (
        frozenset({"answer_desk", "operator_flags"}),
        "what the desk tells is counted, for every transport from 0 on",
    ),
    "status_page": (
        frozenset({"answer_desk", "plots"}),
        "a page of figures and of what the desk told",
    ),
    "http_service": (
        frozenset({"answer_desk", "metrics", "slow_callers", "status_page"}),
        "a transport of the desk, and the pages of the others",
    ),
    "record_keeping": (frozenset({"answer_desk"}), "it keeps what the desk tells"),
    "attribution": (
        frozenset({"forecast_engine", "market_view"}),
        "parts are replaced in the forecasts that answer live",
    ),
    "report_numbers": (
        frozenset({"backtest_results", "bootstrap", "comparison", "pit", "rewards", "seasonality"}),
        "a document is summed up with errors, rewards and the clock",
    ),
    "report": (frozenset({"plots"}), "a page of figures"),
    "backtest_tables": (frozenset({"console"}), "tables are printed through it"),
    "live_market": (frozenset({"collector", "price_board"}), "it holds what feeds an engine"),
    "set_review": (frozenset({"forecast_engine"}), "it reviews the sets of a running engine"),
    "walk_forward": (
        frozenset({"market_view", "replay", "set_training"}),
        "it replays market by market, with sets trained as for the live miner",
    ),
    "lgbm_trainer": (
        frozenset({"lgbm_predictor", "model_store", "scheduled_events"}),
        "validation uses the models as they are served, then publishes them",
    ),
}

# Arrays in, arrays out: these would bring in files, clocks, the network,
# processes or a global random generator.
IMPURE = frozenset(
    {
        "asyncio", "io", "logging", "multiprocessing", "os", "pathlib", "random", "requests",
        "shutil", "socket", "subprocess", "tempfile", "threading", "time", "urllib",
    }
)  # fmt: skip

LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))


def imported(node: ast.AST) -> set[str]:
    """Top-level packages that import statements anywhere under `node` name."""
    names: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            names |= {alias.name.split(".")[0] for alias in child.names}
        elif isinstance(child, ast.ImportFrom) and child.module:
            names.add(child.module.split(".")[0])
    return names


def called(module: str) -> set[str]:
    """Plain names that the module calls, and attributes as `owner.name`."""
    names: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            names.add(ast.unparse(node.func))
    return names


def misplaced(module: str, target: str) -> str | None:
    """Why `module` may not import `target`, or None."""
    own, other = LAYER_OF[module], LAYER_OF[target]
    if own == 5 == other and module == "demo":
        return None
    if other > own:
        return f"{module} (layer {own}) imports {target} from above (layer {other})"
    if other == own and target not in WITHIN_LAYER.get(module, (frozenset(), ""))[0]:
        return f"{module} imports its neighbour {target}, which is not in WITHIN_LAYER"
    return None


def test_every_module_has_a_layer():
    assert [module for module in MODULES if module not in LAYER_OF] == []


def test_no_module_hides_one_of_the_standard_library():
    assert [module for module in MODULES if module in sys.stdlib_module_names] == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward_only(module):
    ours = sorted(imported(tree(module)) & set(LAYER_OF))
    assert [fault for target in ours if (fault := misplaced(module, target))] == []


def test_an_upward_import_and_an_unlisted_neighbour_would_be_found():
    assert "from above" in (misplaced("scoring", "forecast_engine") or "")
    assert "neighbour" in (misplaced("scoring", "wire_format") or "")
    assert "neighbour" in (misplaced("miner", "backtest") or "")
    assert misplaced("features", "seasonality") is None


def test_every_listed_exception_is_still_needed():
    unused = {
        module: allowed - imported(tree(module))
        for module, (allowed, _) in WITHIN_LAYER.items()
        if module in MODULES and allowed - imported(tree(module))
    }
    assert unused == {}


@pytest.mark.parametrize("module", sorted(set(LAYERS[1]) & set(MODULES)))
def test_a_pure_module_knows_no_files_clock_network_or_global_random_numbers(module):
    assert imported(tree(module)) & IMPURE == set()
    forbidden = ("np.random.seed", "np.random.normal", "open", "print", "datetime.now")
    assert called(module) & set(forbidden) == set()


def test_only_plots_imports_matplotlib_and_only_inside_functions():
    users = {module for module in MODULES if "matplotlib" in imported(tree(module))}
    assert users <= {"plots"}
    for module in users:
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        outside = [node for node in tree(module).body if not isinstance(node, functions)]
        assert "matplotlib" not in set(chain.from_iterable(map(imported, outside)))


def test_only_the_axon_adapter_imports_bittensor():
    users = {module for module in MODULES if "bittensor" in imported(tree(module))}
    assert users == {"axon_adapter"}


def test_only_the_task_pool_imports_dask_and_only_inside_functions():
    dask = {"dask", "distributed"}
    assert {module for module in MODULES if imported(tree(module)) & dask} == {"task_pool"}
    functions = (ast.FunctionDef, ast.ClassDef)
    outside = [node for node in tree("task_pool").body if not isinstance(node, functions)]
    assert dask & set(chain.from_iterable(map(imported, outside))) == set()


@pytest.mark.parametrize("module", MODULES)
def test_no_module_can_be_made_to_run_what_a_file_says(module):
    assert (
        imported(tree(module)) & {"pickle", "joblib", "cloudpickle", "marshal", "shelve"} == set()
    )
    assert called(module) & {"eval", "exec", "np.load", "pd.read_pickle", "yaml.load"} == set()
