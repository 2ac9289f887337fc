"""Small steps between ranks, and between plain tensors and DTensors."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Shard

from ..linear import BlockSparseLinear
from ..pattern import Pattern, grid_shape


def broadcast(tensor: Tensor, size: tuple[int, ...], group: Any, source: int) -> Tensor:
    """A copy of what the rank `source` of the group passes; its size is `size`, on every rank."""
    mine = dist.get_rank(group) == source
    copy = tensor.detach().clone() if mine else tensor.new_empty(size)
    dist.broadcast(copy, group=group, group_src=source)
    return copy


def broadcast_pattern(
    layer: BlockSparseLinear, shape: tuple[int, int], group: Any, source: int
) -> Pattern:
    """The pattern that `layer` has on the rank `source` of the group, where it is of `shape`."""
    rows = grid_shape(shape, layer.block_shape)[0]
    crow = broadcast(layer.crow_indices, (rows + 1,), group, source)
    col = broadcast(layer.col_indices, (int(crow[-1]),), group, source)
    return Pattern.from_bsr(crow, col, shape, layer.block_shape)


def spread(tensor: Tensor, mesh: DeviceMesh, layouts: tuple[Placement, ...]) -> DTensor:
    """`tensor` as the local part of a DTensor; a DTensor as it is."""
    if isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(tensor, mesh, layouts, run_check=False)


def cuts_last(layouts: Sequence[Placement], dims: int) -> bool:
    """True if the last of `dims` dimensions is the sharded one."""
    (layout,) = layouts
    return isinstance(layout, Shard) and layout.dim % dims == dims - 1
