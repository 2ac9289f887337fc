"""The examples run from end to end, in their short forms."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_train_language_model(tmp_path):
    result = subprocess.run(
        [
            sys.executable,
            str(EXAMPLES / "train_language_model.py"),
            "--quick",
            "--out",
            str(tmp_path),
        ],
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr

    rows = re.findall(r"^(.+?) +([\d,.]+) +([\d,.]+) +([\d.]+)$", result.stdout, re.MULTILINE)
    table = {label: [float(n.replace(",", "")) for n in numbers] for label, *numbers in rows}
    # A quarter of the blocks; the biases stay whole and weigh more in layers as small as these.
    assert table["linear layers: parameters"][2] < 0.27
    assert table["linear layers: bytes, with indices"][2] < 0.28
    assert table["model: parameters"][2] < 1
    assert table["linear layers: ms per step, alone"][1] > 0 < table["model: ms per step"][1]
    assert table["train loss, last 2"][1] < table["train loss, first step"][1]
    first, last = table["train loss, first step"], table["held-out loss"]
    assert last[0] < first[0] - 0.3
    assert last[1] < first[1] - 0.3

    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert re.search(r"tokens' frequencies alone.*: \d\.\d+$", result.stdout, re.MULTILINE)
    here, there = re.search(r"here (\S+), loaded in a new process (\S+)", result.stdout).groups()
    assert here == there


@pytest.mark.slow
def test_optimise_pattern(tmp_path):
    methods = ["dense", "static", "gradual + distillation"]
    command = [sys.executable, str(EXAMPLES / "optimise_pattern.py"), "--quick"]
    command += ["--out", str(tmp_path), "--methods", *methods]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # so small a model waits for its threads
    result = subprocess.run(command, text=True, capture_output=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr

    rows = re.findall(r"^\| ([^\d\n]+?) \| [\d.]+ \| (.*) \|$", result.stdout, re.MULTILINE)
    table = {method: line.split(" | ") for method, line in rows}
    assert sorted(table) == sorted(methods)
    parameters = {name: int(line[2].replace(",", "")) for name, line in table.items()}
    # ERK rounds the number of blocks in each layer.
    assert parameters["gradual + distillation"] == pytest.approx(parameters["static"], rel=0.005)
    assert parameters["static"] < parameters["dense"] / 2
    assert all(5 < float(line[3]) < 6 for line in table.values())  # log(512) is 6.2
    assert (tmp_path / "loss.png").stat().st_size > 10_000

    again = subprocess.run(command, text=True, capture_output=True)
    assert "3 runs are there, 0 are to be made" in again.stdout
