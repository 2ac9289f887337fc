"""Choosing blocks: by score, or at random. The same choice on every rank and in every run.

Ties go to the lower block id, NaN counts as the lowest score, and randomness depends on nothing but
(seed, name of the parameter, step): there is no generator whose state could differ or be lost.
"""

import hashlib
import math
import warnings

import torch
from torch import Tensor


def nan_as_lowest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """`scores` with minus infinity for NaN, and how many these are, without a word to the host."""
    nan = torch.isnan(scores)
    return scores.masked_fill(nan, -math.inf), nan.sum()


def warn_of_nan(count: int, of: int, where: str, stacklevel: int = 3) -> None:
    """Says that `count` of so many scores are NaN, if any is."""
    if count:
        warnings.warn(
            f"{where}: {count} of {of} block scores are NaN; they count as the lowest",
            stacklevel=stacklevel,
        )


def without_nan(scores: Tensor, where: str) -> Tensor:
    """`scores` with minus infinity for NaN, and a warning if there is any. Waits for the device."""
    clean, count = nan_as_lowest(scores)
    warn_of_nan(int(count), scores.numel(), where)
    return clean


def lowest(scores: Tensor, count: int) -> Tensor:
    """int64 ``[count]``: positions of the lowest scores; of equal ones the first."""
    return torch.sort(scores, stable=True).indices[:count]


def highest(scores: Tensor, count: int) -> Tensor:
    """int64 ``[count]``: positions of the highest scores; of equal ones the first."""
    return torch.sort(scores, descending=True, stable=True).indices[:count]


def generator(seed: int, name: str, step: int) -> torch.Generator:
    """A CPU generator that depends on its arguments and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{name}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_sample(items: Tensor, count: int, source: torch.Generator) -> Tensor:
    """`count` of `items` (or all, if there are fewer) without replacement, in random order.

    The same on every device: the order is drawn on the CPU.
    """
    order = torch.randperm(len(items), generator=source)[:count]
    # From pageable memory the driver takes a copy before the call returns: nobody has to wait.
    return items[order.to(items.device, non_blocking=True)]
