"""BlockMovement: learns a score per block along with the weights; blocks whose score falls go.

Soft movement pruning (Sanh et al., arXiv 2005.07683) in blocks, with the straight-through gradient.
Best known for fine-tuning. No second forward and no change of the layer: `values` hold the masked
weight W', so that its gradient is there for all blocks, masked ones too; the weights of masked
blocks are kept aside and come back if their score rises again.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._progress import progress
from . import scores
from .choose import highest
from .layers import SparseLayer, sums_of_parts
from .schedule import Cubic, Every, check_finite, check_int, share_of
from .sparsifier import Sparsifier


class BlockMovement(Sparsifier):
    """Removes the blocks whose learnt score S falls: mask = sigmoid(S) > tau.

    dL/dS of a block is the sum over it of dL/dW' * W (straight-through), plus the gradient of the
    penalty ``penalty * tau / tau_final * mean(sigmoid(S))`` over all blocks of all layers. Adam
    steps S in every ``score_every``-th real optimizer step, so much further: the sum reads all
    weights and gradients once more. tau goes from 0 to `threshold` between `begin` and `end`, as a
    cubic; after `end` the pattern stays and the masked blocks are freed.

    How dense the result is, is what the loss and `penalty` agree on; `floor` bounds it from below.

    Args:
        model, optimizer, seed, only, process_group: see :class:`Sparsifier`. Patch the model at the
            density to start from, usually 1.
        total_steps: T, the length of the training in real optimizer steps.
        penalty: lambda; more makes the result sparser (5 to 30).
        threshold: tau at the end.
        score_lr: learning rate of S, for each real optimizer step.
        score_every: S is stepped in every so many of them; by default so that it is about 250
            times between `begin` and `end`, but at least in every 25th.
        floor: in each layer never fewer than this share of its grid stays.
        begin, end: first and last step of the threshold's rise; by default 0.1 T and 0.75 T.
        every: steps between two masks; by default so that there are about 65, but at least 10.
        compact: free the memory of masked blocks at `end` (makes new Parameters). If False, call
            :meth:`compact` yourself.

    Example:
        >>> import torch
        >>> from pytorch_block_sparse import BlockSparseLinear
        >>> from pytorch_block_sparse.optim import BlockMovement
        >>> model = torch.nn.Sequential(BlockSparseLinear(128, 128, density=1.0))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> sparsifier = BlockMovement(
        ...     model, optimizer, total_steps=40, floor=0.25, score_lr=1.0, every=5
        ... )
        >>> for _ in range(40):
        ...     model(torch.randn(8, 128)).square().mean().backward()
        ...     optimizer.step()
        ...     entry = sparsifier.step()
        ...     optimizer.zero_grad()
        >>> model[0].block_count
        4
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        *,
        penalty: float = 10.0,
        threshold: float = 0.1,
        score_lr: float = 1e-2,
        score_every: int | None = None,
        floor: float = 0.005,
        begin: int | None = None,
        end: int | None = None,
        every: int | None = None,
        compact: bool = True,
        seed: int = 0,
        only: Callable[[str], bool] | None = None,
        process_group: Any = None,
    ) -> None:
        check_finite("threshold", threshold)
        check_finite("floor", floor)
        check_finite("penalty", penalty)
        check_finite("score_lr", score_lr)
        if not 0 < threshold < 1:
            raise ValueError(f"threshold: must be in (0, 1), got {threshold}")
        if not 0 < floor <= 1:
            raise ValueError(f"floor: must be in (0, 1], got {floor}")
        if not penalty >= 0:
            raise ValueError(f"penalty: must not be negative, got {penalty}")
        if score_lr < 0:
            raise ValueError(f"score_lr: must not be negative, got {score_lr}")
        begin, end = (
            share_of(total_steps, 0.1, "begin", begin),
            share_of(total_steps, 0.75, "end", end),
        )
        if every is None:
            every = max(10, (end - begin) // 65)
        check_int("every", every, least=1)
        if score_every is None:
            score_every = min(25, max(1, (end - begin) // 250))
        check_int("score_every", score_every, least=1)
        self.tau = Cubic(0.0, threshold, begin, end)
        last = begin + (end - begin) // every * every
        schedule = Every(every, begin, last)
        super().__init__(
            model, optimizer, schedule, seed=seed, only=only, process_group=process_group
        )
        if compact:
            self._refuse_compaction_under_ddp()
        self.penalty, self.threshold, self.floor = penalty, threshold, floor
        self.score_every = score_every
        self.compact_at_end = compact
        self._aside = {
            layer.name: layer.module.values.detach()[layer.dead] for layer in self.layers
        }
        # One tensor for all layers: on a GPU the work on scores is mostly that of starting it.
        blocks = sum(layer.start for layer in self.layers)
        self._score = torch.zeros(blocks, device=self.layers[0].born.device)
        self._adam = torch.optim.Adam([self._score], lr=score_lr * score_every)

    @property
    def scores(self) -> dict[str, Tensor]:
        """S of each layer, ``[nnz]``: parts of one tensor, by the layer's name."""
        return self._by_layer(self._score)

    def compact(self) -> None:
        """Frees the memory of masked blocks, for good. Makes new Parameters.

        Raises:
            RuntimeError: optimizer steps since the last :meth:`step`: masked blocks may have moved.
        """
        self._refuse_missed_steps()
        keep = self._joined(layer.alive for layer in self.layers)
        for layer in progress(self.layers, "Compacting"):
            self._aside[layer.name] = self._aside[layer.name][:0]
            self._compact(layer)
        state = self._adam.state.get(self._score, {})
        kept = {name: item if name == "step" else item[keep] for name, item in state.items()}
        self._set_score(self._score[keep], kept)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken: see :class:`Sparsifier`."""
        super().load_state_dict(state)
        parts = list(state["layers"].values())
        adam = {
            name: item.clone() if name == "step" else self._joined(p["adam"][name] for p in parts)
            for name, item in parts[0]["adam"].items()
        }
        self._set_score(self._joined(part["score"] for part in parts), adam)

    def _collect(self) -> None:
        if self.steps >= self.schedule.end or self.steps % self.score_every:
            return
        self._check_layers()
        blocks = sum(layer.start for layer in self.layers)
        push = self.penalty * self.tau(self.steps) / self.threshold
        scale = getattr(self.optimizer, "grad_scale", None)  # fused, under a GradScaler
        slope = self._slope()
        soft = torch.sigmoid(self._score)
        self._score.grad = push / blocks * soft * (1 - soft)
        self._score.grad += (slope if scale is None else slope / scale).to(self._score.dtype)
        self._adam.step()

    def _slope(self) -> Tensor:
        """dL/dS of each block, but for the penalty's part; 0 in layers that had no gradient."""
        seen = [layer for layer in self.layers if layer.module.values.grad is not None]
        if not seen:
            warnings.warn(
                f"BlockMovement: no layer has a gradient in step {self.steps + 1}, so the scores "
                "follow the penalty alone; call backward() before it, or in its closure",
                stacklevel=5,
            )
            return torch.zeros_like(self._score)
        values = [layer.module.values for layer in seen]
        slopes = scores.effects(
            values,
            [own.grad for own in values if own.grad is not None],
            [layer.dead for layer in seen],
            [self._aside[layer.name].to(layer.module.values.dtype) for layer in seen],
        )
        if len(seen) == len(self.layers):
            return slopes
        parts = iter(slopes.split([len(own) for own in values]))
        return self._joined(
            slopes.new_zeros(len(layer.alive)) if layer.module.values.grad is None else next(parts)
            for layer in self.layers
        )

    def _after_step(self) -> None:
        self._hold_at_zero()

    def _update(self) -> dict[str, int]:
        # For all layers at once: their number is what launches and waiting for a GPU cost.
        alive = self._mask()
        flips = alive != self._joined(layer.alive for layer in self.layers)
        changed, gone = torch.stack([self._counts(flips), self._counts(~alive)]).tolist()
        dead = (~alive).nonzero().squeeze(1).split(gone)
        start = 0
        for layer, now, positions in zip(self.layers, self._split(alive), dead, strict=True):
            values, device = layer.module.values, layer.alive.device
            values.index_copy_(0, layer.dead, self._aside[layer.name].to(values.dtype))
            layer.alive, layer.dead = now.to(device), (positions - start).to(device)
            self._aside[layer.name] = values.index_select(0, layer.dead)
            start += len(now)
        self._hold_at_zero()
        if self.steps == self.schedule.end and self.compact_at_end:
            self.compact()
        return {layer.name: count for layer, count in zip(self.layers, changed, strict=True)}

    def _mask(self) -> Tensor:
        """Which blocks of all layers are to be alive."""
        nan = self._score.isnan()
        for layer, count in zip(self.layers, self._counts(nan).unbind(), strict=True):
            self._nan.append((layer.name, len(layer.alive), count))
        score = self._score.masked_fill(nan, -torch.inf)
        alive = torch.sigmoid(score) > self.tau(self.steps)
        parts = zip(self._split(alive), self._split(score), strict=True)
        numbers = self._counts(alive).tolist()
        for layer, number, (now, part) in zip(self.layers, numbers, parts, strict=True):
            least = min(len(now), max(1, round(self.floor * layer.cells)))
            if number < least:  # else the highest are alive as it is
                now.index_fill_(0, highest(part, least), True)
        return alive

    def _joined(self, parts: Iterable[Tensor]) -> Tensor:
        """Something of each layer, as one tensor."""
        return torch.cat([part.to(self._score.device) for part in parts])

    def _by_layer(self, joined: Tensor) -> dict[str, Tensor]:
        parts = zip(self.layers, self._split(joined), strict=True)
        return {layer.name: part for layer, part in parts}

    def _split(self, joined: Tensor) -> tuple[Tensor, ...]:
        return joined.split([len(layer.alive) for layer in self.layers])

    def _counts(self, flags: Tensor) -> Tensor:
        """How many of each layer's are True."""
        return sums_of_parts(flags, [len(layer.alive) for layer in self.layers])

    def _set_score(self, score: Tensor, state: dict[str, Tensor]) -> None:
        """Puts scores, and what Adam keeps of them, in the place of those that are there."""
        self._adam.param_groups[0]["params"] = [score]
        self._adam.state.clear()
        if state:
            self._adam.state[score] = state
        self._score = score

    def _layer_state(self, layer: SparseLayer) -> dict[str, Any]:
        adam = self._adam.state.get(self._score, {})
        return {
            **super()._layer_state(layer),
            "score": self.scores[layer.name].clone(),
            "aside": self._aside[layer.name].clone(),
            "adam": {
                name: (item if name == "step" else self._by_layer(item)[layer.name]).clone()
                for name, item in adam.items()
            },
        }

    def _load_layer_state(self, layer: SparseLayer, state: dict[str, Any]) -> None:
        super()._load_layer_state(layer, state)
        self._aside[layer.name] = state["aside"].to(layer.born.device, copy=True)
