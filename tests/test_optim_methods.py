"""Each method finds what it should: a planted pattern, its schedule, its formula."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from optim_helpers import mlp, train_step
from pytorch_block_sparse import BlockSparseLinear
from pytorch_block_sparse.optim import (
    BlockMovement,
    BlockRigL,
    BlockSET,
    BlockWanda,
    GradualMagnitude,
    layer_counts,
    layer_densities,
    update_pattern_,
)
from pytorch_block_sparse.optim.update import replace_blocks_

pytestmark = pytest.mark.usefixtures("one_thread")

# --- the planted teacher: a linear map whose pattern of blocks is known --------------------------

SIZE, BLOCK, DENSITY, STEPS = 128, 8, 0.25, 400


def found(make_sparsifier, density, seed):
    """Share of the planted blocks that the student has after training at that number of blocks."""
    torch.manual_seed(seed)
    teacher = BlockSparseLinear(SIZE, SIZE, False, DENSITY, block_shape=(BLOCK, BLOCK))
    student = nn.Sequential(
        BlockSparseLinear(SIZE, SIZE, False, density, block_shape=(BLOCK, BLOCK))
    )
    teacher.requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    sparsifier = make_sparsifier(student, optimizer, seed)
    for _ in range(STEPS):
        x = torch.randn(64, SIZE)
        (student(x) - teacher(x)).square().mean().backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step()
        optimizer.zero_grad()
    planted, now = teacher.pattern.mask(), student[0].pattern.mask()
    assert now.sum() == planted.sum()  # no method wins by having more
    return float((planted & now).sum() / planted.sum())


@pytest.mark.parametrize(
    ("name", "density", "low", "high"),
    [
        ("static", DENSITY, DENSITY - 0.15, DENSITY + 0.15),
        ("SET", DENSITY, 0.7, 1.0),
        ("RigL", DENSITY, 0.9, 1.0),
        ("gradual", 1.0, 0.9, 1.0),
        ("movement", 1.0, 0.9, 1.0),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_blocks_are_found(name, density, low, high, seed):
    make = {
        "static": lambda m, o, s: None,
        "SET": lambda m, o, s: BlockSET(m, o, STEPS, every=10, seed=s),
        "RigL": lambda m, o, s: BlockRigL(m, o, STEPS, every=10, seed=s),
        "gradual": lambda m, o, s: GradualMagnitude(m, o, STEPS, density=DENSITY),
        "movement": lambda m, o, s: BlockMovement(m, o, STEPS, floor=DENSITY, score_lr=5e-2),
    }[name]
    assert low <= found(make, density, seed) <= high


# --- SET and RigL --------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["l1", "l2", "max"])
def test_set_drops_the_lowest(score):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    layer = model[0]
    values = layer.values.detach()
    norm = {
        "l1": values.abs().sum((1, 2)),
        "l2": values.square().sum((1, 2)).sqrt(),
        "max": values.abs().amax((1, 2)),
    }[score]
    pairs = layer.pattern.mask().nonzero()[norm.argsort()[:16]]
    before = layer.pattern.mask()
    sparsifier = BlockSET(model, optimizer, 100, every=1, score=score, drop=lambda step: 0.5)
    train_step(model, optimizer, sparsifier)
    gone = before & ~layer.pattern.mask()
    assert gone.sum() == 16 and gone[pairs[:, 0], pairs[:, 1]].all()


def test_set_starts_new_blocks_at_zero_or_as_told():
    for new_values in (None, lambda layer, count: torch.full((count, 8, 8), 7.0)):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters())
        sparsifier = BlockSET(model, optimizer, 100, every=2, new_values=new_values)
        train_step(model, optimizer, sparsifier)
        train_step(model, optimizer, sparsifier)
        fresh = sparsifier.layers[0].born == 2
        assert fresh.sum() == 16
        assert (model[0].values[fresh] == (0.0 if new_values is None else 7.0)).all()
        assert not optimizer.state[model[0].values]["exp_avg"][fresh].any()
        assert optimizer.state[model[0].values]["exp_avg"][~fresh].any()


@pytest.mark.parametrize("build", [BlockSET, BlockRigL])
def test_new_blocks_can_start_at_the_mean_second_moment(build):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier = build(model, optimizer, 100, every=2, second_moment="mean")
    train_step(model, optimizer, sparsifier)
    train_step(model, optimizer, sparsifier)
    state, fresh = optimizer.state[model[0].values], sparsifier.layers[0].born == 2
    second = state["exp_avg_sq"]
    assert fresh.any() and not state["exp_avg"][fresh].any()
    torch.testing.assert_close(second[fresh], second[~fresh].mean().expand_as(second[fresh]))
    with pytest.raises(ValueError, match="second_moment: must be 'zero' or 'mean'"):
        build(model, optimizer, 100, second_moment="one")


def test_set_grows_as_many_as_fit():
    model = mlp(0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = BlockSET(model, optimizer, 100, every=1)
    cells, nnz = 128, model[0].block_count
    train_step(model, optimizer, sparsifier)
    assert sparsifier.log[0]["layers"]["0"]["churn"] == (cells - nnz) / nnz
    assert model[0].block_count == nnz


def test_blocks_that_cannot_be_replaced_change_nothing():
    """Neither by hand nor in a method of one's own, whose choice is not checked."""
    model = mlp()
    layer = model[0]
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer)
    layer.values.grad = torch.randn_like(layer.values)
    state = optimizer.state[layer.values]
    mask = layer.pattern.mask()
    drop, present, absent = mask.nonzero()[:2], mask.nonzero()[3:5], (~mask).nonzero()[:2]

    def everything():
        tensors = [layer.values, layer.values.grad, state["exp_avg"], *layer.buffers()]
        return [tensor.detach().clone() for tensor in tensors]

    before = everything()

    def refused(error, match, grow=absent, **options):
        with pytest.raises(error, match=match):
            update_pattern_(layer, drop, grow, optimizer, **options)
        assert all(map(torch.equal, before, everything()))

    refused(ValueError, "grow: block .* is present already", present)
    refused(ValueError, "grow: names a block twice", absent[[0, 0]])
    refused(TypeError, "new_values: must be a tensor, got list", new_values=[0.0])
    refused(ValueError, r"new_values: must be \[2, 8, 8\]", new_values=torch.zeros(2, 8))
    with pytest.raises(ValueError, match="without duplicates"):
        ids = present[:, 0] * mask.shape[1] + present[:, 1]
        replace_blocks_(layer.weight, torch.arange(2), ids, optimizer)
    assert all(map(torch.equal, before, everything()))
    state["exp_avg_sq"] = state["exp_avg_sq"].to("meta")
    refused(TypeError, "keeps 'exp_avg_sq' on meta, but the values are on cpu")


