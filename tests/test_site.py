"""The documentation site builds without a warning, and the notebook runs, in its short form."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "notebooks" / "sparsify_a_model.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(notebook):
    """What the cells of a notebook wrote to standard output."""
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return "".join("".join(o["text"]) for o in outputs if o.get("name") == "stdout")


def pictures(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]


def test_the_committed_notebook_has_the_outputs_of_one_run():
    notebook = json.loads(NOTEBOOK.read_text())
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {(o["output_type"], o.get("name")) for cell in cells for o in cell["outputs"]}
    assert ("error", None) not in kinds and ("stream", "stderr") not in kinds
    assert len(pictures(notebook)) == 4
    assert "step  396: " in printed(notebook)  # of 800: the long form
    assert "torch 2." in printed(notebook) and "the same" in printed(notebook)


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch, tmp_path):
    """In an empty folder: of this repository it needs the installed package only."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for needed in ("ipykernel", "transformers", "tokenizers", "matplotlib"):
        pytest.importorskip(needed)
    monkeypatch.setenv("NOTEBOOK_STEPS", "12")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the products of so few steps are no work for two
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = printed(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # a cell that raises is an error here
    said = printed(notebook)
    assert len(pictures(notebook)) == 4

    # What does not depend on the training is what the committed run says.
    first = re.compile(r"^layer .*?^total .*?$", re.MULTILINE | re.DOTALL)
    assert first.search(said)[0] == first.search(committed)[0]
    numbers = re.findall(r"^(?:dense|block sparse) +([\d,]+) +[\d.]+ +[\d.]+$", said, re.MULTILINE)
    dense, sparse = (int(number.replace(",", "")) for number in numbers[:2])
    assert 0.25 < sparse / dense < 0.3
    size = {
        name: int(n.replace(",", ""))
        for name, n in re.findall(r"^(\w+) +([\d,]+) bytes", said, re.M)
    }
    assert size["sparse"] < 0.5 * size["dense"]
    churn = [float(c) for c in re.findall(r"churn ([\d.]+)$", said, re.MULTILINE)]
    assert churn[0] > 0.4 and len(churn) >= 6
    assert re.search(r"held-out loss of the loaded model: [\d.]+, the same$", said, re.MULTILINE)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocs_jupyter")
    result = subprocess.run(  # not --quiet: then --strict sees no warnings
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    pages = {page.relative_to(tmp_path).as_posix(): page for page in tmp_path.rglob("*.html")}
    del pages["404.html"]  # its links are those of a server
    text = {name: html.unescape(page.read_text()) for name, page in pages.items()}
    assert "block_count" in text["api/layers.html"]
    assert "cuBLAS" in text["choose.html"] and "density 0.25" in text["choose.html"]
    assert "data:image/png" in text["notebooks/sparsify_a_model.html"]
    for name, content in text.items():
        for left_over in ("--8<--", ":class:`", ":meth:`", "::: pytorch"):
            assert left_over not in content, f"{name} has {left_over}"
        links = re.findall(r'href="([^"#?:]+)["#?]', content)
        gone = [link for link in links if not (pages[name].parent / link).exists()]
        assert not gone, f"{name} links to {gone}"
