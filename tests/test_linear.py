"""BlockSparseLinear as a layer: what it takes, computes and is.

Each result is compared with float64 arithmetic on the dense weight, within the error that the
accumulation may make.
"""

import inspect

import pytest
import torch
from torch import nn

from linear_helpers import assert_is_product, make, sizes
from pytorch_block_sparse import BlockSparseLinear, BlockSparseMatrix, Pattern
from zoo import DTYPES

pytestmark = pytest.mark.usefixtures("one_thread")


# --- what it takes ----------------------------------------------------------------------------


def test_signature_starts_as_that_of_nn_linear():
    mine = list(inspect.signature(BlockSparseLinear).parameters.values())
    names = [p.name for p in mine]
    assert names[:7] == [
        "in_features",
        "out_features",
        "bias",
        "density",
        "torch_nn_linear",
        "verbose",
        "block_shape",
    ]
    assert names[7:] == ["pattern", "device", "dtype"]
    assert all(p.kind is p.KEYWORD_ONLY for p in mine[7:])
    defaults = [p.default for p in mine[2:7]]
    assert defaults == [True, 0.5, None, False, (32, 32)]
    assert names[:3] == list(inspect.signature(nn.Linear).parameters)[:3]


def test_positional_arguments():
    layer = BlockSparseLinear(64, 96, False, 0.25, None, False, (16, 32))
    assert (layer.in_features, layer.out_features, layer.bias) == (64, 96, None)
    assert (layer.block_count, layer.block_shape) == (3, (16, 32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@sizes
def test_computes_the_product_with_its_dense_weight(size, bias, dtype):
    layer = make(size, bias=bias, density=0.6, dtype=dtype)
    x = torch.randn(9, size[0]).to(dtype)
    assert_is_product(layer(x), x, layer.weight.to_dense(), layer.bias)


LEADING = [(), (1,), (5,), (2, 3), (2, 1, 3, 2), (0,), (3, 0, 2)]


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("mode", ["train", "no_grad", "inference"])
def test_leading_dimensions(leading, mode):
    layer = BlockSparseLinear(48, 40, block_shape=(16, 16))
    x = torch.randn(*leading, 48)
    with {
        "train": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
    }[mode]():
        y = layer(x)
    assert_is_product(y, x, layer.weight.to_dense(), layer.bias)


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_gradients_are_those_of_the_dense_layer(leading):
    layer = BlockSparseLinear(48, 40, block_shape=(16, 16), dtype=torch.float64)
    dense = layer.to_dense()
    x = torch.randn(*leading, 48, dtype=torch.float64, requires_grad=True)
    x_dense = x.detach().clone().requires_grad_()
    weights = torch.randn(*leading, 40, dtype=torch.float64)
    (layer(x) * weights).sum().backward()
    (dense(x_dense) * weights).sum().backward()
    torch.testing.assert_close(x.grad, x_dense.grad)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    at_blocks = BlockSparseMatrix.from_dense(dense.weight.grad, pattern=layer.pattern).values
    torch.testing.assert_close(layer.values.grad, at_blocks)


STRIDES = {
    "transposed": lambda: torch.randn(48, 7).T,
    "every_second": lambda: torch.randn(7, 96)[:, ::2],
    "expanded": lambda: torch.randn(1, 48).expand(7, 48),
    "expanded_features": lambda: torch.randn(7, 1).expand(7, 48),
    "offset": lambda: torch.randn(7, 50)[:, 1:49],
    "permuted": lambda: torch.randn(3, 48, 7).permute(2, 0, 1),
}


@pytest.mark.parametrize("x", STRIDES.values(), ids=STRIDES.keys())
def test_input_of_any_strides(x):
    layer = BlockSparseLinear(48, 40, block_shape=(16, 16))
    x = x()
    assert_is_product(layer(x), x, layer.weight.to_dense(), layer.bias)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)], ids=str)
def test_no_features(shape):
    layer = BlockSparseLinear(*shape)
    x = torch.randn(3, shape[0], requires_grad=True)
    y = layer(x)
    assert y.shape == (3, shape[1])
    assert torch.equal(y, layer.bias.expand(3, -1))
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_argument(dtype):
    layer = BlockSparseLinear(64, 64, dtype=dtype, device="cpu")
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert {b.dtype for b in layer.buffers()} == {torch.int32}


