"""summary(model), plot_pattern(module), and progress bars where tqdm is installed."""

import builtins
import sys

import pytest
import torch
from torch import nn

from patch_helpers import Model, patched
from pytorch_block_sparse import BlockSparseLinear, Pattern, plot_pattern, summary
from pytorch_block_sparse._progress import progress


def columns(table):
    return [line.split() for line in table.splitlines()]


def test_summary_counts_what_is_stored_and_what_a_dense_layer_would_have():
    model = Model()
    dense = sum(p.numel() for p in model.parameters())
    patched(model, (r"blocks\.\d\.up", {"density": 0.25}))
    lines = columns(summary(model))
    assert [line[0] for line in lines] == ["layer", "blocks.0.up", "blocks.1.up", "sparse", "model"]
    indices = 4 * (2 + 5 + 3 + 5 + 4 * 2)  # of each layer: 2 of its 4 x 2 blocks are present
    assert lines[1][1:9] == ["128", "x", "64", "32x32", "2", "/", "8", "0.25"]
    assert lines[1][9:] == ["2,176", "8,320", f"{4 * 2176 + indices:,}"]
    assert lines[3][1:] == ["4", "/", "16", "0.25", "4,352", "16,640", f"{2 * (8704 + indices):,}"]
    stored = sum(p.numel() for p in model.parameters())
    assert lines[4][1:] == [f"{stored:,}", f"{dense:,}", f"{4 * stored + 2 * indices:,}"]


def test_summary_of_a_layer_alone_a_shared_one_and_a_prepacked_one():
    layer = BlockSparseLinear(64, 96, bias=False, density=0.5)
    assert columns(summary(layer))[1][0] == "(itself)"
    twice = nn.Sequential(layer, nn.Linear(96, 64), layer)
    assert columns(summary(twice))[-1][1] == f"{3 * 1024 + 96 * 64 + 64:,}"
    served = nn.Sequential(layer.prepack())
    assert columns(summary(served))[1][1:] == columns(summary(nn.Sequential(layer)))[1][1:]


def test_summary_of_a_model_without_sparse_layers():
    assert columns(summary(nn.Linear(4, 4))) == [
        ["layer", "out", "x", "in", "block", "blocks", "density", "parameters", "dense", "bytes"],
        ["sparse", "0", "/", "0", "0", "0", "0"],
        ["model", "20", "20", "80"],
    ]


def test_summary_of_int8_values_has_their_bytes():
    layer = BlockSparseLinear(64, 96, density=0.5)
    plain, served = (columns(summary(module))[1][-3:] for module in (layer, layer.quantize()))
    assert served[:2] == plain[:2]
    values, others = 3 * 1024, 4 * (96 + (4 + 3) + (4 + 3) + 4 * 3)  # bias and indices
    assert [plain[2], served[2]] == [f"{4 * values + others:,}", f"{values + others + 4 * 96:,}"]


def test_plot_shows_the_mask_of_each_layer(tmp_path):
    pytest.importorskip("matplotlib")
    pattern = Pattern.from_blocks([(0, 1), (2, 0)], (96, 64))
    model = nn.Sequential(
        BlockSparseLinear(64, 96, pattern=pattern), BlockSparseLinear(96, 64, density=0.5)
    )
    figure = plot_pattern(model, tmp_path / "pattern.png")
    assert (tmp_path / "pattern.png").read_bytes().startswith(b"\x89PNG")
    axes = [ax for ax in figure.axes if ax.images]
    assert len(axes) == 2
    shown = torch.as_tensor(axes[0].images[0].get_array().data)
    assert torch.equal(shown.bool(), pattern.mask())
    assert axes[0].get_title() == "0 0.333"
    assert len(plot_pattern(model[1]).axes) == 1


def test_plot_without_a_layer_or_without_matplotlib(monkeypatch):
    with pytest.raises(ValueError, match="module: Linear has no block-sparse layer"):
        plot_pattern(nn.Linear(4, 4))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plot_pattern: needs matplotlib"):
        plot_pattern(BlockSparseLinear(64, 64))


# --- progress -------------------------------------------------------------------------------------


def test_progress_shows_a_bar_where_tqdm_is_installed(monkeypatch):
    auto = pytest.importorskip("tqdm.auto")
    seen = []

    def tqdm(items, **options):
        seen.append(options)
        return iter(items)

    monkeypatch.setattr(auto, "tqdm", tqdm)
    patched(Model(), (".*", {"density": 0.5}))
    (options,) = seen
    assert options["desc"] == "Patching" and options["delay"] > 0  # a small model shows none


def test_without_tqdm_all_is_done_all_the_same(monkeypatch):
    plain = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name.startswith("tqdm"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    assert list(progress([1, 2, 3], "Counting")) == [1, 2, 3]
    assert len(patched(Model(), (".*", {"density": 0.5}))) == 5
