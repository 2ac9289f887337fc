"""BlockSparsityCallback: lets transformers' ``Trainer`` drive a method of pattern optimisation."""

import base64
import inspect
import io
import warnings
import zlib
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .._progress import progress
from ..optim import BlockWanda, Sparsifier


class BlockSparsityCallback(TrainerCallback, ExportableState):
    """Changes the pattern while a ``Trainer`` trains; ``Trainer(..., callbacks=[this])``.

    The method is made when the training begins, with the Trainer's model and optimizer and with the
    number of its steps, and it is stepped after each step of the optimizer. It is saved with each
    checkpoint of the Trainer and goes on where it was when the training is resumed from one.

    Each log of the Trainer gets ``block_density``, and ``block_churn``: the share of the blocks
    that was replaced or removed since the log before.

    Args:
        method: a class of :mod:`pytorch_block_sparse.optim`, or a function of the same arguments
            that returns such an object.
        calibration_batches: for ``BlockWanda``: how many batches of the training data it sees.
        options: further arguments of `method`.

    Attributes:
        sparsifier: the method, once the training has begun; its ``log`` has the details.

    Raises:
        TypeError: `method` is, or makes, something else.

    Example:
        >>> from pytorch_block_sparse.integrations import BlockSparsityCallback
        >>> from pytorch_block_sparse.optim import BlockSET
        >>> callback = BlockSparsityCallback(BlockSET, drop=0.3)
    """

    def __init__(
        self,
        method: Callable[..., Sparsifier],
        *,
        calibration_batches: int = 8,
        **options: Any,
    ) -> None:
        if method is None:
            raise ValueError(
                "BlockSparsityCallback: goes on by itself when a training is resumed; leave "
                "restore_callback_states_from_checkpoint at False"
            )
        if not callable(method) or (inspect.isclass(method) and not issubclass(method, Sparsifier)):
            raise TypeError(
                f"method: must be a Sparsifier of pytorch_block_sparse.optim, got {method!r}"
            )
        self.method = method
        self.options = options
        self.calibration_batches = calibration_batches
        self.sparsifier: Sparsifier | None = None
        self._churn = 0.0

    def state(self) -> dict[str, Any]:
        """For the checkpoint of the Trainer, which is JSON."""
        saved = None if self.sparsifier is None else _to_text(self.sparsifier.state_dict())
        return {"args": {"method": None}, "attributes": {"saved": saved}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        train_dataloader: Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Makes the method, or brings it back to where the checkpoint was taken."""
        assert model is not None
        self._churn = 0.0
        self.sparsifier = self._make(model, optimizer, state.max_steps)
        name = type(self).__name__
        saved = _saved(state, name) if state.global_step else None
        if saved is not None:
            self.sparsifier.load_state_dict(_from_text(saved))
        elif state.global_step:
            warnings.warn(
                f"{name}: the checkpoint has no state of it, so its schedule starts anew at step "
                f"{state.global_step}",
                stacklevel=2,
            )
        elif isinstance(self.sparsifier, BlockWanda):
            self._calibrate(self.sparsifier, model, train_dataloader or [])
        _states(state).setdefault(name, self.state())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Between the optimizer's step and ``zero_grad``, as a method wants it."""
        assert self.sparsifier is not None
        self._count(self.sparsifier.step())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where the best model was loaded, the optimizer's moments are those of other blocks."""
        if not args.load_best_model_at_end or self.sparsifier is None:
            return
        if self.sparsifier.optimizer is not None:
            for layer in self.sparsifier.layers:
                self.sparsifier.optimizer.state.pop(layer.module.values, None)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds density and churn to what is logged."""
        if self.sparsifier is None or logs is None or "loss" not in logs:
            return
        entry = {"block_density": self.sparsifier.density(), "block_churn": self._churn}
        self._churn = 0.0
        logs.update(entry)
        state.log_history[-1].update(entry)

    def _make(self, model: nn.Module, optimizer: Any, total_steps: int) -> Sparsifier:
        options = dict(self.options)
        if "total_steps" in inspect.signature(self.method).parameters:
            options.setdefault("total_steps", total_steps)
        sparsifier = self.method(model, optimizer, **options)
        if not isinstance(sparsifier, Sparsifier):
            raise TypeError(f"method: must make a Sparsifier, got {type(sparsifier).__name__}")
        return sparsifier

    def _calibrate(self, wanda: BlockWanda, model: nn.Module, batches: Iterable[Any]) -> None:
        training = model.training
        model.eval()
        with wanda.calibration():
            for batch in progress(islice(batches, self.calibration_batches), "Calibrating"):
                model(**batch)
        model.train(training)
        self._count(wanda.step())

    def _count(self, entry: dict[str, Any] | None) -> None:
        if entry is not None:
            self._churn += entry["churn"]


def _states(state: TrainerState) -> dict[str, Any]:
    return cast(dict[str, Any], state.stateful_callbacks)


def _saved(state: TrainerState, name: str) -> str | None:
    content = _states(state).get(name)
    if isinstance(content, list):
        raise ValueError(f"{name}: a Trainer takes one of them, and the checkpoint has several")
    saved: str | None = content["attributes"]["saved"] if content else None
    return saved


def _to_text(state: dict[str, Any]) -> str:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(zlib.compress(buffer.getvalue())).decode()


def _from_text(text: str) -> dict[str, Any]:
    buffer = io.BytesIO(zlib.decompress(base64.b64decode(text)))
    state: dict[str, Any] = torch.load(buffer, weights_only=True)  # tensors and numbers, no code
    return state
