"""BlockRigL: drop the smallest blocks, grow those whose gradient is largest.

RigL (Evci et al., arXiv 1911.11134) in blocks, without its dense gradient: a random sample of the
absent blocks is scored, exactly, by the product that training runs anyway.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .block_set import BlockSET
from .choose import highest, random_sample
from .layers import SparseLayer
from .observe import CandidateGradients, seen_by
from .schedule import Schedule, check_finite, check_share


class BlockRigL(BlockSET):
    """:class:`BlockSET` that grows by gradient.

    In the step before an update, each layer draws ``candidates * k`` of its absent blocks and sums
    their gradient, dW = dyt x, over the micro-batches and ranks. Of these the k with the largest
    2-norm are grown, each column divided by the root mean square of its input feature first: else
    a few outlier features draw every block to their columns. A share is grown at random.

    Code under torch.compile runs eagerly in that one step, so that gradients can be watched;
    nothing is compiled again. That holds for all compiled code of the process, other models too:
    where a training stops in such a step, drop the sparsifier (``del sparsifier``).

    Args:
        model, optimizer, total_steps, every, end, score, new_values, second_moment, seed, only,
            process_group: see :class:`BlockSET`. By default there are about 20 updates, but at
            least 100 steps between them (or a quarter of `end`, if that is less).
        drop: the share to start with (it falls as a cosine), or a schedule of it.
        candidates: how many blocks are scored for each one grown.
        random_share: share of the new blocks that is random.
        normalise: divide by the root mean square of the input features.

    Example:
        >>> import torch
        >>> from pytorch_block_sparse import BlockSparseLinear
        >>> from pytorch_block_sparse.optim import BlockRigL
        >>> model = torch.nn.Sequential(BlockSparseLinear(128, 128, density=0.25))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> sparsifier = BlockRigL(model, optimizer, total_steps=200, every=5)
        >>> for _ in range(10):
        ...     model(torch.randn(8, 128)).square().mean().backward()
        ...     optimizer.step()
        ...     entry = sparsifier.step()
        ...     optimizer.zero_grad()
        >>> [(entry["step"], entry["churn"]) for entry in sparsifier.log]
        [(5, 0.25), (10, 0.25)]
    """

    _updates = 20  # in a long training: each costs twice as much as one of SET

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        *,
        drop: float | Schedule = 0.3,
        every: int | None = None,
        end: int | None = None,
        candidates: float = 4.0,
        random_share: float = 0.1,
        normalise: bool = True,
        score: str = "l1",
        new_values: Callable[[SparseLayer, int], Tensor] | None = None,
        second_moment: str = "zero",
        seed: int = 0,
        only: Callable[[str], bool] | None = None,
        process_group: Any = None,
    ) -> None:
        check_finite("candidates", candidates)
        if not candidates >= 1:
            raise ValueError(f"candidates: must be at least 1, got {candidates}")
        check_share("random_share", random_share)
        self.candidates = candidates
        self.random_share = random_share
        self.normalise = normalise
        self._watched: dict[str, CandidateGradients] = {}
        super().__init__(
            model,
            optimizer,
            total_steps,
            drop=drop,
            every=every,
            end=end,
            score=score,
            new_values=new_values,
            second_moment=second_moment,
            seed=seed,
            only=only,
            process_group=process_group,
        )
        if self.schedule.due(1):
            self._prepare()

    def _prepare(self) -> None:
        self._release()
        step = self.steps + 1
        for layer in self.layers:
            count = self._count(layer, step)
            if count:
                source = self._random(layer, "candidates", step)
                ids = random_sample(self._absent(layer), int(self.candidates * count), source)
                self._watched[layer.name] = CandidateGradients(
                    layer.module, ids.sort().values, of_step=True
                )

    def _collect(self) -> None:
        for watched in self._watched.values():
            # Left by a skipped step, and no forward since. Zeros are this step's gradient.
            watched.forget_if_cleared(zeros=False)

    def _release(self) -> None:
        for watched in self._watched.values():
            watched.remove()
        self._watched = {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken: see :class:`Sparsifier`."""
        super().load_state_dict(state)
        if not self.schedule.due(self.steps + 1):
            self._release()

    def _update(self) -> dict[str, int]:
        try:
            self._forget_the_unseen()
            return super()._update()
        finally:
            self._release()

    def _grow(self, layer: SparseLayer, count: int) -> Tensor:
        absent = self._absent(layer)
        random = random_sample(absent, len(absent), self._random(layer, "grow"))
        watched = self._watched.get(layer.name)
        if watched is None:
            return random[:count]
        # Something else may have grown candidates since they were drawn: these are passed over.
        # How many they are only the device knows, so all are ordered and the first that fit taken.
        free = torch.zeros(layer.cells, dtype=torch.uint8, device=absent.device)
        free.index_fill_(0, absent, 1)
        norms = watched.norms(per_input_rms=self.normalise, group=self.process_group)
        norms = self._without_nan(layer, norms, ", candidates")
        norms = norms.masked_fill(free[watched.ids] == 0, -torch.inf)
        best = watched.ids[highest(norms, count - round(self.random_share * count))]
        fit = [free[best], free.index_fill(0, best, 0)[random]]
        return torch.cat([best, random])[highest(torch.cat(fit), count)]

    def _forget_the_unseen(self) -> None:
        """Layers without a finite gradient, on any rank, get random blocks, with a warning."""
        for name, seen in seen_by(self._watched, self.process_group).items():
            if not seen:
                warnings.warn(
                    f"{name}: no finite gradient was seen at step {self.steps}; its new blocks "
                    "are random",
                    stacklevel=2,
                )
                self._watched.pop(name).remove()
