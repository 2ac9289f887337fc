"""PseudoBlockSparseLinear: the same layer computed densely. For checks and study, not for speed."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .linear import BlockSparseLinear
from .matrix import BlockSparseMatrix


class PseudoBlockSparseLinear(nn.Module):
    """What a :class:`BlockSparseLinear` computes, with a dense weight and a mask.

    The weight is a dense Parameter, multiplied by the mask of the pattern in each forward: values
    and gradients are those of the block-sparse layer, at the speed and size of the dense one.

    Args:
        layer: the layer to imitate; its values are copied.

    Example:
        >>> import torch
        >>> from pytorch_block_sparse import BlockSparseLinear, PseudoBlockSparseLinear
        >>> layer = BlockSparseLinear(64, 96, density=0.5)
        >>> x = torch.randn(4, 64)
        >>> torch.allclose(PseudoBlockSparseLinear(layer)(x), layer(x), atol=1e-5)
        True
    """

    mask: Tensor

    def __init__(self, layer: BlockSparseLinear) -> None:
        super().__init__()
        if not isinstance(layer, BlockSparseLinear):
            raise TypeError(f"layer: must be a BlockSparseLinear, got {type(layer).__name__}")
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.density = layer.density
        weight = layer.weight.to_dense().detach()
        ones = BlockSparseMatrix(torch.ones_like(layer.values, dtype=torch.bool), layer.pattern)
        self.weight = nn.Parameter(weight, requires_grad=layer.values.requires_grad)
        self.register_buffer("mask", ones.to_dense())
        self.bias: nn.Parameter | None
        if layer.bias is None:
            self.register_parameter("bias", None)
        else:
            bias = layer.bias.detach().clone()
            self.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return functional.linear(input, self.weight * self.mask, self.bias)

    def extra_repr(self) -> str:
        """As ``nn.Linear``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )
