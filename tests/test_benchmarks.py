"""The bars in benchmarks/overhead.py: which times miss them. No test measures time."""

import importlib.util
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parent.parent / "benchmarks" / "overhead.py"

# (ours, dense) in us: inference and training step of the tiny layer, then of the large one
KEPT = [(3, 1), (50, 10), (10, 15), (10, 15)]
MISSED = [(3.1, 1), (51, 10), (10, 14.9), (10, 14.9)]


@pytest.mark.parametrize("missed", [None, 0, 1, 2, 3], ids=str)
def test_the_exit_status_of_overhead(missed, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("overhead", PATH)
    overhead = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(overhead)
    times = [MISSED[i] if i == missed else pair for i, pair in enumerate(KEPT)]
    monkeypatch.setattr(overhead, "compare", lambda *args: times.pop(0))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    assert overhead.main() == (missed is not None)
    verdicts = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert verdicts == ["MISSED" if i == missed else "ok" for i in range(4)]
