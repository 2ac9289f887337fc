"""The three products as differentiable functions of tensors.

The ops live under ``torch.ops.block_sparse`` (schemas and kernels in C++); this file adds what
torch wants from Python: fakes, autograd and autocast. Each gradient is made of the same three ops,
so that derivatives of any order work. It knows tensors only; patterns and modules are built on top.

===========  ===================================  =======================  =======================
op           computes                             gradient of 1st operand  gradient of 2nd operand
===========  ===================================  =======================  =======================
forward      y = x Wt + bias                      grad_input(dy, W)        grad_weight(dy, x)
grad_input   dx = dy W                            forward(g, W)            grad_weight(dy, g)
grad_weight  dW = dyt x at the present blocks     forward(x, G)            grad_input(dy, G)
===========  ===================================  =======================  =======================
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _library  # noqa: F401  (defines torch.ops.block_sparse)

forward = torch.ops.block_sparse.forward.default
grad_input = torch.ops.block_sparse.grad_input.default
grad_weight = torch.ops.block_sparse.grad_weight.default


def linear(
    input: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Block-sparse ``torch.nn.functional.linear``: ``y = x Wt + bias``.

    Args:
        input: ``[..., in_features]``, any strides.
        values: ``[nnz, block_out, block_in]``, the blocks in BSR order; dtype, device as `input`.
        index: packed int32 index of the pattern (``Pattern.index``).
        bias: ``[out_features]`` or None.
        out_features: rows of the weight; the number of columns is ``input.shape[-1]``.

    Returns:
        ``[..., out_features]``, in the dtype of `input` (under autocast: in autocast's dtype).

    Raises:
        ValueError: a shape, dtype, device or index that does not fit, with what was wanted.

    Example:
        >>> import torch
        >>> from pytorch_block_sparse import Pattern, ops
        >>> pattern = Pattern.full((64, 32))
        >>> x, values = torch.randn(8, 32), torch.randn(2, 32, 32)
        >>> y = ops.linear(x, values, pattern.index, None, 64)
        >>> torch.allclose(y, x @ values.reshape(64, 32).T, atol=1e-4)
        True
    """
    if torch.compiler.is_compiling():
        return forward(input, values, index, bias, out_features)
    if _is_transformed():
        operands = _autocast_operands(input.device.type, input, values, bias)
        return _transformable_linear(operands, index, out_features)
    if not torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
        return forward(input, values, index, bias, out_features)
    return _EagerLinear.apply(input, values, index, bias, out_features)


def left_linear(input: Tensor, values: Tensor, index: Tensor, in_features: int) -> Tensor:
    """``input @ W``: the product ``grad_input`` as a function in its own right.

    Args:
        input: ``[..., out_features]``, any strides.
        values, index: as in :func:`linear`.
        in_features: columns of the weight; the number of rows is ``input.shape[-1]``.

    Returns:
        ``[..., in_features]``.
    """
    if not torch.compiler.is_compiling() and _is_transformed():
        operands = _autocast_operands(input.device.type, input, values)
        return _GradInput.apply(*operands, index, in_features)
    return grad_input(input, values, index, in_features)


def _save(ctx: Any, input: Tensor, values: Tensor, index: Tensor) -> None:
    # Only what the backward needs: a frozen weight does not keep its input alive.
    needs_input, needs_values = ctx.needs_input_grad[:2]
    ctx.save_for_backward(input if needs_values else None, values if needs_input else None, index)
    ctx.in_features = input.shape[-1]
    ctx.block_shape = values.shape[1:]


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients_from(ctx, ctx.saved_tensors, grad_output)


