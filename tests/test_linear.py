"""BlockSparseLinear as a layer: what it takes, computes, draws and refuses; torch's tools on it.

Each result is compared with float64 arithmetic on the dense weight, within the error that the
accumulation may make. Checkpoints and moves are in test_persistence.py.
"""

import copy
import inspect
import math
import re
from functools import partial

import numpy
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pytorch_block_sparse import BlockSparseLinear, BlockSparseMatrix, Pattern


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These products are too small for threads: waking them is most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
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


# --- how it is drawn ----------------------------------------------------------------------------


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


# --- from and to a dense layer ------------------------------------------------------------------


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


# --- what it refuses ----------------------------------------------------------------------------


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


# --- training, and torch's tools ----------------------------------------------------------------


def test_learns_a_block_sparse_map():
    torch.manual_seed(0)
    pattern = Pattern.random((48, 64), 0.4, (16, 16))
    teacher = BlockSparseLinear(64, 48, pattern=pattern)
    student = BlockSparseLinear(64, 48, pattern=pattern)
    x = torch.randn(256, 64)
    target = teacher(x).detach()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(student(x), target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-5
    torch.testing.assert_close(student.values, teacher.values, atol=0.02, rtol=0)


def encoder_with_sparse_layers(batch_first=True):
    """A TransformerEncoderLayer, and the same one with block-sparse linear layers."""
    dense = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=batch_first)
    sparse = copy.deepcopy(dense)
    sparse.linear1 = BlockSparseLinear.from_dense(dense.linear1, 1.0)
    sparse.linear2 = BlockSparseLinear.from_dense(dense.linear2, 1.0)
    return dense, sparse


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_transformer_encoder_layer(train, grad):
    # In evaluation without gradients nn.TransformerEncoderLayer reads linear1.weight itself.
    dense, sparse = encoder_with_sparse_layers()
    x = torch.randn(2, 5, 64)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(sparse.train(train)(x), dense.train(train)(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_transformer_encoder_with_padding(train, grad):
    dense, sparse = (nn.TransformerEncoder(one, 2) for one in encoder_with_sparse_layers())
    x = torch.randn(2, 5, 64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(grad):
        y, wanted = (
            one.train(train)(x, src_key_padding_mask=padding)[~padding] for one in (sparse, dense)
        )
    torch.testing.assert_close(y, wanted)


def test_gradients_reach_values_in_a_transformer_encoder_layer():
    _, sparse = encoder_with_sparse_layers()
    sparse(torch.randn(2, 5, 64)).square().sum().backward()
    assert sparse.linear1.values.grad.any() and sparse.linear2.values.grad.any()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_multihead_attention_beside_sparse_layers(train):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
            self.project = BlockSparseLinear(64, 64, density=0.5)

        def forward(self, x):
            x = self.project(x)
            return self.attention(x, x, x, need_weights=False)[0]

    block = Block().train(train)
    y = block(torch.randn(2, 5, 64))
    y.square().sum().backward()
    assert y.shape == (2, 5, 64) and block.project.values.grad.any()


def mlp(dtype=torch.float32):
    return nn.Sequential(
        BlockSparseLinear(48, 64, density=0.5, block_shape=(16, 16), dtype=dtype),
        nn.GELU(),
        BlockSparseLinear(64, 40, density=0.5, block_shape=(16, 16), dtype=dtype),
    )


def test_functional_call_uses_what_it_is_given():
    a, b = mlp(), mlp()
    x = torch.randn(5, 48)
    state = dict(b.named_parameters()) | dict(b.named_buffers())
    before = a(x)
    assert torch.equal(torch.func.functional_call(a, state, (x,)), b(x))
    assert torch.equal(a(x), before)

    zeros = {"2.values": torch.zeros_like(a[2].values), "2.bias": torch.ones(40)}
    assert torch.equal(torch.func.functional_call(a, zeros, (x,)), torch.ones(5, 40))


def test_activation_checkpointing_gives_the_same_gradients():
    model, x = mlp(torch.float64), torch.randn(5, 48, dtype=torch.float64)

    def gradients(run):
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        run(inputs).square().sum().backward()
        return [inputs.grad, *(p.grad for p in model.parameters())]

    plain = gradients(model)
    for reentrant in (True, False):
        again = gradients(partial(checkpoint, model, use_reentrant=reentrant))
        assert all(map(torch.equal, plain, again))


def test_compiles_to_one_graph_and_follows_the_pattern():
    torch.compiler.reset()
    model = mlp()
    compiled = torch.compile(model, fullgraph=True)
    for tokens in (5, 9):
        x = torch.randn(tokens, 48)
        torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for compiled_one, eager in zip(gradients, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(compiled_one, eager)

    model.load_state_dict(mlp().state_dict())  # another pattern, the same number of blocks
    torch.testing.assert_close(compiled(x), model(x))
