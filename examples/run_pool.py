"""Runs tasks in worker processes, each with a device of its own. Knows nothing of what a task is.

Many small trainings leave a GPU idle between their kernels; several processes fill the gaps. A task
that fails, or that takes its process with it, is reported, its process is replaced, and the others
go on. Nothing is retried.
"""

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection, get_context
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """One task that is over: either `result` is something, or `error` says why not."""

    task: Any
    result: Any
    error: str | None


def _work(make: Callable[[str], Callable[[Any], Any]], device: str, pipe: Any) -> None:
    """A worker: makes its function, and calls it with one task after the other."""
    function = make(device)
    while (task := pipe.recv()) is not None:
        try:
            pipe.send((function(task), None))
        except Exception:
            # The last one of this process: an error of CUDA stays until it ends.
            pipe.send((None, traceback.format_exc()))
            return


class _Worker:
    """A process, the pipe to it, and the task that it is busy with (None: none)."""

    def __init__(self, make: Callable[[str], Callable[[Any], Any]], device: str) -> None:
        context = get_context("spawn")  # CUDA does not survive a fork
        self.device, self.task, self.since = device, None, 0.0
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(make, device, other), daemon=True)
        self.process.start()
        other.close()  # so that the end of the process is the end of the pipe

    def give(self, task: Any) -> None:
        """Starts a task; a process that has died already is noticed by `outcome`."""
        self.task, self.since = task, time.monotonic()
        with contextlib.suppress(OSError):
            self.pipe.send(task)

    def stop(self) -> None:
        """Ends the process, and with it what it is busy with."""
        if self.task is None:
            self.give(None)
            self.process.join(5)
        self.process.terminate()

    def outcome(self) -> Outcome:
        """Of the task that it was given; waits for it."""
        try:
            result, error = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            result, error = None, f"its process ended with code {self.process.exitcode}"
        task, self.task = self.task, None
        return Outcome(task, result, error)


def run_pool(
    make: Callable[[str], Callable[[Any], Any]],
    tasks: list[Any],
    devices: list[str],
    *,
    ready: Callable[[Any], bool] = lambda task: True,
    deadline: float = float("inf"),
) -> Iterator[Outcome]:
    """Yields the outcome of each task, in the order in which they end.

    Args:
        make: called with its device in each worker process; returns the function that does a task.
            Must be picklable, as the tasks and their results.
        tasks: in the order in which they are started.
        devices: one worker for each; a device may be named several times.
        ready: says whether a task may start yet; asked again whenever another has ended. Tasks that
            never are ready are not run.
        deadline: of ``time.monotonic()``; what runs then is stopped, and nothing is started that
            would last beyond it (if it took as long as the median so far).
    """
    waiting = list(tasks)
    lasted: list[float] = []
    workers = [_Worker(make, device) for device in devices[: len(tasks)]]
    try:
        while True:
            typical = sorted(lasted)[len(lasted) // 2] if lasted else 0.0
            for worker in workers:
                chosen = next((task for task in waiting if ready(task)), None)
                late = time.monotonic() + typical > deadline
                if worker.task is None and chosen is not None and not late:
                    waiting.remove(chosen)
                    worker.give(chosen)
            busy = {worker.pipe: worker for worker in workers if worker.task is not None}
            left = deadline - time.monotonic()
            if not busy or left <= 0:
                return
            for pipe in connection.wait(list(busy), None if left == float("inf") else left):
                worker = busy[pipe]
                outcome = worker.outcome()
                if outcome.error is None:
                    lasted.append(time.monotonic() - worker.since)
                else:
                    workers[workers.index(worker)] = _Worker(make, worker.device)
                yield outcome
    finally:
        for worker in workers:
            worker.stop()
