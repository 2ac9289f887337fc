"""What torch wants of an op: autograd of any order, compile, export, torch.func, autocast.

The numbers themselves are test_products.py's.
"""

import gc
import itertools
import weakref

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from pytorch_block_sparse import BlockSparseLinear, Pattern, ops
from pytorch_block_sparse.testing import dense_forward
from zoo import block_id, normal, pattern_of, small_integers

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


# --- opcheck: schema, autograd registration, fakes, AOT dispatch ----------------------------------


@each_block_shape
@pytest.mark.parametrize("tokens", [(), (3,), (2, 0), (2, 3)], ids=str)
def test_opcheck_of_the_products(block_shape, tokens, device):
    case = Case(block_shape, tokens, device=device)
    x, dy, values, bias, index = case.x, case.dy, case.values, case.bias, case.index
    opcheck(namespace.forward.default, (x, values, index, bias, SHAPE[0]))
    opcheck(namespace.forward.default, (x, values.detach(), index, None, SHAPE[0]))
    opcheck(namespace.grad_input.default, (dy, values, index, SHAPE[1]))
    opcheck(namespace.grad_weight.default, (dy, x, index, *block_shape))


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


def test_opcheck_of_the_index_ops():
    pattern = pattern_of("random", (96, 160), (16, 16))
    bsr = (pattern.crow_indices, pattern.col_indices, pattern.grid[1])
    opcheck(namespace.index_from_bsr.default, bsr)
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
        "pack",
        "unpack",
        "grad_input",
        "grad_weight",
        "index_from_bsr",
        "index_from_mask",
        "index_from_blocks",
        "index_random",
        "index_banded",
    }
    assert names == checked | {"explain"}


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
        (lambda dy, x: ops.grad_weight(dy, x, case.index, *block_shape), (case.dy, case.x)),
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


# --- torch.func -----------------------------------------------------------------------------------


def _func_transforms():
    func = torch.func
    return {
        "grad": lambda f: func.grad(lambda *a: f(*a).pow(2).sum(), argnums=(0, 1, 2)),
        "jacrev": lambda f: func.jacrev(lambda *a: f(*a).sum(0), argnums=(0, 1, 2)),
        "jacfwd": lambda f: func.jacfwd(lambda *a: f(*a).sum(0), argnums=(0, 1, 2)),
        "hessian": lambda f: func.hessian(lambda *a: f(*a).pow(2).sum(), argnums=(0, 1)),
        "reverse_twice": lambda f: func.jacrev(func.grad(lambda *a: f(*a).pow(2).sum(), argnums=1)),
        "jvp": lambda f: lambda *a: func.jvp(f, a, tuple(t.cos() for t in a)),
        "vjp": lambda f: lambda *a: func.vjp(f, *a)[1](f(*a).cos()),
        "per_sample": lambda f: func.vmap(
            func.grad(lambda v, x, b: f(x, v, b).pow(2).sum()), in_dims=(None, 0, None)
        ),
        "vmap_input": lambda f: func.vmap(f, in_dims=(0, None, None)),
        "vmap_input_inside": lambda f: func.vmap(f, in_dims=(1, None, None)),
        "vmap_values": lambda f: (
            lambda x, v, b: func.vmap(f, in_dims=(None, 0, None))(x, torch.stack([v, v.cos()]), b)
        ),
        "vmap_both": lambda f: (
            lambda x, v, b: func.vmap(f, in_dims=(0, 3, None))(
                x, torch.stack([v, v.cos(), v.sin()], dim=3), b
            )
        ),
    }


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("name", list(_func_transforms()))
def test_torch_func(name):
    case = Case(tokens=(3, 2)) if name == "vmap_input_inside" else Case()
    operands = (case.x.detach(), case.values.detach(), case.bias.detach())
    if name == "per_sample":
        operands = (operands[1], operands[0], operands[2])
    if name == "vmap_input_inside":
        operands = (torch.randn(13, 4, 13, dtype=torch.float64), *operands[1:])
    transform = _func_transforms()[name]
    ours, dense = transform(case.linear)(*operands), transform(case.dense)(*operands)
    torch.testing.assert_close(ours, dense)
    leaves = torch.utils._pytree.tree_leaves(dense)
    assert all(leaf.count_nonzero() > 0 for leaf in leaves)


def test_torch_func_of_a_product_from_the_left():
    case = Case()
    dense = case.pattern
    ours = torch.func.jacrev(lambda dy, v: ops.left_linear(dy, v, case.index, 13), argnums=(0, 1))
    wanted = torch.func.jacrev(
        lambda dy, v: dy @ dense_forward(torch.eye(13, dtype=dy.dtype), v, dense, None).t(),
        argnums=(0, 1),
    )
    operands = (case.dy.detach(), case.values.detach())
    torch.testing.assert_close(ours(*operands), wanted(*operands))


def test_forward_mode_derivatives():
    case = Case()
    tangent = torch.ones_like(case.x)
    for grad_mode in (torch.enable_grad, torch.no_grad):
        with grad_mode(), torch.autograd.forward_ad.dual_level():
            x = torch.autograd.forward_ad.make_dual(case.x, tangent)
            y = case.linear(x, case.values, case.bias)
            got = torch.autograd.forward_ad.unpack_dual(y).tangent
        torch.testing.assert_close(got, case.dense(tangent, case.values, None))


