"""What every method keeps: rules 3 to 6 (determinism, order in a step, resuming, reports)."""

import copy
import warnings

import pytest
import torch
from torch import nn

from optim_helpers import layers_of, mlp, train_step
from pytorch_block_sparse import BlockSparseLinear
from pytorch_block_sparse.optim import (
    BlockMovement,
    BlockRigL,
    BlockSET,
    Every,
    GradualMagnitude,
    Sparsifier,
)

pytestmark = pytest.mark.usefixtures("one_thread")


METHODS = {
    "SET": (0.25, lambda m, o, **k: BlockSET(m, o, 40, every=5, **k)),
    "RigL": (0.25, lambda m, o, **k: BlockRigL(m, o, 40, every=5, **k)),
    "gradual": (
        1.0,
        lambda m, o, **k: GradualMagnitude(m, o, 40, density=0.2, updates=6, compactions=2, **k),
    ),
    "gradual global": (
        1.0,
        lambda m, o, **k: GradualMagnitude(
            m, o, 40, density=0.2, updates=6, compactions=0, distribution="global", **k
        ),
    ),
    "movement": (
        1.0,
        lambda m, o, **k: BlockMovement(m, o, 40, every=3, score_lr=0.5, floor=0.1, **k),
    ),
}
method = pytest.mark.parametrize("name", METHODS)
FROM_SCRATCH = ["SET", "RigL"]


def make(name, optimizer=torch.optim.AdamW, seed=0, **options):
    density, build = METHODS[name]
    model = mlp(density)
    optimizer = optimizer(model.parameters(), lr=1e-2)
    return model, optimizer, build(model, optimizer, seed=seed, **options)


def snapshot(model):
    return {name: item.clone() for name, item in model.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- rule 3: deterministic ------------------------------------------------------------------------


@method
def test_same_seed_same_run_whatever_the_global_generator_does(name):
    runs = []
    for noise in (1, 2):
        model, optimizer, sparsifier = make(name)
        for step in range(32):
            torch.manual_seed(noise + step)
            train_step(model, optimizer, sparsifier, seed=step)
        runs.append((snapshot(model), sparsifier.log))
    assert_equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1] and runs[0][1]


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_another_seed_another_pattern_and_layers_differ(name):
    masks = []
    for seed in (0, 1):
        torch.manual_seed(0)
        shape = {"density": 0.25, "block_shape": (8, 8)}
        model = nn.Sequential(
            BlockSparseLinear(64, 64, **shape), BlockSparseLinear(64, 64, **shape)
        )
        model[1].load_state_dict(model[0].state_dict())
        optimizer = torch.optim.AdamW(model.parameters())
        sparsifier = METHODS[name][1](model, optimizer, seed=seed)
        for step in range(5):
            train_step(model, optimizer, sparsifier, seed=step)
        masks += [layer.pattern.mask() for layer in model]
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])


def test_the_optimizer_does_not_know_the_wrappers_names():
    """DDP and torch.compile put prefixes into names; randomness must not depend on them."""
    masks = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="eager"), nn.DataParallel):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters())
        sparsifier = BlockSET(wrap(model), optimizer, 40, every=1)
        assert [layer.name for layer in sparsifier.layers] == ["0", "2"]
        train_step(model, optimizer, sparsifier)
        masks.append(model[0].pattern.mask())
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_ties_go_to_the_lower_block_id():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.no_grad():
        model[0].values.fill_(1.0)
    sparsifier = BlockSET(model, optimizer, 40, every=1, drop=lambda step: 0.25)
    before = model[0].pattern.mask().nonzero()
    train_step(model, optimizer, sparsifier)
    after = model[0].pattern.mask()
    assert not after[before[:8, 0], before[:8, 1]].any()
    assert after[before[8:, 0], before[8:, 1]].all()


@method
def test_nan_scores_are_lowest_with_a_warning(name):
    model, optimizer, sparsifier = make(name)
    for step in range(4):
        train_step(model, optimizer, sparsifier, seed=step)
    layer = model[0]
    poisoned = layer.pattern.mask().nonzero()[7]
    if name == "movement":
        sparsifier.scores["0"][7] = torch.nan
    with pytest.warns(UserWarning, match=r"0: 1 of \d+ block scores are NaN; .* the lowest"):
        for _ in range(20):
            if name != "movement":
                rows, cols = layer.pattern.row_indices, layer.pattern.col_indices
                with torch.no_grad():
                    here = (rows == poisoned[0]) & (cols == poisoned[1])
                    layer.values[here] = torch.nan
            sparsifier._new_steps = 1
            if sparsifier.step():
                break
    alive = layer.pattern.mask()
    alive[alive.clone()] = sparsifier.layers[0].alive
    assert not alive[tuple(poisoned)]
    assert layer.values.isfinite().all()


