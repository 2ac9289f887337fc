"""The three products against dense ones: exact on small integers, then within float64's bound.

Every kernel of the list that dispatches runs over the zoo of patterns. A kernel that refuses a case
says so in ``explain``, and the case is not made for it; the reference refuses nothing.
"""

import pytest
import torch

from pytorch_block_sparse import Pattern, ops
from pytorch_block_sparse.testing import (
    assert_close_to_float64,
    dense_forward,
    dense_grad_input,
    dense_grad_weight,
    kernel_names,
)
from zoo import BLOCK_SHAPES, DTYPES, block_id, dtype_id, normal, pattern_of, small_integers, zoo

# Around the edges of register tiles and of the split between threads.
TOKENS = [1, 2, 5, 12, 13, 31, 33, 64, 67]

CPU_KERNELS = kernel_names("cpu")
CUDA_KERNELS = kernel_names("cuda") if torch.cuda.is_available() else ["cuda_reference"]
KERNELS = [pytest.param("cpu", name, id=name) for name in CPU_KERNELS] + [
    pytest.param("cuda", name, id=name, marks=pytest.mark.cuda) for name in CUDA_KERNELS
]

each_kernel = pytest.mark.parametrize(("device", "kernel"), KERNELS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
each_block_shape = pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=block_id)


def accepts(kernel, product, tokens, values, pattern, bias=False):
    """Whether `kernel`, which is forced, takes the product; a refusal must give its reason."""
    text = torch.ops.block_sparse.explain(values, product, tokens, *pattern.shape, bias)
    line = text.splitlines()[1].strip()
    assert line.startswith(f"{kernel}: ")
    if "chosen" in line:
        return True
    assert line.startswith(f"{kernel}: refuses: ") and len(line) > len(f"{kernel}: refuses: ")
    assert "reference" not in kernel
    return False


class Products:
    """The three products of one case: by the forced kernel, and densely in any dtype."""

    def __init__(self, data, kernel, dtype, pattern, tokens, device):
        self.kernel, self.pattern, self.tokens = kernel, pattern, tokens
        out_features, in_features = pattern.shape
        make = {"dtype": dtype, "device": device}
        self.x = data(tokens, in_features, seed=1, **make)
        self.dy = data(tokens, out_features, seed=2, **make)
        self.bias = data(out_features, seed=3, **make)
        # Outside the matrix too: what lies there must not be read into a result.
        self.values = data(pattern.nnz, *pattern.block_shape, seed=4, **make)

    def runs(self):
        """(name, what the kernel gives, the same densely in a given dtype)."""
        x, dy, values, pattern, index = (
            self.x,
            self.dy,
            self.values,
            self.pattern,
            self.pattern.index,
        )
        out_features, in_features = pattern.shape
        for bias in (None, self.bias):
            if accepts(self.kernel, "forward", self.tokens, values, pattern, bias is not None):
                yield (
                    "forward" if bias is None else "forward with bias",
                    ops.forward(x, values, index, bias, out_features),
                    lambda to, bias=bias: dense_forward(
                        to(x), to(values), pattern, None if bias is None else to(bias)
                    ),
                )
        if accepts(self.kernel, "grad_input", self.tokens, values, pattern):
            yield (
                "grad_input",
                ops.grad_input(dy, values, index, in_features),
                lambda to: dense_grad_input(to(dy), to(values), pattern),
            )
        if accepts(self.kernel, "grad_weight", self.tokens, values, pattern):
            yield (
                "grad_weight",
                ops.grad_weight(dy, x, index, pattern.nnz, *pattern.block_shape),
                lambda to: dense_grad_weight(to(dy), to(x), pattern),
            )


@each_kernel
@each_dtype
@each_block_shape
def test_exact_on_small_integers(device, kernel, dtype, block_shape, force_kernel):
    force_kernel(kernel)
    for case, (name, pattern) in enumerate(zoo(block_shape, device)):
        tokens = TOKENS[case % len(TOKENS)]
        products = Products(small_integers, kernel, dtype, pattern, tokens, device)
        for product, out, dense in products.runs():
            wanted = dense(torch.Tensor.double).to(dtype)
            assert torch.equal(out, wanted), f"{product} of {name} with {tokens} tokens"


@each_kernel
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_exact_at_every_number_of_tokens(device, kernel, tokens, dtype, force_kernel):
    force_kernel(kernel)
    for block_shape in BLOCK_SHAPES:
        pattern = pattern_of("random", (130, 90), block_shape, device)
        products = Products(small_integers, kernel, dtype, pattern, tokens, device)
        for product, out, dense in products.runs():
            wanted = dense(torch.Tensor.double).to(dtype)
            assert torch.equal(out, wanted), f"{product} of {block_shape}"


