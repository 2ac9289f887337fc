"""Hooks by which layers and optimizers call what watches them. They hold it weakly: a layer or an
optimizer must not keep alive what its user has dropped. What is done in a hook is not here."""

import weakref
from collections.abc import Callable
from typing import Any

import torch


class WeakHook:
    """On a layer: calls a method as long as its object lives.

    A copy, in a copied layer, calls nothing.
    """

    def __init__(self, method: Callable[..., None] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *args: Any) -> None:
        """What torch calls."""
        method = None if self._method is None else self._method()
        if method is not None:
            method(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return WeakHook, ()


def innermost(optimizer: Any) -> torch.optim.Optimizer | None:
    """The torch optimizer under the wrappers of accelerate and others."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    return optimizer


def on_step(method: Callable[[], None]) -> Callable[[Any, Any, Any], None]:
    """Calls `method` in each step that is not skipped, as long as its object lives."""
    reference = weakref.WeakMethod(method)

    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        target = reference()
        if target is not None and not _skipped(optimizer):
            target()

    return hook


def before_step(method: Callable[[], None]) -> Callable[[Any, Any, Any], Any]:
    """Calls `method` before each step that is not skipped, or after the backward in its closure."""
    weak, reference = on_step(method), weakref.WeakMethod(method)

    def hook(optimizer: Any, args: Any, kwargs: Any) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure) or reference() is None:
            return weak(optimizer, args, kwargs)
        seen = False

        def with_gradients() -> Any:
            nonlocal seen
            loss = closure()
            if not seen:  # some optimizers call it more than once
                seen = True
                weak(optimizer, args, kwargs)
            return loss

        if len(args) > 1:
            return (args[0], with_gradients, *args[2:]), kwargs
        return args, {**kwargs, "closure": with_gradients}

    return hook


def _skipped(optimizer: Any) -> bool:
    """True inside a step that a fused optimizer skips because its GradScaler found inf."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
