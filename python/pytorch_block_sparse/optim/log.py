"""What a method logs of an update, of all layers in one round trip to the device."""

import itertools
from typing import Any

import torch
from torch import Tensor

from .layers import SparseLayer, sums_of_parts


def log_entry(
    step: int,
    layers: list[SparseLayer],
    before: list[int],
    changed: dict[str, int],
    numbers: list[int],
) -> dict[str, Any]:
    """The line of a step.

    Args:
        step: its number.
        layers: all that the method cares for.
        before: how many blocks of each were alive before the step.
        changed: how many were replaced or removed, by the layer's name.
        numbers: what :func:`measure` has found, joined.
    """
    lines, cells = {}, 0
    for i, layer in enumerate(layers):
        born, rows, cols = numbers[i :: len(layers)]
        lines[layer.name] = {
            "density": layer.alive_count / max(1, layer.cells),
            "churn": changed.get(layer.name, 0) / max(1, before[i]),
            "age": (step * layer.alive_count - born) / max(1, layer.alive_count),
            "dead_rows": layer.module.pattern.grid[0] - rows,
            "dead_cols": layer.module.pattern.grid[1] - cols,
        }
        cells += layer.cells
    return {
        "step": step,
        "density": sum(layer.alive_count for layer in layers) / max(1, cells),
        "churn": sum(changed.values()) / max(1, sum(before)),
        "layers": lines,
    }


def measure(layers: list[SparseLayer]) -> list[Tensor]:
    """int64, of the blocks of each layer that are alive: sums of `born`, rows, and columns."""
    device = layers[0].born.device
    patterns = [layer.module.pattern for layer in layers]
    sizes = [pattern.nnz for pattern in patterns]
    counts = torch.tensor(sizes).to(device, non_blocking=True)
    alive = torch.cat([layer.alive.to(device) for layer in layers])
    born = torch.cat([layer.born.to(device) for layer in layers])
    measured = [sums_of_parts(born * alive, sizes)]
    for dim in (0, 1):
        of = [pattern.col_indices if dim else pattern.row_indices for pattern in patterns]
        lengths = [pattern.grid[dim] for pattern in patterns]
        # One row of flags for all layers, where each has its own part.
        starts = torch.tensor([0, *itertools.accumulate(lengths)])[:-1]
        starts = starts.to(device, non_blocking=True)
        own = starts.repeat_interleave(counts, output_size=len(alive))
        own += torch.cat([indices.to(device) for indices in of])
        seen = torch.zeros(sum(lengths), dtype=torch.bool, device=device)
        measured.append(sums_of_parts(seen.index_add_(0, own, alive), lengths))
    return measured