# --- rule 4: only real optimizer steps count ------------------------------------------------------


@method
def test_gradient_accumulation_counts_real_steps(name):
    """step() after each of four micro-batches is step() after each optimizer step."""
    runs = []
    for call_always in (False, True):
        model, optimizer, sparsifier = make(name, torch.optim.SGD)
        for micro in range(80):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(micro))
            (model(x) - x).square().mean().backward()
            real = micro % 4 == 3
            if real:
                optimizer.step()
            if real or call_always:
                entry = sparsifier.step()
                assert real or entry is None
            if real:
                optimizer.zero_grad()
        assert sparsifier.steps == 20
        runs.append((snapshot(model), sparsifier.log))
    assert_equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1] and runs[0][1]


@pytest.mark.parametrize("fused", [False, True])
@method
def test_a_step_that_the_scaler_skips_changes_nothing(name, fused):
    model, optimizer, sparsifier = make(name, lambda p, lr: torch.optim.AdamW(p, lr, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    skipped = 0
    for step in range(15):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x).square().mean()
        if step % 5 == 4:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        before, steps = snapshot(model), sparsifier.steps
        state = copy.deepcopy(sparsifier.state_dict())
        scaler.step(optimizer)
        entry = sparsifier.step()
        scaler.update()
        optimizer.zero_grad()
        if step % 5 == 4:
            skipped += 1
            assert entry is None and sparsifier.steps == steps
            assert_equal(before, snapshot(model))
            for layer, saved in sparsifier.state_dict()["layers"].items():
                for key, item in saved.items():
                    if isinstance(item, torch.Tensor):
                        assert torch.equal(item, state["layers"][layer][key])
        else:
            assert sparsifier.steps == steps + 1
    assert skipped == 3 and sparsifier.steps == 12 and sparsifier.log
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("by_name", [True, False])
@method
def test_a_backward_in_a_closure_is_as_good_as_one_before(name, by_name, to_none):
    """Lightning does it so. The gradients of the step before are cleared in the closure."""
    runs = []
    for in_closure in (False, True):
        model, optimizer, sparsifier = make(name)
        for step in range(20):

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad(set_to_none=to_none)
                x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
                loss = (model(x) - x.roll(1, 1)).square().mean()
                loss.backward()
                return loss

            if not in_closure:
                closure()
                optimizer.step()
            elif by_name:
                assert optimizer.step(closure=closure) > 0
            else:
                assert optimizer.step(closure) > 0
            sparsifier.step()
        scores = getattr(sparsifier, "scores", {})
        runs.append((snapshot(model), sparsifier.log, {**scores}))
    assert_equal(runs[0][0], runs[1][0])
    assert_equal(runs[0][2], runs[1][2])
    assert runs[0][1] == runs[1][1] and runs[0][1]


def test_a_sparsifier_whose_optimizer_never_steps_warns():
    model, _, sparsifier = make("SET")
    other = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.warns(UserWarning, match="optimizer that it was given has made no step"):
        for step in range(100):
            train_step(model, other, sparsifier, seed=step)
    assert sparsifier.steps == 0


# --- a model that moves ---------------------------------------------------------------------------


@method
def test_a_model_that_moves_to_another_device_is_an_error_at_the_next_step(name):
    model, _, sparsifier = make(name)
    model.to("meta")
    sparsifier._new_steps = 1
    with pytest.raises(RuntimeError, match="0: is on meta now, but was on cpu when the method"):
        sparsifier.step()


@pytest.mark.cuda
@pytest.mark.parametrize("train", [0, 4])
@method
def test_a_model_that_moves_to_a_gpu_is_an_error_at_the_next_step(name, train):
    model = mlp(METHODS[name][0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)  # whose state need not move
    sparsifier = METHODS[name][1](model, optimizer)
    for step in range(train):
        train_step(model, optimizer, sparsifier, seed=step)
    model.to("cuda")
    model(torch.randn(16, 64, device="cuda")).square().mean().backward()
    with pytest.raises(RuntimeError, match="0: is on cuda:0 now, but was on cpu when the method"):
        optimizer.step()
        sparsifier.step()


# --- rule 5: resuming -----------------------------------------------------------------------------


@pytest.mark.parametrize("at", [4, 13, 21])
@method
def test_resuming_is_bit_exact(name, at, tmp_path):
    model, optimizer, sparsifier = make(name)
    for step in range(34):
        if step == at:
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "sparsifier": sparsifier.state_dict(),
                },
                tmp_path / "checkpoint.pt",
            )
        train_step(model, optimizer, sparsifier, seed=step)

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    density, build = METHODS[name]
    again = mlp(density, seed=5)
    again.load_state_dict(saved["model"])
    optimizer_again = torch.optim.AdamW(again.parameters(), lr=1e-2)
    optimizer_again.load_state_dict(saved["optimizer"])
    sparsifier_again = build(again, optimizer_again)
    sparsifier_again.load_state_dict(saved["sparsifier"])
    for step in range(at, 34):
        train_step(again, optimizer_again, sparsifier_again, seed=step)

    assert_equal(snapshot(model), snapshot(again))
    for layer, other in zip(layers_of(model), layers_of(again), strict=True):
        a, b = optimizer.state[layer.values], optimizer_again.state[other.values]
        assert_equal(a, b)
    assert sparsifier.log == sparsifier_again.log
    for a, b in zip(sparsifier.layers, sparsifier_again.layers, strict=True):
        assert torch.equal(a.born, b.born) and torch.equal(a.alive, b.alive)


