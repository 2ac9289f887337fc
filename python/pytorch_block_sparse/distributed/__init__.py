"""Tensor parallelism: layers cut over ranks by block rows or block columns, balanced by nnz.

DDP and FSDP2 take block-sparse layers as they are; for FSDP2 there is :func:`broadcast_patterns_`,
where the ranks have drawn other patterns. This package is not
imported by ``import pytorch_block_sparse``, because ``torch.distributed.tensor`` takes its time.
"""

from .cuts import balanced_cuts
from .same_patterns import broadcast_patterns_
from .styles import BlockSparseColwiseParallel, BlockSparseRowwiseParallel

__all__ = [
    "BlockSparseColwiseParallel",
    "BlockSparseRowwiseParallel",
    "balanced_cuts",
    "broadcast_patterns_",
]
