"""First and higher derivatives of the products, in eager mode and under ``torch.compile``.

Each gradient is made of the same three ops. :class:`EagerLinear` is the fast way in eager mode; the
registered formulas serve everything that sees ops and not functions.
"""

from typing import Any

import torch
from torch import Tensor

from ._products import forward, grad_input, grad_weight, zero_blocks_


def _save(ctx: Any, input: Tensor, values: Tensor, index: Tensor) -> None:
    # Only what the backward needs: a frozen weight does not keep its input alive.
    needs_input, needs_values = ctx.needs_input_grad[:2]
    ctx.save_for_backward(input if needs_values else None, values if needs_input else None, index)
    ctx.in_features = input.shape[-1]
    ctx.values_shape = values.shape


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients_from(ctx, ctx.saved_tensors, grad_output)


def _gradients_from(
    ctx: Any, saved: tuple[Tensor, ...], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    input, values, index = saved
    needs_input, needs_values, _, needs_bias, _ = ctx.needs_input_grad
    return (
        grad_input(grad_output, values, index, ctx.in_features) if needs_input else None,
        grad_weight(grad_output, input, index, *ctx.values_shape) if needs_values else None,
        None,
        _sum_of_rows(grad_output) if needs_bias else None,
        None,
    )


def _sum_of_rows(tensor: Tensor) -> Tensor:
    # sum_to_size says it too, at three times the host time; a tuple of dimensions costs more than
    # the one number.
    dim = tensor.dim()
    if dim == 1:
        return tensor
    return tensor.sum(0) if dim == 2 else tensor.sum(tuple(range(dim - 1)))


class EagerLinear(torch.autograd.Function):
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
    ctx.values_shape = values.shape


def _grad_input_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, values, index = ctx.saved_tensors
    needs_grad_output, needs_values = ctx.needs_input_grad[:2]
    return (
        forward(grad, values, index, None, ctx.out_features) if needs_grad_output else None,
        grad_weight(grad_output, grad, index, *ctx.values_shape) if needs_values else None,
        None,
        None,
    )


def _grad_weight_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, input, index, _, _, _ = inputs
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
        None,
    )


def _no_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    raise AssertionError("the forward has refused")


def _refuse_gradients(name: str, instead: str) -> None:
    def refuse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        raise RuntimeError(
            f"{name}: has no gradients, but an operand requires one; use forward with the {instead}"
        )

    torch.library.register_autograd(f"block_sparse::{name}", _no_gradients, setup_context=refuse)


def _zero_blocks(values: list[Tensor], blocks: list[Tensor]) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in values):
        raise RuntimeError("zero_blocks_: has no gradients, but values require one; use no_grad()")
    with torch._C._AutoDispatchBelowAutograd():
        zero_blocks_(values, blocks)
    # As after any write: a backward that has saved the values must not take these for them.
    torch.autograd.graph.increment_version(values)


_autograd_library = torch.library.Library("block_sparse", "IMPL")
_autograd_library.impl("zero_blocks_", _zero_blocks, "Autograd")
_refuse_gradients("forward_packed", "unpacked values")
_refuse_gradients("forward_int8", "dequantized values")
torch.library.register_autograd("block_sparse::forward", _gradients, setup_context=_forward_context)
torch.library.register_autograd(
    "block_sparse::grad_input", _grad_input_backward, setup_context=_grad_input_context
)
torch.library.register_autograd(
    "block_sparse::grad_weight", _grad_weight_backward, setup_context=_grad_weight_context
)
