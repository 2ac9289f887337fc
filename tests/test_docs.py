"""The pages of docs/: their Python runs as printed, and what they list is what there is.

README.md and the pages of TESTED_ELSEWHERE have tests of their own.
"""

import re
from pathlib import Path

import pytest
import torch

import pytorch_block_sparse
from pytorch_block_sparse import BlockSparseLinear, Pattern, distributed, integrations, optim
from pytorch_block_sparse.testing import kernel_names

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TESTED_ELSEWHERE = {"pattern-optimisation.md", "huggingface.md", "distributed.md", "serving.md"}
WITH_PYTHON = sorted(
    page.name
    for page in DOCS.glob("*.md")
    if "```python" in page.read_text() and page.name not in TESTED_ELSEWHERE
)

pytestmark = pytest.mark.usefixtures("one_thread")


def run(page, capsys):
    """What a page's blocks of Python, one after the other, define and print."""
    names = {}
    for code in re.findall(
        r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL
    ):
        exec(compile(code, page, "exec"), names)
    return names, capsys.readouterr().out


def test_every_page_with_python_is_run_below():
    assert WITH_PYTHON == [
        "index.md",
        "inside.md",
        "install.md",
        "migration.md",
        "quantization.md",
        "quickstart.md",
    ]


def test_index(capsys):
    names, _ = run("index.md", capsys)
    assert names["layer"].block_count == 26


def test_install(capsys):
    _, said = run("install.md", capsys)
    assert said.startswith(pytorch_block_sparse.__version__)
    assert f"cpu {kernel_names('cpu')}" in said


def test_inside(capsys):
    _, said = run("inside.md", capsys)
    assert "('cpu_few_tokens', " in said and str(kernel_names("cpu")) in said


def test_quickstart(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, said = run("quickstart.md", capsys)
    assert "density=0.25, block_shape=(32, 32), block_count=32)" in said
    assert names["loss"] < 0.7  # of four classes: 1.39 for a guess
    assert [entry["step"] for entry in names["sparsifier"].log] == [10, 20, 30, 40, 50]
    first, second = names["model"], names["again"]
    assert first[0].pattern.equal(second[0].pattern)
    with torch.inference_mode():
        assert torch.equal(first(names["x"]), second(names["x"]))
        assert torch.allclose(names["y"], second[0](names["x"]), atol=1e-5)
    assert "grad_weight f32 tokens=512" in said


def test_migration(capsys):
    names, _ = run("migration.md", capsys)
    dense, x = names["dense"], names["x"]
    assert names["matrix"].pattern.nnz == 4
    assert names["matrix"].values.data_ptr() == names["bsr"].values().data_ptr()
    assert names["back"].values().data_ptr() == names["bsr"].values().data_ptr()
    assert torch.allclose(names["y"], x @ dense.t(), atol=1e-4)
    bias = torch.randn(64)
    layer = names["sparse_layer"](dense, bias)
    assert type(layer) is BlockSparseLinear and layer.block_count == 4
    assert torch.allclose(layer(x), x @ dense.t() + bias, atol=1e-4)


def test_quantization(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, said = run("quantization.md", capsys)
    values = names["model"][0].values
    assert values.dtype == torch.int8 and 16 * values.numel() == 4 * 256 * 512
    assert f"{sum(b.nbytes for b in names['model'][0].buffers()):,}" in said
    x = torch.randn(3, 256)
    with torch.inference_mode():
        assert torch.equal(names["again"][0](x), names["model"][0](x))


def test_the_rules_of_the_patcher_are_for_whole_names():
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(32, 32)))
    patcher = pytorch_block_sparse.BlockSparseModelPatcher()
    patcher.add_pattern("0", {})  # the start of "0.0"
    with pytest.raises(ValueError, match=r"near names: 0\.0"):
        patcher.patch_model(model)


def test_every_public_name_has_its_place_in_the_reference():
    reference = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(r"^::: pytorch_block_sparse\.([\w.]+)$", reference, re.MULTILINE))
    public = {
        *(set(pytorch_block_sparse.__all__) - {"ops"}),
        *(f"optim.{name}" for name in optim.__all__),
        *(f"integrations.{name}" for name in integrations.__all__),
        *(f"distributed.{name}" for name in distributed.__all__),
    }
    assert public <= listed


@pytest.mark.parametrize("page", ["performance.md", "inside.md"])
def test_every_kernel_is_listed(page):
    if not (ROOT / "src").exists():
        pytest.skip("the sources are not here")
    sources = [p for p in (ROOT / "src").rglob("*") if p.suffix in (".cpp", ".cu")]
    in_sources = {
        name
        for source in sources
        for name in re.findall(r'return \{\s*"((?:cpu|cuda)_\w+)"', source.read_text())
    }
    named = set(re.findall(r"`((?:cpu|cuda)_\w+)`", (DOCS / page).read_text()))
    assert set(kernel_names("cpu")) < in_sources
    assert named == in_sources


def test_every_file_that_a_page_names_exists():
    named = {
        name
        for page in DOCS.glob("*.md")
        for name in re.findall(
            r"`((?:src|include|python|benchmarks|examples)/[\w./-]+)`", page.read_text()
        )
    }
    assert {"src/kernel.h", "src/dispatch.cpp", "src/torch/binding.h"} <= named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_index_is_laid_out_as_inside_says():
    text = (DOCS / "inside.md").read_text()
    parts = re.findall(r"`(\w+)`", re.search(r"\| part .*?\n\n", text, re.DOTALL)[0])
    from pytorch_block_sparse.pattern import IndexParts

    assert tuple(part for part in parts if part != "values") == IndexParts._fields
    pattern = Pattern.random((64, 96), 0.5)
    rows, cols = pattern.grid
    assert pattern.index.numel() == rows + 1 + cols + 1 + 4 * pattern.nnz
