"""Small operands of the ops, and the dense function that they are compared with."""

import pytest
import torch

from pytorch_block_sparse import ops
from pytorch_block_sparse.testing import dense_forward
from zoo import block_id, normal, pattern_of

namespace = torch.ops.block_sparse

SHAPE = (11, 13)  # ragged in every block shape below
BLOCK_SHAPES = [(4, 4), (5, 3), (1, 6), (16, 16)]
each_block_shape = pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=block_id)


class Case:
    """Small operands that require gradients."""

    def __init__(self, block_shape=(4, 4), tokens=(3,), dtype=torch.float64, device="cpu"):
        make = {"dtype": dtype, "device": device}
        self.pattern = pattern_of("random", SHAPE, block_shape, device)
        self.index, self.block_shape = self.pattern.index, block_shape
        self.x = normal(*tokens, SHAPE[1], seed=1, **make).requires_grad_()
        self.dy = normal(*tokens, SHAPE[0], seed=2, **make).requires_grad_()
        self.values = normal(self.pattern.nnz, *block_shape, seed=3, **make).requires_grad_()
        self.bias = normal(SHAPE[0], seed=4, **make).requires_grad_()

    def linear(self, x, values, bias):
        return ops.linear(x, values, self.index, bias, SHAPE[0])

    def dense(self, x, values, bias):
        return dense_forward(x, values, self.pattern, bias)