@each_kernel
@each_dtype
@each_block_shape
def test_normal_data_as_close_to_float64_as_torch(device, kernel, dtype, block_shape, force_kernel):
    force_kernel(kernel)
    for kind in ("random", "skewed", "full"):
        pattern = pattern_of(kind, (130, 90), block_shape, device)
        for product, out, dense in Products(normal, kernel, dtype, pattern, 37, device).runs():
            try:
                assert_close_to_float64(out, dense(torch.Tensor.double), dense(lambda t: t))
            except AssertionError as error:
                raise AssertionError(f"{product} of {kind}: {error}") from None


# --- every way that a tensor may lie in memory ----------------------------------------------------


def _strided(tensor):
    """The same numbers, every second element of a larger tensor in each direction."""
    wide = tensor.new_full([2 * size for size in tensor.shape], torch.nan)
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def _wide_rows(tensor):
    """Adjacent within a row, rows further apart: read without a copy."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan)
    return wide[..., : tensor.shape[-1]].copy_(tensor)


def _offset(tensor):
    """Starts in the middle of an allocation, where no vector load is aligned."""
    flat = tensor.new_full((tensor.numel() + 1,), torch.nan)
    return flat[1:].view(tensor.shape).copy_(tensor)


def _reversed_dims(tensor):
    """The last dimension is the one furthest apart."""
    order = list(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


LAYOUTS = {
    "contiguous": lambda t: t,
    "strided": _strided,
    "wide_rows": _wide_rows,
    "offset": _offset,
    "transposed": _reversed_dims,
    "expanded_rows": lambda t: t[:1].expand(t.shape) if t.dim() > 1 else t,
    "expanded": lambda t: t.flatten()[:1].view([1] * t.dim()).expand(t.shape) if t.numel() else t,
}


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(
    "leading", [(), (1,), (6,), (0,), (2, 3), (2, 0, 3), (2, 1, 2, 3)], ids=str
)
def test_any_strides_and_leading_dimensions(device, kernel, dtype, layout, leading, force_kernel):
    force_kernel(kernel)
    pattern = pattern_of("random", (90, 75), (16, 16), device)
    out_features, in_features = pattern.shape
    make = {"dtype": dtype, "device": device}
    lay = LAYOUTS[layout]
    x = (
        lay(small_integers(*leading, in_features, seed=1, **make))
        if leading != ()
        else lay(small_integers(in_features, seed=1, **make))
    )
    dy = lay(small_integers(*leading, out_features, seed=2, **make))
    values = lay(small_integers(pattern.nnz, 16, 16, seed=4, **make))
    bias = lay(small_integers(out_features, seed=3, **make))
    tokens = torch.Size(leading).numel()

    if accepts(kernel, "forward", tokens, values, pattern, True):
        y = ops.forward(x, values, pattern.index, bias, out_features)
        wanted = dense_forward(x.double(), values.double(), pattern, bias.double()).to(dtype)
        assert y.shape == (*leading, out_features) and torch.equal(y, wanted)
    if accepts(kernel, "grad_input", tokens, values, pattern):
        dx = ops.grad_input(dy, values, pattern.index, in_features)
        wanted = dense_grad_input(dy.double(), values.double(), pattern).to(dtype)
        assert dx.shape == (*leading, in_features) and torch.equal(dx, wanted)
    if accepts(kernel, "grad_weight", tokens, values, pattern):
        dw = ops.grad_weight(dy, x, pattern.index, pattern.nnz, 16, 16)
        wanted = dense_grad_weight(dy.double(), x.double(), pattern).to(dtype)
        assert torch.equal(dw, wanted)


@each_kernel
@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0)], ids=str)
def test_no_features(device, kernel, shape, force_kernel):
    force_kernel(kernel)
    pattern = Pattern.full(shape, (32, 32), device=device)
    values = torch.empty(0, 32, 32, device=device)
    bias = torch.arange(shape[0], dtype=torch.float32, device=device)
    x, dy = torch.ones(3, shape[1], device=device), torch.ones(3, shape[0], device=device)
    if accepts(kernel, "forward", 3, values, pattern, True):
        y = ops.forward(x, values, pattern.index, bias, shape[0])
        assert torch.equal(y, bias.expand(3, -1))
    if accepts(kernel, "grad_input", 3, values, pattern):
        assert torch.equal(ops.grad_input(dy, values, pattern.index, shape[1]), torch.zeros_like(x))
    if accepts(kernel, "grad_weight", 3, values, pattern):
        assert ops.grad_weight(dy, x, pattern.index, 0, 32, 32).shape == (0, 32, 32)


@each_kernel
def test_numbers_that_are_not_finite_stay_where_they_belong(device, kernel, force_kernel):
    """NaN outside the matrix or in another block row must not reach a result."""
    force_kernel(kernel)
    pattern = pattern_of("banded", (90, 75), (16, 16), device)
    values = small_integers(pattern.nnz, 16, 16, seed=4, device=device)
    values[pattern.row_indices == 5, 10:] = torch.nan  # rows 90 to 95
    values[pattern.col_indices == 4, :, 11:] = torch.nan  # columns 75 to 79
    x = small_integers(13, 75, seed=1, device=device)
    dy = small_integers(13, 90, seed=2, device=device)
    clean = values.nan_to_num()
    if accepts(kernel, "forward", 13, values, pattern):
        y = ops.forward(x, values, pattern.index, None, 90)
        assert torch.equal(y, dense_forward(x, clean, pattern, None))
    if accepts(kernel, "grad_input", 13, values, pattern):
        dx = ops.grad_input(dy, values, pattern.index, 75)
        assert torch.equal(dx, dense_grad_input(dy, clean, pattern))

    x[3] = torch.inf  # one token
    if accepts(kernel, "forward", 13, values, pattern):
        y = ops.forward(x, clean, pattern.index, None, 90)
        others = [token for token in range(13) if token != 3]
        assert y[others].isfinite().all() and not y[3].isfinite().all()


# --- the kernels that exist -----------------------------------------------------------------------


def test_the_reference_is_last_and_accepts_everything():
    assert CPU_KERNELS[-1] == "cpu_reference"
    assert len(set(CPU_KERNELS)) == len(CPU_KERNELS)


def test_an_unknown_forced_kernel_is_an_error_that_names_those_that_exist(force_kernel):
    force_kernel("cpu_no_such_kernel")
    pattern = pattern_of("full", (96, 96), (32, 32))
    values = torch.ones(9, 32, 32)
    with pytest.raises(ValueError, match=r"cpu_no_such_kernel.*cpu_reference"):
        ops.forward(torch.ones(1, 96), values, pattern.index, None, 96)


# --- the tests, tested ----------------------------------------------------------------------------


def _without_a_block(products):
    values = products.values.clone()
    values[3] = 0
    return ops.forward(products.x, values, products.pattern.index, None, products.pattern.shape[0])


CORRUPTIONS = {
    "one_element": lambda out, _: out.index_put(
        (torch.tensor(17), torch.tensor(33)), out[17, 33] + 1
    ),
    "one_token": lambda out, _: out.index_copy(0, torch.tensor([40]), out[41:42]),
    "one_block_of_the_weight": lambda _, products: _without_a_block(products),
    "one_block_of_the_result": lambda out, _: out.slice_scatter(0 * out[:, 32:64], 1, 32, 64),
    "one_nan": lambda out, _: out.index_put(
        (torch.tensor(5), torch.tensor(5)), torch.tensor(torch.nan, dtype=out.dtype)
    ),
    "shifted": lambda out, _: out.roll(1, dims=1),
}


@pytest.mark.parametrize("what", list(CORRUPTIONS))
@each_dtype
def test_a_corrupt_result_fails_the_assertion(what, dtype):
    pattern = pattern_of("full", (160, 160), (32, 32))
    products = Products(normal, "any", dtype, pattern, 67, "cpu")
    truth = dense_forward(products.x.double(), products.values.double(), pattern, None)
    torch_out = dense_forward(products.x, products.values, pattern, None)
    out = ops.forward(products.x, products.values, pattern.index, None, 160)
    assert_close_to_float64(out, truth, torch_out)
    with pytest.raises(AssertionError, match="elements are wrong"):
        assert_close_to_float64(CORRUPTIONS[what](out, products), truth, torch_out)


def test_a_result_of_another_shape_or_dtype_fails_the_assertion():
    ones = torch.ones(2, 3)
    with pytest.raises(AssertionError, match=r"\[3, 2\]"):
        assert_close_to_float64(ones.t(), ones.double(), ones)
    with pytest.raises(AssertionError, match="bfloat16"):
        assert_close_to_float64(ones.bfloat16(), ones.double(), ones)
