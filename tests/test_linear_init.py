"""How the values of a BlockSparseLinear are drawn: with the variance of a dense layer."""

import copy
import math

import pytest
import torch
from torch import nn

from linear_helpers import SIZES, make, outside, sizes
from pytorch_block_sparse import BlockSparseLinear, Pattern

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of_unequal_numbers_of_inputs():
    # block columns of 32, 32 and 8 inputs inside; 1 to 3 of them present
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 1], [1, 0, 1]], dtype=torch.bool)
    return Pattern.from_mask(mask, (256, 32), (1000, 72)), [72, 32, 8, 40]


def test_each_block_row_has_the_output_variance_of_a_dense_layer():
    pattern, inputs = rows_of_unequal_numbers_of_inputs()
    torch.manual_seed(0)
    layer = BlockSparseLinear(72, 1000, bias=False, pattern=pattern)
    # For unit inputs the variance of an output is the sum of squares of its weights. A dense
    # nn.Linear draws uniformly from +-1/sqrt(in): a sum of 1/3 on average, whatever `in` is.
    variance = layer.weight.to_dense().detach().double().square().sum(dim=1)
    for row, n in enumerate(inputs):
        mine = variance[row * 256 : (row + 1) * 256]
        # the square of a uniform number has a standard deviation of 0.894 of its mean
        deviation = math.sqrt(0.8 / (n * len(mine)))
        assert abs(mine.mean() * 3 - 1) < 4 * deviation, f"block row {row}"


def test_dense_and_sparse_outputs_have_one_variance():
    torch.manual_seed(0)
    x = torch.randn(2000, 256)
    dense = nn.Linear(256, 512)(x).var().item()
    pattern = Pattern.random((512, 256), 0.25, balanced=True)  # no block row is empty
    sparse = BlockSparseLinear(256, 512, pattern=pattern)(x).var().item()
    assert sparse == pytest.approx(dense, rel=0.05)


def test_bias_is_drawn_as_that_of_nn_linear():
    torch.manual_seed(0)
    bias = BlockSparseLinear(64, 20_000, density=0.1).bias
    assert bias.abs().max() <= 1 / 8
    assert bias.std().item() == pytest.approx(nn.Linear(64, 20_000).bias.std().item(), rel=0.03)


def test_reset_parameters_draws_anew_at_the_same_pattern():
    torch.manual_seed(0)
    layer = BlockSparseLinear(70, 40, density=0.5)
    before = copy.deepcopy(layer)
    layer.reset_parameters()
    assert layer.pattern.equal(before.pattern)
    assert not torch.equal(layer.bias, before.bias)
    inside = ~outside(layer)
    assert (layer.values != before.values)[inside].all()
    assert (layer.values[~inside] == 0).all()


@sizes
def test_outside_of_edge_blocks_is_zero_and_stays_so_in_training(size):
    layer = make(size, density=1.0)
    where = outside(layer)
    assert where.any() == (size is not SIZES["whole"])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(4):
        assert (layer.values[where] == 0).all()
        assert (layer.values[~where] != 0).all()
        optimizer.zero_grad()
        layer(torch.randn(6, size[0])).square().sum().backward()
        assert (layer.values.grad[where] == 0).all()
        optimizer.step()
