"""The training example runs from end to end, in its short form."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_language_model.py"


def test_train_language_model(tmp_path):
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), "--quick", "--out", str(tmp_path)],
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
