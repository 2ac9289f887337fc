"""The Python of docs/huggingface.md runs, block after block, exactly as printed."""

import re
import sys
from pathlib import Path

import pytest
import torch

for needed in ("transformers", "peft", "matplotlib"):
    pytest.importorskip(needed)

from hf_helpers import sparse_layers  # noqa: E402

PAGE = Path(__file__).parent.parent / "docs" / "huggingface.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names, said = {}, []
    for code in BLOCKS:
        exec(compile(code, str(PAGE), "exec"), names)
        said.append(capsys.readouterr().out)
    save, _, train, generate, lora, card, look = range(len(BLOCKS))

    assert len(sparse_layers(names["loaded"])) == 14
    assert names["loaded"].dtype == torch.bfloat16
    assert "0.25" in said[save]
    assert "'block_density': 0.25" in said[train]
    printed = re.search(r'"block_churn": ([\d.]+)', BLOCKS[train])[1]
    assert f"'block_churn': {printed}" in said[train]
    assert (tmp_path / "run" / "checkpoint-10" / "trainer_state.json").exists()
    assert names["callback"].sparsifier.steps == 20
    assert names["text"].shape == (2, 16) and not said[generate]
    assert "trainable params" in said[lora]
    assert "import pytorch_block_sparse" in (tmp_path / "README.md").read_text() and not said[card]
    assert "model.layers.1.mlp.down_proj" in said[look]
    assert (tmp_path / "pattern.png").exists()


def test_it_names_the_extras_that_exist():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is new in 3.11")
    import tomllib

    project = tomllib.loads((PAGE.parent.parent / "pyproject.toml").read_text())["project"]
    named = re.search(r"pytorch_block_sparse\[(.*?)\]", PAGE.read_text())[1].split(",")
    assert set(named) <= set(project["optional-dependencies"])
