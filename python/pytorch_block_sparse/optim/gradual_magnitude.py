"""GradualMagnitude: from dense to sparse while training, the smallest blocks first.

Zhu and Gupta, arXiv 1710.01878, in blocks. The strongest simple baseline for language models; best
with distillation (:class:`DistillationLoss`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._progress import progress
from . import scores
from .distribution import keep_blocks, layer_counts
from .layers import SparseLayer
from .schedule import Cubic, Every, check_int, share_of
from .sparsifier import Sparsifier
from .update import block_ids


class GradualMagnitude(Sparsifier):
    """Removes the blocks of lowest norm, along a cubic schedule of the density.

    Density goes from that of the model (patch it at density 1) to `density` between `begin` and
    `end`: d(t) = d_end + (d_start - d_end) (1 - progress)^3. A removed block is held at zero; its
    memory and its arithmetic are freed at a few of the updates only, by :func:`compact_`, which
    makes new Parameters (read there what has to know). The last update always compacts.

    Args:
        model, optimizer, seed, only, process_group: see :class:`Sparsifier`.
        total_steps: T, the length of the training in real optimizer steps.
        density: of all layers together, at the end, in (0, 1].
        begin, end: the steps between which the density falls; by default 0.1 T and 0.4 T: what is
            left of the training is for the blocks that are left. The first update is an interval
            after `begin`, the last at `end` or less than one before it.
        updates: how many updates at most, all in the same interval of whole steps.
        compactions: at how many of them memory is freed; 0: never (then call :meth:`compact`).
        distribution: "erk" (small and oblong layers are kept denser), "uniform" (each layer has the
            same density), or "global" (blocks of all layers compete; each layer keeps at least
            one).
        score: what the blocks are ranked by: "relative" (the 2-norm, against those of the block's
            row and column), or a plain norm, "l1", "l2" or "max".

    Raises:
        ValueError: also a model that is sparser than `density` already, or compactions under DDP.

    Example:
        >>> import torch
        >>> from pytorch_block_sparse import BlockSparseLinear
        >>> from pytorch_block_sparse.optim import GradualMagnitude
        >>> model = torch.nn.Sequential(BlockSparseLinear(128, 128, density=1.0))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> sparsifier = GradualMagnitude(model, optimizer, total_steps=20, density=0.25, updates=3)
        >>> for _ in range(20):
        ...     model(torch.randn(8, 128)).square().mean().backward()
        ...     optimizer.step()
        ...     entry = sparsifier.step()
        ...     optimizer.zero_grad()
        >>> [(entry["step"], entry["density"]) for entry in sparsifier.log]
        [(4, 0.5), (6, 0.25), (8, 0.25)]
        >>> model[0].block_count
        4
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        *,
        density: float,
        begin: int | None = None,
        end: int | None = None,
        updates: int = 40,
        compactions: int = 6,
        distribution: str = "erk",
        score: str = "relative",
        seed: int = 0,
        only: Callable[[str], bool] | None = None,
        process_group: Any = None,
    ) -> None:
        check_int("updates", updates)
        check_int("compactions", compactions)
        if updates < 1 or compactions < 0:
            raise ValueError(
                f"updates: at least 1, and compactions at least 0, got {updates}, {compactions}"
            )
        known = ["relative", *scores.FROM_WEIGHTS]
        if score not in known:
            raise ValueError(f"score: must be one of {known}, got {score!r}")
        begin = share_of(total_steps, 0.1, "begin", begin)
        end = share_of(total_steps, 0.4, "end", end)
        # Rounded up: the last update is at `end`, or less than an interval before it.
        every = max(1, -(-(end - begin) // updates))
        last = begin + max(1, (end - begin) // every) * every
        self._progress = Cubic(1.0, 0.0, begin, min(end, last))  # (1 - progress)^3
        schedule = Every(every, begin + every, last)
        super().__init__(
            model, optimizer, schedule, seed=seed, only=only, process_group=process_group
        )
        if compactions:
            self._refuse_compaction_under_ddp()
        self.distribution = distribution
        self.score = score
        self.compactions = compactions
        grids = {layer.name: layer.module.pattern.grid for layer in self.layers}
        self._final = layer_counts(grids, density, distribution)
        self._refuse_a_sparser_model()

    def _refuse_a_sparser_model(self) -> None:
        if self.distribution == "global":  # only the sum counts: a layer may be left with one block
            wanted, there = sum(self._final.values()), sum(layer.start for layer in self.layers)
            if wanted > there:
                raise ValueError(
                    f"density: the layers together would need {wanted} blocks, but have {there}; "
                    "patch the model at a higher density"
                )
            return
        for layer in self.layers:
            if self._final[layer.name] > layer.start:
                raise ValueError(
                    f"density: {layer.name} would need {self._final[layer.name]} blocks, but has "
                    f"{layer.start}; patch the model at a higher density, or take "
                    "distribution='uniform'"
                )

    def compact(self) -> None:
        """Frees the memory of all blocks held at zero. Makes new Parameters.

        Raises:
            RuntimeError: optimizer steps since the last :meth:`step`: such blocks may have grown.
        """
        self._refuse_missed_steps()
        for layer in progress(self.layers, "Compacting"):
            self._compact(layer)

    def _after_step(self) -> None:
        self._hold_at_zero()

    def _update(self) -> dict[str, int]:
        before = {layer.name: layer.alive_count for layer in self.layers}
        norms = {
            layer.name: self._scores(layer).masked_fill(~layer.alive, -torch.inf)
            for layer in self.layers
        }
        counts = {
            layer.name: round(
                self._final[layer.name]
                + (layer.start - self._final[layer.name]) * self._progress(self.steps)
            )
            for layer in self.layers
        }
        keep = keep_blocks(norms, counts, self.distribution)
        for layer in self.layers:
            layer.set_alive(layer.alive & keep[layer.name])
        self._hold_at_zero()
        changed = {layer.name: before[layer.name] - layer.alive_count for layer in self.layers}
        if self._compaction_due():
            self.compact()
        return changed

    def _scores(self, layer: SparseLayer) -> Tensor:
        values, pattern = layer.module.values, layer.module.pattern
        norm = scores.FROM_WEIGHTS["l2" if self.score == "relative" else self.score]
        # Against that of a block of ones: layers may differ in their block shapes.
        norms = norm(values) / norm(torch.ones_like(values[:1]))
        if self.score != "relative":
            return self._without_nan(layer, norms)
        # An infinite one is as broken as NaN, and would take the others of its row with it.
        norms = self._without_nan(layer, norms.masked_fill(norms.isinf(), torch.nan))
        return scores.relative(norms, block_ids(pattern), pattern.grid)

    def _compaction_due(self) -> bool:
        if not self.compactions:
            return False
        begin, every, last = self.schedule.begin, self.schedule.interval, self.schedule.end
        total, number = (last - begin) // every + 1, (self.steps - begin) // every + 1
        return number * self.compactions // total > (number - 1) * self.compactions // total
