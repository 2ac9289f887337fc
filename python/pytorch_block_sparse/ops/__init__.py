"""The three products as differentiable functions of tensors.

The ops live under ``torch.ops.block_sparse`` (schemas and kernels in C++); this package adds what
torch wants from Python: autograd, ``torch.func``, fakes and autocast, a file each. Each gradient is
made of the same three ops, so that derivatives of any order work. It knows tensors only; patterns
and modules are built on top.

===========  ===================================  =======================  =======================
op           computes                             gradient of 1st operand  gradient of 2nd operand
===========  ===================================  =======================  =======================
forward      y = x Wt + bias                      grad_input(dy, W)        grad_weight(dy, x)
grad_input   dx = dy W                            forward(g, W)            grad_weight(dy, g)
grad_weight  dW = dyt x at the present blocks     forward(x, G)            grad_input(dy, G)
===========  ===================================  =======================  =======================

``forward_packed`` is ``forward`` for serving on the CPU, without gradients: its values are in the
order of ``pack``, which ``unpack`` undoes. ``forward_int8`` is ``forward`` for serving, without
gradients: its values are int8, and each output is multiplied by a float32 scale of its own.

``zero_blocks_`` sets blocks of many tensors to zero, and ``block_dots`` sums products of them, with
few launches on a GPU; the latter exists there only.
"""

import torch
from torch import Tensor

from . import _fakes  # noqa: F401  (registers them)
from ._autocast import autocast_operands
from ._autograd import EagerLinear
from ._products import (
    block_dots,
    forward,
    forward_int8,
    forward_packed,
    grad_input,
    grad_weight,
    pack,
    unpack,
    zero_blocks_,
)
from ._transforms import GradInput, is_transformed, transformable_linear

__all__ = [
    "block_dots",
    "forward",
    "forward_int8",
    "forward_packed",
    "grad_input",
    "grad_weight",
    "left_linear",
    "linear",
    "pack",
    "unpack",
    "zero_blocks_",
]


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
    if is_transformed():
        operands = autocast_operands(input.device.type, input, values, bias)
        return transformable_linear(operands, index, out_features)
    if torch._C._is_any_autocast_enabled() or torch.is_inference_mode_enabled():
        return forward(input, values, index, bias, out_features)
    if not torch.is_grad_enabled():
        with torch._C._AutoDispatchBelowAutograd():  # its formulas are Python: half of the call
            return forward(input, values, index, bias, out_features)
    return EagerLinear.apply(input, values, index, bias, out_features)


def left_linear(input: Tensor, values: Tensor, index: Tensor, in_features: int) -> Tensor:
    """``input @ W``: the product ``grad_input`` as a function in its own right.

    Args:
        input: ``[..., out_features]``, any strides.
        values, index: as in :func:`linear`.
        in_features: columns of the weight; the number of rows is ``input.shape[-1]``.

    Returns:
        ``[..., in_features]``.
    """
    if not torch.compiler.is_compiling() and is_transformed():
        operands = autocast_operands(input.device.type, input, values)
        return GradInput.apply(*operands, index, in_features)
    return grad_input(input, values, index, in_features)
