"""Tensor parallelism: layers cut over ranks by block rows or block columns, balanced by nnz.

DDP and FSDP2 need nothing from here: they take block-sparse layers as they are. This package is not
imported by ``import pytorch_block_sparse``, because ``torch.distributed.tensor`` takes its time.
"""

from .cuts import balanced_cuts
from .styles import BlockSparseColwiseParallel, BlockSparseRowwiseParallel

__all__ = ["BlockSparseColwiseParallel", "BlockSparseRowwiseParallel", "balanced_cuts"]
