"""Changes which blocks a layer has, between two steps of training.

:func:`update_pattern_` replaces blocks by as many others, in place: the same Parameter, the same
storage, the same buffers, so that optimizer, DDP buckets, compiled code and CUDA graphs go on.
:func:`compact_` removes blocks, which needs a new Parameter. This file does not decide which blocks
to take: the methods beside it do.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._sharded import refuse_sharded
from ..linear import BlockSparseLinear
from ..matrix import BlockSparseMatrix, zero_outside_
from ..pattern import Pattern, with_walks

Blocks = Tensor | list[tuple[int, int]]


class Change(NamedTuple):
    """What :func:`update_pattern_` did to the order of the blocks.

    Attributes:
        order: int64 ``[nnz]``; the block that is now at position i was at position ``order[i]``.
        fresh: bool ``[nnz]``; True where the block is a new one.
    """

    order: Tensor
    fresh: Tensor


def update_pattern_(
    layer: BlockSparseLinear | BlockSparseMatrix,
    drop: Blocks,
    grow: Blocks,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    new_values: Tensor | None = None,
) -> Change:
    """Drops blocks and grows as many others, in place.

    Values, gradient and optimizer state of the blocks that stay move with them, bit by bit; those
    of the new blocks are zero. The optimizer's step counter is left alone. Call it after
    ``optimizer.step()``: between a forward and its backward, autograd raises its version error.

    Args:
        layer: the layer (or matrix) to change.
        drop: blocks that are present: bool ``[nnz]`` in BSR order, or pairs (block row, block
            column), ``[k, 2]``.
        grow: blocks that are absent, pairs ``[k, 2]``.
        optimizer: the optimizer that trains ``layer.values``. Its state tensors must be of the
            shape of `values` (Adam, AdamW, SGD, RMSprop, ...) or counters.
        new_values: ``[k, block_out, block_in]``, the values of the new blocks, in the order of
            `grow`; by default zero.

    Returns:
        How the blocks were reordered: for whoever keeps something per block.

    Raises:
        ValueError: another number of blocks in `drop` than in `grow`, a block twice, a dropped
            block that is absent, a grown one that is present, or an optimizer that does not train
            the layer. Nothing is changed then.
        TypeError: optimizer state that cannot follow the blocks (factored, flat, quantised, on
            another device), or new_values that are no tensor. Nothing is changed then either.

    Example:
        >>> from pytorch_block_sparse import BlockSparseLinear, Pattern
        >>> from pytorch_block_sparse.optim import update_pattern_
        >>> pattern = Pattern.from_blocks([(0, 0), (1, 1)], (64, 64))
        >>> layer = BlockSparseLinear(64, 64, pattern=pattern)
        >>> change = update_pattern_(layer, drop=[(0, 0)], grow=[(1, 0)])
        >>> layer.pattern.mask().int().tolist(), change.fresh.tolist()
        ([[0, 0], [1, 1]], [True, False])
    """
    matrix = _matrix(layer)
    present = block_ids(matrix.pattern)
    positions = _positions("drop", drop, matrix.pattern, present)
    ids = _ids("grow", grow, matrix.pattern)
    if len(positions) != len(ids):
        raise ValueError(
            f"grow: must have as many blocks as drop ({len(positions)}), got {len(ids)}; "
            "compact_ changes their number"
        )
    again = ids[torch.isin(ids, present)]
    if len(again):
        raise ValueError(f"grow: block {_pair(again[0], matrix.pattern)} is present already")
    return replace_blocks_(matrix, positions, ids, optimizer, new_values)


@torch.no_grad()
def replace_blocks_(
    matrix: BlockSparseMatrix,
    positions: Tensor,
    ids: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    new_values: Tensor | None = None,
) -> Change:
    """:func:`update_pattern_` of positions and block ids (int64 ``[k]``), which are not checked.

    On a CPU a block that is there twice is an error of the index; like all errors it comes before
    anything is changed.
    """
    pattern, values = matrix.pattern, matrix.values
    if new_values is not None:
        if not isinstance(new_values, Tensor):
            raise TypeError(f"new_values: must be a tensor, got {type(new_values).__name__}")
        wanted = (len(ids), *matrix.block_shape)
        if tuple(new_values.shape) != wanted:
            raise ValueError(f"new_values: must be {list(wanted)}, got {list(new_values.shape)}")
        new_values = new_values.to(values)
    moving = [values, *block_state(optimizer, values)]
    if values.grad is not None:
        moving.append(values.grad)
    moved = block_ids(pattern).index_copy_(0, positions, ids)
    moved, order = torch.sort(moved)
    fresh = torch.zeros_like(moved, dtype=torch.bool).index_fill_(0, positions, True)[order]
    crow, col, index = _planned(moved, pattern)

    for tensor in moving:
        # A new block takes the place in `order` of one that goes, whose zeros it inherits.
        tensor.copy_(tensor.index_fill_(0, positions, 0)[order])
    pattern.crow_indices.copy_(crow)
    pattern.col_indices.copy_(col)
    pattern.index.copy_(index)
    if new_values is not None:
        values[torch.searchsorted(moved, ids)] = new_values
        zero_outside_(values, pattern)
    return Change(order, fresh)


@torch.no_grad()
def compact_(
    layer: BlockSparseLinear, keep: Blocks, optimizer: torch.optim.Optimizer | None = None
) -> nn.Parameter:
    """Removes all blocks but `keep` from memory: ``layer.values`` becomes a new Parameter.

    The only function here that changes nnz. The optimizer is remapped: the new Parameter takes the
    place of the old one in its param_groups, and the state of the kept blocks goes with it, bit by
    bit. Whatever else holds the old Parameter does not know: wrap the model in DDP again, capture
    CUDA graphs again; compiled code is compiled once more.

    Args:
        layer: the layer to change.
        keep: blocks that are present, at least one: bool ``[nnz]`` in BSR order, or pairs
            (block row, block column), ``[k, 2]``.
        optimizer: the optimizer that trains ``layer.values``.

    Returns:
        The new ``layer.values``.

    Raises:
        ValueError: a block that is absent or named twice, none at all, or an optimizer that does
            not train the layer. Nothing is changed then.
        TypeError: optimizer state that cannot follow the blocks (factored, flat, quantised, on
            another device).

    Example:
        >>> from pytorch_block_sparse import BlockSparseLinear
        >>> from pytorch_block_sparse.optim import compact_
        >>> layer = BlockSparseLinear(128, 128, density=1.0)
        >>> norm = layer.weight.block_norm(1)
        >>> values = compact_(layer, norm > norm.median())
        >>> layer.block_count, values is layer.values
        (8, True)
    """
    if not isinstance(layer, BlockSparseLinear):
        raise TypeError(f"layer: must be a BlockSparseLinear, got {type(layer).__name__}")
    matrix, old = _matrix(layer), layer.values
    pattern = matrix.pattern
    present = block_ids(pattern)
    kept = _positions("keep", keep, pattern, present).sort().values
    if not len(kept):
        raise ValueError("keep: at least one block must stay")
    moving = {id(tensor) for tensor in block_state(optimizer, old)}

    new = nn.Parameter(old.detach()[kept], requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = old.grad[kept]
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            optimizer.state[new] = {
                name: item[kept] if id(item) in moving else item for name, item in state.items()
            }
    layer.values = new
    crow, col, index = _planned(present[kept], pattern)
    layer._set_pattern(Pattern(crow, col, index, pattern.shape, pattern.block_shape))
    return new


# --- block ids: block row * block columns + block column; BSR order is their order ----------------


def block_ids(pattern: Pattern) -> Tensor:
    """int64 ``[nnz]``: the ids of the present blocks, ascending. A copy."""
    return torch.add(pattern.col_indices, pattern.row_indices.long(), alpha=pattern.grid[1])


def absent_ids(pattern: Pattern) -> Tensor:
    """int64, ascending: the ids of the blocks that are not present."""
    return others(block_ids(pattern), pattern.grid[0] * pattern.grid[1])


def others(ids: Tensor, cells: int) -> Tensor:
    """int64, ascending: what of range(cells) is not among `ids`, which are distinct.

    How many they are is known; so they are sorted and not searched, which would wait for a GPU.
    """
    taken = torch.zeros(cells, dtype=torch.uint8, device=ids.device).index_fill_(0, ids, 1)
    return torch.sort(taken, stable=True).indices[: cells - len(ids)]


def indices_of(ids: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor, Tensor]:
    """crow_indices, col_indices and packed index of ascending block ids, on their device.

    Shape and block shape are those of `pattern`. No kernel's plan is behind the index yet.
    """
    rows, cols = pattern.grid
    step = max(cols, 1)  # of no columns there are no ids, and where rows start is all the same
    starts = torch.arange(0, rows * step + 1, step, device=ids.device)
    crow = torch.searchsorted(ids, starts, out_int32=True)
    col = (ids % step).to(torch.int32)
    index = torch.ops.block_sparse.index_from_bsr(crow, col, cols)
    return crow, col, index


def _planned(ids: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`indices_of`, with the plans of the kernels, for products that are run often."""
    crow, col, index = indices_of(ids, pattern)
    return crow, col, with_walks(index, pattern.grid, len(ids), pattern.block_shape)


