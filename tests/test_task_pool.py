"""Tasks in processes of this machine and on a real dask cluster: results, losses, refusals."""

import os
import re
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace

import dask.config
import distributed
import orjson
import pytest
from distributed.versions import VersionMismatchWarning, error_message, get_versions

import backtest
import task_pool
import train_models
from config import DAY_S, Frequency
from errors import BusyError, ConfigError, DataError
from settings import Settings
from task_pool import Job, WorkersLost, open_pool, work_off
from tests import cluster_tasks
from tests.conftest import TRAINED_DAYS_BEFORE_END
from tests.pools import PoolHere, do_here
from tests.waiting import PATIENCE_S, is_running, wait_for
from walk_forward import Scores

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "set_training"
PROMPTS = 6
# How often a scheduler would thin out copies, unless it is told not to.
AMM_INTERVAL, AMM_INTERVAL_S = "distributed.scheduler.active-memory-manager.interval", 0.1
QUIET = {"dashboard_address": ":0", "silence_logs": "CRITICAL"}

# Workers search as few path shapes as the fixture `quick_search` does, restarted ones too.
QUICK = """
import lgbm_trainer, path_fitting
from config import Frequency
lgbm_trainer.SHAPE_PROMPTS = dict.fromkeys(Frequency, 3)
path_fitting.VARIATIONS = lgbm_trainer.VARIATIONS = path_fitting.VARIATIONS[:2]
"""


RESTART_S = 20  # in which a dead worker is usually back


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
    """Schedulers and two workers each, all of them processes; the last one is in use."""
    folder = tmp_path_factory.mktemp("cluster")
    preload = folder / "quick.py"
    preload.write_text(QUICK)
    options = {"preload": str(preload), "local_directory": str(folder)}
    with ExitStack() as opened:

        def start():
            with dask.config.set({AMM_INTERVAL: f"{AMM_INTERVAL_S} s"}):
                return opened.enter_context(
                    distributed.LocalCluster(
                        n_workers=2, threads_per_worker=1, processes=True, **QUIET, **options
                    )
                )

        running = [start()]

        def whole():
            """Dead workers are started again, but not after so many deaths in a row."""
            with distributed.Client(running[-1].scheduler_address, set_as_default=False) as client:
                try:
                    client.wait_for_workers(2, timeout=RESTART_S)
                except TimeoutError:
                    running.append(start())
            return running[-1]

        yield whole


@pytest.fixture
def cluster(clusters):
    """One with both workers there, whatever the test before did to them."""
    return clusters()


@pytest.fixture
def two_workers(cluster):
    """A client of the cluster."""
    with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=PATIENCE_S)
        yield client


@pytest.fixture(params=["processes", "cluster"])
def scheduler(request):
    """None for processes of this machine, or the address of the cluster."""
    if request.param == "processes":
        return None
    request.getfixturevalue("two_workers")
    return request.getfixturevalue("cluster").scheduler_address


def no_failure(job, error):
    raise AssertionError(job.name) from error


def done(jobs, scheduler, jobs_side_by_side=2):
    """Results, failures and what was told, of work and arguments."""
    found = SimpleNamespace(results=[], failures=[], told=[])

    def keep(result):
        found.results.append(result)
        return ()

    given = [Job(name="sum", work=work, args=args, then=keep) for work, *args in jobs]
    with open_pool(
        jobs_side_by_side, scheduler, PROGRAM, lambda *step: found.told.append(step)
    ) as pool:
        work_off(pool, given, lambda _, error: found.failures.append(error))
    return found


# ---------------------------------------------------------------- both kinds alike


@pytest.fixture(scope="module", params=["processes", "cluster"])
def mixed(request, tmp_path_factory):
    """Jobs of all kinds, one of which kills its worker, done together."""
    folder = tmp_path_factory.mktemp("mixed")
    numbers = cluster_tasks.shared_numbers(folder, 10)
    few = [cluster_tasks.shared_numbers(folder, n) for n in (3, 4)]
    scheduler = None
    if request.param == "cluster":
        scheduler = request.getfixturevalue("clusters")().scheduler_address
    work = [
        *((cluster_tasks.add_up, numbers, extra) for extra in range(4)),
        (cluster_tasks.die_once, folder / "dead", -1),
        (cluster_tasks.add_all, few),
        (cluster_tasks.refuse, DataError("too short; wait.")),
        (cluster_tasks.refuse, ZeroDivisionError("a bug")),
    ]
    return done(work, scheduler)


