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

import itertools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._sharded import refuse_sharded
from .choose import generator, nan_as_lowest, warn_of_nan
from .layers import SparseLayer, hold_at_zero, sparse_layers, sums_of_parts
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
        self.optimizer = _innermost(optimizer)
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
            # Weakly: an optimizer must not keep a sparsifier alive that its user has dropped.
            self.optimizer.register_step_pre_hook(_weak_pre_hook(self._with_gradients))
            self.optimizer.register_step_post_hook(_weak_hook(self._after_optimizer_step))

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
            twin = next((layer for layer in layers if layer.module.values is module.values), None)
            if twin is not None:
                raise ValueError(
                    f"{name}: has its values in common with {twin.name}, so neither can change its "
                    "pattern; leave both out with `only`"
                )
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
            if self.optimizer is not None and not layer.module.values.requires_grad:
                raise RuntimeError(
                    f"{layer.name}: has been frozen since {type(self).__name__} was made, which "
                    "would go on changing its pattern; make the method anew, it leaves frozen "
                    "layers as they are"
                )
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
        measured = self._measure()
        measured += [number.to(measured[0].device)[None] for _, _, number in self._nan]
        numbers = torch.cat(measured).tolist()
        number = len(self.layers)
        for (name, of, _), nan in zip(self._nan, numbers[3 * number :], strict=True):
            warn_of_nan(nan, of, name, stacklevel=4)
        layers = {}
        for i, layer in enumerate(self.layers):
            born, rows, cols = numbers[i : 3 * number : number]
            layers[layer.name] = {
                "density": layer.alive_count / max(1, layer.cells),
                "churn": changed.get(layer.name, 0) / max(1, before[i]),
                "age": (self.steps * layer.alive_count - born) / max(1, layer.alive_count),
                "dead_rows": layer.module.pattern.grid[0] - rows,
                "dead_cols": layer.module.pattern.grid[1] - cols,
            }
        entry = {
            "step": self.steps,
            "density": self.density(),
            "churn": sum(changed.values()) / max(1, sum(before)),
            "layers": layers,
        }
        self.log.append(entry)
        over = self.steps + self.schedule.interval > self.schedule.end
        if over and not any(line["churn"] for line in self.log):
            warnings.warn(
                f"{type(self).__name__}: this was its last update, and none has changed a block",
                stacklevel=3,
            )
        return entry

    def _measure(self) -> list[Tensor]:
        """int64, of the blocks of each layer that are alive: sums of `born`, rows, and columns."""
        device = self.layers[0].born.device
        patterns = [layer.module.pattern for layer in self.layers]
        sizes = [pattern.nnz for pattern in patterns]
        counts = torch.tensor(sizes).to(device, non_blocking=True)
        alive = torch.cat([layer.alive.to(device) for layer in self.layers])
        born = torch.cat([layer.born.to(device) for layer in self.layers])
        measured = [sums_of_parts(born * alive, sizes)]
        for dim in (0, 1):
            of = [pattern.col_indices if dim else pattern.row_indices for pattern in patterns]
            lengths = [pattern.grid[dim] for pattern in patterns]
            # One row of flags for all layers, where each has its own part.
            starts = torch.tensor([0, *itertools.accumulate(lengths)])[:-1]
            starts = starts.to(device, non_blocking=True)
            own = starts.repeat_interleave(counts, output_size=len(alive))
            own += torch.cat([indices.to(device) for indices in of])
            seen = torch.zeros(sum(lengths), dtype=torch.bool, device=device)
            measured.append(sums_of_parts(seen.index_add_(0, own, alive), lengths))
        return measured


def _innermost(optimizer: Any) -> torch.optim.Optimizer | None:
    """The torch optimizer under the wrappers of accelerate and others."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    return optimizer


def _weak_hook(method: Callable[[], None]) -> Callable[[Any, Any, Any], None]:
    """Calls `method` in each step that is not skipped, as long as its object lives."""
    reference = weakref.WeakMethod(method)

    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        target = reference()
        if target is not None and not _skipped(optimizer):
            target()

    return hook


def _weak_pre_hook(method: Callable[[], None]) -> Callable[[Any, Any, Any], Any]:
    """Calls `method` before each step that is not skipped, or after the backward in its closure."""
    weak, reference = _weak_hook(method), weakref.WeakMethod(method)

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
