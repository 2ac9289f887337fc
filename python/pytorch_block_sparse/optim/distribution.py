"""How many blocks each layer gets, when a density is given for all of them together.

``uniform``: the same density in each layer. ``erk``: small and oblong layers are kept denser.
``global``: the scores of all layers compete, so that it takes scores and not only shapes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..pattern import check_density, count_for_density
from .choose import highest

Grid = tuple[int, int]


def layer_densities(
    grids: Mapping[str, Grid], density: float, distribution: str = "uniform"
) -> dict[str, float]:
    """The density of each layer.

    Args:
        grids: (block rows, block columns) of each layer, by name. Shapes in elements do as well,
            where all layers have square blocks of one size.
        density: share of the blocks that are present, in all layers together, in (0, 1].
        distribution: "uniform", or "erk": the Erdos-Renyi rule of SET (Mocanu et al., arXiv
            1707.04780; RigL, arXiv 1911.11134), density proportional to
            (rows + cols) / (rows * cols). A layer that would exceed 1 gets 1, the others the rest.

    Raises:
        ValueError: density out of range, or an unknown distribution.

    Example:
        >>> from pytorch_block_sparse.optim import layer_densities
        >>> layer_densities({"wide": (32, 8), "square": (8, 8)}, 0.25, "erk")
        {'wide': 0.22321428571428573, 'square': 0.35714285714285715}
    """
    check_density(density)
    if distribution == "uniform":
        return dict.fromkeys(grids, float(density))
    if distribution != "erk":
        raise ValueError(f"distribution: must be 'uniform' or 'erk' here, got {distribution!r}")
    cells = {name: rows * cols for name, (rows, cols) in grids.items()}
    weight = {
        name: rows + cols for name, (rows, cols) in grids.items()
    }  # density * cells, unscaled
    budget = density * sum(cells.values())
    full: set[str] = set()
    while True:
        open_layers = [name for name in grids if name not in full]
        rest = budget - sum(cells[name] for name in full)
        scale = rest / max(1, sum(weight[name] for name in open_layers))
        over = {name for name in open_layers if scale * weight[name] > cells[name]}
        if not over:
            break
        full |= over
    return {
        name: 1.0 if name in full else scale * weight[name] / max(1, cells[name]) for name in grids
    }


def layer_counts(
    grids: Mapping[str, Grid], density: float, distribution: str = "uniform"
) -> dict[str, int]:
    """The number of blocks of each layer, at least one: :func:`layer_densities`, rounded.

    For "global" those of "uniform", of which only the sum counts.
    """
    if distribution not in ("uniform", "erk", "global"):
        raise ValueError(
            f"distribution: must be 'uniform', 'erk' or 'global', got {distribution!r}"
        )
    even = "uniform" if distribution == "global" else distribution
    densities = layer_densities(grids, density, even)
    return {
        name: count_for_density(densities[name], rows * cols)
        for name, (rows, cols) in grids.items()
    }


def keep_blocks(
    scores: Mapping[str, Tensor], counts: Mapping[str, int], distribution: str = "uniform"
) -> dict[str, Tensor]:
    """Which blocks stay, bool ``[nnz]`` for each layer: those of the highest scores.

    Args:
        scores: ``[nnz]`` of each layer; for "global", on one scale in all layers.
        counts: how many stay in each layer; for "global" only their sum counts, and each layer
            keeps at least its best block.
        distribution: "global", or anything else for a count in each layer.
    """
    if distribution != "global":
        return {name: _mask_of_highest(score, counts[name]) for name, score in scores.items()}
    pieces = [score.index_fill(0, highest(score, 1), torch.inf) for score in scores.values()]
    merged = torch.cat([piece.to(pieces[0].device) for piece in pieces])
    masks = _mask_of_highest(merged, sum(counts.values())).split([len(p) for p in pieces])
    return {
        name: mask.to(score.device)
        for (name, score), mask in zip(scores.items(), masks, strict=True)
    }


def _mask_of_highest(score: Tensor, count: int) -> Tensor:
    mask = torch.zeros(len(score), dtype=torch.bool, device=score.device)
    return mask.index_fill_(0, highest(score, count), True)
