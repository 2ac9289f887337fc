"""A checkpoint that does not fit is refused, and changes nothing."""

import copy
import re

import pytest
import torch
from torch import nn

from checkpoint_helpers import (
    BLOCK,
    IN,
    OUT,
    assert_same_tensors,
    assert_sound,
    layer_with,
    model_with,
    snapshot,
    tensors_of,
)
from pytorch_block_sparse import BlockSparseLinear

pytestmark = pytest.mark.usefixtures("one_thread")


def corrupt(name, change):
    def apply(state):
        state[name] = change(state[name].clone())

    return apply


def put(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def another_shape(state):
    torch.manual_seed(1)
    other = BlockSparseLinear(IN, OUT + 16, density=0.4, block_shape=BLOCK)
    state.update(other.state_dict())


def another_block_shape(state):
    torch.manual_seed(1)
    state.update(BlockSparseLinear(IN, OUT, density=0.4, block_shape=(16, 8)).state_dict())


# what is done to a good checkpoint, and what the message says
CORRUPTIONS = {
    "values_too_few": (corrupt("values", lambda t: t[:-1]), "values: must be [9, 16, 16], got [8"),
    "values_flat": (corrupt("values", lambda t: t.flatten()), "values: must be [9, 16, 16], got"),
    "values_int": (corrupt("values", lambda t: t.int()), "values: must be floating point"),
    "values_complex": (corrupt("values", lambda t: t.cfloat()), "values: must be floating point"),
    "values_meta": (corrupt("values", lambda t: t.to("meta")), "values: must be floating point, w"),
    "values_array": (corrupt("values", lambda t: t.numpy()), "values: must be a tensor, got ndarr"),
    "bias_too_long": (corrupt("bias", lambda t: t.repeat(2)), "bias: must be [40], got [80]"),
    "bias_meta": (corrupt("bias", lambda t: t.to("meta")), "bias: must be floating point, with n"),
    "bias_list": (corrupt("bias", lambda t: t.tolist()), "bias: must be a tensor, got list"),
    "crow_too_short": (corrupt("crow_indices", lambda t: t[:-1]), "crow_indices: has 3 entries"),
    "crow_empty": (corrupt("crow_indices", lambda t: t[:0]), "crow_indices: has 0 entries"),
    "crow_first": (corrupt("crow_indices", put(0, 1)), "crow_indices"),
    "crow_not_monotone": (corrupt("crow_indices", put(1, 100)), "crow_indices"),
    "crow_negative": (corrupt("crow_indices", put(1, -1)), "crow_indices"),
    "crow_last": (corrupt("crow_indices", put(-1, 8)), "crow_indices"),
    "crow_last_huge": (corrupt("crow_indices", put(-1, 2**31 - 1)), "crow_indices"),
    "crow_float": (corrupt("crow_indices", lambda t: t.float()), "crow_indices: dtype must be int"),
    "crow_2d": (corrupt("crow_indices", lambda t: t[None]), "crow_indices: must have one dimens"),
    "crow_list": (corrupt("crow_indices", lambda t: t.tolist()), "crow_indices: must be a tensor"),
    "col_too_large": (corrupt("col_indices", put(2, 5)), "col_indices"),
    "col_negative": (corrupt("col_indices", put(2, -1)), "col_indices"),
    "col_twice": (corrupt("col_indices", lambda t: t * 0), "col_indices"),
    "col_not_sorted": (corrupt("col_indices", lambda t: t.flip(0)), "col_indices"),
    "col_too_short": (corrupt("col_indices", lambda t: t[:-1]), "_indices"),
    "col_too_long": (corrupt("col_indices", lambda t: t.repeat(2)), "_indices"),
    "col_int64_huge": (corrupt("col_indices", lambda t: t.long() + 2**40), "col_indices: has an"),
    "col_uint8": (corrupt("col_indices", lambda t: t.byte()), "col_indices: dtype must be int32"),
    "col_meta": (corrupt("col_indices", lambda t: t.to("meta")), "indices"),
    "of_another_shape": (another_shape, "crow_indices: has 5 entries; 3 block rows need 4"),
    "of_another_block_shape": (another_block_shape, "fc.: "),
}


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not_strict"])
@pytest.mark.parametrize(("change", "text"), CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_a_checkpoint_that_does_not_fit_changes_nothing(change, text, strict, assign):
    target = nn.ModuleDict({"fc": layer_with(6, seed=2)})
    before, objects = snapshot(target), {n: id(t) for n, t in tensors_of(target).items()}
    state = layer_with(9, seed=1).state_dict()
    change(state)
    state = {f"fc.{key}": value for key, value in state.items()}
    with pytest.raises(RuntimeError, match=re.escape("fc.: ")) as caught:
        target.load_state_dict(state, strict=strict, assign=assign)
    assert text in str(caught.value)
    assert_same_tensors(target, before)
    assert {n: id(t) for n, t in tensors_of(target).items()} == objects
    assert_sound(target["fc"])


@pytest.mark.parametrize("nnz", [6, 9], ids=["same_number", "more"])
@pytest.mark.parametrize("name", ["values", "crow_indices", "col_indices"])
def test_a_missing_key_is_reported_and_no_half_of_a_pattern_loaded(name, nnz):
    source, target = layer_with(nnz, seed=1), layer_with(6, seed=2)
    before = snapshot(target)
    state = source.state_dict()
    del state[name]
    with pytest.raises(RuntimeError, match=f'Missing key\\(s\\) in state_dict: "{name}". '):
        copy.deepcopy(target).load_state_dict(state)
    keys = target.load_state_dict(state, strict=False)
    assert keys.missing_keys == [name] and not keys.unexpected_keys
    assert_same_tensors(target, before | {"bias": source.bias})  # as nn.Module: the rest is loaded
    assert_sound(target)


def test_a_missing_bias_is_reported_and_the_rest_loaded():
    source, target = layer_with(9, seed=1), layer_with(6, seed=2)
    bias = target.bias.clone()
    state = source.state_dict()
    del state["bias"]
    keys = target.load_state_dict(state, strict=False)
    assert keys.missing_keys == ["bias"]
    assert torch.equal(target.values, source.values) and torch.equal(target.bias, bias)
    assert_sound(target)


def test_missing_and_unexpected_keys_are_those_of_nn_module():
    source, target = model_with(6, seed=1), model_with(6, seed=2)
    state = source.state_dict()
    state["fc.extra"] = state.pop("fc.values")
    state["fc.sub.bias"] = state["fc1.bias"] = torch.zeros(1)
    state["fc2.values"] = state["_index"] = state["fc._index"] = torch.zeros(1)
    keys = target.load_state_dict(state, strict=False)
    assert keys.missing_keys == ["fc.values"]
    assert sorted(keys.unexpected_keys) == [
        "_index",
        "fc._index",
        "fc.extra",
        "fc.sub.bias",
        "fc1.bias",
        "fc2.values",
    ]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        target.load_state_dict(state)


def test_a_checkpoint_of_a_dense_layer_is_refused_by_its_keys():
    target = layer_with(6)
    before = snapshot(target)
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        target.load_state_dict({"weight": torch.zeros(OUT, IN)})
    assert 'Unexpected key(s) in state_dict: "weight"' in str(caught.value)
    assert_same_tensors(target, before)
