"""The learning rate that block-sparse weights want: higher than that of dense ones.

Adam moves each weight by about the rate. An output of a sparse layer is a sum of `density` times as
many of them, so at the dense rate it learns that much slower. Maximal update parameterization for
sparsity (Dey et al., arXiv 2405.15743) divides the rate by the density. This file makes groups of
parameters; it does not follow a density that changes.
"""

import math
from typing import Any

from torch import nn

from .layers import sparse_layers
from .schedule import check_number


def parameter_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Groups for an optimizer of the Adam family: block-sparse values at ``lr / density``.

    Args:
        model: a patched model.
        lr: learning rate of a dense model, which all other parameters get.

    Returns:
        One group for all other parameters and one for each density, as ``torch.optim`` takes them:
        ``{"params": [...], "lr": ...}``. Every parameter of the model is in one of them.

    Raises:
        ValueError: a rate that is not positive and finite, or a model without a block-sparse layer.

    Example:
        >>> import torch
        >>> from pytorch_block_sparse import BlockSparseLinear
        >>> from pytorch_block_sparse.optim import parameter_groups
        >>> model = torch.nn.Sequential(BlockSparseLinear(128, 128, density=0.25))
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
        >>> [group["lr"] for group in optimizer.param_groups]  # the bias, the values
        [0.001, 0.004]
    """
    check_number("lr", lr)
    if not 0 < lr < math.inf:
        raise ValueError(f"lr: must be positive and finite, got {lr}")
    density = {
        id(layer.values): layer.pattern.density
        for layer in sparse_layers(model).values()
        if layer.pattern.nnz
    }
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for parameter in model.parameters():
        groups.setdefault(density.get(id(parameter), 1.0), []).append(parameter)
    return [{"params": params, "lr": lr / share} for share, params in groups.items() if params]
