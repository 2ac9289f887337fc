"""BlockWanda: one shot. Scores blocks by weight and input on calibration data, keeps the best.

Wanda (Sun et al., arXiv 2306.11695) summed over blocks. Always train on afterwards: at the
densities and block sizes of this library one shot alone loses too much.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._progress import progress
from . import scores
from .distribution import keep_blocks, layer_counts
from .observe import InputSquares, watch_inputs
from .schedule import Every
from .sparsifier import Sparsifier


class BlockWanda(Sparsifier):
    """Prunes once, after a calibration pass, and frees the memory (:func:`compact_`).

    The score of a block is the sum over it of W^2 E[x^2], or its energy tr(W H Wt) with
    H = E[x xt] inside the block column.

    Args:
        model: a patched model, usually at density 1.
        optimizer: the optimizer that goes on training it, if there is one already.
        density: of all layers together, afterwards, in (0, 1].
        distribution: "uniform", "erk" or "global", as in :class:`GradualMagnitude`.
        score: "activation" or "energy".
        only, process_group: see :class:`Sparsifier`. Ranks may see different calibration data.

    Example:
        >>> import torch
        >>> from pytorch_block_sparse import BlockSparseLinear
        >>> from pytorch_block_sparse.optim import BlockWanda
        >>> model = torch.nn.Sequential(BlockSparseLinear(128, 128, density=1.0))
        >>> wanda = BlockWanda(model, density=0.25)
        >>> with wanda.calibration():
        ...     out = model(torch.randn(64, 128))
        >>> entry = wanda.step()
        >>> model[0].block_count
        4
    """

    _acts_alone = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        density: float,
        distribution: str = "uniform",
        score: str = "activation",
        only: Callable[[str], bool] | None = None,
        process_group: Any = None,
    ) -> None:
        if score not in ("activation", "energy"):
            raise ValueError(f"score: must be 'activation' or 'energy', got {score!r}")
        super().__init__(model, optimizer, Every(1, 1, 1), only=only, process_group=process_group)
        self.distribution = distribution
        self._score = scores.energy if score == "energy" else scores.activation
        grids = {layer.name: layer.module.pattern.grid for layer in self.layers}
        self._counts = layer_counts(grids, density, distribution)
        products = score == "energy"
        self._inputs = {
            layer.name: InputSquares(layer.module, products=products) for layer in self.layers
        }

    @contextmanager
    def calibration(self) -> Iterator[None]:
        """Inside, each forward of the model counts; it may be entered again for more data."""
        with torch.no_grad(), watch_inputs(list(self._inputs.values())):
            yield

    def step(self) -> dict[str, Any] | None:
        """Prunes. Does nothing when called again.

        Raises:
            RuntimeError: no calibration data was seen by a layer.
        """
        if self.steps:
            return None
        self.steps = 1
        try:
            with torch.no_grad():
                return self._run_update()
        except RuntimeError:
            self.steps = 0
            raise

    def _update(self) -> dict[str, int]:
        norms: dict[str, Tensor] = {}
        for layer in self.layers:
            inputs = self._inputs[layer.name]
            mean = inputs.mean(self.process_group)
            if not inputs.tokens:
                raise RuntimeError(
                    f"{layer.name}: saw no calibration data; run the model inside calibration()"
                )
            norm = self._score(layer.module.values, mean, layer.module.col_indices)
            norms[layer.name] = self._without_nan(layer, norm)
        before = {layer.name: layer.module.block_count for layer in self.layers}
        counts = {name: min(count, before[name]) for name, count in self._counts.items()}
        keep = keep_blocks(norms, counts, self.distribution)
        for layer in progress(self.layers, "Compacting"):
            layer.set_alive(keep[layer.name])
            self._compact(layer)
        return {layer.name: before[layer.name] - layer.module.block_count for layer in self.layers}