@pytest.mark.parametrize("at", [13, 30])
@pytest.mark.parametrize("build_first", [False, True])
def test_resuming_global_after_a_compaction(build_first, at):
    """A layer may be left with fewer blocks than its share of the density: only the sum counts."""

    def build(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        options = {"density": 0.2, "updates": 6, "compactions": 2, "distribution": "global"}
        return optimizer, GradualMagnitude(model, optimizer, 40, score="l1", **options)

    model = mlp(1.0)
    with torch.no_grad():
        model[0].values.mul_(5)
    optimizer, sparsifier = build(model)
    for step in range(at):
        train_step(model, optimizer, sparsifier, seed=step)
    saved = copy.deepcopy([item.state_dict() for item in (model, optimizer, sparsifier)])
    assert model[2].block_count < 26  # 0.2 of 128

    again = mlp(1.0, seed=3)
    if build_first:
        built = build(again)
        again.load_state_dict(saved[0])
    else:
        again.load_state_dict(saved[0])
        built = build(again)
    for item, state in zip(built, saved[1:], strict=True):
        item.load_state_dict(state)
    for step in range(at, 40):
        train_step(model, optimizer, sparsifier, seed=step)
        train_step(again, *built, seed=step)
    assert_equal(snapshot(model), snapshot(again))
    assert sparsifier.log == built[1].log and sparsifier.density() == pytest.approx(0.2, abs=0.01)


def test_global_wants_as_many_blocks_in_all_layers_together():
    model = mlp(0.25)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="density: the layers together would need 78 blocks, but"):
        GradualMagnitude(model, optimizer, 40, density=0.305, distribution="global")


def test_a_state_that_does_not_fit_is_an_error():
    model, optimizer, sparsifier = make("SET")
    state = sparsifier.state_dict()
    rigl = BlockRigL(model, optimizer, 40)
    with pytest.raises(ValueError, match="state: is of BlockSET, not of BlockRigL"):
        rigl.load_state_dict(state)
    other = nn.Sequential(mlp()[0])
    theirs = BlockSET(other, torch.optim.SGD(other.parameters(), lr=1.0), 40)
    with pytest.raises(ValueError, match="this model has \\['0'\\]"):
        theirs.load_state_dict(state)
    denser = mlp(0.5)
    theirs = BlockSET(denser, torch.optim.SGD(denser.parameters(), lr=1.0), 40)
    with pytest.raises(ValueError, match="has 32 blocks in 0, but the layer 64; load the model"):
        theirs.load_state_dict(state)


# --- rule 6: what it reports ----------------------------------------------------------------------


