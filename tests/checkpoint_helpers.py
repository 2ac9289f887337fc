"""Layers with a given number of blocks, and what it means that two are the same."""

import torch
from torch import nn

from pytorch_block_sparse import BlockSparseLinear, Pattern

IN, OUT, BLOCK = 72, 40, (16, 16)  # 3 x 5 blocks, ragged both ways


def layer_with(nnz, seed=0, **options):
    torch.manual_seed(seed)
    return BlockSparseLinear(IN, OUT, density=nnz / 15, block_shape=BLOCK, **options)


def model_with(nnz, seed=0):
    """One name is a prefix of another, with and without a dot between."""
    torch.manual_seed(seed)
    model = nn.Module()
    model.fc = BlockSparseLinear(IN, OUT, density=nnz / 15, block_shape=BLOCK)
    model.fc1 = BlockSparseLinear(IN, OUT, density=nnz / 15, block_shape=BLOCK, bias=False)
    model.block = nn.Module()
    model.block.fc = nn.Sequential(nn.Linear(IN, IN), layer_with(nnz, seed + 1))
    return model


def tensors_of(module):
    """Everything a module holds, also what no checkpoint has."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def snapshot(module):
    return {name: tensor.detach().clone() for name, tensor in tensors_of(module).items()}


def assert_same_tensors(a, b):
    a, b = (tensors_of(m) if isinstance(m, nn.Module) else m for m in (a, b))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


def assert_sound(layer):
    """The index is the one that belongs to the saved indices, and the layer computes with it."""
    made_anew = Pattern.from_bsr(
        layer.crow_indices, layer.col_indices, (layer.out_features, layer.in_features), BLOCK
    )
    assert torch.equal(layer._index, made_anew.index)
    x = torch.randn(3, layer.in_features, dtype=layer.values.dtype)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


def assert_same_layer(a, b):
    assert_same_tensors(a, b)
    for layer in (a, b):
        assert_sound(layer)
