"""BlockSparseLinear made of an nn.Linear, and an nn.Linear made of it."""

import pytest
import torch
from torch import nn

from linear_helpers import assert_is_product, sizes
from pytorch_block_sparse import BlockSparseLinear, Pattern
from zoo import DTYPES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@sizes
def test_at_density_one_it_is_the_dense_layer(size, dtype):
    dense = nn.Linear(size[0], size[1], dtype=dtype)
    layer = BlockSparseLinear.from_dense(dense, 1.0, size[2])
    assert torch.equal(layer.weight.to_dense(), dense.weight)
    assert torch.equal(layer.bias, dense.bias)
    x = torch.randn(9, size[0]).to(dtype)
    assert_is_product(layer(x), x, dense.weight, dense.bias)


def test_from_dense_keeps_the_blocks_of_largest_l1_norm():
    # one block of 16 ones: L1 16, L2 4, max 1; one of a single 10: L1 10, L2 10, max 10
    dense = nn.Linear(12, 8, bias=False)
    with torch.no_grad():
        dense.weight.zero_()
        dense.weight[0:4, 4:8] = -1  # 16
        dense.weight[5, 1] = 10  # 10
        dense.weight[4:8, 8:12] = 0.75  # 12
        dense.weight[0:4, 8:12] = 0.5  # 8
    layer = BlockSparseLinear.from_dense(dense, density=2 / 6, block_shape=(4, 4))
    assert layer.pattern.mask().tolist() == [[False, True, False], [False, False, True]]
    assert torch.equal(layer.values[0], dense.weight[0:4, 4:8])
    assert torch.equal(layer.values[1], dense.weight[4:8, 8:12])


def test_from_dense_at_a_given_pattern():
    dense = nn.Linear(70, 40)
    pattern = Pattern.random((40, 70), 0.5, (16, 16))
    layer = BlockSparseLinear.from_dense(dense, pattern=pattern)
    keep = pattern.mask().repeat_interleave(16, 0).repeat_interleave(16, 1)[:40, :70]
    assert torch.equal(layer.weight.to_dense(), dense.weight * keep)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_from_dense_and_back_keep_what_a_layer_is(bias):
    dense = nn.Linear(64, 32, bias=bias, dtype=torch.bfloat16).eval()
    dense.weight.requires_grad_(False)
    layer = BlockSparseLinear.from_dense(dense, density=1.0)
    for one in (layer, layer.to_dense()):
        assert not one.training
        assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
        assert [p.requires_grad for p in one.parameters()] == [False, True][: 1 + bias]
        assert (one.bias is not None) == bias
    assert type(layer.to_dense()) is nn.Linear
    assert torch.equal(layer.to_dense().weight, dense.weight)


def test_dense_copies_share_no_memory():
    dense = nn.Linear(64, 64)
    layer = BlockSparseLinear.from_dense(dense, 1.0)
    back = layer.to_dense()
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    assert dense.weight.any() and dense.bias.any()
    assert back.weight.any() and back.bias.any()


def test_to_dense_is_zero_elsewhere():
    layer = BlockSparseLinear(70, 40, density=0.4, block_shape=(16, 16))
    absent = ~layer.pattern.mask().repeat_interleave(16, 0).repeat_interleave(16, 1)[:40, :70]
    dense = layer.to_dense()
    assert (dense.weight[absent] == 0).all() and (dense.weight[~absent] != 0).all()


@pytest.mark.parametrize("sizes_given", [(0, 0), (64, 48), (0, 48)], ids=str)
def test_torch_nn_linear_argument(sizes_given):
    dense = nn.Linear(64, 48, bias=False, dtype=torch.float64)
    layer = BlockSparseLinear(
        *sizes_given, density=1.0, torch_nn_linear=dense, block_shape=(16, 16)
    )
    assert (layer.in_features, layer.out_features, layer.bias) == (64, 48, None)
    assert layer.values.dtype == torch.float64
    assert torch.equal(layer.weight.to_dense(), dense.weight)


def test_from_dense_on_the_meta_device():
    layer = BlockSparseLinear.from_dense(nn.Linear(64, 64, device="meta"), 0.5)
    assert layer.values.is_meta and layer.block_count == 2
