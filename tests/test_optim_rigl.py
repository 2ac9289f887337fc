"""RigL: what it grows, what it watches and for how long, and what it forgets."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from optim_helpers import mlp, train_step
from pytorch_block_sparse import BlockSparseLinear, BlockSparseMatrix, Pattern
from pytorch_block_sparse.optim import (
    BlockRigL,
    SparseOptimizer,
    update_pattern_,
)
from pytorch_block_sparse.optim.observe import CandidateGradients, _Eager

pytestmark = pytest.mark.usefixtures("one_thread")


def test_candidate_gradients_are_those_of_the_dense_weight():
    """Two micro-batches, an input of several dimensions, candidates that touch the edge."""
    pattern = Pattern.random((30, 20), 0.25, (8, 8))
    layer = BlockSparseLinear(20, 30, pattern=pattern)
    ids = (~pattern.mask()).flatten().nonzero().squeeze(1)
    watched = CandidateGradients(layer, ids)
    dense = layer.weight.to_dense().detach().requires_grad_()
    for _ in range(2):
        x = torch.randn(3, 5, 20)
        layer(x).square().sum().backward()
        nn.functional.linear(x, dense, layer.bias).square().sum().backward()
    watched.remove()
    candidates = Pattern.from_mask(~pattern.mask(), (8, 8), (30, 20))
    expected = BlockSparseMatrix.from_dense(dense.grad, pattern=candidates)
    torch.testing.assert_close(watched.sum, expected.values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(watched.norms(), expected.block_norm(), rtol=1e-4, atol=1e-4)
    before = watched.sum.clone()
    layer(x).sum().backward()
    assert torch.equal(watched.sum, before)  # the hook is gone


@pytest.mark.parametrize("where", ["input", "gradient"])
def test_a_pass_that_is_not_finite_leaves_no_trace(where):
    """The step of a GradScaler that is skipped: neither its gradient nor its inputs count."""
    torch.manual_seed(0)
    layer = BlockSparseLinear(32, 32, density=0.25, block_shape=(8, 8))
    absent = torch.tensor([i for i in range(16) if not layer.pattern.mask().flatten()[i]])
    x, y = torch.randn(4, 32), torch.randn(4, 32)
    norms = []
    for broken in (False, True):
        watched = CandidateGradients(layer, absent)
        if broken:
            bad = x.clone()
            bad[1, 5] = torch.inf if where == "input" else 1.0
            loss = (layer(bad) * y).sum() * (torch.inf if where == "gradient" else 1.0)
            loss.backward()
        (layer(x) * y).sum().backward()
        norms.append(watched.norms(per_input_rms=True))
        watched.remove()
    assert torch.equal(*norms) and norms[0].isfinite().all() and (norms[0] > 0).all()


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("inf_at", [0, 1])
def test_rigl_forgets_the_micro_batches_of_a_skipped_step(to_none, fused, inf_at):
    """Those that were finite too: after a skipped step nothing has happened."""
    masks = []
    for skip in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, fused=fused)
        sparsifier = BlockRigL(model, optimizer, 40, every=2, random_share=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

        def step(losses, model=model, optimizer=optimizer, sparsifier=sparsifier, scaler=scaler):
            for seed, factor in losses:
                x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
                scaler.scale(factor * (model(x) - x.roll(1, 1)).square().mean()).backward()
            scaler.step(optimizer)
            entry = sparsifier.step()
            scaler.update()
            optimizer.zero_grad(set_to_none=to_none)
            return entry

        step([(0, 1.0), (1, 1.0)])
        if skip:
            bad = [(50, 100.0), (51, 100.0)]
            bad[inf_at] = (52, torch.inf)
            assert step(bad) is None
        assert step([(2, 1.0), (3, 1.0)]) is not None
        masks.append(model[0].pattern.mask())
    assert torch.equal(*masks)


def test_rigl_forgets_a_skipped_step_of_a_layer_that_takes_no_part_later():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    sparsifier = BlockRigL(model, optimizer, 40, every=1)
    model(torch.randn(4, 64)).square().mean().backward()
    optimizer.zero_grad()  # skipped by hand
    model[0](torch.randn(4, 64)).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="2: no finite gradient was seen"):
        sparsifier.step()


def test_what_overflowed_in_a_skipped_step_is_forgotten_too():
    """Inputs and gradients can be finite where their product is not."""
    layer = BlockSparseLinear(32, 32, density=0.25, block_shape=(8, 8))
    absent = (~layer.pattern.mask()).flatten().nonzero().squeeze(1)
    watched = CandidateGradients(layer, absent, of_step=True)
    layer(torch.ones(4, 32)).sum().backward()
    watched.sum[0] = torch.inf
    layer.values.grad = None
    layer(torch.ones(4, 32)).sum().backward()
    assert torch.equal(watched.sum, torch.full_like(watched.sum, 4.0)) and watched.passes == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_used_twice_under_checkpointing_is_one_pass(reentrant):
    """Each part of the model is run anew in the backward, before the gradient has come."""
    layer = BlockSparseLinear(32, 32, density=0.25, block_shape=(8, 8))
    absent = (~layer.pattern.mask()).flatten().nonzero().squeeze(1)
    x, sums = torch.randn(4, 32, requires_grad=True), []
    for again in (False, True):
        watched = CandidateGradients(layer, absent, of_step=True)
        y = x
        for _ in range(2):
            y = checkpoint(layer, y, use_reentrant=reentrant) if again else layer(y)
        y.square().sum().backward()
        layer.values.grad = None
        sums.append(watched.sum)
        watched.remove()
    torch.testing.assert_close(*sums)


def test_rigl_grows_the_largest_gradients():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = BlockRigL(
        model, optimizer, 100, every=2, candidates=1000, random_share=0.0, normalise=False
    )
    x = torch.randn(16, 64)
    before = model[0].pattern.mask()
    for _ in range(2):
        hidden = model[0](x)
        hidden.retain_grad()
        model[2](hidden.relu()).square().mean().backward()
        gradient = hidden.grad.T @ x
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    norms = gradient.reshape(16, 8, 8, 8).square().sum((1, 3)).masked_fill(before, -1)
    count = round(32 * sparsifier.drop(2))
    best = norms.flatten().topk(count).indices
    grown = model[0].pattern.mask() & ~before
    assert grown.sum() == count and grown.flatten()[best].all()


def test_rigl_normalised_is_not_drawn_to_outlier_features():
    grown = {}
    for normalise in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(BlockSparseLinear(64, 64, density=0.25, block_shape=(8, 8)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        sparsifier = BlockRigL(
            model, optimizer, 100, every=1, candidates=1000, random_share=0, normalise=normalise
        )
        before = model[0].pattern.mask()
        x = torch.randn(256, 64)
        x[:, 8:16] *= 100
        (model(x) - torch.randn(256, 64)).square().mean().backward()
        optimizer.step()
        sparsifier.step()
        new = model[0].pattern.mask() & ~before
        grown[normalise] = int(new[:, 1].sum()) / int(new.sum())
    assert grown[False] == 1 and grown[True] < 0.5  # block column 1 has the outliers


def test_rigl_without_a_gradient_grows_at_random_with_a_warning():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sparsifier = BlockRigL(model, optimizer, 100, every=1)
    with pytest.warns(UserWarning, match="no finite gradient was seen"):
        model[0](torch.randn(4, 64)).sum().backward()  # the second layer takes no part
        optimizer.step()
        sparsifier.step()
    assert sparsifier.log[0]["layers"]["2"]["churn"] > 0


def test_evaluation_between_two_steps_is_not_watched():
    runs = []
    for evaluate in (False, True):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters())
        sparsifier = BlockRigL(model, optimizer, 100, every=2)
        for step in range(4):
            train_step(model, optimizer, sparsifier, seed=step)
            if evaluate:
                with torch.no_grad():
                    model(torch.full((4, 64), 1e3))
        runs.append(model[0].pattern.mask())
    assert torch.equal(*runs)


# --- RigL beside something else that changes the pattern ------------------------------------------


def another_rigl(model, optimizer):
    sparsifier = BlockRigL(model, optimizer, 100, every=3, seed=1)
    return sparsifier.step


def a_sparse_optimizer(model, optimizer):
    sparse = SparseOptimizer(SparseOptimizer.sparse_objects(model), lr=0.5)
    sparse.attach_optimizer(optimizer)
    return sparse.step


@pytest.mark.parametrize("build", [another_rigl, a_sparse_optimizer])
def test_rigl_beside_another_method(build):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier = BlockRigL(model, optimizer, 100, every=2)
    beside = build(model, optimizer)
    for step in range(20):
        train_step(model, optimizer, sparsifier, seed=step)
        beside()
        for layer in (model[0], model[2]):
            assert layer.pattern.mask().sum() == layer.block_count == 32
    assert len(sparsifier.log) == 10


def test_rigl_passes_over_candidates_that_came_otherwise():
    """The largest gradients of those that are left are grown; where none is left, others."""
    for taken in (15, 20):  # of 20
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        sparsifier = BlockRigL(
            model, optimizer, 100, every=2, candidates=2, random_share=0.0, normalise=False
        )
        train_step(model, optimizer, sparsifier, seed=0)
        layer, count = model[0], round(32 * sparsifier.drop(2))
        ids = sparsifier._watched["0"].ids[:taken]
        present = layer.pattern.mask().nonzero()[: len(ids)]
        update_pattern_(layer, present, torch.stack([ids // 8, ids % 8], 1), optimizer)
        before = layer.pattern.mask()

        watched = sparsifier._watched["0"]
        x = torch.randn(16, 64)
        (model(x) - x.roll(1, 1)).square().mean().backward()
        norms = watched.norms().masked_fill(before.flatten()[watched.ids], -1)
        optimizer.step()
        sparsifier.step()
        grown = (layer.pattern.mask() & ~before).flatten()
        assert grown.sum() == count and layer.pattern.mask().sum() == 32
        left = min(count, int((norms >= 0).sum()))
        assert grown[watched.ids[norms.topk(left).indices]].all()
        assert left == 20 - taken


def rigl(steps, **options):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier = BlockRigL(model, optimizer, 100, **options)
    for step in range(steps):
        train_step(model, optimizer, sparsifier, seed=step)
    return model, optimizer, sparsifier


def hooks_of(model):
    values = model[0].values._post_accumulate_grad_hooks or {}
    return len(model[0]._forward_hooks) + len(values)


@pytest.mark.parametrize(
    ("options", "saved_at", "loaded_at"),
    [
        ({"every": 5}, 0, 4),  # back to a step that is not due
        ({"every": 1, "end": 10}, 15, 0),  # from a new one, whose first step is due, to the end
    ],
)
def test_rigl_watches_nothing_once_another_step_is_loaded(options, saved_at, loaded_at):
    before = _Eager.holders
    saved = [copy.deepcopy(item.state_dict()) for item in rigl(saved_at, **options)]
    items = rigl(loaded_at, **options)
    assert hooks_of(items[0]) == 2 and _Eager.holders == before + 2
    for item, state in zip(items, saved, strict=True):
        item.load_state_dict(state)
    assert hooks_of(items[0]) == 0 and _Eager.holders == before


def test_rigl_that_is_dropped_watches_no_longer():
    before = _Eager.holders
    model, _, sparsifier = rigl(4, every=5)
    assert hooks_of(model) == 2 and _Eager.holders == before + 2
    del sparsifier
    assert hooks_of(model) == 0 and _Eager.holders == before


def test_a_copy_of_a_watched_model_is_not_watched():
    before = _Eager.holders
    model, optimizer, sparsifier = rigl(4, every=5)
    twin, _ = copy.deepcopy((model, sparsifier))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), twin, torch.load(file, weights_only=False)]
    before_update = model[0].pattern.mask()
    train_step(model, optimizer, sparsifier, seed=4)
    assert _Eager.holders == before and not torch.equal(model[0].pattern.mask(), before_update)
    for other in copies:  # what is left of the hook keeps and calls nothing
        (hook,) = other[0]._forward_hooks.values()
        assert hook._method is None and not other[0].values._post_accumulate_grad_hooks
        other(torch.randn(4, 64)).sum().backward()


def test_rigl_is_silent_where_a_script_ends_while_it_watches(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, torch._dynamo\n"
        "from pytorch_block_sparse import BlockSparseLinear\n"
        "from pytorch_block_sparse.optim import BlockRigL\n"
        "model = torch.nn.Sequential(BlockSparseLinear(256, 256, density=0.25))\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "sparsifier = BlockRigL(model, optimizer, 100, every=1)\n"
        "assert sparsifier._watched\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


# --- gradual magnitude and Wanda -----------------------------------------------------------------
