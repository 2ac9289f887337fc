"""torch's optimizers on BlockSparseLinear, also after another pattern was loaded."""

import copy
import re

import pytest
import torch
from torch import nn

from checkpoint_helpers import (
    BLOCK,
    IN,
    OUT,
    assert_same_layer,
    assert_same_tensors,
    assert_sound,
    layer_with,
    snapshot,
)
from pytorch_block_sparse import BlockSparseLinear, _resized

pytestmark = pytest.mark.usefixtures("one_thread")


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def train(layer, optimizer, steps=1):
    x, target = torch.randn(64, IN), torch.randn(64, OUT)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
    return loss.item()


@optimizers
def test_optimizers_do_as_with_the_dense_layer(make):
    # At density 1 with blocks that fit, the same numbers in another order: the same training.
    sparse = BlockSparseLinear(64, 32, density=1.0, block_shape=BLOCK, dtype=torch.float64)
    dense = sparse.to_dense()
    x, target = torch.randn(20, 64).double(), torch.randn(20, 32).double()
    for layer in (sparse, dense):
        optimizer = make(layer.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(layer(x), target).backward()
            optimizer.step()
    torch.testing.assert_close(sparse.weight.to_dense(), dense.weight)
    torch.testing.assert_close(sparse.bias, dense.bias)


@optimizers
def test_an_optimizer_trains_on_after_another_pattern_of_the_same_number(make):
    layer = layer_with(6)
    optimizer = make(layer.parameters())
    train(layer, optimizer)
    layer.load_state_dict(layer_with(6, seed=1).state_dict())
    before = snapshot(layer)
    train(layer, optimizer)
    assert not torch.equal(layer.values, before["values"])
    assert_sound(layer)


@pytest.mark.parametrize("nnz", [4, 9], ids=["fewer", "more"])
@pytest.mark.parametrize("kind", ["adamw", "adamw_foreach", "adamw_fused", "sgd_momentum", "sgd"])
def test_a_new_optimizer_trains_on_after_another_number_of_blocks(kind, nnz):
    layer = layer_with(6)
    optimizer = OPTIMIZERS[kind](layer.parameters())
    layer.load_state_dict(layer_with(nnz, seed=1).state_dict())
    before = snapshot(layer)
    train(layer, optimizer, steps=3)
    assert (layer.values != before["values"]).flatten(1).any(dim=1).all()  # each block
    assert_sound(layer)


@pytest.mark.parametrize("nnz", [4, 9], ids=["fewer", "more"])
@pytest.mark.parametrize("kind", ["adamw", "adamw_foreach", "adamw_fused", "sgd_momentum"])
def test_an_optimizer_with_moments_of_the_old_shape_refuses_to_step(kind, nnz):
    # torch's fused optimizers do not check: they would write out of bounds.
    layer = layer_with(6)
    optimizer = OPTIMIZERS[kind](layer.parameters())
    train(layer, optimizer)
    layer.load_state_dict(layer_with(nnz, seed=1).state_dict())
    before = snapshot(layer)
    moment = "momentum_buffer" if kind == "sgd_momentum" else "exp_avg"
    text = f"holds {moment} [6, 16, 16] for values that are now [{nnz}, 16, 16]"
    with pytest.raises(RuntimeError, match=re.escape(text)):
        train(layer, optimizer)
    assert_same_tensors(layer, before)

    optimizer.state.pop(layer.values)  # as the message says
    first = train(layer, optimizer)
    assert train(layer, optimizer, steps=3) != first
    assert (layer.values != before["values"]).flatten(1).any(dim=1).all()


def test_a_layer_whose_moments_fit_is_looked_at_no_more():
    layer = layer_with(6)
    optimizer = OPTIMIZERS["adamw"](layer.parameters())
    layer.load_state_dict(layer_with(9, seed=1).state_dict())
    assert layer in _resized._resized
    train(layer, optimizer)  # the state is made in this step
    assert layer in _resized._resized
    train(layer, optimizer)
    assert layer not in _resized._resized
    layer.load_state_dict(layer_with(6).state_dict())
    with pytest.raises(RuntimeError, match="holds exp_avg"):
        train(layer, optimizer)


def test_factored_moments_of_the_new_shape_are_no_error():
    layer = layer_with(6)
    optimizer = torch.optim.Adafactor(layer.parameters())
    layer.load_state_dict(layer_with(9, seed=1).state_dict())
    train(layer, optimizer, steps=2)
    assert optimizer.state[layer.values]["row_var"].shape == (9, 16, 1)
    layer.load_state_dict(layer_with(6).state_dict())
    with pytest.raises(RuntimeError, match="holds row_var"):
        train(layer, optimizer)


@pytest.mark.parametrize("nnz", [4, 9], ids=["fewer", "more"])
def test_resuming_with_the_optimizers_state(nnz):
    saved = layer_with(nnz, seed=1)
    saved_optimizer = OPTIMIZERS["adamw"](saved.parameters())
    train(saved, saved_optimizer, steps=2)

    layer = layer_with(6)
    optimizer = OPTIMIZERS["adamw"](layer.parameters())
    train(layer, optimizer)
    layer.load_state_dict(saved.state_dict())
    optimizer.load_state_dict(copy.deepcopy(saved_optimizer.state_dict()))
    for one, its_optimizer in ((saved, saved_optimizer), (layer, optimizer)):
        torch.manual_seed(5)
        train(one, its_optimizer, steps=2)
    assert_same_layer(layer, saved)
