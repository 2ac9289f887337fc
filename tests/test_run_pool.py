"""examples/run_pool.py: tasks in processes, of which some fail, some wait and some are stopped."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from run_pool import run_pool


def make(device):
    """A worker that does what the task says."""

    def work(task):
        if task == "raise":
            raise ValueError("no such task")
        if task == "die":
            os._exit(3)
        if isinstance(task, float):
            time.sleep(task)
        return task, device

    return work


def test_all_tasks_are_done_on_the_devices_given():
    outcomes = list(run_pool(make, list(range(1, 7)), ["a", "b"]))
    assert sorted(outcome.task for outcome in outcomes) == list(range(1, 7))
    assert all(outcome.result == (outcome.task, outcome.result[1]) for outcome in outcomes)
    assert {outcome.result[1] for outcome in outcomes} <= {"a", "b"}


def test_a_failure_is_reported_and_the_others_go_on():
    outcomes = {outcome.task: outcome for outcome in run_pool(make, ["raise", "die", "x"], ["a"])}
    assert "ValueError: no such task" in outcomes["raise"].error
    assert outcomes["die"].error == "its process ended with code 3"
    assert outcomes["x"] == ("x", ("x", "a"), None)


def test_a_task_waits_for_what_it_needs():
    over = []
    needs = {"never": "what is not there", "second": "first", "first": None}

    def ready(task):
        return needs[task] is None or needs[task] in over

    for outcome in run_pool(make, list(needs), ["a"], ready=ready):
        over.append(outcome.task)
    assert over == ["first", "second"]


def test_what_would_outlast_the_deadline_is_stopped():
    start = time.monotonic()
    outcomes = list(run_pool(make, ["x", 60.0], ["a", "a"], deadline=start + 8))
    assert [outcome.task for outcome in outcomes] == ["x"]
    assert time.monotonic() - start < 20
