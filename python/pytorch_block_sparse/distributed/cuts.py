"""Where layers are cut, and patterns cut in parts and joined again. Knows no processes."""

from collections.abc import Sequence
from itertools import pairwise
from math import lcm

import torch
from torch import Tensor

from ..linear import BlockSparseLinear
from ..pattern import Pattern


def balanced_cuts(
    ranks: int,
    *,
    colwise: Sequence[BlockSparseLinear] = (),
    rowwise: Sequence[BlockSparseLinear] = (),
    multiple_of: int = 1,
) -> list[int]:
    """Where to cut features into one range for each rank, so that all have about as many blocks.

    Layers whose features are the same ones have to be cut at the same places: the first layer of an
    MLP (`colwise`, its outputs) and the second (`rowwise`, its inputs).

    Args:
        ranks: how many parts.
        colwise: layers to be cut along their outputs, with :class:`BlockSparseColwiseParallel`.
        rowwise: layers to be cut along their inputs, with :class:`BlockSparseRowwiseParallel`.
        multiple_of: cut only at multiples of this, as the size of an attention head.

    Returns:
        ``ranks + 1`` ascending positions, from 0 to the number of features. Each part has at least
        one block row or block column, and as near the mean of the blocks as cuts allow.

    Raises:
        ValueError: no layers, layers of different sizes, or fewer places to cut than ranks need.

    Example:
        >>> from pytorch_block_sparse import BlockSparseLinear, Pattern
        >>> from pytorch_block_sparse.distributed import balanced_cuts
        >>> blocks = [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (3, 0)]
        >>> pattern = Pattern.from_blocks(blocks, (128, 96))
        >>> balanced_cuts(2, colwise=[BlockSparseLinear(96, 128, pattern=pattern)])
        [0, 32, 128]
    """
    for name, number in (("ranks", ranks), ("multiple_of", multiple_of)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: must be an int of at least 1, got {number!r}")
    cut = [(layer, 0) for layer in colwise] + [(layer, 1) for layer in rowwise]
    sizes = {layer.pattern.shape[dim] for layer, dim in cut}
    if len(sizes) != 1:
        raise ValueError(
            "colwise, rowwise: must be layers that are cut along the same number of features, "
            f"got {sorted(sizes) or 'none'}"
        )
    (features,) = sizes
    unit = lcm(multiple_of, *(layer.block_shape[dim] for layer, dim in cut))
    units = -(-features // unit)
    if units < ranks:
        raise ValueError(
            f"ranks: {ranks} ranks cannot share {features} features that are cut at multiples of "
            f"{unit}: there are {units} parts at most"
        )
    work = torch.zeros(units, dtype=torch.int64)
    for layer, dim in cut:
        pattern = layer._pattern_to_keep().to("cpu")
        where = (pattern.row_indices, pattern.col_indices)[dim].long() * pattern.block_shape[dim]
        block = pattern.block_shape[0] * pattern.block_shape[1]
        work.index_add_(0, where // unit, torch.full_like(where, block))

    before = torch.cat([work.new_zeros(1), work.cumsum(0)])  # work[:i].sum()
    total = int(before[-1])
    cuts = [0]
    for rank in range(1, ranks):
        nearest = int((before * ranks - total * rank).abs().argmin())
        cuts.append(min(max(nearest, cuts[-1] + 1), units - (ranks - rank)))
    return [position * unit for position in cuts] + [features]


def check_cuts(cuts: Sequence[int], features: int, block: int, ranks: int) -> list[int]:
    """`cuts` as a list, or ValueError if they do not cut `features` in `ranks` parts of blocks."""
    cuts = list(cuts)
    ints = all(isinstance(cut, int) and not isinstance(cut, bool) for cut in cuts)
    if not ints or len(cuts) != ranks + 1 or cuts[0] != 0 or cuts[-1] != features:
        raise ValueError(
            f"cuts: must be {ranks + 1} ints from 0 to {features}, for a mesh of {ranks} ranks, "
            f"got {cuts}"
        )
    if min(widths_of(cuts)) < 1:
        raise ValueError(f"cuts: must ascend, got {cuts}")
    if any(cut % block for cut in cuts[:-1]):
        raise ValueError(f"cuts: must be multiples of the block, {block}, got {cuts}")
    return cuts


def widths_of(cuts: Sequence[int]) -> list[int]:
    """The number of features of each part."""
    return [stop - start for start, stop in pairwise(cuts)]


def check_equal(cuts: Sequence[int]) -> None:
    """ValueError unless all parts are as wide: others no DTensor has."""
    if len(set(widths_of(cuts))) > 1:
        raise ValueError(
            "use_local_output: a DTensor that is sharded along the last dimension has parts of "
            f"equal width, but cuts are {list(cuts)}"
        )


def cut_pattern(pattern: Pattern, dim: int, start: int, stop: int) -> tuple[Pattern, Tensor]:
    """The features ``[start, stop)`` of `pattern` along `dim`, and which blocks that are.

    The second is bool ``[nnz]``; the order of the blocks stays.
    """
    block = pattern.block_shape[dim]
    blocks = torch.stack([pattern.row_indices, pattern.col_indices], 1).long()
    inside = (blocks[:, dim] >= start // block) & (blocks[:, dim] < -(-stop // block))
    blocks = blocks[inside]
    blocks[:, dim] -= start // block
    return Pattern.from_blocks(
        blocks, _resized(pattern, dim, stop - start), pattern.block_shape
    ), inside


def join_patterns(
    parts: Sequence[Pattern], dim: int, cuts: Sequence[int]
) -> tuple[Pattern, Tensor]:
    """The pattern of which `parts` are the parts, and the order in which their blocks lie in it."""
    first = parts[0]
    all_blocks = []
    for part, start in zip(parts, cuts[:-1], strict=True):
        blocks = torch.stack([part.row_indices, part.col_indices], 1).long()
        blocks[:, dim] += start // first.block_shape[dim]
        all_blocks.append(blocks)
    blocks = torch.cat(all_blocks)
    whole = Pattern.from_blocks(blocks, _resized(first, dim, cuts[-1]), first.block_shape)
    return whole, (blocks[:, 0] * whole.grid[1] + blocks[:, 1]).argsort()


def _resized(pattern: Pattern, dim: int, features: int) -> tuple[int, int]:
    rows, cols = pattern.shape
    return (features, cols) if dim == 0 else (rows, features)
