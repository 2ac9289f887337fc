"""BlockImportance against dense formulas."""

import sys

import pytest
import torch
from torch import nn

from optim_helpers import mlp
from pytorch_block_sparse import BlockSparseLinear, Pattern
from pytorch_block_sparse.optim import BlockImportance, update_pattern_

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    pattern = Pattern.random((30, 20), 0.5, (8, 8))
    return BlockSparseLinear(20, 30, pattern=pattern)


def blocks_of(dense):
    """[4, 3, 8, 8]: the blocks of a 30 x 20 matrix."""
    padded = nn.functional.pad(dense, (0, 4, 0, 2))
    return padded.reshape(4, 8, 3, 8).permute(0, 2, 1, 3)


def present(grid, layer):
    return grid[layer.pattern.mask()]


def test_scores_from_weights(layer):
    importance = BlockImportance(nn.Sequential(layer))
    blocks = blocks_of(layer.weight.to_dense().detach())
    for score, expected in {
        "l1": blocks.abs().sum((2, 3)),
        "l2": blocks.square().sum((2, 3)).sqrt(),
        "max": blocks.abs().amax((2, 3)),
    }.items():
        values = importance.scores(score)["0"]
        torch.testing.assert_close(values, present(expected, layer))
        grid = importance.map("0", score)
        assert torch.equal(grid.isnan(), ~layer.pattern.mask())
        assert torch.equal(grid[layer.pattern.mask()], values)


def test_scores_from_gradients(layer):
    importance = BlockImportance(nn.Sequential(layer), decay=0.5)
    weight = layer.weight.to_dense().detach()
    average, fisher = None, 0.0
    for _ in range(3):
        x = torch.randn(16, 20)
        y = layer(x)
        y.retain_grad()
        y.square().sum().backward()
        product = blocks_of(weight * (y.grad.T @ x))
        importance.observe()
        layer.zero_grad()
        effect = product.sum((2, 3)).abs()
        average = effect if average is None else 0.5 * average + 0.5 * effect
        fisher = fisher + product.square().sum((2, 3))
    for score, expected in (("effect", effect), ("average", average), ("fisher", fisher)):
        torch.testing.assert_close(
            importance.scores(score)["0"], present(expected, layer), rtol=1e-3, atol=1e-3
        )


def test_effect_is_the_first_order_change_of_the_loss(layer):
    importance = BlockImportance(nn.Sequential(layer))
    layer = layer.double()
    x, target = torch.randn(16, 20).double(), torch.randn(16, 30).double()

    def loss():
        return (layer(x) - target).square().mean()

    loss().backward()
    importance.observe()
    with torch.no_grad():
        base, scale = loss(), 1e-6
        for block in range(layer.block_count):
            layer.values[block] *= 1 - scale
            change = (loss() - base) / scale
            layer.values[block] /= 1 - scale
            expected = importance.scores("effect")["0"][block]
            torch.testing.assert_close(change.abs(), expected, rtol=1e-3, atol=1e-6)


def test_scores_from_inputs(layer):
    importance = BlockImportance(nn.Sequential(layer))
    x = torch.randn(64, 20) * torch.arange(20)
    with importance.calibration():
        layer(x[:10])
        layer(x[10:].reshape(2, 27, 20))
    expected = blocks_of(layer.weight.to_dense().detach().square() * x.square().mean(0))
    torch.testing.assert_close(
        importance.scores("activation")["0"].float(), present(expected.sum((2, 3)), layer)
    )


def test_absent_blocks(layer):
    importance = BlockImportance(nn.Sequential(layer))
    x = torch.randn(3, 7, 20)
    with importance.candidates(share=1.0) as candidates, importance.pooled() as bounds:
        y = layer(x)
        y.retain_grad()
        y.square().sum().backward()
    norms = blocks_of(y.grad.flatten(0, 1).T @ x.flatten(0, 1)).square().sum((2, 3)).sqrt()
    pairs, scores = candidates["0"]
    assert torch.equal(pairs, (~layer.pattern.mask()).nonzero())
    torch.testing.assert_close(scores, norms[~layer.pattern.mask()], rtol=1e-3, atol=1e-3)
    assert (bounds["0"] >= norms * (1 - 1e-5)).all()
    per_token = y.grad.flatten(0, 1)[:, :, None] * x.flatten(0, 1)[:, None]
    sums = torch.stack([blocks_of(g).square().sum((2, 3)).sqrt() for g in per_token]).sum(0)
    torch.testing.assert_close(bounds["0"], sums, rtol=1e-4, atol=1e-4)
    with importance.candidates(share=0.5) as fewer:
        layer(x).sum().backward()
    assert len(fewer["0"][0]) == 3 and not layer._forward_hooks


