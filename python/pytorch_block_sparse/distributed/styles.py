"""The styles for ``parallelize_module``: they say how a layer is cut; ``parallelize`` does it."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement

from .linear import ColwiseLinear, Layouts, RowwiseLinear
from .parallelize import parallelize_


class _Cut:
    """What both styles share; the other base is torch's style, which keeps the layouts."""

    _layer: type[ColwiseLinear] | type[RowwiseLinear]
    input_layouts: Any
    output_layouts: Any
    use_local_output: bool
    src_data_rank: int | None

    def __init__(
        self,
        *,
        cuts: Sequence[int] | None = None,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]
            input_layouts=input_layouts,
            output_layouts=output_layouts,
            use_local_output=use_local_output,
        )
        self.cuts = cuts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layouts = Layouts(self.input_layouts, self.output_layouts, self.use_local_output)
        return parallelize_(
            module, self._layer, device_mesh, self.cuts, layouts, self.src_data_rank
        )


class BlockSparseColwiseParallel(_Cut, ColwiseParallel):
    """``ColwiseParallel`` for :class:`BlockSparseLinear`: each rank has a range of block rows.

    Cut are the outputs, and the bias with them. The layer stays a ``BlockSparseLinear``, one of its
    rank's part; its Parameters are new, so make the optimizer afterwards.

    Args:
        cuts: where, as :func:`balanced_cuts` gives them; by default balanced for this layer alone.
            A layer that takes the outputs as they are (Rowwise) has to have the same.
        input_layouts: as in ``ColwiseParallel``: how the input lies, by default replicated.
        output_layouts: how the output shall lie, by default sharded along the last dimension: each
            rank keeps its part.
        use_local_output: whether the output is a plain tensor, by default, or a DTensor. A DTensor
            that is sharded along the last dimension exists only of parts of equal width.

    Raises:
        ValueError: the mesh has more ranks than the layer has block rows, or more than one
            dimension; cuts that do not fit.
        TypeError: a layer that is no ``BlockSparseLinear``.

    Example:
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from pytorch_block_sparse.distributed import (
        ...     BlockSparseColwiseParallel, BlockSparseRowwiseParallel, balanced_cuts
        ... )
        >>> def parallelize(mlp, mesh):
        ...     cuts = balanced_cuts(mesh.size(), colwise=[mlp.up], rowwise=[mlp.down])
        ...     return parallelize_module(mlp, mesh, {
        ...         "up": BlockSparseColwiseParallel(cuts=cuts),
        ...         "down": BlockSparseRowwiseParallel(cuts=cuts),
        ...     })
    """

    _layer = ColwiseLinear


class BlockSparseRowwiseParallel(_Cut, RowwiseParallel):
    """``RowwiseParallel`` for :class:`BlockSparseLinear`: each rank has a range of block columns.

    Cut are the inputs; the bias is whole on every rank. Otherwise as
    :class:`BlockSparseColwiseParallel`.

    Args:
        cuts: where, as :func:`balanced_cuts` gives them; by default balanced for this layer alone.
        input_layouts: how the input lies, by default sharded along the last dimension, at `cuts`.
        output_layouts: how the output shall lie, by default replicated: the ranks' products are
            summed.
        use_local_output: whether the output is a plain tensor, by default, or a DTensor.
    """

    _layer = RowwiseLinear