def test_torch_func_under_autocast():
    case = Case(dtype=torch.float32)
    operands = (case.x.detach(), case.values.detach(), case.bias.detach())
    with torch.autocast("cpu", torch.bfloat16):
        gradient = torch.func.grad(lambda x, v, b: case.linear(x, v, b).float().sum(), argnums=1)(
            *operands
        )
    assert gradient.dtype == torch.float32
    exact = torch.func.grad(lambda x, v, b: case.linear(x, v, b).sum(), argnums=1)(*operands)
    torch.testing.assert_close(gradient, exact, rtol=0.05, atol=0.05)


# --- torch.compile and torch.export ---------------------------------------------------------------


def _train(function, *operands):
    operands = [tensor.detach().clone().requires_grad_() for tensor in operands]
    y = function(*operands)
    y.pow(2).sum().backward()
    return [y.detach(), *(tensor.grad for tensor in operands)]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Frames:
    """A backend that counts what it is given to compile."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_is_one_frame_for_all_token_counts():
    case, frames = Case(dtype=torch.float32), Frames()
    compiled = torch.compile(case.linear, fullgraph=True, dynamic=True, backend=frames)
    for tokens in (5, 3, 7, 16, 64):  # not 2, the number of blocks: torch would tie the two
        x = normal(tokens, SHAPE[1], seed=tokens)
        ours = _train(compiled, x, case.values, case.bias)
        for got, wanted in zip(ours, _train(case.dense, x, case.values, case.bias), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert frames.count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_automatic_shapes_recompiles_once():
    case, frames = Case(dtype=torch.float32), Frames()
    compiled = torch.compile(case.linear, fullgraph=True, backend=frames)
    for tokens in (3, 7, 16, 64, 65):
        _train(compiled, normal(tokens, SHAPE[1]), case.values, case.bias)
    assert frames.count == 2  # the first size, then any


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_a_layer_by_inductor():
    layer = BlockSparseLinear(13, 11, density=0.5, block_shape=(4, 4))
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(5, 13)
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.no_grad():
        layer.values.mul_(2)  # a step of an optimizer must be seen
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_under_autocast():
    case, frames = Case(dtype=torch.float32), Frames()
    compiled = torch.compile(case.linear, fullgraph=True, backend=frames)
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(case.x, case.values, case.bias)
        eager = case.linear(case.x, case.values, case.bias)
    assert y.dtype == torch.bfloat16 and torch.equal(y, eager)
    y.sum().backward()
    assert case.values.grad.dtype == torch.float32


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_making_a_pattern():
    def nnz_and_index(mask):
        index = namespace.index_from_mask(mask)
        return index * 1

    mask = pattern_of("random", (96, 160), (16, 16)).mask()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(nnz_and_index, fullgraph=True, backend=Frames())
        assert torch.equal(compiled(mask), namespace.index_from_mask(mask))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    layer = BlockSparseLinear(13, 11, density=0.5, block_shape=(4, 4))
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(
        layer, (torch.randn(5, 13),), dynamic_shapes=({0: tokens},), strict=strict
    )
    targets = [node.target for node in program.graph.nodes]
    assert namespace.forward.default in targets
    for count in (2, 5, 33):
        x = torch.randn(count, 13)
        torch.testing.assert_close(program.module()(x), layer(x))


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(dtype, device):
    case = Case(dtype=torch.float32, device=device)
    with torch.autocast(device.type, dtype):
        y = case.linear(case.x, case.values, case.bias)
        with torch.autocast(device.type, enabled=False):
            inner = case.linear(case.x, case.values, case.bias)
    assert y.dtype == dtype and inner.dtype == torch.float32
    assert torch.equal(
        y,
        ops.forward(
            case.x.to(dtype), case.values.to(dtype), case.index, case.bias.to(dtype), SHAPE[0]
        ),
    )
    y.sum().backward()
    for tensor in (case.x, case.values, case.bias):
        assert tensor.grad.dtype == torch.float32


def test_autocast_joins_mixed_dtypes():
    case = Case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = case.linear(case.x.bfloat16(), case.values, case.bias)
        dx = ops.left_linear(case.dy.bfloat16(), case.values, case.index, SHAPE[1])
    assert y.dtype == dx.dtype == torch.bfloat16


def test_autocast_leaves_float64_alone():
    case = Case(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = case.linear(case.x, case.values, case.bias)
    assert y.dtype == torch.float64
    assert torch.equal(y, case.linear(case.x, case.values, case.bias))


def test_the_backward_inside_autocast_gives_gradients_in_the_dtype_of_the_parameters():
    case, outside = Case(dtype=torch.float32), Case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        case.linear(case.x, case.values, case.bias).float().pow(2).sum().backward()
        y = outside.linear(outside.x, outside.values, outside.bias)
    y.float().pow(2).sum().backward()
    assert case.values.grad.dtype == torch.float32
    assert torch.equal(case.values.grad, outside.values.grad)


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
            ops.grad_weight(dy, x, pattern.index, 32, 32),
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
    dw = ops.grad_weight(small_integers(5, 11), small_integers(5, 13) + 100, pattern.index, 4, 4)
    assert dw[pattern.row_indices == 2, 3:].eq(0).all()
    assert dw[pattern.col_indices == 3, :, 1:].eq(0).all()
    assert dw.ne(0).any()
