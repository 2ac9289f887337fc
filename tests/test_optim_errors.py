"""What the methods refuse when they are made, and what they warn of."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from optim_helpers import mlp, train_step
from pytorch_block_sparse import BlockSparseLinear
from pytorch_block_sparse.optim import (
    BlockImportance,
    BlockMovement,
    BlockRigL,
    BlockSET,
    BlockWanda,
    GradualMagnitude,
    SparseOptimizer,
    compact_,
)

pytestmark = pytest.mark.usefixtures("one_thread")


BUILD = {
    "SET": lambda m, o, **k: BlockSET(m, o, 100, **k),
    "RigL": lambda m, o, **k: BlockRigL(m, o, 100, **k),
    "gradual": lambda m, o, **k: GradualMagnitude(m, o, 100, density=0.1, **k),
    "movement": lambda m, o, **k: BlockMovement(m, o, 100, **k),
    "Wanda": lambda m, o, **k: BlockWanda(m, o, density=0.1, **k),
}
build = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())


@build
def test_a_model_without_a_block_sparse_layer(build):
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="has no BlockSparseLinear; replace its layers with"):
        build(model, torch.optim.SGD(model.parameters(), lr=1.0))


@build
def test_an_optimizer_that_does_not_hold_the_parameters(build):
    model = mlp()
    with pytest.raises(ValueError, match="does not hold the values of layer 2"):
        build(model, torch.optim.SGD(model[0].parameters(), lr=1.0))
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got Sequential"):
        build(model, model)


@build
def test_a_frozen_layer_stays_as_it_is_with_a_warning(build):
    model = mlp(0.5)
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1.0)
    with pytest.warns(UserWarning, match="2: is frozen, its pattern stays as it is"):
        sparsifier = build(model, optimizer)
    assert [layer.name for layer in sparsifier.layers] == ["0"]
    model[0].requires_grad_(False)
    with (
        pytest.warns(UserWarning, match="is frozen"),
        pytest.raises(ValueError, match="none of its block-sparse layers is trained"),
    ):
        build(model, optimizer)


@build
def test_a_layer_frozen_later_is_an_error_at_the_next_update(build):
    model = mlp(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = build(model, optimizer)
    model[2].requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"2: has been frozen since .* make the method anew"):
        for _ in range(100):
            model(torch.randn(4, model[0].in_features)).square().mean().backward()
            optimizer.step()
            sparsifier.step()
            optimizer.zero_grad()


@build
def test_only_some_layers(build):
    model = mlp(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsifier = build(model, optimizer, only=lambda name: name == "2")
    assert [layer.name for layer in sparsifier.layers] == ["2"]


@pytest.mark.parametrize("build", [BlockSET, BlockRigL, GradualMagnitude, BlockMovement])
def test_schedules_that_end_before_they_start(build):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"density": 0.1} if build is GradualMagnitude else {}
    if build in (GradualMagnitude, BlockMovement):
        options["begin"] = 50
    with pytest.raises(ValueError, match=r"ends .* before it starts"):
        build(model, optimizer, 100, end=0 if "begin" not in options else 20, **options)
    with pytest.raises(ValueError, match=r"total_steps: must be"):
        build(model, optimizer, 0, **options)


def test_numbers_out_of_range():
    model = mlp(0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for density in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"density: must be in \(0, 1\]"):
            GradualMagnitude(model, optimizer, 100, density=density)
        with pytest.raises(ValueError, match=r"density: must be in \(0, 1\]"):
            BlockWanda(model, density=density)
    with pytest.raises(ValueError, match="would need 64 blocks, but has 32"):
        GradualMagnitude(model, optimizer, 100, density=0.5)
    for distribution in ("erdos", None):
        with pytest.raises(ValueError, match="distribution: must be 'uniform', 'erk' or 'global'"):
            GradualMagnitude(model, optimizer, 100, density=0.1, distribution=distribution)
    with pytest.raises(ValueError, match=r"drop: must be in \[0, 1\]"):
        BlockSET(model, optimizer, 100, drop=1.5)
    with pytest.raises(ValueError, match="score: must be one of"):
        BlockSET(model, optimizer, 100, score="l3")
    with pytest.raises(ValueError, match="score: must be one of"):
        GradualMagnitude(model, optimizer, 100, density=0.1, score="l3")
    with pytest.raises(ValueError, match="every: must be at least 1"):
        BlockSET(model, optimizer, 100, every=0)
    with pytest.raises(ValueError, match="candidates: must be at least 1"):
        BlockRigL(model, optimizer, 100, candidates=0.5)
    with pytest.raises(ValueError, match=r"random_share: must be in \[0, 1\]"):
        BlockRigL(model, optimizer, 100, random_share=2)
    with pytest.raises(ValueError, match="updates: at least 1"):
        GradualMagnitude(model, optimizer, 100, density=0.1, updates=0)
    for options in ({"threshold": 1.0}, {"floor": 0.0}, {"penalty": -1.0}, {"score_every": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            BlockMovement(model, optimizer, 100, **options)


ALONE = pytest.mark.parametrize("build", [b for n, b in BUILD.items() if n != "Wanda"])


@ALONE
def test_no_optimizer(build):
    with pytest.raises(TypeError, match=r"optimizer: must be a torch.optim.Optimizer, got None"):
        build(mlp(1.0), None)


@build
def test_layers_with_values_in_common(build):
    model = mlp(1.0)
    twin = BlockSparseLinear(64, 128, density=1.0, block_shape=(8, 8))
    twin.values = model[0].values
    model.append(twin)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="3: has its values in common with 0"):
        build(model, optimizer)


@pytest.mark.parametrize("share", [2.0, -0.5, float("nan")])
def test_a_schedule_of_shares_that_are_none(share):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsifier = BlockSET(model, optimizer, 100, drop=lambda step: share, every=1)
    before = model[0].pattern.mask()
    with pytest.raises(ValueError, match=r"drop, at step 1: must be in \[0, 1\], got "):
        train_step(model, optimizer, sparsifier)
    assert torch.equal(model[0].pattern.mask(), before)


def test_numbers_that_are_no_integers():
    model = mlp(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    wrong = [
        (lambda: BlockSET(model, optimizer, 100, every=2.5), "every: must be an int, got 2.5"),
        (lambda: BlockSET(model, optimizer, 100, end=10.5), "end: must be an int, got 10.5"),
        (lambda: BlockMovement(model, optimizer, 100, every=0), "every: must be at least 1, got 0"),
        (lambda: BlockSET(model, optimizer, 100, every=0), "every: must be at least 1, got 0"),
        (lambda: BlockSET(model, optimizer, 100, end=-5), "end: must not be negative, got -5"),
        (lambda: BlockMovement(model, optimizer, 100, begin=0.1), "begin: must be an int, got 0.1"),
        (lambda: BlockMovement(model, optimizer, 100, score_every=1.5), "score_every: must be an"),
        (lambda: BlockMovement(model, optimizer, 100, penalty=float("nan")), "penalty: must be fi"),
        (lambda: BlockMovement(model, optimizer, 100, score_lr=-1e-2), "score_lr: must not be neg"),
        (lambda: BlockRigL(model, optimizer, 100, candidates=math.inf), "candidates: must be fin"),
        (lambda: BlockRigL(model, optimizer, 100, candidates=float("nan")), "candidates: must be"),
        (
            lambda: GradualMagnitude(model, optimizer, 100, density=0.1, updates=2.5),
            "updates: must be an int",
        ),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()


def test_an_end_after_the_training():
    model = mlp(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.warns(UserWarning, match="step 400 comes after the last one of the training, 40"):
        GradualMagnitude(model, optimizer, 40, density=0.1, end=400)


def test_new_values_of_a_wrong_shape_change_nothing():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsifier = BlockSET(
        model, optimizer, 100, every=1, new_values=lambda layer, count: torch.zeros(count, 1, 8)
    )
    before = model[0].pattern.mask()
    with pytest.raises(ValueError, match=r"new_values: must be \[\d+, 8, 8\], got \[\d+, 1, 8\]"):
        train_step(model, optimizer, sparsifier)
    assert torch.equal(model[0].pattern.mask(), before)


@pytest.mark.parametrize(
    "build",
    [
        lambda m, o: BlockMovement(m, o, 40, score_lr=0.0),
        lambda m, o: GradualMagnitude(m, o, 40, density=1.0),
    ],
    ids=["movement", "gradual"],
)
def test_a_warning_at_the_end_if_nothing_was_ever_changed(build):
    model = mlp(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sparsifier = build(model, optimizer)
    with pytest.warns(UserWarning, match="was its last update, and none has changed a block"):
        for step in range(40):
            train_step(model, optimizer, sparsifier, seed=step)


def test_a_warning_if_wanda_removes_nothing():
    model = mlp(0.25)
    wanda = BlockWanda(model, density=0.9)
    with wanda.calibration():
        model(torch.randn(8, 64))
    with pytest.warns(UserWarning, match="none has changed a block"):
        wanda.step()


def test_a_warning_if_the_sparse_optimizer_replaces_nothing():
    model = nn.Sequential(BlockSparseLinear(32, 32, density=0.5, block_shape=(8, 8)))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = SparseOptimizer([model[0]], lr=0.1)  # of 8 blocks
    sparse.attach_optimizer(sgd)
    with pytest.warns(UserWarning, match="step 1 has replaced no block: in each layer lr is less"):
        train_step(model, sgd, sparse)
    sparse.param_groups[0]["lr"] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_step(model, sgd, sparse)


def test_a_warning_if_nothing_is_attached_to_the_sparse_optimizer():
    model = mlp(0.5)
    sparse = SparseOptimizer(SparseOptimizer.sparse_objects(model))
    with pytest.warns(UserWarning, match=r"no optimizer is attached.* call attach_optimizer"):
        assert sparse.step() is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        sparse.step()


def test_frozen_layers_and_the_sparse_optimizer():
    model = mlp(0.5)
    adam = torch.optim.Adam(model.parameters())
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"sparse_objects\[0\]: is frozen, its pattern stays"):
        sparse = SparseOptimizer(SparseOptimizer.sparse_objects(model))
    sparse.attach_optimizer(adam)
    before = [model[i].pattern.mask() for i in (0, 2)]
    assert list(train_step(model, adam, sparse)["layers"]) == ["sparse_objects[1]"]
    assert torch.equal(before[0], model[0].pattern.mask())
    before[1] = model[2].pattern.mask()
    model[2].values.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"sparse_objects\[1\]: has been frozen since"):
        sparse.step()
    assert torch.equal(before[1], model[2].pattern.mask())
    with (
        pytest.warns(UserWarning, match="is frozen"),
        pytest.raises(ValueError, match="none of the layers is trained"),
    ):
        SparseOptimizer(SparseOptimizer.sparse_objects(model))


def test_values_in_common_and_the_sparse_optimizer():
    model, twin = mlp(), mlp()
    twin[2].values = model[2].values
    layers = SparseOptimizer.sparse_objects(nn.ModuleList([model, twin]))
    message = r"sparse_objects\[3\]: has its values in common with sparse_objects\[1\]"
    with pytest.raises(ValueError, match=message):
        SparseOptimizer(layers)
    sparse = SparseOptimizer(layers[:2])
    with pytest.raises(ValueError, match=message):
        sparse.add_param_group({"sparse_objects": layers[2:]})


def test_state_that_cannot_follow_and_the_sparse_optimizer():
    """Nothing is changed, not even the layers of another optimizer."""
    model = mlp(0.5)
    adafactor = torch.optim.Adafactor(model[2].parameters())
    sgd = torch.optim.SGD(model[0].parameters(), lr=0.1)
    sparse = SparseOptimizer(SparseOptimizer.sparse_objects(model))
    sparse.attach_optimizer(sgd)
    sparse.attach_optimizer(adafactor)
    before = model[0].pattern.mask()
    train_step(model, sgd)
    with pytest.raises(TypeError, match="Adafactor keeps"):
        train_step(model, adafactor, sparse)
    assert torch.equal(before, model[0].pattern.mask())


def test_sparse_optimizer_without_layers():
    with pytest.raises(TypeError, match=r"got Sequential; SparseOptimizer.sparse_objects\(model\)"):
        SparseOptimizer(mlp())
    with pytest.raises(ValueError, match="sparse_objects: must be at least one"):
        SparseOptimizer([])
    with pytest.raises(ValueError, match="new_coefficients_scale: must be finite"):
        SparseOptimizer([mlp()[0]], new_coefficients_scale=float("nan"))


@pytest.mark.parametrize("build", [BlockSET, BlockRigL])
def test_what_set_and_rigl_cannot_call_or_look_up(build):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(TypeError, match=r"new_values: must take \(layer, k\) .* got int"):
        build(model, optimizer, 100, new_values=3)
    with pytest.raises(ValueError, match=r"score: must be one of .* got \[1\]"):
        build(model, optimizer, 100, score=[1])


def test_a_choice_of_layers_that_is_no_function():
    model = mlp()
    with pytest.raises(TypeError, match="only: must take a layer's name, got str"):
        BlockImportance(model, only="0")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(TypeError, match="only: must take a layer's name, got list"):
        BlockSET(model, optimizer, 100, only=["0"])


def test_a_state_of_nothing():
    model = mlp()
    sparsifier = BlockSET(model, torch.optim.SGD(model.parameters(), lr=1.0), 100)
    with pytest.raises(ValueError, match="state: is of None, not of BlockSET"):
        sparsifier.load_state_dict({})


def test_blocks_that_something_else_took():
    model = mlp(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsifier = BlockMovement(model, optimizer, 100, every=1)
    compact_(model[0], torch.arange(model[0].block_count) > 0, optimizer)
    with pytest.raises(RuntimeError, match=r"0: has \d+ blocks, but BlockMovement knows \d+"):
        train_step(model, optimizer, sparsifier)


@pytest.mark.parametrize(
    "build",
    [
        lambda m, o: BlockMovement(m, o, 4, every=1, compact=False),
        lambda m, o: GradualMagnitude(m, o, 4, density=0.5, compactions=0),
    ],
    ids=["movement", "gradual"],
)
def test_compaction_after_steps_that_were_not_told(build):
    """Blocks that were held at zero may have grown since."""
    model = mlp(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sparsifier = build(model, optimizer)
    train_step(model, optimizer, sparsifier)
    sparsifier.compact()
    optimizer.step()
    with pytest.raises(RuntimeError, match="has made 1 steps since the last call of step"):
        sparsifier.compact()


def test_numbers_that_are_no_numbers():
    model = mlp(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for name in ("threshold", "floor", "penalty", "score_lr"):
        with pytest.raises(TypeError, match=f"{name}: must be a number, got '1'"):
            BlockMovement(model, optimizer, 100, **{name: "1"})
    with pytest.raises(TypeError, match="candidates: must be a number"):
        BlockRigL(model, optimizer, 100, candidates="4")
    with pytest.raises(ValueError, match="score: must be one of"):
        GradualMagnitude(model, optimizer, 100, density=0.1, score=["l1"])
    with pytest.raises(TypeError, match=r"state: must be what state_dict\(\) returned, got 5"):
        BlockSET(model, optimizer, 100).load_state_dict(5)


@pytest.mark.parametrize("build", [BlockMovement, partial(GradualMagnitude, density=0.1)])
def test_a_layer_that_has_moved_to_another_device(build):
    model = mlp(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsifier = build(model, optimizer, 40)
    sparsifier.layers[0].module.to("meta")
    with pytest.raises(RuntimeError, match="is on meta now, but was on cpu when the method"):
        sparsifier._check_layers()


def test_movement_without_any_gradient():
    model = mlp(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sparsifier = BlockMovement(model, optimizer, 40, begin=0, score_every=1)
    with pytest.warns(UserWarning, match="no layer has a gradient in step 1, so the scores"):
        optimizer.step()
    del sparsifier


def test_movement_of_a_model_that_changes_its_dtype():
    model = mlp(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sparsifier = BlockMovement(model, optimizer, 40, every=2, begin=0, score_lr=10.0, penalty=100.0)
    for step in range(10):
        train_step(model, optimizer, sparsifier, seed=step)
    assert sparsifier.density() < 1
    model.to(torch.bfloat16)
    for _ in range(10):
        model(torch.randn(4, 64).bfloat16()).square().mean().backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    assert all(layer.module.values.isfinite().all() for layer in sparsifier.layers)
