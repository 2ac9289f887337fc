"""Sizes of BlockSparseLinear, and what its results are held against."""

import pytest
import torch

from pytorch_block_sparse import BlockSparseLinear, BlockSparseMatrix

# (in, out, block shape): whole blocks, ragged both ways, one block larger than the weight, tall
SIZES = {
    "whole": (96, 64, (32, 32)),
    "ragged": (70, 40, (32, 32)),
    "block_larger": (5, 7, (32, 32)),
    "tall_blocks": (48, 60, (16, 8)),
}
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())


def make(size, **options):
    in_features, out_features, block_shape = size
    return BlockSparseLinear(in_features, out_features, block_shape=block_shape, **options)


def assert_is_product(y, x, weight, bias):
    """`y` is x Wt + bias, up to the rounding of its accumulation (fp32; fp64 for fp64)."""
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], weight.shape[0])
    x, weight = x.detach().double(), weight.detach().double()
    bias = torch.zeros(len(weight)).double() if bias is None else bias.detach().double()
    exact = x @ weight.T + bias
    size = x.abs() @ weight.abs().T + bias.abs()
    unit = torch.finfo(torch.float64 if y.dtype == torch.float64 else torch.float32).eps
    bound = (weight.shape[1] + 2) * unit * size + torch.finfo(y.dtype).eps * exact.abs()
    excess = (y.detach().double() - exact).abs() - bound
    assert not excess.numel() or excess.max() <= 0, f"over the bound by {excess.max():.3g}"


def outside(layer):
    """bool, as `values`: the part of edge blocks that lies outside the weight."""
    ones = torch.ones(layer.out_features, layer.in_features)
    return BlockSparseMatrix.from_dense(ones, pattern=layer.pattern).values == 0
