"""InferenceModule: what a layer that was made for serving refuses. It computes nothing."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .linear import BlockSparseLinear


class InferenceModule(nn.Module):
    """A module made of a :class:`BlockSparseLinear`, without parameters and gradients."""

    in_features: int
    _BACK: ClassVar[str]  # the method that gives a layer that can be trained

    def _check_input(self, input: Tensor) -> None:
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"input: must be [..., in_features={self.in_features}], got {list(input.shape)}"
            )
        name = type(self).__name__
        if torch.is_grad_enabled() and (self.training or input.requires_grad):
            what = "input requires a gradient" if input.requires_grad else "it is in training mode"
            raise RuntimeError(
                f"{name}: is for inference only, but {what}; call it under "
                f"torch.inference_mode(), or train the layer that {self._BACK}() returns"
            )
        if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
            raise RuntimeError(f"{name}: has no derivatives; take those of {self._BACK}()")

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Nothing here is trained: True is an error."""
        if requires_grad:
            raise RuntimeError(
                f"{type(self).__name__}: is never trained; train the layer that {self._BACK}() "
                "returns"
            )
        return self


def check_layer_to_serve(layer: BlockSparseLinear, how: str) -> None:
    """Raises unless `layer` is one that a module for serving, a `how` one, can be made of."""
    if not isinstance(layer, BlockSparseLinear):
        raise TypeError(f"layer: must be a BlockSparseLinear, got {type(layer).__name__}")
    if layer.is_part:
        raise ValueError(f"layer: is cut over ranks (tensor parallel) and cannot be {how}")
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            raise RuntimeError(
                f"{name}: has a gradient pending, and a {how} layer is never trained; step the "
                "optimizer and call zero_grad() first, or drop the gradient with zero_grad()"
            )
