"""How a layer becomes the part of itself that a rank holds."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Shard

from .._module import own
from .._sharded import is_sharded
from ..linear import BlockSparseLinear
from .collectives import broadcast, broadcast_pattern
from .cuts import balanced_cuts, check_cuts, check_equal, cut_pattern
from .linear import ColwiseLinear, Layouts, ParallelLinear


@torch.no_grad()
def parallelize_(
    layer: nn.Module,
    kind: type[ParallelLinear],
    mesh: DeviceMesh,
    cuts: Sequence[int] | None,
    layouts: Layouts,
    source: int | None,
) -> nn.Module:
    """Makes `layer` the part of itself that this rank holds, in place.

    The numbers, pattern and cuts are those of the rank `source` of the mesh; with None, or on the
    meta device, each rank takes its own, which have to be the same.
    """
    if not isinstance(layer, BlockSparseLinear):
        raise TypeError(
            f"module: must be a BlockSparseLinear, got {type(layer).__name__}; dense layers take "
            "ColwiseParallel and RowwiseParallel"
        )
    if layer.is_part or is_sharded(layer.values):
        raise ValueError("module: is cut over ranks already")
    if mesh.ndim != 1:
        raise ValueError(f"device_mesh: must have one dimension, got {mesh.ndim}; take mesh['tp']")
    device = layer.values.device
    if device.type not in (mesh.device_type, "meta"):
        raise ValueError(f"module: is on {device}, but device_mesh on {mesh.device_type}")
    if cuts is None:
        option = "colwise" if kind.cut_dim == 0 else "rowwise"
        cuts = balanced_cuts(mesh.size(), **{option: [layer]})  # type: ignore[arg-type]
    features, block = layer.pattern.shape[kind.cut_dim], layer.block_shape[kind.cut_dim]
    cuts = check_cuts(cuts, features, block, mesh.size())
    if kind is ColwiseLinear and not layouts.local_output and layouts.output == (Shard(-1),):
        check_equal(cuts)

    values, bias, pattern = layer.values, layer.bias, layer._pattern_to_keep().to("cpu")
    if source is not None and not values.is_meta:
        group = mesh.get_group()
        places = torch.tensor(cuts, device=device)
        dist.broadcast(places, group=group, group_src=source)
        cuts = places.tolist()
        pattern = broadcast_pattern(layer, layer.pattern.shape, group, source)
        numbers = broadcast(values, (pattern.nnz, *layer.block_shape), group, source)
        if bias is not None:
            dist.broadcast(bias, group=group, group_src=source)
    else:
        numbers = values.detach()

    start, stop = cuts[mesh.get_local_rank()], cuts[mesh.get_local_rank() + 1]
    part, inside = cut_pattern(pattern, kind.cut_dim, start, stop)
    own_numbers = (
        numbers[inside] if not values.is_meta else numbers.new_empty((part.nnz, *layer.block_shape))
    )
    layer.values = nn.Parameter(own_numbers, requires_grad=values.requires_grad)
    if kind.cut_dim == 0:
        layer.out_features = stop - start
        if bias is not None:
            own_bias = bias.detach()[start:stop].clone()
            layer.bias = nn.Parameter(own_bias, requires_grad=bias.requires_grad)
    else:
        layer.in_features = stop - start
    layer._set_pattern(own(part))
    layer.__class__ = kind
    layer.mesh, layer.cuts, layer.layouts = mesh, list(cuts), layouts
    return layer