def _gradients_from(
    ctx: Any, saved: tuple[Tensor, ...], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    input, values, index = saved
    needs_input, needs_values, _, needs_bias, _ = ctx.needs_input_grad
    return (
        grad_input(grad_output, values, index, ctx.in_features) if needs_input else None,
        grad_weight(grad_output, input, index, *ctx.block_shape) if needs_values else None,
        None,
        grad_output.sum_to_size(grad_output.shape[-1:]) if needs_bias else None,
        None,
    )


class _EagerLinear(torch.autograd.Function):
    """``forward`` with its registered autograd, at about two thirds of the host time."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        values: Tensor,
        index: Tensor,
        bias: Tensor | None,
        out_features: int,
    ) -> Tensor:
        _save(ctx, input, values, index)
        with torch._C._AutoDispatchBelowAutograd():
            return forward(input, values, index, bias, out_features)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the gradients are differentiated again
            return _gradients(ctx, grad_output)
        saved = ctx.saved_tensors  # activation checkpointing recomputes here: not under the guard
        with torch._C._AutoDispatchBelowAutograd():
            return _gradients_from(ctx, saved, grad_output)


# --- autograd of the registered ops ---------------------------------------------------------------


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, values, index, _, _ = inputs
    _save(ctx, input, values, index)


def _grad_input_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, values, index, _ = inputs
    needs_grad_output, needs_values = ctx.needs_input_grad[:2]
    ctx.save_for_backward(
        grad_output if needs_values else None, values if needs_grad_output else None, index
    )
    ctx.out_features = grad_output.shape[-1]
    ctx.block_shape = values.shape[1:]


def _grad_input_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, values, index = ctx.saved_tensors
    needs_grad_output, needs_values = ctx.needs_input_grad[:2]
    return (
        forward(grad, values, index, None, ctx.out_features) if needs_grad_output else None,
        grad_weight(grad_output, grad, index, *ctx.block_shape) if needs_values else None,
        None,
        None,
    )


def _grad_weight_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, input, index, _, _ = inputs
    needs_grad_output, needs_input = ctx.needs_input_grad[:2]
    ctx.save_for_backward(
        grad_output if needs_input else None, input if needs_grad_output else None, index
    )
    ctx.out_features, ctx.in_features = grad_output.shape[-1], input.shape[-1]


def _grad_weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, input, index = ctx.saved_tensors
    needs_grad_output, needs_input = ctx.needs_input_grad[:2]
    return (
        forward(input, grad, index, None, ctx.out_features) if needs_grad_output else None,
        grad_input(grad_output, grad, index, ctx.in_features) if needs_input else None,
        None,
        None,
        None,
    )


torch.library.register_autograd("block_sparse::forward", _gradients, setup_context=_forward_context)
torch.library.register_autograd(
    "block_sparse::grad_input", _grad_input_backward, setup_context=_grad_input_context
)
torch.library.register_autograd(
    "block_sparse::grad_weight", _grad_weight_backward, setup_context=_grad_weight_context
)


# --- torch.func and forward-mode derivatives ------------------------------------------------------
# The registered autograd knows neither (it would drop a tangent in silence). These do, at a higher
# cost on the host: each is linear in both of its operands, and made of the other two.


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _transformable_linear(
    operands: list[Tensor | None], index: Tensor, out_features: int
) -> Tensor:
    input, values, bias = operands
    output = _Forward.apply(input, values, index, out_features)
    return output if bias is None else output + bias


class _Bilinear(torch.autograd.Function):
    """A product of two operands, an index and sizes; derivatives of every kind."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        first, second, index, *ctx.sizes = inputs
        ctx.save_for_backward(first, second, index)
        ctx.save_for_forward(first, second, index)

    @classmethod
    def _jvp(cls, ctx: Any, d_first: Tensor | None, d_second: Tensor | None) -> Tensor:
        first, second, index = ctx.saved_tensors
        terms = []
        if d_first is not None:
            terms.append(cls.apply(d_first, second, index, *ctx.sizes))
        if d_second is not None:
            terms.append(cls.apply(first, d_second, index, *ctx.sizes))
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]


