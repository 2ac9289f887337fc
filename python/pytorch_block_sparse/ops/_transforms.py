"""The products under ``torch.func`` and forward-mode derivatives.

The registered autograd knows neither (it would drop a tangent in silence). The functions here do,
at a higher cost on the host: each is linear in both operands, and made of the other two.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._products import forward, forward_int8, forward_packed, grad_input, grad_weight


def is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def transformable_linear(operands: list[Tensor | None], index: Tensor, out_features: int) -> Tensor:
    input, values, bias = operands
    output = Forward.apply(input, values, index, out_features)
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


class Forward(_Bilinear):
    @staticmethod
    def forward(input: Tensor, values: Tensor, index: Tensor, out_features: int) -> Tensor:
        return forward(input, values, index, None, out_features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, values, index = ctx.saved_tensors
        return (
            GradInput.apply(grad, values, index, input.shape[-1]),
            GradWeight.apply(grad, input, index, *values.shape),
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return Forward._jvp(ctx, *tangents[:2])


class GradInput(_Bilinear):
    @staticmethod
    def forward(grad_output: Tensor, values: Tensor, index: Tensor, in_features: int) -> Tensor:
        return grad_input(grad_output, values, index, in_features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, values, index = ctx.saved_tensors
        return (
            Forward.apply(grad, values, index, grad_output.shape[-1]),
            GradWeight.apply(grad_output, grad, index, *values.shape),
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return GradInput._jvp(ctx, *tangents[:2])


class GradWeight(_Bilinear):
    @staticmethod
    def forward(
        grad_output: Tensor,
        input: Tensor,
        index: Tensor,
        nnz: int,
        block_out: int,
        block_in: int,
    ) -> Tensor:
        return grad_weight(grad_output, input, index, nnz, block_out, block_in)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, input, index = ctx.saved_tensors
        return (
            Forward.apply(input, grad, index, grad_output.shape[-1]),
            GradInput.apply(grad_output, grad, index, input.shape[-1]),
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return GradWeight._jvp(ctx, *tangents[:2])


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
_register_vmap("forward_packed", forward_packed, tokens_first=True)
_register_vmap("forward_int8", forward_int8, tokens_first=True)
_register_vmap("grad_input", grad_input, tokens_first=True)
_register_vmap("grad_weight", grad_weight, tokens_first=False)