def test_every_result_comes_back_once_even_though_a_worker_was_killed(mixed):
    assert sorted(mixed.results) == [-1, 3 + 6, 45, 46, 47, 48]


def test_what_tasks_tell_comes_back_while_they_run(mixed):
    assert {told["extra"] for _, _, told in mixed.told} == {0, 1, 2, 3}
    assert {step[:2] for step in mixed.told} == {("sum", "adding")}


def test_a_failure_is_the_one_that_the_task_raised_and_stops_no_other(mixed):
    kinds = {type(error): str(error) for error in mixed.failures}
    assert kinds == {DataError: "too short; wait.", ZeroDivisionError: "a bug"}


def test_what_follows_from_a_result_is_done_and_a_failure_that_is_raised_ends_it(scheduler):
    results = []

    def more(result):
        results.append(result)
        work, args = (cluster_tasks.double, (result,))
        if result > 20:
            work, args = (cluster_tasks.refuse, (ValueError("enough"),))
        return [Job(name="x", work=work, args=args, then=more, urgent=True)]

    def stop(_, error):
        raise error

    first = Job(name="x", work=cluster_tasks.double, args=(3,), then=more)
    with pytest.raises(ValueError, match="enough"), open_pool(1, scheduler, PROGRAM, print) as pool:
        work_off(pool, [first], stop)
    assert results == [6, 12, 24]


# ---------------------------------------------------------------- processes of this machine


def test_a_task_that_always_kills_its_process_is_given_up():
    with pytest.raises(WorkersLost, match=r"ended 3 times, .* with fewer --jobs\.$"):
        done([(cluster_tasks.die,)], None)


def test_after_a_loss_half_as_many_processes_go_on_and_load_what_is_shared_by_themselves(tmp_path):
    sizes = []
    numbers = cluster_tasks.shared_numbers(tmp_path, 10)
    with open_pool(2, None, PROGRAM, print) as pool:

        def more(_):
            sizes.append(pool.size)
            has = Job(name="x", work=cluster_tasks.who_has, args=(numbers,), then=lambda _: ())
            return [has] * 3

        job = Job(name="x", work=cluster_tasks.die_once, args=(tmp_path / "dead", 1), then=more)
        work_off(pool, [job], no_failure)
    assert sizes == [1]
    (loaded_by,) = (tmp_path / "loaded").read_text().split()  # once, for three tasks
    assert int(loaded_by) != os.getpid()


def test_leaving_by_an_error_ends_at_once_what_runs(tmp_path):
    mark = tmp_path / "resting"

    def interrupt(pool):
        pool.submit(Job(name="x", work=cluster_tasks.rest, args=(mark,), then=list))
        wait_for(lambda: mark.exists() and mark.read_text())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_pool(1, None, PROGRAM, print) as pool:
        interrupt(pool)
    assert not is_running(int(mark.read_text()))


# ---------------------------------------------------------------- a cluster


def test_on_a_cluster_what_is_shared_travels_once_per_worker(cluster, two_workers, tmp_path):
    numbers = cluster_tasks.shared_numbers(tmp_path, 10_000)
    found = done([(cluster_tasks.who_has, numbers)] * 12, cluster.scheduler_address)
    copies = set(found.results)
    assert len(copies) == len({pid for pid, _ in copies}) == 2  # one object in each of two
    assert (tmp_path / "loaded").read_text().split() == [str(os.getpid())]


def test_on_a_cluster_what_is_shared_stays_with_idle_workers(cluster, two_workers, tmp_path):
    numbers = cluster_tasks.shared_numbers(tmp_path, 10_000)
    with open_pool(1, cluster.scheduler_address, PROGRAM, print) as pool:
        before = asked_of(pool, numbers)
        time.sleep(10 * AMM_INTERVAL_S)
        assert asked_of(pool, numbers) == before
    assert len(before) == 2


def asked_of(pool, numbers):
    """The objects that the workers hold of a shared value, by process."""
    futures = [
        pool.submit(Job(name="x", work=cluster_tasks.who_has, args=(numbers,), then=list))
        for _ in range(12)
    ]
    return {future.result(PATIENCE_S) for future in futures}


