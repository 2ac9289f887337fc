"""The state_dict of BlockSparseLinear: a pattern is loaded with its values."""

import copy

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
    model_with,
    snapshot,
    tensors_of,
)
from pytorch_block_sparse import BlockSparseLinear

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_keys_of_the_checkpoint(bias):
    state = layer_with(6, bias=bias).state_dict()
    names = ["values", "bias", "crow_indices", "col_indices"]
    assert list(state) == [name for name in names if bias or name != "bias"]
    assert state["crow_indices"].dtype == state["col_indices"].dtype == torch.int32
    assert state["values"].shape == (6, 16, 16)


def test_checkpoint_of_a_ragged_layer_is_zero_outside():
    state = layer_with(15).state_dict()
    assert (state["values"][10:, 8:] == 0).all()
    assert (state["values"][4::5, :, 8:] == 0).all()


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("nnz", [15, 6], ids=["same_number", "more"])
def test_numbers_outside_a_ragged_layer_are_not_loaded(nnz, assign):
    state = layer_with(15).state_dict()
    state["values"].fill_(1)
    target = layer_with(nnz, seed=1)
    target.load_state_dict(state, assign=assign)
    assert target.values.sum() == OUT * IN
    assert torch.equal(target.to_dense().weight, torch.ones(OUT, IN))
    assert state["values"].eq(1).all()  # the checkpoint is not ours to change


LOADS = {"same_number": 6, "fewer": 4, "more": 9, "all": 15, "one": 1}


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("nnz", LOADS.values(), ids=LOADS.keys())
def test_adopts_the_pattern_of_the_checkpoint(nnz, assign):
    source, target = layer_with(nnz, seed=1), layer_with(6, seed=2)
    assert not target.pattern.equal(source.pattern)
    keys = target.load_state_dict(source.state_dict(), assign=assign)
    assert not keys.missing_keys and not keys.unexpected_keys
    assert target.block_count == nnz
    assert_same_layer(target, source)


def test_loads_the_same_number_of_blocks_in_place():
    source, target = layer_with(6, seed=1), layer_with(6, seed=2)
    before = {name: (id(t), t.data_ptr()) for name, t in tensors_of(target).items()}
    target.load_state_dict(source.state_dict())
    assert {name: (id(t), t.data_ptr()) for name, t in tensors_of(target).items()} == before


@pytest.mark.parametrize("nnz", [4, 9], ids=["fewer", "more"])
def test_another_number_of_blocks_keeps_the_parameter(nnz):
    source, target = layer_with(nnz, seed=1), layer_with(6, seed=2)
    values = target.values
    target(torch.randn(3, IN)).sum().backward()
    target.load_state_dict(source.state_dict())
    assert target.values is values and values.requires_grad
    assert values.grad is None
    target(torch.randn(3, IN)).sum().backward()
    assert values.grad.shape == (nnz, 16, 16)


def test_gradients_survive_a_load_only_with_their_pattern():
    layer = layer_with(6)
    layer(torch.randn(3, IN)).sum().backward()
    gradient = layer.values.grad
    layer.load_state_dict(copy.deepcopy(layer).state_dict())
    assert layer.values.grad is gradient
    layer.load_state_dict(layer_with(6, seed=1).state_dict())  # as many blocks, others
    assert layer.values.grad is None and layer.bias.grad is not None


@pytest.mark.parametrize("nnz", [6, 9], ids=["same_number", "more"])
def test_loading_shares_no_memory_with_the_checkpoint(nnz):
    source, target = layer_with(nnz, seed=1), layer_with(6, seed=2)
    target.load_state_dict(source.state_dict())
    before = snapshot(source)
    target.load_state_dict(layer_with(nnz, seed=3).state_dict())
    assert_same_tensors(source, before)


def test_assign_takes_the_tensors_of_the_checkpoint():
    source, target = layer_with(9, seed=1), layer_with(6, seed=2)
    target.values.requires_grad_(False)
    state = source.state_dict()
    target.load_state_dict(state, assign=True)
    for name, tensor in state.items():
        assert getattr(target, name).data_ptr() == tensor.data_ptr(), name
    assert isinstance(target.values, nn.Parameter)
    assert not target.values.requires_grad and target.bias.requires_grad


def test_casts_the_checkpoint_to_the_dtype_of_the_layer():
    source, target = layer_with(9, seed=1, dtype=torch.float64), layer_with(6, dtype=torch.bfloat16)
    target.load_state_dict(source.state_dict())
    assert_same_layer(target, source.bfloat16())


def test_loads_int64_indices():
    source, target = layer_with(6, seed=1), layer_with(6, seed=2)
    state = source.state_dict()
    for assign in (False, True):
        for name in ("crow_indices", "col_indices"):
            state[name] = state[name].long()
        target.load_state_dict(state, assign=assign)
        assert_same_layer(target, source)


@pytest.mark.parametrize("nnz", [6, 9], ids=["same_number", "more"])
def test_swapping_of_tensors_loads_too(nnz):
    source, target = layer_with(nnz, seed=1), layer_with(6, seed=2)
    values = target.values
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        target.load_state_dict(source.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert target.values is values
    assert_same_layer(target, source)


def test_nested_modules_with_names_that_are_prefixes():
    source, target = model_with(9, seed=1), model_with(6, seed=5)
    target.load_state_dict(source.state_dict())
    assert_same_tensors(target, source)
    for layer in (target.fc, target.fc1, target.block.fc[1]):
        assert_sound(layer)


def test_a_load_hook_and_a_tensor_of_a_subclass_are_served():
    class Scaled(BlockSparseLinear):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale = nn.Parameter(torch.ones(1))
            self.register_buffer("steps", torch.zeros(()))
            self.adapter = nn.Linear(3, 3)

    source, target = (Scaled(IN, OUT, density=0.4, block_shape=BLOCK) for _ in range(2))
    with torch.no_grad():
        source.scale.fill_(7)
        source.steps.fill_(5)
    seen = []
    target.register_load_state_dict_pre_hook(lambda module, *args: seen.append(module))
    target.load_state_dict(source.state_dict())
    assert_same_tensors(target, source)
    assert seen == [target]
