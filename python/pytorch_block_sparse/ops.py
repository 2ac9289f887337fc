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

from typing import Any

import torch
from torch import Tensor

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
        values: ``[nnz, block_out, block_in]``, the blocks in BSR order; dtype and device as `input`.
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
    if (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
    ):
        return forward(input, values, index, bias, out_features)
    return _EagerLinear.apply(input, values, index, bias, out_features)


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
    needs_input, needs_values, _, needs_bias = ctx.needs_input_grad[:4]
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


# --- fakes: the shapes, without the numbers -------------------------------------------------------


def _index_size(block_rows: int, block_cols: int, nnz: int) -> int:
    return block_rows + 1 + block_cols + 1 + 4 * nnz


def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


@torch.library.register_fake("block_sparse::forward")
def _forward_fake(
    input: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    return input.new_empty((*input.shape[:-1], out_features))


@torch.library.register_fake("block_sparse::grad_input")
def _grad_input_fake(
    grad_output: Tensor, values: Tensor, index: Tensor, in_features: int
) -> Tensor:
    return grad_output.new_empty((*grad_output.shape[:-1], in_features))


@torch.library.register_fake("block_sparse::grad_weight")
def _grad_weight_fake(
    grad_output: Tensor, input: Tensor, index: Tensor, block_out: int, block_in: int
) -> Tensor:
    rows = _ceil_div(grad_output.shape[-1], block_out)
    cols = _ceil_div(input.shape[-1], block_in)
    nnz = (index.numel() - _index_size(rows, cols, 0)) // 4
    return input.new_empty((nnz, block_out, block_in))


@torch.library.register_fake("block_sparse::index_from_bsr")
def _index_from_bsr_fake(crow_indices: Tensor, col_indices: Tensor, block_cols: int) -> Tensor:
    size = _index_size(crow_indices.numel() - 1, block_cols, col_indices.numel())
    return crow_indices.new_empty(size)


@torch.library.register_fake("block_sparse::index_from_blocks")
def _index_from_blocks_fake(blocks: Tensor, block_rows: int, block_cols: int) -> Tensor:
    size = _index_size(block_rows, block_cols, blocks.shape[0])
    return blocks.new_empty(size, dtype=torch.int32)


# --- autocast: the dtype is asked for at each call, and float64 is left alone --------------------


def _register_autocast(device_type: str) -> None:
    key = f"Autocast{device_type.upper()}"
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def autocast_forward(
        input: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, out_features: int
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)

        def cast(tensor: Tensor) -> Tensor:
            eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
            return tensor.to(dtype) if eligible else tensor

        with torch._C._ExcludeDispatchKeyGuard(below):
            return forward(
                cast(input),
                cast(values),
                index,
                None if bias is None else cast(bias),
                out_features,
            )

    _autocast_library.impl("forward", autocast_forward, key)


_autocast_library = torch.library.Library("block_sparse", "IMPL")
_register_autocast("cpu")
_register_autocast("cuda")
