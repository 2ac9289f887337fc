"""The ops as torch sees them: schema, fakes, derivatives of any order, what differs in operands.

The numbers themselves are test_products.py's.
"""

import gc
import itertools
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from op_helpers import SHAPE, Case, each_block_shape, namespace
from pytorch_block_sparse import Pattern, ops
from zoo import normal, pattern_of, small_integers

# --- opcheck: schema, autograd registration, fakes, AOT dispatch ----------------------------------


@each_block_shape
@pytest.mark.parametrize("tokens", [(), (3,), (2, 0), (2, 3)], ids=str)
def test_opcheck_of_the_products(block_shape, tokens, device):
    case = Case(block_shape, tokens, device=device)
    x, dy, values, bias, index = case.x, case.dy, case.values, case.bias, case.index
    opcheck(namespace.forward.default, (x, values, index, bias, SHAPE[0]))
    opcheck(namespace.forward.default, (x, values.detach(), index, None, SHAPE[0]))
    opcheck(namespace.grad_input.default, (dy, values, index, SHAPE[1]))
    opcheck(namespace.grad_weight.default, (dy, x, index, len(values), *block_shape))


@each_block_shape
@pytest.mark.parametrize("tokens", [(), (3,), (2, 0), (2, 3)], ids=str)
def test_opcheck_of_the_packed_ops(block_shape, tokens):
    case = Case(block_shape, tokens)
    x, values, bias = case.x.detach(), case.values.detach(), case.bias.detach()
    packed = namespace.pack(values)
    opcheck(namespace.pack.default, (values,))
    opcheck(namespace.unpack.default, (packed, *block_shape))
    sizes = (SHAPE[0], *block_shape)
    opcheck(namespace.forward_packed.default, (x, packed, case.index, bias, *sizes))
    opcheck(namespace.forward_packed.default, (x, packed, case.index, None, *sizes))


@each_block_shape
@pytest.mark.parametrize("tokens", [(), (3,), (2, 0), (2, 3)], ids=str)
def test_opcheck_of_the_int8_op(block_shape, tokens, device):
    case = Case(block_shape, tokens, device=device)
    x, bias = case.x.detach(), case.bias.detach()
    values = (16 * case.values.detach()).to(torch.int8)
    scales = torch.rand(SHAPE[0], device=device)
    op = namespace.forward_int8.default
    opcheck(op, (x, values, scales, case.index, bias, SHAPE[0]))
    opcheck(op, (x.float(), values, scales, case.index, None, SHAPE[0]))
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(ValueError, match=r"values: must be torch\.int8"),
    ):
        op(x, values.float(), scales, case.index, bias, SHAPE[0])


def test_opcheck_of_the_index_ops():
    pattern = pattern_of("random", (96, 160), (16, 16))
    bsr = (pattern.crow_indices, pattern.col_indices, pattern.grid[1])
    opcheck(namespace.index_from_bsr.default, bsr)
    opcheck(namespace.with_walks.default, (pattern.index, *pattern.grid, pattern.nnz, 16, 16))
    opcheck(namespace.index_from_mask.default, (pattern.mask(),))
    opcheck(namespace.index_from_mask.default, (torch.zeros(0, 3, dtype=torch.bool),))
    opcheck(namespace.index_from_blocks.default, (torch.tensor([[0, 1], [2, 2]]), 3, 4))
    opcheck(namespace.index_random.default, (6, 10, 20, 1, False))
    opcheck(namespace.index_banded.default, (6, 10, 1))
    # Not explain: it returns text for people, and no tensor that a fake could stand for.


def test_every_op_is_checked_above():
    names = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("block_sparse::")
    }
    checked = {
        "forward",
        "forward_packed",
        "forward_int8",
        "pack",
        "unpack",
        "grad_input",
        "grad_weight",
        "index_from_bsr",
        "with_walks",
        "index_from_mask",
        "index_from_blocks",
        "index_random",
        "index_banded",
    }
    elsewhere = {"zero_blocks_", "block_dots"}  # test_block_lists.py
    assert names == checked | elsewhere | {"explain"}


@pytest.mark.parametrize(
    ("rows", "cols", "bandwidth"), list(itertools.product([0, 1, 5, 9], [0, 4], [0, 2, 99]))
)
def test_the_fake_of_index_banded_has_the_size_of_the_real_one(rows, cols, bandwidth):
    real = namespace.index_banded(rows, cols, bandwidth)
    fake = ops._fakes._index_banded_fake(rows, cols, bandwidth)
    assert fake.shape == real.shape and fake.dtype == real.dtype


# --- derivatives ----------------------------------------------------------------------------------


@each_block_shape
def test_gradcheck_of_linear(block_shape):
    case = Case(block_shape)
    assert gradcheck(case.linear, (case.x, case.values, case.bias))
    assert gradgradcheck(case.linear, (case.x, case.values, case.bias))
    assert gradcheck(lambda x, v: case.linear(x, v, None), (case.x, case.values))


@each_block_shape
def test_gradcheck_of_the_registered_ops(block_shape):
    case = Case(block_shape)
    products = [
        (
            lambda x, v, b: ops.forward(x, v, case.index, b, SHAPE[0]),
            (case.x, case.values, case.bias),
        ),
        (lambda dy, v: ops.grad_input(dy, v, case.index, SHAPE[1]), (case.dy, case.values)),
        (
            lambda dy, x: ops.grad_weight(dy, x, case.index, len(case.values), *block_shape),
            (case.dy, case.x),
        ),
    ]
    for product, operands in products:
        assert gradcheck(product, operands)
        assert gradgradcheck(product, operands)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("registered", [False, True], ids=["eager", "registered"])