def test_a_task_that_always_kills_its_worker_is_given_up(cluster, two_workers, monkeypatch):
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    found = done([(cluster_tasks.die,)], cluster.scheduler_address)
    (failure,) = found.failures
    assert isinstance(failure, WorkersLost)
    assert str(failure).endswith("give the workers more memory and repeat the command.")


def test_a_worker_of_another_version_is_refused(cluster, two_workers, monkeypatch):
    ours = task_pool.program_facts(PROGRAM)
    for name in ("program", "python", "lightgbm", "numpy"):
        changed = {**ours, name: "0.1"}
        monkeypatch.setattr(task_pool, "program_facts", lambda _, changed=changed: changed)
        with pytest.raises(ConfigError) as refused:
            done([(cluster_tasks.double, 1)], cluster.scheduler_address)
        assert re.fullmatch(
            rf"worker tcp://\S+ has {name} {ours[name]} instead of 0\.1; install the same "
            r"versions there and start it again\.",
            str(refused.value),
        )


def test_a_worker_of_another_version_that_joins_later_is_refused(cluster, two_workers):
    failures = []
    with open_pool(1, cluster.scheduler_address, PROGRAM, print) as pool:
        assert isinstance(pool, task_pool._ClusterPool)
        pool.facts = {**pool.facts, "numpy": "0.1"}  # as if the workers had come since
        job = Job(name="x", work=cluster_tasks.double, args=(1,), then=pytest.fail)
        work_off(pool, [job], lambda _, error: failures.append(error))
    (failure,) = failures
    assert isinstance(failure, ConfigError)
    assert "instead of 0.1; install the same versions there" in str(failure)


def test_another_version_of_dask_is_refused_by_the_names_of_its_packages():
    ours = get_versions()
    theirs = get_versions()
    theirs["packages"] |= {"distributed": "2020.1", "python": "3.9.1.final.0"}
    table = error_message(theirs, {}, ours)["warning"]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.warn(VersionMismatchWarning(table), stacklevel=1)
    assert task_pool._mismatches(str(warned[0].message)) == "distributed, python"


@pytest.mark.parametrize(
    ("address", "kind", "sentence"),
    [
        ("10.0.0.5:8786", ConfigError, "--scheduler 10.0.0.5:8786 is no address; write e.g. tcp"),
        ("tcp://10.0.0.5", ConfigError, "--scheduler tcp://10.0.0.5 is no address; "),
        ("tcp://127.0.0.1:9", BusyError, "the scheduler tcp://127.0.0.1:9 cannot be reached ("),
    ],
)
def test_a_scheduler_that_cannot_be_used_is_one_sentence(address, kind, sentence, monkeypatch):
    monkeypatch.setattr(task_pool, "CONNECT_S", 0.3)
    with pytest.raises(kind) as refused:
        done([], address)
    assert str(refused.value).startswith(sentence)
    assert str(refused.value).endswith((".", "…"))


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"pip install -r requirements-cluster\.txt\.$"):
        done([], "tcp://127.0.0.1:8786")


# ---------------------------------------------------------------- as operators start it


@contextmanager
def started(*words, folder, **environment):
    """`dask <words>` in a folder, as from a shell."""
    log = folder / f"{words[0]}.log"
    environment = {**os.environ, "DASK_DISTRIBUTED__WORKER__DAEMON": "False", **environment}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", *words],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
        )
        try:
            yield log
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def test_a_cluster_from_the_command_line_is_refused_until_it_can_work(tmp_path, monkeypatch):
    whole, bare = {"PYTHONPATH": str(ROOT)}, {"PYTHONPATH": ""}
    scheduler = ("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
    with started(*scheduler, folder=tmp_path, **whole) as log:
        address = wait_for(lambda: re.findall(r"Scheduler at:\s+(tcp://\S+)", log.read_text()))[0]
        ask = partial(done, [(cluster_tasks.double, 4)], address)
        monkeypatch.setattr(task_pool, "CONNECT_S", 0.5)
        with pytest.raises(BusyError, match=r"has no worker; start some with dask worker tcp"):
            ask()
        monkeypatch.setattr(task_pool, "CONNECT_S", PATIENCE_S)
        worker = ("worker", address, "--no-dashboard", "--nthreads", "1", "--no-nanny")
        with (
            started(*worker, folder=tmp_path, **bare),
            pytest.raises(ConfigError, match=r"worker .* cannot load this program .* PYTHONPATH"),
        ):
            ask()
        with started(*worker, folder=tmp_path, **whole):
            found = ask()
    assert (found.results, found.failures) == ([8], [])


def test_a_scheduler_that_goes_away_ends_it_with_a_sentence(tmp_path):
    failures = []
    cluster = distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", **QUIET
    )
    with open_pool(1, cluster.scheduler_address, PROGRAM, print) as pool:
        job = Job(name="x", work=time.sleep, args=(1.0,), then=pytest.fail)

        def close_soon():
            yield job
            cluster.close()

        work_off(pool, close_soon(), lambda _, error: failures.append(error))
    (failure,) = failures
    assert isinstance(failure, BusyError)
    assert str(failure).startswith(f"the scheduler {cluster.scheduler_address} went away; ")


