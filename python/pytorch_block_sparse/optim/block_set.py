"""BlockSET: drop the smallest blocks, grow random ones. The default for training from scratch.

SET (Mocanu et al., arXiv 1707.04780) in blocks, as for BERT pre-training in arXiv 2108.06277.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import scores
from .choose import lowest, random_sample
from .layers import SparseLayer
from .schedule import Cosine, Every, Schedule, check_int, check_share, share_of
from .sparsifier import Sparsifier

_SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg"}


class BlockSET(Sparsifier):
    """Replaces a falling share of each layer's blocks: those of lowest norm, by random others.

    At each update, k = round(nnz * drop(step)) blocks of the lowest L1 norm go, and k of the absent
    blocks, drawn uniformly, come, with value zero. nnz stays. By default the share is
    0.5 * (1 + cos(pi t / end)) / 2 with end = T / 2: what comes late learns little while the
    learning rate falls.

    Args:
        model, optimizer, seed, only, process_group: see :class:`Sparsifier`.
        total_steps: T, the length of the training in real optimizer steps.
        drop: the share to start with, or a schedule of it.
        every: steps between updates; by default so that there are about 30, but at least 100 steps
            (or a quarter of `end`, if that is less): a new block that has learnt little is the next
            one to go, and the layer never has all its blocks at work.
        end: last step with an update; by default T / 2.
        score: "l1", "l2" or "max": the norm of which the lowest blocks go.
        new_values: called with (layer, k), returns the values of k new blocks,
            ``[k, block_out, block_in]``; by default zero.
        second_moment: what new blocks find in Adam's exp_avg_sq (RMSprop's square_avg). "zero", as
            in all other state; or "mean", the mean over the layer's other blocks. With zeros and a
            step counter that goes on, Adam's first steps in a new block are 3 to 13 times as large
            as elsewhere (1 / sqrt(1 - beta2) without its bias correction).

    Example:
        >>> import torch
        >>> from pytorch_block_sparse import BlockSparseLinear
        >>> from pytorch_block_sparse.optim import BlockSET
        >>> model = torch.nn.Sequential(BlockSparseLinear(128, 128, density=0.25))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> sparsifier = BlockSET(model, optimizer, total_steps=400, every=3)
        >>> for _ in range(10):
        ...     model(torch.randn(8, 128)).square().mean().backward()
        ...     optimizer.step()
        ...     entry = sparsifier.step()
        ...     optimizer.zero_grad()
        >>> [(entry["step"], entry["churn"]) for entry in sparsifier.log]
        [(3, 0.5), (6, 0.5), (9, 0.5)]
    """

    _updates = 30  # in a long training

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        *,
        drop: float | Schedule = 0.5,
        every: int | None = None,
        end: int | None = None,
        score: str = "l1",
        new_values: Callable[[SparseLayer, int], Tensor] | None = None,
        second_moment: str = "zero",
        seed: int = 0,
        only: Callable[[str], bool] | None = None,
        process_group: Any = None,
    ) -> None:
        end = share_of(total_steps, 0.5, "end", end)
        if every is None:
            every = max(1, min(end // 4, max(100, end // self._updates)))
        check_int("every", every, least=1)
        if not callable(drop):
            check_share("drop", drop)
        if score not in list(scores.FROM_WEIGHTS):  # a list: of what has no hash too
            raise ValueError(f"score: must be one of {list(scores.FROM_WEIGHTS)}, got {score!r}")
        if new_values is not None and not callable(new_values):
            raise TypeError(
                "new_values: must take (layer, k) and return values, got "
                f"{type(new_values).__name__}"
            )
        if second_moment not in ("zero", "mean"):
            raise ValueError(f"second_moment: must be 'zero' or 'mean', got {second_moment!r}")
        self.second_moment = second_moment
        self.drop = drop if callable(drop) else Cosine(drop, end)
        self.score = scores.FROM_WEIGHTS[score]
        self.new_values = new_values
        super().__init__(
            model,
            optimizer,
            Every(every, 0, end),
            seed=seed,
            only=only,
            process_group=process_group,
        )

    def _update(self) -> dict[str, int]:
        return {layer.name: self._update_layer(layer) for layer in self.layers}

    def _update_layer(self, layer: SparseLayer) -> int:
        count = self._count(layer, self.steps)
        ids = self._grow(layer, count)
        norms = self._without_nan(layer, self.score(layer.module.values))
        new_values = None if self.new_values is None else self.new_values(layer, len(ids))
        change = self._replace(layer, lowest(norms, len(ids)), ids, new_values)
        if self.second_moment == "mean":
            self._fill_second_moment(layer, change.fresh)
        return len(ids)

    def _fill_second_moment(self, layer: SparseLayer, fresh: Tensor) -> None:
        assert self.optimizer is not None
        state = self.optimizer.state.get(layer.module.values, {})
        for name in _SECOND_MOMENTS & state.keys():
            weight = (~fresh).to(state[name].dtype)
            per_block = state[name].mean(dim=(1, 2))
            mean = (per_block * weight).sum() / weight.sum().clamp(min=1)
            state[name].copy_(torch.where(fresh[:, None, None], mean, state[name]))

    def _count(self, layer: SparseLayer, step: int) -> int:
        """How many blocks are replaced at `step`; a warning if none can be though some should."""
        nnz, share = layer.module.block_count, self.drop(step)
        check_share(f"drop, at step {step}", share)
        wanted = round(nnz * share)
        possible = min(wanted, layer.cells - nnz)
        reason = None
        if wanted and not possible:
            reason = "it has all its blocks, there is none to grow"
        elif share > 0 and not round(nnz * self.drop(1)):
            reason = f"{self.drop(1):.3g} of its {nnz} blocks is less than one"
        if reason is not None:
            warnings.warn(f"{layer.name}: its pattern does not change: {reason}", stacklevel=2)
        return possible

    def _grow(self, layer: SparseLayer, count: int) -> Tensor:
        """Ids of `count` absent blocks."""
        return random_sample(self._absent(layer), count, self._random(layer, "grow"))
