"""SparseOptimizer, the ancestor's face: what it draws, when it acts, and what it refuses."""

import math

import pytest
import torch
from torch import nn

from optim_helpers import mlp, train_step
from pytorch_block_sparse.optim import (
    SparseOptimizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
def test_sparse_optimizer_draws_new_values(distribution):
    """The ancestor's uniform values were all zero."""
    model = mlp(0.5, width=128)
    adam = torch.optim.Adam(model.parameters())
    layer = model[0]
    sparse = SparseOptimizer(
        SparseOptimizer.sparse_objects(model), 0.25, "magnitude", 0.5, distribution
    )
    sparse.attach_optimizer(adam)
    sparse.attach_optimizer(adam)
    train_step(model, adam)
    before, spread = layer.pattern.mask(), 0.5 * float(layer.values.detach().std())
    smallest = layer.weight.block_norm(1).argsort()[: layer.block_count // 4]
    pairs = before.nonzero()[smallest]
    sparse.step()
    now = layer.pattern.mask()
    assert (before & ~now).sum() == layer.block_count // 4
    assert not now[pairs[:, 0], pairs[:, 1]].any()
    fresh = (now & ~before)[now]
    new = layer.values.detach()[fresh]
    assert not adam.state[layer.values]["exp_avg"][fresh].any()
    assert adam.state[layer.values]["exp_avg"][~fresh].any()
    expected = spread / 3**0.5 if distribution == "uniform" else spread
    assert new.std() == pytest.approx(expected, 0.1)
    assert abs(new.mean()) < 0.1 * spread
    if distribution == "uniform":
        assert new.abs().max() <= spread and new.abs().max() > 0.95 * spread
        quarters = torch.histc(new, 4, -spread, spread) / new.numel()
        assert (quarters - 0.25).abs().max() < 0.03
    assert len(new.unique()) > 0.9 * new.numel()


def test_sparse_optimizer_options_and_state():
    model = mlp(0.5)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    sparse = SparseOptimizer([model[0]], lr=0.5)
    sparse.attach_optimizer(sgd)
    sparse.add_param_group({"sparse_objects": model[2], "lr": 0.0})
    masks = [model[0].pattern.mask(), model[2].pattern.mask()]
    scheduler = torch.optim.lr_scheduler.StepLR(sparse, 1, gamma=0.5)
    train_step(model, sgd, sparse)
    scheduler.step()
    assert not torch.equal(masks[0], model[0].pattern.mask())
    assert torch.equal(masks[1], model[2].pattern.mask())
    again = SparseOptimizer([model[0]], lr=0.1)
    again.add_param_group({"sparse_objects": [model[2]]})
    again.load_state_dict(sparse.state_dict())
    assert [group["lr"] for group in again.param_groups] == [0.25, 0.0] and again.steps == 1
    assert again.param_groups[0]["sparse_objects"][0] is model[0]
    again.attach_optimizer(sgd)
    assert again.attached_optimizers == [sgd]
    assert again.log == sparse.log
    assert train_step(model, sgd, again)["layers"]["sparse_objects[0]"]["age"] > 0


def test_sparse_optimizer_keeps_a_log():
    model = mlp(0.5)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = SparseOptimizer(SparseOptimizer.sparse_objects(model), lr=0.25)
    sparse.attach_optimizer(sgd)
    for seed in range(3):
        entry = train_step(model, sgd, sparse, seed)
        assert entry is sparse.log[-1]
    assert [line["step"] for line in sparse.log] == [1, 2, 3]
    assert (entry["density"], entry["churn"]) == (0.5, 0.25)
    line, pattern = entry["layers"]["sparse_objects[0]"], model[0].pattern
    assert (line["density"], line["churn"]) == (0.5, 0.25)
    assert line["dead_rows"] == int((~pattern.mask().any(1)).sum())
    assert line["dead_cols"] == int((~pattern.mask().any(0)).sum())
    # A quarter is of step 3; of what is left there may be some of step 2, age 1, and so on.
    assert 0.75 <= line["age"] <= 0.75 * 3


def test_sparse_optimizer_follows_real_steps_only():
    model = mlp(0.5)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    sparse = SparseOptimizer(SparseOptimizer.sparse_objects(model), lr=0.25)
    sparse.attach_optimizer(adam)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for scale, steps in ((torch.inf, 0), (1.0, 1), (torch.inf, 1), (1.0, 2)):
        before = model[0].pattern.mask()
        scaler.scale(scale * model(torch.randn(4, 64)).square().mean()).backward()
        assert sparse.step() is None  # accumulation: the optimizer has not stepped yet
        scaler.step(adam)
        entry = sparse.step()
        scaler.update()
        adam.zero_grad()
        assert (
            (entry is None) == (scale == torch.inf) == torch.equal(before, model[0].pattern.mask())
        )
        assert sparse.steps == len(sparse.log) == steps
    with pytest.warns(UserWarning, match="called 100 times, but no attached optimizer has made"):
        for _ in range(100):
            sparse.step()


def test_sparse_optimizer_with_an_optimizer_for_each_layer():
    model = mlp(0.5)
    optimizers = [torch.optim.Adam(model[i].parameters()) for i in (0, 2)]
    sparse = SparseOptimizer(SparseOptimizer.sparse_objects(model), lr=0.25)
    for optimizer in optimizers:
        sparse.attach_optimizer(optimizer)
    masks = [model[i].pattern.mask() for i in (0, 2)]
    entry = train_step(model, optimizers[1], sparse)  # the other one's was skipped
    assert torch.equal(masks[0], model[0].pattern.mask())
    assert not torch.equal(masks[1], model[2].pattern.mask())
    assert [line["churn"] for line in entry["layers"].values()] == [0.0, 0.25]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_sparse_optimizer_drops_what_is_not_finite(broken):
    model = mlp(0.5)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    sparse = SparseOptimizer([model[0]], lr=0.25)
    sparse.attach_optimizer(sgd)
    sgd.step()
    with torch.no_grad():
        model[0].values[3, 2, 1] = broken
    before = model[0].pattern.mask()
    with pytest.warns(UserWarning, match=r"sparse_objects\[0\]: 1 of 64 block scores are NaN"):
        sparse.step()
    gone = tuple(before.nonzero()[3].tolist())
    assert not model[0].pattern.mask()[gone]
    assert model[0].values.isfinite().all()
    fresh = (model[0].pattern.mask() & ~before)[model[0].pattern.mask()]
    assert model[0].values[fresh].any()  # drawn by the spread of those that are finite


def test_sparse_optimizer_bad_input():
    model = mlp(0.5)
    layers = SparseOptimizer.sparse_objects(model)
    assert layers == [model[0], model[2]]
    with pytest.raises(ValueError, match="has no BlockSparseLinear"):
        SparseOptimizer.sparse_objects(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="lr: must be in"):
        SparseOptimizer(layers, lr=-0.1)
    with pytest.raises(ValueError, match="method: must be 'magnitude'"):
        SparseOptimizer(layers, method="random")
    with pytest.raises(ValueError, match="new_coefficients_distribution: must be one of"):
        SparseOptimizer(layers, new_coefficients_distribution="cauchy")
    with pytest.raises(TypeError, match="must be BlockSparseLinear, got Linear"):
        SparseOptimizer([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="param_group: unknown \\['momentum'\\]"):
        SparseOptimizer(layers).add_param_group({"sparse_objects": [], "momentum": 1})
    with pytest.raises(ValueError, match=r"\[2\]: is the same layer as .*\[0\]"):
        SparseOptimizer(layers).add_param_group({"sparse_objects": layers})
    sparse = SparseOptimizer(layers)
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer"):
        sparse.attach_optimizer(model)
    sparse.attach_optimizer(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    with pytest.raises(ValueError, match=r"no attached optimizer trains sparse_objects\[0\]"):
        sparse.step()
    with pytest.raises(TypeError, match="got None"):
        sparse.attach_optimizer(None)
    with pytest.raises(TypeError, match="lr: must be a number, got 'x'"):
        SparseOptimizer(layers, lr="x")
    with pytest.raises(TypeError, match="new_coefficients_scale: must be a number"):
        SparseOptimizer(layers, new_coefficients_scale=None)
    sparse.param_groups[0]["lr"] = 2.0
    with pytest.raises(ValueError, match="lr: must be in"):
        sparse.step()
