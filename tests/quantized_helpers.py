"""Layers with int8 values for the tests: exact ones, ones of random numbers, and their inputs."""

import pytest
import torch

from pytorch_block_sparse import BlockSparseLinear
from pytorch_block_sparse.matrix import zero_outside_
from zoo import DTYPES, dtype_id, normal, small_integers

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def exact_layer(pattern, *, bias=True, dtype=torch.float32):
    """A layer whose int8 values are its values, with scales that are powers of two.

    In each row the largest magnitude is 127 times the scale.
    """
    out_features, in_features = pattern.shape
    layer = BlockSparseLinear(in_features, out_features, bias=bias, pattern=pattern, dtype=dtype)
    block_out = pattern.block_shape[0]
    scale = torch.exp2(torch.arange(-2.0, 2.0)).repeat(pattern.grid[0] * block_out)
    scale = scale[: pattern.grid[0] * block_out].view(-1, block_out)
    with torch.no_grad():
        values = small_integers(*layer.values.shape)
        first = pattern.crow_indices[:-1][torch.diff(pattern.crow_indices) > 0]
        values[first.long(), :, 0] = 127.0
        layer.values.copy_(values * scale[pattern.row_indices.long()][:, :, None])
        zero_outside_(layer.values, layer.pattern)
        if bias:
            layer.bias.copy_(small_integers(out_features, seed=1))
    return layer


def inputs(layer, *leading, dtype=torch.float32):
    """Small integers, and few of them where sums must stay exact in sixteen bits."""
    return small_integers(*leading, layer.in_features, dtype=dtype, seed=2)


def layer_of_normals(pattern, dtype=torch.float32):
    layer = BlockSparseLinear(*pattern.shape[::-1], pattern=pattern, dtype=dtype)
    with torch.no_grad():
        layer.values.mul_(normal(*layer.values.shape, dtype=dtype))
    return layer


def served_layer(density=0.4, seed=0, **kwargs):
    torch.manual_seed(seed)
    return BlockSparseLinear(160, 96, density=density, **kwargs).quantize()
