"""Sparsifier: what all methods share. It counts the optimizer's steps and acts when one is due.

A method is a subclass in a file of its own. It says when (a schedule), and what is done to one
layer or to all of them (:meth:`Sparsifier._update`). This file knows no scores.

The order in a training step, which every method keeps::

    loss.backward()            # once or several times (gradient accumulation)
    clip_grad_norm_(...)
    optimizer.step()           # the sparsifier's hooks collect here what it needs
    sparsifier.step()          # changes the pattern if one is due
    optimizer.zero_grad()

``sparsifier.step()`` may be called after each micro-batch: only real optimizer steps count. After a
step that a GradScaler skipped nothing happens.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._sharded import refuse_sharded
from .choose import generator, nan_as_lowest, warn_of_nan
from .hooks import before_step, innermost, on_step
from .layers import SparseLayer, hold_at_zero, refuse_tied, sparse_layers
from .log import log_entry, measure
from .schedule import Every
from .update import Change, absent_ids, block_state, compact_, holds, replace_blocks_

_CALLS_BEFORE_WARNING = 100


class Sparsifier:
    """Base class of the methods: applied to a model and its optimizer, stepped after the optimizer.

    Args:
        model: a patched model; may be wrapped by DDP or torch.compile.
        optimizer: the optimizer that trains its block-sparse layers.
        schedule: at which real optimizer steps the method acts.
        seed: of all random choices, which are the same on every rank.
        only: takes a layer's name and says whether the method cares for it; by default all.
        process_group: the ranks that hold copies of the model; by default all, if
            ``torch.distributed`` is initialised.

    A layer whose values are frozen (``requires_grad=False``) when the sparsifier is made is left as
    it is, with a warning. (Without an optimizer frozen layers count as all others.)

    Attributes:
        steps: number of real optimizer steps so far.
        log: one dict for each pattern update: ``step``, ``density``, ``churn`` (share of the blocks
            replaced or removed by this update), and ``layers``: for each name ``density``,
            ``churn``, ``age`` (mean, in steps, of the present blocks), ``dead_rows`` and
            ``dead_cols`` (rows and columns of the grid without a block).

    Raises:
        ValueError: no block-sparse layer, none that is trained, or an optimizer that does not hold
            their values.
        RuntimeError: two optimizer steps without a call of :meth:`step` in between, or a model that
            has moved to another device since.
        TypeError: the optimizer keeps state that cannot follow the blocks (see
            :func:`update_pattern_`; found at the first update, where it appears then only).
    """

    _acts_alone = False  # without an optimizer

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        schedule: Every,
        *,
        seed: int = 0,
        only: Callable[[str], bool] | None = None,
        process_group: Any = None,
    ) -> None:
        if only is not None and not callable(only):
            raise TypeError(f"only: must take a layer's name, got {type(only).__name__}")
        if optimizer is None and not self._acts_alone:
            raise TypeError("optimizer: must be a torch.optim.Optimizer, got None")
        self.schedule = schedule
        self.seed = seed
        self.process_group = process_group
        self.optimizer = innermost(optimizer)
        self.layers = self._choose_layers(model, only)
        self.steps = 0
        self.log: list[dict[str, Any]] = []
        self._new_steps = 0  # of the optimizer, since the last call of step()
        self._calls_in_vain = 0
        # Of this update: whose scores, how many, and how many of them are NaN.
        self._nan: list[tuple[str, int, Tensor]] = []
        if max(schedule.begin, schedule.interval if not schedule.begin else 0) > schedule.end:
            warnings.warn(
                f"{type(self).__name__}: no step is due: the first would be {schedule.interval}, "
                f"the last {schedule.end}",
                stacklevel=3,
            )
        if self.optimizer is not None:
            self.optimizer.register_step_pre_hook(before_step(self._with_gradients))
            self.optimizer.register_step_post_hook(on_step(self._after_optimizer_step))

    def _choose_layers(
        self, model: nn.Module, only: Callable[[str], bool] | None
    ) -> list[SparseLayer]:
        layers: list[SparseLayer] = []
        for name, module in sparse_layers(model).items():
            if only is not None and not only(name):
                continue
            refuse_sharded(name, module.values, "optimise its pattern")
            if module.is_part and self.process_group is None:
                raise ValueError(
                    f"{name}: is cut over ranks (tensor parallel); give process_group: the ranks "
                    "that hold copies of the same part"
                )
            if self.optimizer is not None:
                if not module.values.requires_grad:
                    warnings.warn(f"{name}: is frozen, its pattern stays as it is", stacklevel=4)
                    continue
                if not holds(self.optimizer, module.values):
                    raise ValueError(
                        f"optimizer: does not hold the values of layer {name}; make it from the "
                        "parameters of the patched model, or leave the layer out with `only`"
                    )
                block_state(self.optimizer, module.values)
            refuse_tied(name, module, layers)
            layers.append(SparseLayer.of(name, module))
        if not layers:
            raise ValueError("model: none of its block-sparse layers is trained and chosen")
        return layers

    # --- for the user -----------------------------------------------------------------------------

    def step(self) -> dict[str, Any] | None:
        """Call after ``optimizer.step()`` and before ``zero_grad()``.

        Returns:
            The new entry of :attr:`log` if the pattern was updated, else None.
        """
        if self._new_steps == 0:
            self._calls_in_vain += 1
            if self._calls_in_vain == _CALLS_BEFORE_WARNING:
                warnings.warn(
                    f"{type(self).__name__}: step() was called {_CALLS_BEFORE_WARNING} times, but "
                    "the optimizer that it was given has made no step in between",
                    stacklevel=2,
                )
            return None
        self._refuse_missed_steps(allowed=1)
        self.layers[0].check_device()  # the others at the next update: each takes its time
        self._new_steps, self._calls_in_vain = 0, 0
        self.steps += 1
        with torch.no_grad():
            self._after_step()
            entry = self._run_update() if self.schedule.due(self.steps) else None
            if self.schedule.due(self.steps + 1):
                self._prepare()
        return entry

    def density(self) -> float:
        """Share of the blocks that are present, in all layers together."""
        alive = sum(layer.alive_count for layer in self.layers)
        return alive / sum(layer.cells for layer in self.layers)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, besides the model's and the optimizer's own state."""
        return {
            "method": type(self).__name__,
            "seed": self.seed,
            "steps": self.steps,
            "log": list(self.log),
            "layers": {layer.name: self._layer_state(layer) for layer in self.layers},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken: load model and optimizer first.

        Raises:
            TypeError: no state at all.
            ValueError: the state of another method, of other layers, or of another number of
                blocks. Nothing is changed then.
        """
        if not isinstance(state, dict):
            raise TypeError(f"state: must be what state_dict() returned, got {state!r}")
        if state.get("method") != type(self).__name__:
            raise ValueError(f"state: is of {state.get('method')}, not of {type(self).__name__}")
        names, wanted = list(state["layers"]), [layer.name for layer in self.layers]
        if names != wanted:
            raise ValueError(f"state: is of the layers {names}, but this model has {wanted}")
        for layer in self.layers:
            count = len(state["layers"][layer.name]["born"])
            if count != layer.module.block_count:
                raise ValueError(
                    f"state: has {count} blocks in {layer.name}, but the layer "
                    f"{layer.module.block_count}; load the model's state first"
                )
        self.seed, self.steps, self.log = state["seed"], state["steps"], list(state["log"])
        self._new_steps = 0
        for layer in self.layers:
            self._load_layer_state(layer, state["layers"][layer.name])
        if self.schedule.due(self.steps + 1):
            self._prepare()

    # --- for a method to fill in ------------------------------------------------------------------

    def _update(self) -> dict[str, int]:
        """Changes the pattern. Returns how many blocks were changed, for layers where any were."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Called when the next step will be one with an update."""

    def _collect(self) -> None:
        """Called in each real optimizer step: gradients are there, values not yet stepped."""

    def _after_step(self) -> None:
        """Called after each real optimizer step, update or not."""

    def _layer_state(self, layer: SparseLayer) -> dict[str, Any]:
        return {"born": layer.born.clone(), "alive": layer.alive.clone(), "start": layer.start}

    def _load_layer_state(self, layer: SparseLayer, state: dict[str, Any]) -> None:
        device = layer.module.values.device
        layer.born = state["born"].to(device, copy=True)
        layer.set_alive(state["alive"].to(device, copy=True))
        layer.start = state["start"]

    # --- for a method to use ----------------------------------------------------------------------

    def _random(self, layer: SparseLayer, purpose: str, step: int | None = None) -> torch.Generator:
        """Randomness of this layer and step; `purpose` tells several draws apart."""
        step = self.steps if step is None else step
        return generator(self.seed, f"{layer.name}.values:{purpose}", step)

    def _absent(self, layer: SparseLayer) -> Tensor:
        """int64, ascending: ids of the blocks that the layer does not have."""
        return absent_ids(layer.module.pattern)

    def _replace(
        self, layer: SparseLayer, positions: Tensor, ids: Tensor, new_values: Tensor | None = None
    ) -> Change:
        """Blocks at `positions` go, blocks `ids` come; everything kept per block follows."""
        change = replace_blocks_(layer.module.weight, positions, ids, self.optimizer, new_values)
        layer.born = layer.born[change.order].masked_fill_(change.fresh, self.steps)
        if len(layer.dead):
            layer.set_alive(layer.alive[change.order] | change.fresh)
        return change

    def _without_nan(self, layer: SparseLayer, scores: Tensor, what: str = "") -> Tensor:
        """Scores with minus infinity for NaN. The warning comes with the log: nobody waits here."""
        clean, count = nan_as_lowest(scores)
        self._nan.append((layer.name + what, len(scores), count))
        return clean

    def _compact(self, layer: SparseLayer) -> None:
        """Frees the memory of the blocks that are no longer alive."""
        keep = layer.alive
        if not len(layer.dead):
            return
        compact_(layer.module, keep, self.optimizer)
        layer.born = layer.born[keep]
        layer.set_alive(keep[keep])

    def _hold_at_zero(self) -> None:
        """Blocks that are not alive stay zero, whatever the optimizer did to them."""
        hold_at_zero(self.layers)

    def _refuse_missed_steps(self, allowed: int = 0) -> None:
        if self._new_steps > allowed:
            raise RuntimeError(
                f"{type(self).__name__}: the optimizer has made {self._new_steps} steps since the "
                "last call of step(); call it after each optimizer.step()"
            )

    def _check_layers(self) -> None:
        """Not in every step: it takes longer than what is done in most of them."""
        for layer in self.layers:
            if self.optimizer is not None:
                layer.check_trained(type(self).__name__)
            layer.check_device()
            if len(layer.alive) != layer.module.block_count:
                raise RuntimeError(
                    f"{layer.name}: has {layer.module.block_count} blocks, but "
                    f"{type(self).__name__} knows {len(layer.alive)}: something else has changed "
                    "their number, or its state is still to be loaded (load_state_dict)"
                )

    def _refuse_compaction_under_ddp(self) -> None:
        replicas = (
            dist.get_world_size(self.process_group)
            if dist.is_available() and dist.is_initialized()
            else 1
        )
        if replicas > 1:
            raise ValueError(
                f"{type(self).__name__}: compaction makes new Parameters, which DDP would not "
                "see; switch it off here and call compact() yourself, then wrap the model again"
            )

    # --- inner works ------------------------------------------------------------------------------

    def _with_gradients(self) -> None:
        with torch.no_grad():
            self._collect()

    def _after_optimizer_step(self) -> None:
        self._new_steps += 1

    def _run_update(self) -> dict[str, Any]:
        self._check_layers()
        before = [layer.alive_count for layer in self.layers]
        self._nan = []
        changed = self._update()
        # One round trip to the device for all layers.
        measured = measure(self.layers)
        measured += [number.to(measured[0].device)[None] for _, _, number in self._nan]
        numbers = torch.cat(measured).tolist()
        number = 3 * len(self.layers)
        for (name, of, _), nan in zip(self._nan, numbers[number:], strict=True):
            warn_of_nan(nan, of, name, stacklevel=4)
        entry = log_entry(self.steps, self.layers, before, changed, numbers[:number])
        self.log.append(entry)
        over = self.steps + self.schedule.interval > self.schedule.end
        if over and not any(line["churn"] for line in self.log):
            warnings.warn(
                f"{type(self).__name__}: this was its last update, and none has changed a block",
                stacklevel=3,
            )
        return entry