def test_gradients_of_what_requires_them_and_of_nothing_else(wanted, registered):
    case = Case(tokens=(2, 3))
    operands = [case.x, case.values, case.bias]
    for tensor, requires_grad in zip(operands, wanted, strict=True):
        tensor.requires_grad_(requires_grad)
    if registered:
        y = ops.forward(case.x, case.values, case.index, case.bias, SHAPE[0])
    else:
        y = case.linear(*operands)
    assert y.requires_grad == any(wanted)
    if not any(wanted):
        return
    y.backward(case.dy.detach())
    got = [tensor.grad for tensor in operands]
    copies = [tensor.detach().clone().requires_grad_() for tensor in operands]
    case.dense(*copies).backward(case.dy.detach())
    for gradient, copy, requires_grad in zip(got, copies, wanted, strict=True):
        assert (gradient is not None) == requires_grad
        if requires_grad:
            torch.testing.assert_close(gradient, copy.grad, rtol=1e-12, atol=1e-12)


def test_expanded_gradients(device):
    """sum() sends a gradient of stride 0."""
    case = Case(device=device)
    case.linear(case.x, case.values, case.bias).sum().backward()
    copy = Case(device=device)
    copy.dense(copy.x, copy.values, copy.bias).sum().backward()
    torch.testing.assert_close(case.x.grad, copy.x.grad)
    torch.testing.assert_close(case.values.grad, copy.values.grad)
    torch.testing.assert_close(case.bias.grad, torch.full_like(case.bias, 3))


def test_second_derivatives_through_the_eager_path():
    results = []
    for function in ("linear", "dense"):
        case = Case()
        y = getattr(case, function)(case.x, case.values, case.bias)
        first = torch.autograd.grad(y.pow(2).sum(), (case.x, case.values), create_graph=True)
        penalty = sum(gradient.pow(2).sum() for gradient in first)
        results.append(torch.autograd.grad(penalty, (case.x, case.values, case.bias)))
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense)


def test_a_pattern_changed_between_forward_and_backward_is_an_error():
    case = Case()
    y = case.linear(case.x, case.values, case.bias)
    case.index.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("operand", ["x", "values"])
def test_an_operand_changed_between_forward_and_backward_is_an_error(operand):
    case = Case()
    y = case.linear(case.x, case.values, case.bias)
    with torch.no_grad():
        getattr(case, operand).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("registered", [False, True], ids=["eager", "registered"])
def test_frozen_values_do_not_keep_the_input_alive(registered):
    case = Case()
    linear = (
        case.linear
        if not registered
        else (lambda x, v, b: ops.forward(x, v, case.index, b, SHAPE[0]))
    )

    def input_survives(values):
        before = case.x * 2
        y = linear(before, values, None)
        alive = weakref.ref(before)
        del before
        gc.collect()
        assert y.requires_grad
        return alive() is not None

    assert input_survives(case.values)  # the gradient of the values needs it
    assert not input_survives(case.values.detach())


# --- what differs between tensors -----------------------------------------------------------------


def test_mixed_dtypes_without_autocast_are_an_error():
    case = Case()
    with pytest.raises(ValueError, match="input: dtype is f32, but values has f64"):
        case.linear(case.x.float(), case.values, case.bias)


def test_views_that_are_not_resolved_yet():
    """A negated view holds other numbers than its memory."""
    case = Case()
    x = torch.randn(3, SHAPE[1], dtype=torch.complex128).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(
        case.linear(x, case.values, None), case.linear(x.resolve_neg(), case.values, None)
    )


def test_inference_mode_and_no_grad_give_the_same():
    case = Case()
    y = case.linear(case.x, case.values, case.bias)
    with torch.no_grad():
        assert torch.equal(case.linear(case.x, case.values, case.bias), y)
    with torch.inference_mode():
        inferred = case.linear(case.x, case.values, case.bias)
        assert torch.equal(inferred, y) and inferred.is_inference()


def test_the_same_call_gives_the_same_bits_again():
    pattern = pattern_of("skewed", (160, 160), (32, 32))
    values = normal(pattern.nnz, 32, 32)
    x, dy = normal(67, 160, seed=1), normal(67, 160, seed=2)

    def products():
        return (
            ops.forward(x, values, pattern.index, None, 160),
            ops.grad_input(dy, values, pattern.index, 160),
            ops.grad_weight(dy, x, pattern.index, pattern.nnz, 32, 32),
        )

    first = products()
    for _ in range(5):
        assert all(map(torch.equal, first, products()))


def test_operands_are_left_as_they_were():
    case = Case()
    before = [t.detach().clone() for t in (case.x, case.values, case.bias, case.index)]
    case.linear(case.x, case.values, case.bias).sum().backward()
    after = [t.detach() for t in (case.x, case.values, case.bias, case.index)]
    assert all(map(torch.equal, before, after))


def test_grad_weight_is_zero_outside_a_ragged_matrix():
    pattern = Pattern.full((11, 13), (4, 4))
    dw = ops.grad_weight(
        small_integers(5, 11), small_integers(5, 13) + 100, pattern.index, pattern.nnz, 4, 4
    )
    assert dw[pattern.row_indices == 2, 3:].eq(0).all()
    assert dw[pattern.col_indices == 3, :, 1:].eq(0).all()
    assert dw.ne(0).any()
