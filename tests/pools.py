"""A task pool without processes, for tests of what the tasks do."""

from concurrent.futures import Future
from typing import Any

from task_pool import Job, _run_here, work_off


class PoolHere:
    """Does every task at once, in this process."""

    size = 1

    def submit(self, job: Job) -> "Future[Any]":
        done: Future[Any] = Future()
        try:
            done.set_result(_run_here(job.work, job.args))
        except Exception as error:  # noqa: BLE001  # a pool passes on whatever a task raises
            done.set_exception(error)
        return done

    def renew(self) -> None:
        raise AssertionError("nothing is lost here")


def do_here(jobs):
    """Do jobs in this process; the first failure is raised."""

    def fail(job, error):
        raise error

    work_off(PoolHere(), jobs, fail)
