"""What benchmarks/ makes of its measurements. No test measures time."""

import importlib.util
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# (ours, dense) in us: inference and training step of the tiny layer, then of the large one
KEPT = [(3, 1), (50, 10), (10, 15), (10, 15)]
MISSED = [(3.1, 1), (51, 10), (10, 14.9), (10, 14.9)]


def module(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("missed", [None, 0, 1, 2, 3], ids=str)
def test_the_exit_status_of_overhead(missed, monkeypatch, capsys):
    overhead = module("overhead")
    times = [MISSED[i] if i == missed else pair for i, pair in enumerate(KEPT)]
    monkeypatch.setattr(overhead, "compare", lambda *args: times.pop(0))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    assert overhead.main() == (missed is not None)
    verdicts = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert verdicts == ["MISSED" if i == missed else "ok" for i in range(4)]


@pytest.mark.parametrize(
    ("names", "axes"),
    [
        (["gpu_h200_bfloat16"], [("density", "times as fast as dense")] + 2 * [("density", "")]),
        (
            ["few_tokens_h100_bfloat16", "handover_h100_bfloat16"],
            [("tokens", "microseconds"), ("tokens", "")],
        ),
    ],
    ids=["density", "tokens"],
)
def test_plots_of_results(names, axes, tmp_path):
    pytest.importorskip("matplotlib")
    gpu_plots = module("gpu_plots")
    file = tmp_path / "plot.png"
    gpu_plots.main([*(f"{BENCHMARKS}/results/{name}.json" for name in names), "--plot", str(file)])
    assert file.read_bytes().startswith(b"\x89PNG")
    figure = gpu_plots.plt.gcf()
    assert [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes] == axes
    dense = ["cuBLAS dense"] + len(axes) % 3 * ["memory's limit, dense", "memory's limit, ours"]
    assert {line.get_label() for line in figure.axes[0].lines} > set(dense[:3])
    gpu_plots.plt.close(figure)
