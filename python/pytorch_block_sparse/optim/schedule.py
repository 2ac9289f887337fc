"""Schedules: small frozen objects that give a number for a step. They keep no state.

Steps are real optimizer steps, counted from 1.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

Schedule = Callable[[int], float]


def _check_span(begin: int, end: int) -> None:
    check_int("begin", begin)
    check_int("end", end)
    if begin < 0 or end <= begin:
        raise ValueError(f"end: the schedule ends (step {end}) before it starts (step {begin})")


def check_number(name: str, value: float) -> None:
    """TypeError unless it is a number: a comparison with a string would not name the argument."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: must be a number, got {value!r}")


def check_finite(name: str, value: float) -> None:
    """TypeError unless it is a number, ValueError if that is NaN or infinite."""
    check_number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name}: must be finite, got {value!r}")


def check_share(name: str, value: float) -> None:
    """ValueError unless it is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name}: must be in [0, 1], got {value!r}")


def check_int(name: str, value: int, least: int | None = None) -> None:
    """ValueError unless it is an int, and not less than `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: must be an int, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name}: must be at least {least}, got {value}")


def share_of(total_steps: int, share: float, name: str, given: int | None = None) -> int:
    """The step at which `share` of the training is done, unless another is given as `name`."""
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(f"total_steps: must be a positive int, got {total_steps!r}")
    if given is None:
        return int(share * total_steps)
    check_int(name, given)
    if given < 0:
        raise ValueError(f"{name}: must not be negative, got {given}")
    if given > total_steps:
        warnings.warn(
            f"{name}: step {given} comes after the last one of the training, {total_steps}",
            stacklevel=4,
        )
    return given


@dataclass(frozen=True)
class Every:
    """Which steps are due: every `interval` steps, from `begin` up to and including `end`.

    Example:
        >>> from pytorch_block_sparse.optim import Every
        >>> [step for step in range(20) if Every(5, begin=5, end=15).due(step)]
        [5, 10, 15]
    """

    interval: int
    begin: int
    end: int

    def __post_init__(self) -> None:
        for name in ("interval", "begin", "end"):
            check_int(name, getattr(self, name))
        if self.begin < 0 or self.end < self.begin:
            raise ValueError(
                f"end: the schedule ends (step {self.end}) before it starts (step {self.begin})"
            )
        check_int("interval", self.interval, least=1)

    def due(self, step: int) -> bool:
        """True if something is to be done at `step`."""
        return (
            step > 0 and self.begin <= step <= self.end and (step - self.begin) % self.interval == 0
        )


@dataclass(frozen=True)
class Constant:
    """The same number at each step.

    >>> Constant(0.1)(1000)
    0.1
    """

    value: float

    def __post_init__(self) -> None:
        check_finite("value", self.value)

    def __call__(self, step: int) -> float:
        """The number."""
        return self.value


@dataclass(frozen=True)
class Cosine:
    """A share that falls from `start` to 0 at `end`: start * (1 + cos(pi t / end)) / 2.

    The drop fraction of RigL (Evci et al., arXiv 1911.11134).

    >>> cosine = Cosine(0.5, end=100)
    >>> cosine(0), round(cosine(50), 6), cosine(100), cosine(200)
    (0.5, 0.25, 0.0, 0.0)
    """

    start: float
    end: int

    def __post_init__(self) -> None:
        check_share("start", self.start)
        _check_span(0, self.end)

    def __call__(self, step: int) -> float:
        """The share at `step`."""
        if step >= self.end:
            return 0.0
        return self.start * (1 + math.cos(math.pi * step / self.end)) / 2


@dataclass(frozen=True)
class Cubic:
    """From `start` to `final` between two steps: final + (start - final) * (1 - progress)^3.

    Fast first, slow at the end. Zhu and Gupta, arXiv 1710.01878, equation 1: as the sparsity goes
    by this rule, so does the density.

    >>> density = Cubic(1.0, 0.1, begin=100, end=500)
    >>> density(50), round(density(300), 4), density(900)
    (1.0, 0.2125, 0.1)
    """

    start: float
    final: float
    begin: int
    end: int

    def __post_init__(self) -> None:
        check_finite("start", self.start)
        check_finite("final", self.final)
        _check_span(self.begin, self.end)

    def __call__(self, step: int) -> float:
        """The number at `step`."""
        progress = min(1.0, max(0.0, (step - self.begin) / (self.end - self.begin)))
        return self.final + (self.start - self.final) * (1 - progress) ** 3