def test_table_and_picture(tmp_path):
    model = mlp()
    importance = BlockImportance(model)
    with torch.no_grad():
        model[0].values.fill_(1.0)
    rows = importance.table("l1")
    assert [row["layer"] for row in rows] == ["0", "2"]
    assert rows[0]["lowest_half"] == 0.5 and rows[0]["min"] == rows[0]["max"] == 64
    assert rows[1]["lowest_half"] < 0.5 and rows[1]["shape"] == (64, 128)
    assert rows[0]["dead_rows"] == int((~model[0].pattern.mask().any(1)).sum())
    pytest.importorskip("matplotlib")
    importance.plot("l2", path=tmp_path / "heat.png")
    assert (tmp_path / "heat.png").stat().st_size > 1000
    assert len(importance.plot("l1", names=["2"]).axes) == 2  # a map and its colour bar


def test_without_matplotlib_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plot: needs matplotlib"):
        BlockImportance(mlp()).plot()


def test_what_was_not_measured_is_an_error():
    model = mlp()
    importance = BlockImportance(model)
    with pytest.raises(RuntimeError, match="0 has no gradient; call observe"):
        importance.scores("effect")
    with pytest.raises(RuntimeError, match="call it between backward and zero_grad"):
        importance.observe()
    with pytest.raises(RuntimeError, match=r"run the model inside calibration"):
        importance.scores("activation")
    with importance.calibration():
        pass
    with pytest.raises(RuntimeError, match=r"0 has had no input inside calibration"):
        importance.table("activation")
    for names in ([], "0"):
        with pytest.raises(ValueError, match="names: must be a list of layers, one at least"):
            importance.plot("l1", names)
    with pytest.raises(ValueError, match="score: must be one of"):
        importance.scores("l7")
    with pytest.raises(ValueError, match="name: '7' is none of"):
        importance.map("7")
    with pytest.raises(ValueError, match="has no BlockSparseLinear"):
        BlockImportance(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="only: chooses none"):
        BlockImportance(model, only=lambda name: False)
    with pytest.raises(ValueError, match="decay"):
        BlockImportance(model, decay=1.0)
    with pytest.raises(TypeError, match="decay: must be a number, got 'x'"):
        BlockImportance(model, decay="x")
    with pytest.raises(TypeError, match="share: must be a number"), importance.candidates("x"):
        pass
    with pytest.raises(ValueError, match="share"), importance.candidates(share=0):
        pass


@pytest.mark.parametrize("name", ["candidates", "pooled"])
def test_absent_blocks_without_a_backward_are_an_error(name):
    model = mlp()
    context = getattr(BlockImportance(model), name)
    message = rf"{name}: 0 has had no finite gradient inside {name}\(\)"
    with pytest.raises(RuntimeError, match=message), context() as found:
        model(torch.randn(4, 64))
    assert not found
    with pytest.raises(RuntimeError, match=message), context():
        (model(torch.randn(4, 64)).sum() * torch.inf).backward()
    with pytest.raises(RuntimeError, match=f"{name}: 2 has had no finite gradient"), context():
        model[0](torch.randn(4, 64)).sum().backward()
    assert not any(m._forward_hooks for m in model.modules())


def test_hooks_go_away_when_the_body_raises():
    model = mlp()
    importance = BlockImportance(model)
    for context in (importance.candidates, importance.pooled, importance.calibration):
        with pytest.raises(KeyError), context():
            raise KeyError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_after_an_update_the_scores_are_of_the_new_blocks():
    model = mlp()
    importance = BlockImportance(model)
    mask = model[0].pattern.mask()
    update_pattern_(model[0], mask.nonzero()[:1], (~mask).nonzero()[:1])
    assert (importance.scores("l1")["0"] == 0).sum() == 1