# --- RigL's watchers come and go ------------------------------------------------------------------


@pytest.mark.parametrize("compactions", [0, 1, 3, 10])
def test_gradual_magnitude_follows_its_schedule(compactions):
    model = mlp(1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = GradualMagnitude(
        model, optimizer, 100, density=0.1, updates=10, compactions=compactions
    )
    sizes, parameters = [], set()
    for step in range(100):
        train_step(model, optimizer, sparsifier, seed=step)
        sizes.append(model[0].block_count)
        parameters.add(id(model[0].values))
        dead = sparsifier.layers[0].dead
        assert not model[0].values[dead].any()  # held at zero
    assert [entry["step"] for entry in sparsifier.log] == list(range(13, 41, 3))  # 0.1 T to 0.4 T
    for number, entry in enumerate(sparsifier.log, 1):
        expected = 0.1 + 0.9 * (1 - number / 10) ** 3
        assert entry["density"] == pytest.approx(expected, abs=0.5 / 128 + 1e-9)
    changes = sum(a != b for a, b in itertools.pairwise(sizes))
    assert changes == min(compactions, 9)  # of ten updates the last, 0.1001 to 0.1, removes nothing
    assert sizes[-1] == (128 if compactions == 0 else 13)
    sparsifier.compact()
    assert model[0].block_count == 13
    train_step(model, optimizer, sparsifier)


def test_gradual_magnitude_removes_the_smallest():
    model = mlp(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    norms = model[0].weight.block_norm(1)
    once = {"begin": 0, "end": 1, "updates": 1, "score": "l1", "distribution": "uniform"}
    sparsifier = GradualMagnitude(model, optimizer, 10, density=0.25, **once)
    pairs = model[0].pattern.mask().nonzero()[norms.topk(32).indices]
    train_step(model, optimizer, sparsifier)
    assert model[0].block_count == 32 and model[0].pattern.mask()[pairs[:, 0], pairs[:, 1]].all()


def test_global_lets_layers_compete():
    model = mlp(1.0)
    with torch.no_grad():
        model[2].values.mul_(100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = GradualMagnitude(
        model, optimizer, 10, density=0.25, begin=0, end=1, updates=1, distribution="global"
    )
    train_step(model, optimizer, sparsifier)
    assert (model[0].block_count, model[2].block_count) == (1, 63)  # at least one each


@pytest.mark.parametrize("score", ["activation", "energy"])
def test_wanda_keeps_what_matters_for_the_output(score):
    torch.manual_seed(0)
    layer = BlockSparseLinear(20, 30, density=1.0, block_shape=(8, 8))
    x = torch.randn(500, 20) @ torch.randn(20, 20) + 1
    weight = layer.weight.to_dense().detach()
    energy = torch.zeros(4, 3)
    for row in range(4):
        for col in range(3):
            w = weight[8 * row : 8 * row + 8, 8 * col : 8 * col + 8]
            inside = x[:, 8 * col : 8 * col + 8]
            if score == "energy":
                energy[row, col] = (inside @ w.T).square().sum(1).mean()
            else:
                energy[row, col] = (w.square() * inside.square().mean(0)).sum()
    expected = torch.zeros(12, dtype=torch.bool)
    expected[energy.flatten().topk(6).indices] = True

    wanda = BlockWanda(nn.Sequential(layer), density=0.5, score=score)
    with pytest.raises(RuntimeError, match="0: saw no calibration data"):
        wanda.step()
    with wanda.calibration():
        layer(x[:200])
    with wanda.calibration():
        layer(x[200:].reshape(3, 100, 20))
    layer(1e6 * x)  # outside: does not count
    entry = wanda.step()
    assert torch.equal(layer.pattern.mask().flatten(), expected)
    assert entry["density"] == 0.5 and wanda.step() is None


# --- distributions -------------------------------------------------------------------------------


def test_distributions():
    grids = {"a": (64, 64), "b": (64, 16), "c": (2, 2)}
    cells = {name: rows * cols for name, (rows, cols) in grids.items()}
    for density in (0.05, 0.25, 0.9):
        erk = layer_densities(grids, density, "erk")
        total = sum(erk[name] * cells[name] for name in grids)
        assert total == pytest.approx(density * sum(cells.values()))
        assert all(0 < value <= 1 for value in erk.values())
        assert erk["a"] < erk["b"] <= erk["c"]
    ratio = layer_densities(grids, 0.05, "erk")
    assert ratio["a"] / ratio["b"] == pytest.approx((128 / 4096) / (80 / 1024))
    assert layer_counts(grids, 0.25) == {"a": 1024, "b": 256, "c": 1}
    with pytest.raises(ValueError, match="distribution"):
        layer_densities(grids, 0.5, "global")
    with pytest.raises(ValueError, match="density"):
        layer_densities(grids, 0.0)


@pytest.mark.parametrize("score", ["relative", "l1"])
def test_gradual_and_a_block_that_is_infinite(score):
    """Ranked by its row and column, it must not take the others of its row with it."""
    model = nn.Sequential(BlockSparseLinear(32, 32, density=1.0, block_shape=(8, 8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = GradualMagnitude(
        model, optimizer, 10, density=0.5, begin=0, end=5, updates=1, score=score, compactions=0
    )
    model[0].values.data[5, 0, 0] = torch.inf
    with pytest.warns(UserWarning, match="NaN") if score == "relative" else nullcontext():
        for _ in range(5):
            optimizer.step()
            sparsifier.step()
    alive = sparsifier.layers[0].alive.view(4, 4)
    assert alive.sum() == 8
    assert alive[1].sum() > 1 and alive[:, 1].sum() > 1
    assert alive[1, 1] == (score == "l1")


@pytest.mark.parametrize(
    ("steps", "options", "first", "last"),
    [
        (263, {}, 28, 104),  # of 78 steps, an update in every other one
        (265, {}, 28, 106),
        (1000, {}, 108, 396),
        (2000, {}, 215, 800),
        (100, {}, 11, 40),
        (100, {"begin": 10, "end": 20, "updates": 3}, 14, 18),
        (100, {"begin": 10, "end": 12, "updates": 9}, 11, 12),
    ],
)
def test_gradual_ends_where_it_was_told(steps, options, first, last):
    model = nn.Sequential(BlockSparseLinear(32, 32, density=1.0, block_shape=(8, 8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = GradualMagnitude(model, optimizer, steps, density=0.5, **options)
    due = [step for step in range(steps + 1) if sparsifier.schedule.due(step)]
    assert (due[0], due[-1]) == (first, last)
    assert len(due) <= options.get("updates", 40)
