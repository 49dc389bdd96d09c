"""Tasks handed to processes of this machine, or to a dask.distributed cluster.

Both run the same functions on the same values, so a result does not tell where it was
made. A task is a function of a module, never of a script, and gives back a value that
the caller keeps: workers need no folder of the caller's. What is too big to travel with
every task is `Shared`: processes of this machine load it themselves, workers of a
cluster get it once each. The tasks of a worker that was killed are done again.

dask's workers run whatever their scheduler sends them: see docs/cluster.md.
"""

import os
import platform
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from queue import Empty, Queue, SimpleQueue
from threading import Event, Thread
from typing import Any, Final, Protocol

from threadpoolctl import threadpool_limits

from content_keys import LIBRARIES, program_key
from errors import BusyError, ConfigError, MinerError

CLUSTER_REQUIREMENTS: Final = "requirements-cluster.txt"
CONNECT_S: Final = 10.0  # for a scheduler to answer, and for it to have a worker
DEATHS: Final = 3  # of processes of this machine; dask allows a task as many

OnStep = Callable[[str, str, Any], None]  # name of the job, step begun, what was found or None

_tell: ContextVar[OnStep | None] = ContextVar("tell", default=None)


class WorkersLost(MinerError):
    """Workers end again and again, so that a task is given up."""


# ---------------------------------------------------------------- what is handed out


@dataclass(frozen=True, slots=True)
class Shared:
    """The value of `load(*args)`, wherever a task needs it.

    `load` is asked again by every process of this machine for every task, so it should
    remember. On a cluster the value is named by `key`, which differs where it differs.
    """

    load: Callable[..., Any]
    args: tuple[Any, ...]
    key: Callable[[Any], str]

    def value(self) -> Any:
        """The value itself."""
        return self.load(*self.args)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """One task, and what the caller does with its result."""

    name: str  # the progress that it moves
    work: Callable[..., Any]
    args: tuple[Any, ...]  # the work's own; `Shared` and lists of it arrive as their values
    then: Callable[[Any], Iterable["Job"]]  # keeps the result; gives what can be done now
    urgent: bool = False  # before others that wait, where the pool can choose


class TaskPool(Protocol):
    """Workers that are there for a while."""

    @property
    def size(self) -> int:
        """How many tasks run side by side."""

    def submit(self, job: Job) -> "Future[Any]":
        """Hand the job out. The future fails with BrokenExecutor if its worker was lost."""

    def renew(self) -> None:
        """Replace workers that were lost. Raises: WorkersLost if that happens too often."""


def tell(name: str, step: str, found: Any = None) -> None:
    """In a task: say which step of a job begins, and what it has found by now.

    `found` is made of plain values. What was told of a task that is redone is told again.
    """
    told = _tell.get()
    if told is not None:
        told(name, step, found)


def work_off(
    pool: TaskPool, jobs: Iterable[Job], on_failure: Callable[[Job, Exception], None]
) -> None:
    """Do the jobs, and what follows from them, in the order in which they end.

    A task that raises goes to `on_failure`, which may raise itself and so end it all.
    Raises: WorkersLost if that happens too often.
    """
    ended: SimpleQueue[Future[Any]] = SimpleQueue()
    running: dict[Future[Any], Job] = {}

    def start(these: Iterable[Job]) -> None:
        for job in these:
            future = pool.submit(job)
            running[future] = job
            future.add_done_callback(ended.put)

    start(jobs)
    while running:
        future = ended.get()
        job = running.pop(future, None)
        if job is None:
            continue  # lost with others, and handed out again
        error = CancelledError() if future.cancelled() else future.exception()
        if isinstance(error, BrokenExecutor):
            lost = [job, *running.values()]
            running.clear()
            pool.renew()
            start(lost)
        elif error is None:
            start(job.then(future.result()))
        elif isinstance(error, Exception):
            on_failure(job, error)
        else:
            raise error


@contextmanager
def open_pool(
    jobs: int, scheduler: str | None, program: str, on_step: OnStep
) -> Iterator[TaskPool]:
    """Processes of this machine, or the workers of a cluster if `scheduler` names one.

    `program` is the module of the tasks, `on_step` is called for what tasks `tell`, in
    another thread. Leaving the block by an error ends what runs. Raises: ConfigError,
    BusyError, if the cluster cannot be used.
    """
    pool = _local(jobs, on_step) if scheduler is None else _cluster(scheduler, program, on_step)
    with pool as opened:
        yield opened


# ---------------------------------------------------------------- processes of this machine