class _Forward(_Bilinear):
    @staticmethod
    def forward(input: Tensor, values: Tensor, index: Tensor, out_features: int) -> Tensor:
        return forward(input, values, index, None, out_features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, values, index = ctx.saved_tensors
        return (
            _GradInput.apply(grad, values, index, input.shape[-1]),
            _GradWeight.apply(grad, input, index, *values.shape[1:]),
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _Forward._jvp(ctx, *tangents[:2])


class _GradInput(_Bilinear):
    @staticmethod
    def forward(grad_output: Tensor, values: Tensor, index: Tensor, in_features: int) -> Tensor:
        return grad_input(grad_output, values, index, in_features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, values, index = ctx.saved_tensors
        return (
            _Forward.apply(grad, values, index, grad_output.shape[-1]),
            _GradWeight.apply(grad_output, grad, index, *values.shape[1:]),
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _GradInput._jvp(ctx, *tangents[:2])


class _GradWeight(_Bilinear):
    @staticmethod
    def forward(
        grad_output: Tensor, input: Tensor, index: Tensor, block_out: int, block_in: int
    ) -> Tensor:
        return grad_weight(grad_output, input, index, block_out, block_in)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, input, index = ctx.saved_tensors
        return (
            _Forward.apply(input, grad, index, grad_output.shape[-1]),
            _GradInput.apply(grad_output, grad, index, input.shape[-1]),
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _GradWeight._jvp(ctx, *tangents[:2])


def _register_vmap(name: str, product: Callable[..., Tensor], tokens_first: bool) -> None:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        if tokens_first and in_dims[0] is not None and not any(d is not None for d in in_dims[1:]):
            return product(args[0].movedim(in_dims[0], 0), *args[1:]), 0  # one more dimension
        each = [
            product(
                *(
                    arg if dim is None else arg.select(dim, i)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        return torch.stack(each), 0

    torch.library.register_vmap(f"block_sparse::{name}", rule)


_register_vmap("forward", forward, tokens_first=True)
_register_vmap("grad_input", grad_input, tokens_first=True)
_register_vmap("grad_weight", grad_weight, tokens_first=False)


# --- fakes: the shapes, without the numbers -------------------------------------------------------
# They check what would give a tensor of the wrong kind; sizes are checked when the op runs.


def _index_size(block_rows: int, block_cols: int, nnz: int) -> int:
    return block_rows + 1 + block_cols + 1 + 4 * nnz


def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def _check_fake(index: Tensor, **operands: Tensor | None) -> None:
    given = {name: tensor for name, tensor in operands.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.dtype != first.dtype:
            raise ValueError(f"{name}: dtype is {tensor.dtype}, but {first_name} has {first.dtype}")
    for name, tensor in {**given, "index": index}.items():
        if tensor.device != first.device:
            raise ValueError(f"{name}: is on {tensor.device}, but {first_name} on {first.device}")


@torch.library.register_fake("block_sparse::forward")
def _forward_fake(
    input: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    _check_fake(index, input=input, values=values, bias=bias)
    return input.new_empty((*input.shape[:-1], out_features))


@torch.library.register_fake("block_sparse::grad_input")
def _grad_input_fake(
    grad_output: Tensor, values: Tensor, index: Tensor, in_features: int
) -> Tensor:
    _check_fake(index, grad_output=grad_output, values=values)
    return grad_output.new_empty((*grad_output.shape[:-1], in_features))


@torch.library.register_fake("block_sparse::grad_weight")
def _grad_weight_fake(
    grad_output: Tensor, input: Tensor, index: Tensor, block_out: int, block_in: int
) -> Tensor:
    _check_fake(index, grad_output=grad_output, input=input)
    rows = _ceil_div(grad_output.shape[-1], block_out)
    cols = _ceil_div(input.shape[-1], block_in)
    nnz = (index.numel() - _index_size(rows, cols, 0)) // 4
    return input.new_empty((nnz, block_out, block_in))


@torch.library.register_fake("block_sparse::index_from_bsr")
def _index_from_bsr_fake(crow_indices: Tensor, col_indices: Tensor, block_cols: int) -> Tensor:
    if col_indices.device != crow_indices.device:
        raise ValueError(
            f"col_indices: is on {col_indices.device}, but crow_indices on {crow_indices.device}"
        )
    size = _index_size(crow_indices.numel() - 1, block_cols, col_indices.numel())
    return crow_indices.new_empty(size)


@torch.library.register_fake("block_sparse::index_from_mask")
def _index_from_mask_fake(mask: Tensor) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size(min=2)  # depends on the mask's numbers
    return mask.new_empty(size, dtype=torch.int32)


@torch.library.register_fake("block_sparse::index_from_blocks")
def _index_from_blocks_fake(blocks: Tensor, block_rows: int, block_cols: int) -> Tensor:
    size = _index_size(block_rows, block_cols, blocks.shape[0])
    return blocks.new_empty(size, dtype=torch.int32)


@torch.library.register_fake("block_sparse::index_random")
def _index_random_fake(
    block_rows: int, block_cols: int, nnz: int, seed: int, balanced: bool
) -> Tensor:
    return torch.empty(_index_size(block_rows, block_cols, nnz), dtype=torch.int32, device="cpu")


@torch.library.register_fake("block_sparse::index_banded")
def _index_banded_fake(block_rows: int, block_cols: int, bandwidth: int) -> Tensor:
    diagonal = [r * block_cols // block_rows for r in range(block_rows)]
    nnz = sum(min(block_cols, d + bandwidth + 1) - max(0, d - bandwidth) for d in diagonal)
    return torch.empty(_index_size(block_rows, block_cols, nnz), dtype=torch.int32, device="cpu")


# --- autocast: the dtype is asked for at each call, and float64 is left alone --------------------


def _autocast_operands(device_type: str, *operands: Tensor | None) -> list[Tensor | None]:
    if not torch.is_autocast_enabled(device_type):
        return list(operands)
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    return [cast(tensor) for tensor in operands]


def _register_autocast(device_type: str) -> None:
    key = f"Autocast{device_type.upper()}"
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def register(name: str, product: Callable[..., Tensor]) -> None:
        def autocast_product(*args: Any) -> Tensor:
            # Operands lie on one device: on another one, the op itself says so.
            operands = [arg if isinstance(arg, Tensor) else None for arg in args]
            cast = _autocast_operands(device_type, *operands)
            with torch._C._ExcludeDispatchKeyGuard(below):
                return product(
                    *(
                        arg if tensor is None else tensor
                        for arg, tensor in zip(args, cast, strict=True)
                    )
                )

        _autocast_library.impl(name, autocast_product, key)

    register("forward", forward)
    register("grad_input", grad_input)
    register("grad_weight", grad_weight)


_autocast_library = torch.library.Library("block_sparse", "IMPL")
_register_autocast("cpu")
_register_autocast("cuda")