def test_default_dtype_is_used():
    torch.set_default_dtype(torch.float64)
    try:
        layer = BlockSparseLinear(64, 64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}


def test_device_context_is_used():
    with torch.device("meta"):
        layer = BlockSparseLinear(64, 64)
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}


def test_device_argument_beats_the_context():
    with torch.device("meta"):
        layer = BlockSparseLinear(64, 64, device="cpu")
        assert layer(torch.zeros(3, 64, device="cpu")).device.type == "cpu"
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"cpu"}


# --- density and pattern ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "count"),
    [(1.0, 80), (1, 80), (0.5, 40), (0.3, 24), (0.131, 10), (0.1, 8), (1e-9, 1)],
)
def test_block_count_is_exact(density, count):
    layer = BlockSparseLinear(320, 256, density=density)
    assert layer.block_count == layer.pattern.nnz == layer.values.shape[0] == count
    assert layer.density == count / 80
    assert int(layer.pattern.mask().sum()) == count


def test_random_pattern_follows_the_seed():
    def pattern(seed):
        torch.manual_seed(seed)
        return BlockSparseLinear(320, 320, density=0.3).pattern

    assert pattern(1).equal(pattern(1))
    assert not pattern(1).equal(pattern(2))


def test_given_pattern_is_used_with_its_block_shape():
    pattern = Pattern.banded((64, 96), 1, block_shape=(16, 32))
    layer = BlockSparseLinear(96, 64, density=0.01, pattern=pattern)
    assert layer.pattern.equal(pattern)
    assert layer.block_shape == (16, 32)


def test_layers_made_of_one_pattern_share_no_memory():
    pattern = Pattern.random((64, 64), 0.5, (16, 16))
    a, b = (BlockSparseLinear(64, 64, pattern=pattern) for _ in range(2))
    before = pattern.index.clone()
    other = BlockSparseLinear(64, 64, density=0.5, block_shape=(16, 16))
    assert not other.pattern.equal(pattern)
    a.load_state_dict(other.state_dict())
    assert torch.equal(pattern.index, before)
    assert torch.equal(b._index, before)
    assert b.pattern.equal(Pattern.from_mask(pattern.mask(), (16, 16)))


# --- what it is ---------------------------------------------------------------------------------


def test_weight_is_a_matrix_on_the_layers_memory():
    layer = BlockSparseLinear(70, 40, dtype=torch.bfloat16)
    weight = layer.weight
    assert isinstance(weight, BlockSparseMatrix)
    assert weight._is_hf_initialized is True
    assert weight.dtype == torch.bfloat16
    assert weight.device == torch.device("cpu")
    assert weight.shape == (40, 70)
    assert weight.values is layer.values
    assert weight.pattern.crow_indices is layer.crow_indices
    assert weight.pattern.col_indices is layer.col_indices
    assert weight.pattern.index is layer._index


def test_parameters_are_values_and_bias():
    layer = BlockSparseLinear(64, 64, density=0.5)
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"]
    assert layer.values.shape == (2, 32, 32)
    assert isinstance(layer.values, nn.Parameter) and isinstance(layer.bias, nn.Parameter)


def test_a_quarter_of_the_blocks_takes_a_quarter_of_the_memory():
    layer = BlockSparseLinear(768, 3072, density=0.25)
    stored = sum(t.nbytes for t in (layer.values, *layer.buffers()))
    assert 0.25 <= stored / nn.Linear(768, 3072).weight.nbytes < 0.26


def test_repr_says_what_the_layer_is(capsys):
    layer = BlockSparseLinear(64, 96, bias=False, density=0.4, verbose=True)
    text = (
        "BlockSparseLinear(in_features=64, out_features=96, bias=False, density=0.333, "
        "block_shape=(32, 32), block_count=2)"
    )
    assert repr(layer) == text
    assert capsys.readouterr().out == text + "\n"


def test_is_silent_unless_verbose(capsys):
    BlockSparseLinear(64, 96)
    assert capsys.readouterr() == ("", "")


def test_explain_names_a_kernel():
    text = BlockSparseLinear(64, 96).explain(tokens=8)
    assert text.startswith("forward f32 tokens=8 out=96 in=64 block=32x32")
    assert "chosen" in text