class _DeafProcess(SpawnProcess):
    """A process that never hears an interrupt: its parent does, and ends it."""

    def start(self) -> None:
        """Start it while interrupts are ignored, which it inherits."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            super().start()
        finally:
            signal.signal(signal.SIGINT, before)


class _DeafContext(SpawnContext):
    """Spawned, because threads of BLAS do not survive a fork."""

    Process = _DeafProcess


@dataclass(slots=True, eq=False)
class _LocalPool:
    """A process pool that is replaced when one of its processes was killed."""

    size: int
    context: _DeafContext
    events: "Queue[tuple[str, str, Any]]"
    deaths: int = 0
    _executor: ProcessPoolExecutor = field(init=False)
    _lifeline: Connection = field(init=False)

    def __post_init__(self) -> None:
        self._start()

    def _start(self) -> None:
        ours, theirs = self.context.Pipe()
        self._lifeline = ours
        self._executor = ProcessPoolExecutor(
            self.size, self.context, initializer=_start_worker, initargs=(theirs, self.events)
        )

    def submit(self, job: Job) -> "Future[Any]":
        try:
            return self._executor.submit(_run_here, job.work, job.args)
        except BrokenExecutor as error:
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed

    def renew(self) -> None:
        """Start other processes, half as many: memory may have been short."""
        self.deaths += 1
        self.end()
        if self.deaths >= DEATHS:
            raise WorkersLost(
                f"worker processes ended {self.deaths} times, perhaps for want of memory; what "
                "was done is kept: repeat the command with fewer --jobs."
            )
        self.size = max(1, self.size // 2)
        self._start()

    def end(self) -> None:
        """End the processes at once, whatever they do."""
        self._lifeline.close()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """End the processes, which have nothing to do any more."""
        self._executor.shutdown(wait=True)
        self._lifeline.close()


@contextmanager
def _local(jobs: int, on_step: OnStep) -> Iterator[_LocalPool]:
    context = _DeafContext()
    with _interrupts_wait():  # half started, the queue's process would be left behind
        manager = context.Manager()
    with manager, _pumping(manager.Queue(), on_step) as events:
        pool = _LocalPool(size=jobs, context=context, events=events)
        try:
            yield pool
        except BaseException:
            pool.end()
            raise
        pool.close()


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Raise an interrupt only when the block is done."""
    heard = Event()
    before = signal.signal(signal.SIGINT, lambda *_: heard.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard.is_set():
        raise KeyboardInterrupt


@contextmanager
def _pumping(
    events: "Queue[tuple[str, str, Any]]", on_step: OnStep
) -> Iterator["Queue[tuple[str, str, Any]]"]:
    """Pass on what comes into the queue; all of it, before the block is left."""
    done = Event()

    def pump() -> None:
        while not (done.is_set() and events.empty()):
            with suppress(Empty):
                on_step(*events.get(timeout=0.2))

    thread = Thread(target=pump, daemon=True)
    thread.start()
    try:
        yield events
    finally:
        done.set()
        thread.join()


def _start_worker(lifeline: Connection, events: "Queue[tuple[str, str, Any]]") -> None:
    """Make this process a worker that ends when its parent does, or says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _prepare()
    _tell.set(lambda *event: events.put(event))
    Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    lifeline.poll(None)  # nothing is ever sent: only the other end's closing wakes it
    os._exit(1)


@cache
def _prepare() -> None:
    threadpool_limits(1)  # workers share the cores already


def _run_here(work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return work(*_each(args, Shared.value))


def _each(args: Iterable[Any], change: Callable[[Shared], Any]) -> list[Any]:
    """The arguments, with everything shared changed, also in lists."""
    return [
        _each(arg, change)
        if isinstance(arg, list)
        else change(arg)
        if isinstance(arg, Shared)
        else arg
        for arg in args
    ]


# ---------------------------------------------------------------- a cluster


def require_distributed() -> Any:
    """The package, which is installed only where it is wanted. Raises: ConfigError."""
    try:
        import distributed
    except ImportError:
        raise ConfigError(
            "--scheduler needs the package distributed; install it with "
            f"pip install -r {CLUSTER_REQUIREMENTS}."
        ) from None
    return distributed


def program_facts(program: str) -> dict[str, str]:
    """What a worker must have in common with its caller for its results to be the same."""
    versions = {name: version(name) for name in LIBRARIES}
    return {"program": program_key(program), "python": platform.python_version(), **versions}


@dataclass(slots=True, eq=False)
class _ClusterPool:
    """The workers of a dask.distributed scheduler."""

    size: int
    address: str
    client: Any
    facts: Mapping[str, str]
    program: str
    topic: str
    _executor: Any = field(init=False)
    _held: dict[Shared, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._executor = self.client.get_executor(pure=False)

    def submit(self, job: Job) -> "Future[Any]":
        args = _each(job.args, self._handed_over)
        # dask redoes the tasks of workers that it loses, up to its allowed-failures.
        theirs: Future[Any] = self._executor.submit(
            _run_there, self.facts, self.program, self.topic, job.work, *args,
            priority=int(job.urgent),
        )  # fmt: skip
        ours: Future[Any] = Future()
        theirs.add_done_callback(lambda done: self._pass_on(done, ours))
        return ours

    def _handed_over(self, shared: Shared) -> Any:
        """The future of a value that lies on the workers that need it, under its own key.

        It is a task whose input the scheduler keeps: a worker that is lost takes nothing
        with it that could not be had again.
        """
        if shared not in self._held:
            import dask.config

            value = shared.value()
            key = f"{shared.load.__name__}-{shared.key(value)}"
            threshold = {"distributed.admin.large-graph-warning-threshold": "1TB"}
            with dask.config.set(threshold):  # it is large, once
                self._held[shared] = self.client.submit(_itself, value, key=key)
        return self._held[shared]

    def _pass_on(self, done: "Future[Any]", ours: "Future[Any]") -> None:
        error = CancelledError() if done.cancelled() else done.exception()
        if error is None:
            ours.set_result(done.result())
            return
        kind = type(error).__name__
        if kind == "KilledWorker":
            error = WorkersLost(
                "a task's workers ended one after the other, perhaps for want of memory; what was "
                "done is kept: give the workers more memory and repeat the command."
            )
        elif isinstance(error, CancelledError):
            error = BusyError(
                f"the scheduler {self.address} went away; what was done is kept: start it again "
                "and repeat the command."
            )
        ours.set_exception(error)

    def renew(self) -> None:
        """Nothing: the scheduler sees to its workers."""


@contextmanager
def _cluster(address: str, program: str, on_step: OnStep) -> Iterator[_ClusterPool]:
    client = _connect(address)
    try:
        # It takes copies from workers that have nothing waiting for them, and they travel again.
        client.amm.stop()
        facts = program_facts(program)
        size = _check_members(client, address, facts, program)
        topic = f"lgbm-miner-{client.id}"
        client.subscribe_topic(topic, lambda event: on_step(*event[1]))
        yield _ClusterPool(
            size=size, address=address, client=client, facts=facts, program=program, topic=topic
        )
    finally:
        client.close()  # what still runs is forgotten


def _connect(address: str) -> Any:
    """A client of the scheduler. Raises: ConfigError; BusyError if there is no answer."""
    if not address.startswith(("tcp://", "tls://")) or not address.rpartition(":")[2].isdecimal():
        raise ConfigError(
            f"--scheduler {address} is no address; write e.g. tcp://10.0.0.5:8786, or tls://…"
        )
    distributed = require_distributed()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
        except (OSError, ValueError, ImportError, RuntimeError, TypeError) as error:
            raise BusyError(
                f"the scheduler {address} cannot be reached ({_first_line(error)}); start one with "
                "dask scheduler, or leave out --scheduler."
            ) from None
    for warning in warned:
        if issubclass(warning.category, distributed.versions.VersionMismatchWarning):
            client.close()
            raise ConfigError(
                f"the cluster at {address} runs other versions than this machine: "
                f"{_mismatches(str(warning.message))}; install the same ones everywhere."
            )
    return client


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _mismatches(table: str) -> str:
    """The packages that dask's table of versions names."""
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    return ", ".join(rows[1:]) or "see dask's warning"


def _check_members(client: Any, address: str, facts: Mapping[str, str], program: str) -> int:
    """How many tasks the workers take side by side. Raises: ConfigError, BusyError."""
    with suppress(TimeoutError):
        client.wait_for_workers(1, timeout=CONNECT_S)
    answers = client.run(_differences, facts, program, on_error="return")
    if not answers:
        raise BusyError(
            f"the scheduler {address} has no worker; start some with dask worker {address}."
        )
    for worker, answer in answers.items():
        if isinstance(answer, Exception):
            raise ConfigError(_cannot_load(f"worker {worker}", answer))
        if answer:
            raise ConfigError(_refusal(worker, answer))
    try:  # it reads what is handed to it, in whatever version
        client.run_on_scheduler(_own_facts, program)
    except Exception as error:  # noqa: BLE001  # whatever an import may raise
        raise ConfigError(_cannot_load(f"the scheduler {address}", error)) from None
    return sum(client.nthreads().values())


def _cannot_load(member: str, error: Exception) -> str:
    return (
        f"{member} cannot load this program ({_first_line(error)}); start it with the program's "
        "folder on its PYTHONPATH."
    )


def _differences(facts: Mapping[str, str], program: str) -> str:
    """On a worker: what it does not have in common with its caller."""
    own = _own_facts(program)
    return ", ".join(
        f"{name} {own[name]} instead of {wanted}"
        for name, wanted in facts.items()
        if own[name] != wanted
    )


@cache
def _own_facts(program: str) -> dict[str, str]:
    """Of the code as it was loaded, whatever becomes of its files."""
    return program_facts(program)


def _refusal(worker: str, differences: str) -> str:
    return f"worker {worker} has {differences}; install the same versions there and start it again."


def _itself(value: Any) -> Any:
    return value


def _run_there(
    facts: Mapping[str, str],
    program: str,
    topic: str,
    work: Callable[..., Any],
    *args: Any,
) -> Any:
    """On a worker: refuse if it is another version, which may have joined late; else work."""
    from distributed import get_worker

    worker = get_worker()
    if differences := _differences(facts, program):
        raise ConfigError(_refusal(worker.address, differences))
    _prepare()
    told = _tell.set(lambda *event: worker.log_event(topic, event))
    try:
        return work(*args)
    finally:
        _tell.reset(told)
