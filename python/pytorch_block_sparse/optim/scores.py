"""How useful a block is, from its weights, its gradient and its inputs. Pure functions of tensors.

Each takes ``[nnz, block_out, block_in]`` and returns ``[nnz]``, in float32 or float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import block_dots


def _wide(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def l1(values: Tensor) -> Tensor:
    """Sum of |W|. The best drop score of the three for BERT (arXiv 2108.06277)."""
    wide = _wide(values)
    # On a GPU the norm reads the values once and writes nothing; on a CPU the sum is faster.
    return torch.linalg.vector_norm(wide, 1, dim=(1, 2)) if wide.is_cuda else wide.abs().sum((1, 2))


def l2(values: Tensor) -> Tensor:
    """Square root of the sum of W^2."""
    return torch.linalg.vector_norm(_wide(values), dim=(1, 2))


def largest(values: Tensor) -> Tensor:
    """Largest |W|."""
    return _wide(values).abs().amax(dim=(1, 2))


def relative(norms: Tensor, ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """Norm of a block over (mean of its block row * mean of its block column)^(1/4).

    Half way, in logarithms, between the norm and the norm over the geometric mean of the two: a row
    or a column of small blocks keeps some, and one of large blocks does not keep all. Relative
    importance as such is from RIA (Zhang et al., ICLR 2024: of single weights, after training).

    Args:
        norms: ``[nnz]``; minus infinity counts as zero for the others.
        ids: int64 ``[nnz]``, block row * block columns + block column.
        grid: (block rows, block columns); a mean is over all cells, absent ones too.
    """
    # Sums of a dense grid, not an index_add: the same bits in every run, on every rank.
    cells = norms.new_zeros(grid[0] * grid[1]).index_copy_(0, ids, norms.clamp(min=0))
    rows, cols = cells.view(grid).mean(1), cells.view(grid).mean(0)
    around = rows[ids // grid[1]] * cols[ids % grid[1]]
    return norms / around.clamp(min=torch.finfo(norms.dtype).tiny) ** 0.25


def effect(values: Tensor, gradient: Tensor) -> Tensor:
    """sum W*G, signed: minus the first-order change of the loss when the block is removed."""
    wide, slope = _wide(values), _wide(gradient)
    # A matrix product makes no array of W * G, but is seven times slower than that on a CPU.
    if not wide.is_cuda:
        return (wide * slope).sum((1, 2))
    return torch.bmm(wide.flatten(1).unsqueeze(1), slope.flatten(1).unsqueeze(2)).flatten()


def effects(
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
    dead: Sequence[Tensor],
    aside: Sequence[Tensor],
) -> Tensor:
    """:func:`effect` of the blocks of many layers, joined, on the device of the first.

    Args:
        values, gradients: of each layer.
        dead: int64, of each layer: positions of the blocks whose weight is not in `values` ...
        aside: ... but here, ``[len(dead), block_out, block_in]``.
    """
    first = values[0]
    kind = (first.dtype, first.device)
    if first.is_cuda and all((t.dtype, t.device) == kind for t in [*values, *gradients, *aside]):
        # A launch or two for all layers: starting them for each takes longer than what they do.
        dense = ([t.contiguous() for t in tensors] for tensors in (values, gradients))
        return block_dots(*dense, list(dead), list(aside))
    sums = []
    for weight, gradient, positions, kept in zip(values, gradients, dead, aside, strict=True):
        sums.append(effect(weight, gradient))
        if len(positions):
            sums[-1].index_copy_(0, positions, effect(kept, gradient[positions]))
    return torch.cat([part.to(first.device) for part in sums])


def fisher(values: Tensor, gradient: Tensor) -> Tensor:
    """Sum of (W*G)^2: the diagonal Fisher information, weighted by W^2."""
    return (_wide(values) * _wide(gradient)).square().sum(dim=(1, 2))


def activation(values: Tensor, squares: Tensor, cols: Tensor) -> Tensor:
    """Sum of W^2 E[x^2]: Wanda (arXiv 2306.11695) squared and summed over the block.

    Args:
        values: ``[nnz, block_out, block_in]``.
        squares: ``[block_cols, block_in]``, mean square of each input feature.
        cols: ``[nnz]``, block column of each block.
    """
    return torch.einsum("boi,bi->b", _wide(values).square().to(squares.dtype), squares[cols.long()])


def energy(values: Tensor, products: Tensor, cols: Tensor) -> Tensor:
    """tr(W H Wt) with H = E[x xt]: the mean square of what the block adds to the output.

    Args:
        values: ``[nnz, block_out, block_in]``.
        products: ``[block_cols, block_in, block_in]``, mean of x xt inside each block column.
        cols: ``[nnz]``, block column of each block.
    """
    wide = _wide(values).to(products.dtype)
    return (torch.bmm(wide, products[cols.long()]) * wide).sum(dim=(1, 2))


FROM_WEIGHTS = {"l1": l1, "l2": l2, "max": largest}
