"""Block movement: its scores against autograd, masks that come and go, and its cadence."""

import itertools

import pytest
import torch
from torch import nn

from optim_helpers import mlp, train_step
from pytorch_block_sparse import BlockSparseLinear, BlockSparseMatrix, Pattern
from pytorch_block_sparse.optim import BlockMovement

pytestmark = pytest.mark.usefixtures("one_thread")


def test_movement_scores_follow_the_formula():
    """Against autograd: W' = W * mask with a straight-through mask, and the penalty in the loss."""
    model = nn.Sequential(BlockSparseLinear(32, 32, False, density=1.0, block_shape=(8, 8)))
    layer = model[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = BlockMovement(
        model, optimizer, 100, begin=0, end=50, every=1, penalty=3.0, score_lr=0.2, floor=0.2
    )
    weight = layer.values.detach().clone().requires_grad_()
    score = torch.zeros(16, requires_grad=True)
    reference = torch.optim.SGD([weight], lr=0.1)
    adam = torch.optim.Adam([score], lr=0.2)
    masks = torch.ones(16, dtype=torch.bool)
    for step in range(30):
        x = torch.randn(64, 32)
        target = x.roll(3, 1)
        (layer(x) - target).square().sum(1).mean().backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()

        soft = torch.sigmoid(score)
        through = masks.float() + score - score.detach()  # mask forward, identity backward
        dense = BlockSparseMatrix(weight * through[:, None, None], Pattern.full((32, 32), (8, 8)))
        loss = (x @ dense.to_dense().T - target).square().sum(1).mean()
        tau = sparsifier.tau(step)
        (loss + 3.0 * tau / 0.1 * soft.mean()).backward()
        # The weight's own gradient is masked; a straight-through mask adds nothing to it.
        reference.step()
        adam.step()
        reference.zero_grad()
        adam.zero_grad()
        masks = torch.sigmoid(score.detach()) > sparsifier.tau(step + 1)
        masks[score.detach().argsort(descending=True, stable=True)[:3]] = True
        torch.testing.assert_close(sparsifier.scores["0"], score.detach(), rtol=1e-3, atol=1e-3)
        assert torch.equal(sparsifier.layers[0].alive, masks)
        torch.testing.assert_close(
            layer.values, weight.detach() * masks[:, None, None], rtol=1e-3, atol=1e-4
        )
    assert 3 <= int(masks.sum()) < 16


def test_movement_of_a_layer_without_a_gradient():
    """Its scores follow the penalty alone, whatever its weights are."""
    model = mlp(density=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = BlockMovement(model, optimizer, 100, begin=0, end=50, score_every=1, compact=False)
    first, *others = (layer.module for layer in sparsifier.layers)
    model(torch.randn(4, first.in_features)).square().mean().backward()
    first.values.grad = None
    first.values.data[0, 0, 0] = torch.inf
    optimizer.step()
    sparsifier.step()
    scores = list(sparsifier.scores.values())
    assert not scores[0].any()  # at first the threshold is 0, and so is its push
    assert others and all(score.all() for score in scores[1:])
    for own in (module.values for module in others):
        own.grad = None
    sparsifier.step()
    assert all(score.isfinite().all() for score in sparsifier.scores.values())


def test_movement_blocks_can_come_back():
    model = nn.Sequential(BlockSparseLinear(32, 32, density=1.0, block_shape=(8, 8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = BlockMovement(model, optimizer, 100, begin=0, every=1, floor=0.01)
    before = model[0].values.detach().clone()
    sparsifier.scores["0"][3] = -100.0
    train_step(model, optimizer, sparsifier)
    assert not sparsifier.layers[0].alive[3] and not model[0].values[3].any()
    sparsifier.scores["0"][3] = 100.0
    train_step(model, optimizer, sparsifier)
    assert sparsifier.layers[0].alive[3] and torch.equal(model[0].values, before)


def test_movement_steps_its_scores_seldom_and_as_far():
    model = nn.Sequential(BlockSparseLinear(32, 32, density=1.0, block_shape=(8, 8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = BlockMovement(model, optimizer, 100, begin=20, score_every=4, score_lr=0.01)
    seen = [sparsifier.scores["0"].clone()]
    for _ in range(8):
        train_step(model, optimizer, sparsifier)
        seen.append(sparsifier.scores["0"].clone())
    moved = [not torch.equal(*pair) for pair in itertools.pairwise(seen)]
    assert moved == 2 * [True, False, False, False]
    torch.testing.assert_close(seen[1].abs(), torch.full((16,), 0.04))  # Adam's first step


def test_movement_by_default_costs_little_in_a_long_training():
    model = mlp(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    long, short = (BlockMovement(model, optimizer, steps) for steps in (10_000, 400))
    assert (long.score_every, long.schedule.interval) == (25, 100)
    assert (short.score_every, short.schedule.interval) == (1, 10)


def test_movement_never_goes_under_its_floor():
    model = mlp(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sparsifier = BlockMovement(model, optimizer, 40, penalty=1e6, score_lr=1.0, every=2)
    for step in range(40):
        train_step(model, optimizer, sparsifier, seed=step)
    assert model[0].block_count == 1 and model[2].block_count == 1  # 0.5 % of 128, at least one


def test_movement_learns_on_after_compaction_by_hand():
    model = mlp(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sparsifier = BlockMovement(model, optimizer, 100, begin=0, every=1, score_every=1, floor=0.01)
    sparsifier.scores["0"][:40] = -100.0
    for step in range(3):
        train_step(model, optimizer, sparsifier, seed=step)
    kept = {name: score.clone() for name, score in sparsifier.scores.items()}
    sparsifier.compact()
    assert model[0].block_count == 88
    assert torch.equal(sparsifier.scores["0"], kept["0"][40:])
    assert torch.equal(sparsifier.scores["2"], kept["2"])
    before = sparsifier.scores["0"].clone()
    train_step(model, optimizer, sparsifier, seed=3)
    assert not torch.equal(sparsifier.scores["0"], before)
    state = sparsifier.state_dict()["layers"]["0"]["adam"]
    assert int(state["step"]) == 4 and len(state["exp_avg"]) == 88
