"""update_pattern_ and compact_: rules 1 and 2 (constant nnz in place; state follows the blocks)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cuda_helpers import captured
from optim_helpers import ADAPTIVE, dense_of, grid_of, mlp, train_step
from pytorch_block_sparse import BlockSparseLinear, BlockSparseMatrix, Pattern
from pytorch_block_sparse.optim import compact_, update_pattern_

pytestmark = pytest.mark.usefixtures("one_thread")


def choose(layer, k, seed=0):
    """k present blocks and k absent ones, as pairs in random order."""
    generator = torch.Generator().manual_seed(seed)
    mask = layer.pattern.mask()
    present, absent = mask.nonzero(), (~mask).nonzero()
    drop = present[torch.randperm(len(present), generator=generator)[:k]]
    grow = absent[torch.randperm(len(absent), generator=generator)[:k]]
    return drop, grow


def trained(make_optimizer, density=0.25):
    model = mlp(density)
    optimizer = make_optimizer(model.parameters())
    for step in range(3):
        train_step(model, optimizer, seed=step)
    return model, optimizer


def addresses(layer):
    return [t.data_ptr() for t in (layer.values, layer.crow_indices, layer.col_indices)] + [
        layer._index.data_ptr()
    ]


@given(
    rows=st.integers(1, 5),
    cols=st.integers(1, 5),
    cut=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_it_does_what_a_dense_weight_would(rows, cols, cut, seed, data):
    cells = rows * cols
    nnz = data.draw(st.integers(1, cells))
    k = data.draw(st.integers(0, min(nnz, cells - nnz)))
    shape = (4 * rows - cut[0], 4 * cols - cut[1])
    generator = torch.Generator().manual_seed(seed)
    pattern = Pattern.random(shape, nnz / cells, (4, 4), generator=generator)
    layer = BlockSparseLinear(shape[1], shape[0], pattern=pattern)
    before, where = layer.weight.to_dense().detach(), addresses(layer)
    drop, grow = choose(layer, k, seed)
    new = torch.randn(k, 4, 4, generator=generator)
    change = update_pattern_(layer, drop, grow, new_values=new)

    expected = before.clone()
    for row, col in drop.tolist():
        expected[4 * row : 4 * row + 4, 4 * col : 4 * col + 4] = 0
    for (row, col), block in zip(grow.tolist(), new, strict=True):
        inside = expected[4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
        inside.copy_(block[: inside.shape[0], : inside.shape[1]])
    assert torch.equal(layer.weight.to_dense(), expected)
    assert int(change.fresh.sum()) == k
    assert addresses(layer) == where
    rebuilt = Pattern.from_mask(layer.pattern.mask(), (4, 4), shape)
    assert torch.equal(rebuilt.index, layer._index)
    outside = layer.weight.to_bsr(padded=True).to_dense()
    assert not outside[shape[0] :].any() and not outside[:, shape[1] :].any()


@pytest.mark.parametrize("name", ADAPTIVE)
def test_optimizer_state_follows_the_blocks(name):
    model, optimizer = trained(ADAPTIVE[name])
    layer = model[0]
    values, pattern = layer.values, layer.pattern
    old_mask = pattern.mask()
    state = optimizer.state[values]
    moving = [key for key, item in state.items() if getattr(item, "shape", None) == values.shape]
    counters = {key: item.clone() for key, item in state.items() if getattr(item, "ndim", 1) == 0}
    before = {key: dense_of(state[key], pattern) for key in moving}
    where = {key: state[key].data_ptr() for key in moving}
    weight = layer.weight.to_dense().detach()
    drop, grow = choose(layer, 5)
    update_pattern_(layer, drop, grow, optimizer)

    assert layer.values is values and optimizer.param_groups[0]["params"][0] is values
    stay = grid_of(old_mask & layer.pattern.mask(), layer.block_shape)
    assert torch.equal(layer.weight.to_dense(), weight * stay)
    for key in moving:
        assert state[key].data_ptr() == where[key]
        assert before[key].any()
        assert torch.equal(dense_of(state[key], layer.pattern), before[key] * stay), key
    assert counters == {key: state[key] for key in counters}
    if name != "SGD":
        assert moving
    train_step(model, optimizer, seed=9)  # and it goes on
    assert layer.values.isfinite().all()


def test_the_gradient_follows_the_blocks():
    model = mlp()
    layer = model[0]
    model(torch.randn(4, 64)).sum().backward()
    gradient, old_mask = dense_of(layer.values.grad, layer.pattern), layer.pattern.mask()
    update_pattern_(layer, *choose(layer, 5))
    stay = grid_of(old_mask & layer.pattern.mask(), layer.block_shape)
    assert torch.equal(dense_of(layer.values.grad, layer.pattern), gradient * stay)


def adafactor(parameters):
    return torch.optim.Adafactor(parameters)


def adafactor_of_transformers(parameters):
    optimization = pytest.importorskip("transformers.optimization")
    return optimization.Adafactor(parameters, lr=1e-2, relative_step=False)


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters)


class Quantised(torch.Tensor):
    pass


@pytest.mark.parametrize("make", [adafactor, adafactor_of_transformers, lbfgs])
@pytest.mark.parametrize("change", ["update", "compact"])
def test_unknown_optimizer_state_is_an_error(make, change):
    model = mlp()
    optimizer = make(model.parameters())
    if make is not lbfgs:
        train_step(model, optimizer)
    layer = model[0]
    before, values = layer.weight.to_dense().detach(), layer.values
    with pytest.raises(TypeError, match=r"Adafactor keeps '\w+' as Tensor \[32, |LBFGS keeps flat"):
        if change == "update":
            update_pattern_(layer, *choose(layer, 5), optimizer)
        else:
            compact_(layer, torch.arange(32) < 5, optimizer)
    assert layer.values is values
    assert torch.equal(layer.weight.to_dense(), before)


def test_quantised_and_flat_state_is_an_error():
    model, optimizer = trained(ADAPTIVE["Adam"])
    layer = model[0]
    state = optimizer.state[layer.values]
    good = state["exp_avg"]
    for bad in (good.as_subclass(Quantised), good.flatten(), [good]):
        state["exp_avg"] = bad
        with pytest.raises(TypeError, match=r"'exp_avg' as .* cannot follow the blocks"):
            update_pattern_(layer, *choose(layer, 5), optimizer)


def test_between_forward_and_backward_autograd_raises():
    model = mlp()
    loss = model(torch.randn(4, 64)).sum()
    update_pattern_(model[0], *choose(model[0], 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_index_alone_raises_in_backward():
    """Also a layer whose values are not saved (the input needs no gradient) notices."""
    layer = mlp()[0]
    loss = layer(torch.randn(4, 64)).sum()
    update_pattern_(layer, *choose(layer, 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled_code_is_not_compiled_again():
    counter = pytest.importorskip("torch._dynamo.testing").CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()  # what earlier tests compiled counts against the limit of a frame
    model, optimizer = trained(ADAPTIVE["Adam"])
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(4, 64)
    for seed in range(6):
        y = compiled(x)
        assert torch.allclose(y, model(x), atol=1e-5)
        y.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if seed < 5:
            update_pattern_(model[0], *choose(model[0], 3, seed), optimizer)
    assert counter.frame_count == 1


def test_a_matrix_can_be_updated_too():
    matrix = BlockSparseMatrix.randn((64, 64), n_blocks=4, block_shape=(16, 16))
    absent = (~matrix.block_mask()).nonzero()[:1]
    update_pattern_(matrix, torch.tensor([True, False, False, False]), absent)
    assert matrix.block_mask()[tuple(absent[0])] and matrix.pattern.nnz == 4


def test_no_blocks_change_nothing():
    layer = mlp()[0]
    before = layer.values.detach().clone()
    change = update_pattern_(layer, [], [])
    assert torch.equal(layer.values, before) and not change.fresh.any()


def test_bad_input_changes_nothing():
    model = mlp()
    layer = model[0]
    before, index = layer.values.detach().clone(), layer._index.clone()
    (drop, grow), optimizer = choose(layer, 2), torch.optim.Adam(model.parameters())
    cases = [
        (ValueError, "as many blocks as drop \\(2\\), got 1", (drop, grow[:1])),
        (ValueError, "drop: block .* is not present", (grow, grow)),
        (ValueError, "grow: block .* is present already", (drop, drop)),
        (ValueError, "grow: names a block twice", (drop, grow[[0, 0]])),
        (ValueError, "drop: names a block twice", (drop[[0, 0]], grow)),
        (ValueError, r"grow: block \(99, 0\) is outside the grid", (drop[:1], [(99, 0)])),
        (ValueError, r"drop: must be bool \[32\], got \[3\]", (torch.ones(3) > 0, grow)),
        (ValueError, "grow: must be pairs", (drop, grow.float())),
        (ValueError, r"grow: must be \[k, 2\], got \[2, 3\]", (drop, torch.zeros(2, 3).long())),
    ]
    for error, message, (bad_drop, bad_grow) in cases:
        with pytest.raises(error, match=message):
            update_pattern_(layer, bad_drop, bad_grow, optimizer)
    with pytest.raises(ValueError, match=r"new_values: must be \[2, 8, 8\], got \[1, 8, 8\]"):
        update_pattern_(layer, drop, grow, new_values=torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="does not train the layer's values"):
        update_pattern_(layer, drop, grow, torch.optim.Adam([nn.Parameter(torch.zeros(1))]))
    with pytest.raises(TypeError, match="layer: must be a BlockSparseLinear"):
        update_pattern_(nn.Linear(2, 2), drop, grow)
    with pytest.raises(ValueError, match="meta"):
        update_pattern_(BlockSparseLinear(64, 64, device="meta"), [], [])
    assert torch.equal(layer.values, before) and torch.equal(layer._index, index)


# --- compact_ -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTIVE)
def test_compact_remaps_the_optimizer(name):
    model, optimizer = trained(ADAPTIVE[name])
    layer = model[0]
    old = layer.values
    pattern, weight = layer.pattern, layer.weight.to_dense().detach()
    state = dict(optimizer.state[old])
    keep = layer.weight.block_norm(1) > layer.weight.block_norm(1).median()
    gone = BlockSparseMatrix(keep[:, None, None].expand_as(old).float(), pattern).to_dense()
    new = compact_(layer, keep, optimizer)

    assert new is layer.values and new is not old and layer.block_count == int(keep.sum())
    params = optimizer.param_groups[0]["params"]
    assert any(p is new for p in params) and not any(p is old for p in params)
    assert old not in optimizer.state
    assert torch.equal(layer.weight.to_dense(), weight * gone)
    for key, item in optimizer.state[new].items():
        if isinstance(item, torch.Tensor) and item.dim():
            assert torch.equal(item, state[key][keep])
        else:
            assert item is state[key]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = new.detach().clone()
    train_step(model, optimizer, seed=9)
    scheduler.step()
    assert not torch.equal(new, before)  # it is trained


def test_compact_takes_pairs_and_keeps_requires_grad():
    layer = mlp()[0].requires_grad_(False)
    pairs = layer.pattern.mask().nonzero()[[4, 2]]
    compact_(layer, pairs)
    assert layer.pattern.mask().nonzero().tolist() == pairs[[1, 0]].tolist()
    assert not layer.values.requires_grad


def test_compact_bad_input():
    layer = mlp()[0]
    with pytest.raises(ValueError, match="keep: at least one block"):
        compact_(layer, torch.zeros(32, dtype=torch.bool))
    with pytest.raises(ValueError, match="is not present"):
        compact_(layer, (~layer.pattern.mask()).nonzero()[:1])
    with pytest.raises(TypeError, match="must be a BlockSparseLinear"):
        compact_(nn.Linear(2, 2), [])


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_captured_graph_sees_the_new_pattern():
    layer = mlp()[0].cuda()
    x = torch.randn(16, 64, device="cuda")
    with torch.no_grad():
        graph, y = captured(lambda: layer(x))
        for seed in range(3):
            mask = layer.pattern.mask().cpu()
            new = torch.randn(5, 8, 8, device="cuda")
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(int(mask.sum()), generator=generator)[:5]
            update_pattern_(layer, mask.nonzero()[order], (~mask).nonzero()[order], new_values=new)
            graph.replay()
            assert torch.allclose(y, x @ layer.weight.to_dense().T + layer.bias, atol=1e-4)
            assert layer._index.device.type == "cuda"
