"""The same patterns on every rank, before a model is sharded."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .._module import own
from .._sharded import refuse_sharded
from ..matrix import zero_outside_
from ..optim.layers import sparse_layers


@torch.no_grad()
def broadcast_patterns_(model: nn.Module, group: Any = None, source: int = 0) -> None:
    """Gives the block-sparse layers of `model` the patterns that they have on one rank.

    Call it before ``fully_shard`` where the ranks may have drawn other patterns: that takes the
    values of each rank as they are, and does not notice. (DDP broadcasts patterns itself.) The
    values are not moved: load or draw them afterwards. On the meta device it works too.

    Args:
        model: a model that is not sharded yet.
        group: the ranks that hold copies of it; by default all.
        source: the rank of the group whose patterns count.

    Raises:
        ValueError: the ranks differ in the number of blocks, or the layers are sharded already.
    """
    layers = sparse_layers(model)
    for name, layer in layers.items():
        refuse_sharded(name, layer.values, "broadcast its pattern")
    patterns = {name: layer._pattern_to_keep().to("cpu") for name, layer in layers.items()}
    box = [{name: (p.crow_indices, p.col_indices) for name, p in patterns.items()}]
    dist.broadcast_object_list(box, group=group, group_src=source)
    for name, layer in layers.items():
        pattern = layer._pattern_from_bsr(*box[0][name])
        if pattern.nnz != layer.block_count:
            raise ValueError(
                f"{name}: has {pattern.nnz} blocks on rank {source}, but {layer.block_count} here"
            )
        layer._set_pattern(own(pattern))
        if not layer.values.is_meta:
            zero_outside_(layer.values, layer.pattern)