# --- what the optimizer keeps ---------------------------------------------------------------------


def holds(optimizer: torch.optim.Optimizer, values: Tensor) -> bool:
    """True if the optimizer trains `values`."""
    return any(p is values for group in optimizer.param_groups for p in group["params"])


def block_state(optimizer: torch.optim.Optimizer | None, values: Tensor) -> list[Tensor]:
    """The tensors of the optimizer's state that belong to blocks, or an error if one is unknown."""
    if optimizer is None:
        return []
    if not holds(optimizer, values):
        raise ValueError(
            f"optimizer: does not train the layer's values {list(values.shape)}; make it from the "
            "parameters of the patched model"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("optimizer: LBFGS keeps flat vectors over all parameters, without blocks")
    state: dict[str, Any] = optimizer.state.get(values, {})
    tensors = []
    for name, item in state.items():
        plain = type(item) in (Tensor, nn.Parameter)
        if plain and item.shape == values.shape:
            if item.device != values.device:
                raise TypeError(
                    f"optimizer: {type(optimizer).__name__} keeps {name!r} on {item.device}, but "
                    f"the values are on {values.device}; its state must be beside them"
                )
            tensors.append(item)
        elif not (item is None or isinstance(item, (int, float)) or (plain and item.dim() == 0)):
            got = f"{type(item).__name__}" + (
                f" {list(item.shape)}" if hasattr(item, "shape") else ""
            )
            raise TypeError(
                f"optimizer: {type(optimizer).__name__} keeps {name!r} as {got}, which cannot "
                f"follow the blocks: only tensors of the shape of values, {list(values.shape)}, "
                "and counters can"
            )
    return tensors


# --- checks ---------------------------------------------------------------------------------------


def _matrix(layer: BlockSparseLinear | BlockSparseMatrix) -> BlockSparseMatrix:
    matrix = layer.weight if isinstance(layer, BlockSparseLinear) else layer
    if not isinstance(matrix, BlockSparseMatrix):
        raise TypeError(
            f"layer: must be a BlockSparseLinear or a BlockSparseMatrix, got {type(layer).__name__}"
        )
    refuse_sharded("layer", matrix.values, "change its pattern")
    if matrix.values.is_meta:
        raise ValueError("layer: is on the meta device and has no blocks to move")
    return matrix


def _pair(block: Tensor, pattern: Pattern) -> tuple[int, int]:
    return divmod(int(block), pattern.grid[1])


def _ids(name: str, blocks: Blocks, pattern: Pattern) -> Tensor:
    """Pairs (block row, block column), checked, as int64 ids ``[k]``."""
    pairs = torch.as_tensor(blocks, device=pattern.device)
    if pairs.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device=pattern.device)
    if pairs.is_floating_point() or pairs.dtype == torch.bool or pairs.dim() != 2:
        raise ValueError(f"{name}: must be pairs (block row, block column), [k, 2], of integers")
    if pairs.shape[1] != 2:
        raise ValueError(f"{name}: must be [k, 2], got {list(pairs.shape)}")
    rows, cols = pattern.grid
    row, col = pairs.long().unbind(1)
    outside = (row < 0) | (row >= rows) | (col < 0) | (col >= cols)
    if outside.any():
        first = tuple(pairs[outside][0].tolist())
        raise ValueError(f"{name}: block {first} is outside the grid of {rows} x {cols} blocks")
    ids = row * cols + col
    if len(ids.unique()) != len(ids):
        raise ValueError(f"{name}: names a block twice")
    return ids


def _positions(name: str, blocks: Blocks, pattern: Pattern, present: Tensor) -> Tensor:
    """Present blocks, given as bool ``[nnz]`` or pairs, as int64 positions in BSR order."""
    if isinstance(blocks, Tensor) and blocks.dtype == torch.bool:
        if tuple(blocks.shape) != (pattern.nnz,):
            raise ValueError(f"{name}: must be bool [{pattern.nnz}], got {list(blocks.shape)}")
        return blocks.to(present.device).nonzero().squeeze(1)
    ids = _ids(name, blocks, pattern)
    absent = ids[~torch.isin(ids, present)]
    if len(absent):
        raise ValueError(f"{name}: block {_pair(absent[0], pattern)} is not present")
    return torch.searchsorted(present, ids)
