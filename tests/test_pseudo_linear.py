"""PseudoBlockSparseLinear: the same layer, computed densely."""

import pytest
import torch

from pytorch_block_sparse import (
    BlockSparseLinear,
    BlockSparseMatrix,
    PseudoBlockSparseLinear,
)
from zoo import normal

SHAPE, RAGGED, BLOCK = (12, 20), (11, 18), (4, 5)  # 3 x 4 blocks


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [SHAPE, RAGGED], ids=["aligned", "ragged"])
def test_the_pseudo_layer_is_the_layer(shape, bias):
    layer = BlockSparseLinear(
        shape[1], shape[0], bias, density=0.5, block_shape=BLOCK, dtype=torch.float64
    ).eval()
    pseudo = PseudoBlockSparseLinear(layer)
    assert not pseudo.training and pseudo.mask.dtype == torch.bool
    x = normal(7, shape[1], dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(ours)
    torch.testing.assert_close(pseudo(theirs), y)
    y.pow(2).sum().backward()
    pseudo(theirs).pow(2).sum().backward()
    torch.testing.assert_close(theirs.grad, ours.grad)
    gradient = BlockSparseMatrix(layer.values.grad, layer.pattern).to_dense()
    torch.testing.assert_close(pseudo.weight.grad, gradient)
    assert pseudo.weight.grad[~pseudo.mask].eq(0).all()
    if bias:
        torch.testing.assert_close(pseudo.bias.grad, layer.bias.grad)
    else:
        assert pseudo.bias is None
    assert "in_features" in repr(pseudo)


def test_the_pseudo_layer_trains_the_same():
    layer = BlockSparseLinear(20, 12, density=0.5, block_shape=BLOCK, dtype=torch.float64)
    pseudo = PseudoBlockSparseLinear(layer)
    x = normal(7, 20, dtype=torch.float64)
    for model in (layer, pseudo):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).pow(2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(pseudo(x), layer(x))


def test_the_pseudo_layer_keeps_what_is_frozen():
    layer = BlockSparseLinear(20, 12, density=0.5, block_shape=BLOCK)
    layer.values.requires_grad_(False)
    pseudo = PseudoBlockSparseLinear(layer)
    assert not pseudo.weight.requires_grad and pseudo.bias.requires_grad