# ---------------------------------------------------------------- the program on a cluster


@pytest.fixture
def replay(archive, archive_dir, monkeypatch, capsys):
    """Run a back-test of the small market in this process; the document that it wrote."""
    train_until = archive.now() - TRAINED_DAYS_BEFORE_END * DAY_S + 60
    arguments = (
        *("--source", "archive", "--archive-dir", archive_dir, "--days", 4),
        *("--train-until", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(train_until))),
        *("--asset", "BTC", "--frequency", "hf", "--baselines", "reference,ewma_t"),
        *("--prompts", PROMPTS),
    )

    def run(folder, *words):
        outputs = ("--work-dir", folder / "work", "--json", folder / "a.json")
        command = ["backtest.py", *map(str, (*arguments, *outputs, *words))]
        monkeypatch.setattr(sys, "argv", command)
        assert backtest.main() == 0, capsys.readouterr().err
        return (folder / "a.json").read_bytes()

    return run


@contextmanager
def pool_here(_jobs, _scheduler, _program, _on_step):
    yield PoolHere()


def scored(folder):
    (file,) = (folder / "work/scores").glob("*.jsonl")
    return [orjson.loads(line) for line in file.read_bytes().splitlines() if line]


@pytest.mark.usefixtures("quick_search")
def test_a_back_test_whose_worker_is_killed_ends_with_the_bytes_of_one_made_here(
    cluster, two_workers, replay, monkeypatch, tmp_path
):
    pids = sorted(two_workers.run(os.getpid).values())
    victim = Random(0).choice(pids)
    told = []
    keep = Scores.keep

    def keep_and_kill(self, entry):
        told.append(entry["start_ts"])
        if len(told) == 1:
            os.kill(victim, 9)
        keep(self, entry)

    monkeypatch.setattr(backtest, "CHUNK_PROMPTS", 2)  # so that both workers have some
    with monkeypatch.context() as patch:
        patch.setattr(Scores, "keep", keep_and_kill)
        disturbed = replay(tmp_path / "cluster", "--scheduler", cluster.scheduler_address)
    assert not is_running(victim)
    assert len(scored(tmp_path / "cluster")) == PROMPTS  # each kept once
    monkeypatch.setattr(backtest, "open_pool", pool_here)
    assert disturbed == replay(tmp_path / "here")


@pytest.mark.usefixtures("quick_search")
def test_a_set_trained_on_a_cluster_has_the_bytes_of_one_trained_here(
    cluster, two_workers, archive_dir, tmp_path
):
    def settings(name):
        return Settings(
            source="archive", archive_dir=archive_dir, days=8, model_dir=tmp_path / name
        )

    pair = ("BTC", Frequency.LF)
    batch = train_models._Batch(settings=settings("here"), until=None)
    do_here(batch.jobs({pair: "BTC lf"}))
    (there,), failures = train_models.train_all(
        [pair], settings("there"), None, cluster.scheduler_address
    )
    assert failures == []
    assert there.files == batch.results[0].files
    published = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("here", "there")
    }
    assert published["here"] == published["there"]


def test_what_does_not_travel_from_a_cluster_is_refused(replay, tmp_path):
    with pytest.raises(ConfigError, match="leave out one of it and --scheduler"):
        replay(tmp_path, "--scheduler", "tcp://127.0.0.1:9", "--export-predictions", tmp_path)
