"""What BlockSparseLinear refuses, and what it says."""

import math
import re

import numpy
import pytest
import torch
from torch import nn

from pytorch_block_sparse import BlockSparseLinear, Pattern

pytestmark = pytest.mark.usefixtures("one_thread")


def refused(kind, text):
    return pytest.raises(kind, match="^" + re.escape(text))


NO_DENSITY = [0, 0.0, -0.1, 1.01, 2, math.nan, math.inf, True, "0.5", None]


@pytest.mark.parametrize("density", NO_DENSITY, ids=repr)
def test_refuses_density(density):
    text = f"density: must be in (0, 1], got {density!r}"
    with refused(ValueError, text):
        BlockSparseLinear(64, 64, density=density)
    with refused(ValueError, text):
        BlockSparseLinear.from_dense(nn.Linear(64, 64), density)


NO_BLOCK = [32, (32,), (8, 8, 8), (0, 32), (32, -1), (32.0, 32), (True, 32), "32", None]


@pytest.mark.parametrize("block_shape", NO_BLOCK, ids=repr)
def test_refuses_block_shape(block_shape):
    text = f"block_shape: must be two positive ints (out, in), got {block_shape!r}"
    with refused(ValueError, text):
        BlockSparseLinear(64, 64, block_shape=block_shape)
    with refused(ValueError, text):
        BlockSparseLinear.from_dense(nn.Linear(64, 64), 0.5, block_shape)


@pytest.mark.parametrize("value", [-1, 2**31, 8.0, True, "8", None], ids=repr)
@pytest.mark.parametrize("name", ["in_features", "out_features"])
def test_refuses_features(name, value):
    sizes = {"in_features": 64, "out_features": 64} | {name: value}
    with refused(ValueError, f"{name}: must be an int in [0, 2^31), got {value!r}"):
        BlockSparseLinear(**sizes)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_refuses_dtype(dtype):
    text = (
        "dtype: must be one of torch.float64, torch.float32, torch.bfloat16, torch.float16, "
        f"got {dtype}"
    )
    with refused(TypeError, text):
        BlockSparseLinear(64, 64, dtype=dtype)


def test_refuses_what_is_no_pattern():
    with refused(TypeError, "pattern: must be a Pattern, got Tensor"):
        BlockSparseLinear(64, 64, pattern=torch.ones(2, 2))


def test_refuses_pattern_of_another_shape():
    pattern = Pattern.full((32, 64))
    text = (
        "pattern: must have the shape of the layer, (out_features, in_features) = (64, 32), "
        "got (32, 64)"
    )
    with refused(ValueError, text):
        BlockSparseLinear(32, 64, pattern=pattern)
    with refused(ValueError, text):
        BlockSparseLinear.from_dense(nn.Linear(32, 64), pattern=pattern)


def test_refuses_what_is_no_dense_layer():
    with refused(TypeError, "torch_nn_linear: must be a torch.nn.Linear, got Conv1d"):
        BlockSparseLinear(0, 0, torch_nn_linear=nn.Conv1d(8, 8, 1))


@pytest.mark.parametrize("name", ["in_features", "out_features"])
def test_refuses_other_sizes_than_those_of_the_dense_layer(name):
    sizes = {"in_features": 8, "out_features": 8} | {name: 9}
    with refused(ValueError, f"{name}: is 9, but torch_nn_linear has 8; 0 takes it over"):
        BlockSparseLinear(**sizes, torch_nn_linear=nn.Linear(8, 8))


def test_refuses_a_dense_layer_without_numbers():
    dense = nn.Linear(8, 8, device="meta")
    text = "torch_nn_linear: is on the meta device, has no numbers for 'cpu'"
    with refused(ValueError, text):
        BlockSparseLinear(0, 0, torch_nn_linear=dense, device="cpu")


@pytest.mark.parametrize("shape", [(3, 96), (3, 63), (64, 3), (1,), ()], ids=str)
def test_refuses_input_of_another_size(shape):
    # 63 inputs are covered by as many blocks as 64
    with refused(ValueError, f"input: must be [..., in_features=64], got {list(shape)}"):
        BlockSparseLinear(64, 64)(torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_refuses_input_of_another_dtype(dtype):
    with refused(ValueError, "input: dtype"):
        BlockSparseLinear(64, 64)(torch.ones(3, 64, dtype=dtype))


def test_density_may_be_a_numpy_float():
    assert BlockSparseLinear(64, 64, density=numpy.float64(0.5)).block_count == 2
