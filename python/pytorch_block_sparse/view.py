"""Looks at a model: a table of its block-sparse layers, and a picture of their patterns.

It shows which blocks there are. What they weigh is in :class:`optim.BlockImportance`.
"""

from pathlib import Path
from typing import Any

from torch import nn

from ._module import PatternModule
from ._table import format_rows
from .prepacked import PrepackedLinear

_LAYERS = (PatternModule, PrepackedLinear)


def summary(model: nn.Module) -> str:
    """A table of the block-sparse layers of `model`: sizes, blocks, density and what they save.

    ``dense`` is the number of parameters that the layer would have without sparsity; ``bytes`` is
    what it holds in memory: values, bias, scales where values are int8, and indices. The last two
    lines are of these layers together, and of the whole model.

    Example:
        >>> from torch import nn
        >>> from pytorch_block_sparse import BlockSparseLinear, summary
        >>> up = BlockSparseLinear(64, 256, density=0.25)
        >>> print(summary(nn.Sequential(nn.Embedding(100, 64), up)))
        layer   out x in  block  blocks  density  parameters   dense   bytes
        1       256 x 64  32x32  4 / 16     0.25       4,352  16,640  17,572
        sparse                   4 / 16     0.25       4,352  16,640  17,572
        model                                         10,752  23,040  43,172
    """
    rows: list[tuple[str, ...]] = [
        ("layer", "out x in", "block", "blocks", "density", "parameters", "dense", "bytes")
    ]
    present = cells = stored = dense = 0
    for name, layer in _layers(model).items():
        blocks, grid = layer.pattern.nnz, layer.pattern.grid
        bias = 0 if layer.bias is None else layer.bias.numel()
        counts = (
            blocks * layer.block_shape[0] * layer.block_shape[1] + bias,
            layer.out_features * layer.in_features + bias,
        )
        rows.append(
            (
                name or "(itself)",
                f"{layer.out_features} x {layer.in_features}",
                f"{layer.block_shape[0]}x{layer.block_shape[1]}",
                f"{blocks:,} / {grid[0] * grid[1]:,}",
                f"{layer.density:.3g}",
                *(f"{count:,}" for count in (*counts, _bytes_of(layer))),
            )
        )
        present, cells = present + blocks, cells + grid[0] * grid[1]
        stored, dense = stored + counts[0], dense + counts[1]
    share = f"{present / cells:.3g}" if cells else ""
    held = f"{_bytes_of(*_layers(model).values()):,}"
    total = (f"{stored:,}", f"{dense:,}", held)
    rows.append(("sparse", "", "", f"{present:,} / {cells:,}", share, *total))
    others = sum(p.numel() for p in _other_parameters(model))
    total = (f"{stored + others:,}", f"{dense + others:,}", f"{_bytes_of(model):,}")
    rows.append(("model", "", "", "", "", *total))
    return format_rows(rows)


def plot_pattern(module: nn.Module, path: str | Path | None = None) -> Any:
    """Draws which blocks are present: of a layer, or of each block-sparse layer of a model.

    Args:
        module: a layer or a model.
        path: where to save the picture, if anywhere.

    Returns:
        The ``matplotlib`` figure.

    Raises:
        ValueError: no block-sparse layer.
        ImportError: matplotlib is not installed.
    """
    layers = _layers(module)
    if not layers:
        raise ValueError(f"module: {type(module).__name__} has no block-sparse layer")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_pattern: needs matplotlib (pip install matplotlib)") from error
    across = min(4, len(layers))
    down = -(-len(layers) // across)
    figure = Figure(figsize=(3.2 * across, 3.0 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for ax in axes.flat[len(layers) :]:
        ax.set_axis_off()
    for ax, (name, layer) in zip(axes.flat, layers.items(), strict=False):
        mask = layer.pattern.mask().cpu().numpy()
        ax.imshow(mask, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        ax.set_title(f"{name} {layer.density:.3g}".strip(), fontsize=8)
        ax.set_xlabel("block column")
        ax.set_ylabel("block row")
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _LAYERS)}


def _bytes_of(*modules: nn.Module) -> int:
    """Of all their parameters and buffers, each once."""
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _other_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that belong to no block-sparse layer; each once."""
    sparse = {id(p) for layer in _layers(model).values() for p in layer.parameters()}
    return [p for p in model.parameters() if id(p) not in sparse]
