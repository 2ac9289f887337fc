"""BlockImportance: measures how useful each block of a patched model is. It changes nothing.

The methods beside this file decide by some of these scores; here they are for people: as numbers,
as a table and as a picture.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import BlockSparseLinear
from . import scores
from .choose import generator, random_sample
from .layers import sparse_layers
from .observe import (
    CandidateGradients,
    GradientWatcher,
    InputSquares,
    PooledGradients,
    seen_by,
    watch_inputs,
)
from .schedule import check_number
from .update import absent_ids

_FROM_GRADIENTS = ("effect", "average", "fisher")
_FROM_INPUTS = ("activation",)
SCORES = (*scores.FROM_WEIGHTS, *_FROM_GRADIENTS, *_FROM_INPUTS)


class BlockImportance:
    """Scores of the blocks of a model.

    ==============  ========================================  ===========================
    score           of a block                                needs
    ==============  ========================================  ===========================
    l1, l2, max     norm of its weights
    effect          |sum W*G|: first-order change of the      :meth:`observe` after a
                    loss when it is removed (Molchanov et     backward
                    al., arXiv 1611.06440)
    average         moving average of that                    :meth:`observe`, repeatedly
    fisher          sum of (W*G)^2, over what was observed    :meth:`observe`, repeatedly
    activation      sum of W^2 E[x^2] (Wanda, arXiv           :meth:`calibration`
                    2306.11695)
    ==============  ========================================  ===========================

    Absent blocks: :meth:`candidates` and :meth:`pooled`.

    Args:
        model: a patched model.
        decay: of the moving average.
        only: takes a layer's name and says whether it counts; by default all.
        process_group: ranks over which inputs and candidates' gradients are summed; by default all.
            (Gradients of values are what DDP made them: already the mean over the ranks.)

    Example:
        >>> import torch
        >>> from pytorch_block_sparse import BlockSparseLinear
        >>> from pytorch_block_sparse.optim import BlockImportance
        >>> model = torch.nn.Sequential(BlockSparseLinear(64, 96, density=0.5))
        >>> importance = BlockImportance(model)
        >>> importance.scores("l1")["0"].shape
        torch.Size([3])
        >>> with importance.calibration():
        ...     loss = model(torch.randn(8, 64)).square().mean()
        >>> [row["layer"] for row in importance.table("activation")]
        ['0']
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float = 0.99,
        only: Callable[[str], bool] | None = None,
        process_group: Any = None,
    ) -> None:
        check_number("decay", decay)
        if only is not None and not callable(only):
            raise TypeError(f"only: must take a layer's name, got {type(only).__name__}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay: must be in [0, 1), got {decay}")
        self.decay = decay
        self.process_group = process_group
        layers = sparse_layers(model)
        self.layers = {name: layers[name] for name in layers if only is None or only(name)}
        if not self.layers:
            raise ValueError("only: chooses none of the model's block-sparse layers")
        self._measured: dict[str, dict[str, Tensor]] = {name: {} for name in self.layers}
        self._inputs: dict[str, InputSquares] = {}

    # --- measuring --------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self) -> None:
        """Takes in the gradients that a backward has just left; before they are zeroed.

        Raises:
            RuntimeError: no layer has a gradient.
        """
        if all(layer.values.grad is None for layer in self.layers.values()):
            raise RuntimeError("observe: no gradient; call it between backward and zero_grad")
        for name, layer in self.layers.items():
            if layer.values.grad is None:
                continue
            found, gradient = self._fresh(name, layer), layer.values.grad
            effect = scores.effect(layer.values, gradient).abs()
            fisher = scores.fisher(layer.values, gradient)
            old = found.get("average", effect)
            found["effect"] = effect
            found["average"] = self.decay * old + (1 - self.decay) * effect
            found["fisher"] = found.get("fisher", torch.zeros_like(fisher)) + fisher

    def _fresh(self, name: str, layer: BlockSparseLinear) -> dict[str, Tensor]:
        """What was measured of a layer, forgotten if its number of blocks has changed since."""
        found = self._measured[name]
        if any(len(item) != layer.block_count for item in found.values()):
            found.clear()
        return found

    @contextmanager
    def calibration(self) -> Iterator[None]:
        """Inside, each forward of the model counts for "activation". A new one starts anew."""
        self._inputs = {name: InputSquares(layer) for name, layer in self.layers.items()}
        with watch_inputs(list(self._inputs.values())):
            yield

    @contextmanager
    def candidates(
        self, share: float = 0.1, *, seed: int = 0
    ) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Inside, each backward scores a random sample of the *absent* blocks, exactly.

        Args:
            share: share of the absent blocks of each layer, in (0, 1].
            seed: of the sample.

        Yields:
            A dict, filled on leaving: layer to (pairs (block row, block column) ``[n, 2]``, 2-norm
            of the gradient of each ``[n]``).

        Raises:
            RuntimeError: on leaving: a layer has had no finite gradient.
        """
        check_number("share", share)
        if not 0 < share <= 1:
            raise ValueError(f"share: must be in (0, 1], got {share}")
        watchers = {}
        for name, layer in self.layers.items():
            absent = absent_ids(layer.pattern)
            count = -int(-share * len(absent) // 1)  # rounded up
            ids = random_sample(absent, count, generator(seed, name, 0))
            watchers[name] = CandidateGradients(layer, ids.sort().values)
        result: dict[str, tuple[Tensor, Tensor]] = {}
        with _removed(watchers):
            yield result
        self._refuse_the_unseen("candidates", watchers)
        for name, watcher in watchers.items():
            cols = max(1, self.layers[name].pattern.grid[1])
            pairs = torch.stack([watcher.ids // cols, watcher.ids % cols], dim=1)
            result[name] = (pairs, watcher.norms(group=self.process_group))

    @contextmanager
    def pooled(self) -> Iterator[dict[str, Tensor]]:
        """Inside, each backward bounds the gradient's norm of *every* block, present or absent.

        Yields:
            A dict, filled on leaving: layer to ``[block_rows, block_cols]``, sum over the tokens of
            |dy_B| |x_B|, an upper bound of the 2-norm of the block's gradient.

        Raises:
            RuntimeError: on leaving: a layer has had no finite gradient.
        """
        watchers = {name: PooledGradients(layer) for name, layer in self.layers.items()}
        result: dict[str, Tensor] = {}
        with _removed(watchers):
            yield result
        self._refuse_the_unseen("pooled", watchers)
        for name, watcher in watchers.items():
            result[name] = watcher.bounds(self.process_group)

    def _refuse_the_unseen(self, what: str, watchers: Mapping[str, GradientWatcher]) -> None:
        for name, seen in seen_by(watchers, self.process_group).items():
            if not seen:
                raise RuntimeError(
                    f"{what}: {name} has had no finite gradient inside {what}(); run forward and "
                    "backward there, or leave the layer out with `only`"
                )

    # --- results ----------------------------------------------------------------------------------

    @torch.no_grad()
    def scores(self, score: str = "l1") -> dict[str, Tensor]:
        """``[nnz]`` of each layer, in BSR order.

        Raises:
            ValueError: an unknown score.
            RuntimeError: what the score needs has not been measured.
        """
        if score in scores.FROM_WEIGHTS:
            of = scores.FROM_WEIGHTS[score]
            return {name: of(layer.values) for name, layer in self.layers.items()}
        if score in _FROM_GRADIENTS:
            return {name: self._from_gradients(name, score) for name in self.layers}
        if score in _FROM_INPUTS:
            if not self._inputs:
                raise RuntimeError("activation: run the model inside calibration() first")
            for name, inputs in self._inputs.items():
                if not inputs.seen(self.process_group):
                    raise RuntimeError(f"activation: {name} has had no input inside calibration()")
            return {
                name: scores.activation(
                    layer.values, self._inputs[name].mean(self.process_group), layer.col_indices
                )
                for name, layer in self.layers.items()
            }
        raise ValueError(f"score: must be one of {list(SCORES)}, got {score!r}")

    def _from_gradients(self, name: str, score: str) -> Tensor:
        found = self._fresh(name, self.layers[name])
        if score not in found:
            raise RuntimeError(f"{score}: {name} has no gradient; call observe() after backward")
        return found[score]

    def map(self, name: str, score: str = "l1") -> Tensor:
        """``[block_rows, block_cols]``: the scores of one layer on its grid, NaN where absent."""
        if name not in self.layers:
            raise ValueError(f"name: {name!r} is none of {list(self.layers)}")
        pattern, values = self.layers[name].pattern, self.scores(score)[name]
        grid = torch.full(pattern.grid, torch.nan, dtype=values.dtype, device=values.device)
        grid[pattern.row_indices.long(), pattern.col_indices.long()] = values
        return grid

    def table(self, score: str = "l1") -> list[dict[str, Any]]:
        """One dict for each layer: its pattern, and how its scores are spread.

        ``lowest_half`` is the share of the sum of scores that the lower half of the blocks has: 0.5
        where all are alike, near 0 where half could go.
        """
        rows = []
        for name, values in self.scores(score).items():
            layer = self.layers[name]
            mask, ordered = layer.pattern.mask(), values.double().sort().values
            half = ordered[: len(ordered) // 2].sum() / ordered.sum().clamp(min=1e-300)
            rows.append(
                {
                    "layer": name,
                    "shape": (layer.out_features, layer.in_features),
                    "block_shape": layer.block_shape,
                    "blocks": layer.block_count,
                    "density": layer.density,
                    "dead_rows": int((~mask.any(1)).sum()),
                    "dead_cols": int((~mask.any(0)).sum()),
                    "min": float(ordered[0]),
                    "mean": float(ordered.mean()),
                    "max": float(ordered[-1]),
                    "lowest_half": float(half),
                }
            )
        return rows

    def plot(
        self, score: str = "l1", names: list[str] | None = None, path: str | Path | None = None
    ) -> Any:
        """A heat map of the grid of blocks of each layer; absent blocks are white.

        Args:
            score: as in :meth:`scores`.
            names: layers to draw; by default all.
            path: where to save the picture, if anywhere.

        Returns:
            The ``matplotlib`` figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "plot: needs matplotlib (pip install pytorch_block_sparse[demo], or matplotlib)"
            ) from error
        names = list(self.layers) if names is None else names
        if isinstance(names, str) or not names:
            raise ValueError(f"names: must be a list of layers, one at least, got {names!r}")
        across = min(4, len(names))
        down = -(-len(names) // across)
        figure = Figure(figsize=(3.2 * across, 3.0 * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False)
        for ax in axes.flat[len(names) :]:
            ax.set_axis_off()
        for ax, name in zip(axes.flat, names, strict=False):
            image = ax.imshow(self.map(name, score).cpu().numpy(), interpolation="nearest")
            figure.colorbar(image, ax=ax, shrink=0.8)
            ax.set_title(f"{name}, density {self.layers[name].density:.2g}", fontsize=8)
            ax.set_xlabel("block column")
            ax.set_ylabel("block row")
        figure.suptitle(score)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


@contextmanager
def _removed(watchers: dict[str, Any]) -> Iterator[None]:
    """On leaving takes the hooks of all watchers away."""
    try:
        yield
    finally:
        for watcher in watchers.values():
            assert isinstance(watcher, GradientWatcher)
            watcher.remove()
