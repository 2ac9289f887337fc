"""The ops under torch.func, forward-mode derivatives and autocast."""

import pytest
import torch

from op_helpers import SHAPE, Case
from pytorch_block_sparse import ops
from pytorch_block_sparse.testing import dense_forward

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