def test_the_log_says_what_happened():
    model, optimizer, sparsifier = make("SET")
    with torch.no_grad():
        model[0].values[model[0].pattern.row_indices == 3] = 0  # a whole row is the smallest
    masks = [layer.pattern.mask() for layer in model if hasattr(layer, "pattern")]
    returned = [train_step(model, optimizer, sparsifier, seed=step) for step in range(10)]
    assert [entry for entry in returned if entry] == sparsifier.log
    assert [entry["step"] for entry in sparsifier.log] == [5, 10]
    entry = sparsifier.log[0]
    assert entry["density"] == 0.25 and set(entry["layers"]) == {"0", "2"}
    assert entry["churn"] == round(32 * sparsifier.drop(5)) / 32
    layer = sparsifier.log[1]["layers"]["0"]
    grown_at_5 = round(32 * sparsifier.drop(5))
    born = sparsifier.layers[0].born
    assert int((born == 10).sum()) == round(32 * sparsifier.drop(10))
    assert 0 < int((born == 5).sum()) <= grown_at_5
    assert layer["age"] == pytest.approx(float((10 - born).double().mean()))
    now = model[0].pattern.mask()
    assert layer["dead_rows"] == int((~now.any(1)).sum())
    assert layer["dead_cols"] == int((~now.any(0)).sum())
    assert layer["density"] == 0.25 and now.sum() == masks[0].sum()


def test_churn_is_the_share_of_blocks_that_moved():
    model, optimizer, sparsifier = make("RigL")
    before = model[0].pattern.mask()
    for step in range(5):
        train_step(model, optimizer, sparsifier, seed=step)
    gone = before & ~model[0].pattern.mask()
    assert sparsifier.log[0]["layers"]["0"]["churn"] == int(gone.sum()) / 32 > 0


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_a_warning_when_nothing_changes_that_should(name):
    model = mlp(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sparsifier = METHODS[name][1](model, optimizer)
    with pytest.warns(UserWarning, match="0: its pattern does not change: it has all its blocks"):
        for step in range(5):
            train_step(model, optimizer, sparsifier, seed=step)
    model = nn.Sequential(BlockSparseLinear(16, 16, density=0.5, block_shape=(16, 8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sparsifier = BlockSET(model, optimizer, 40, every=1, drop=0.3)
    with pytest.warns(UserWarning, match="of its 1 blocks is less than one"):
        train_step(model, optimizer, sparsifier)


def test_a_warning_when_no_step_is_due():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.warns(UserWarning, match="no step is due: the first would be 50, the last 20"):
        BlockSET(model, optimizer, 40, every=50)


@pytest.mark.parametrize("total_steps", [2, 5, 40, 1000, 10**6])
@pytest.mark.parametrize("build", [BlockSET, BlockRigL])
def test_some_step_is_due_by_default(build, total_steps):
    model = mlp()
    schedule = build(model, torch.optim.SGD(model.parameters(), lr=1e-3), total_steps).schedule
    assert schedule.interval <= schedule.end


@method
def test_no_warnings_in_a_normal_run(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer, sparsifier = make(name)
        for step in range(40):
            train_step(model, optimizer, sparsifier, seed=step)


# --- under torch.compile --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_compiled_models_are_compiled_once(name):
    counter = pytest.importorskip("torch._dynamo.testing").CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()  # what earlier tests compiled counts against the limit of a frame
    model, optimizer, sparsifier = make(name)
    plain, plain_optimizer, plain_sparsifier = make(name)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(26):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        for net, opt, sparse in (
            (compiled, optimizer, sparsifier),
            (plain, plain_optimizer, plain_sparsifier),
        ):
            (net(x) - x).square().mean().backward()
            opt.step()
            sparse.step()
            opt.zero_grad()
    assert counter.frame_count == 1
    assert len(sparsifier.log) == 4
    assert torch.equal(model[0].pattern.mask(), plain[0].pattern.mask())
    assert torch.equal(model[2].pattern.mask(), plain[2].pattern.mask())


def test_a_method_of_ones_own_names_the_layers_that_it_changed():
    class OfOneLayer(Sparsifier):
        def _update(self):
            layer = self.layers[0]
            absent = self._absent(layer)[:2]
            self._replace(layer, torch.arange(2), absent)
            return {layer.name: 2}

    model = mlp(0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = OfOneLayer(model, optimizer, Every(1, 0, 10))
    train_step(model, optimizer, sparsifier)
    (entry,) = sparsifier.log
    counts = [layer.module.block_count for layer in sparsifier.layers]
    assert entry["churn"] == 2 / sum(counts)
    assert [line["churn"] for line in entry["layers"].values()] == [2 / counts[0], 0]
