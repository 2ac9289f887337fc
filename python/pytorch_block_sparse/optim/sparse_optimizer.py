"""SparseOptimizer: the face of the 2020 ancestor, on the parts of :class:`BlockSET`.

It has no schedule: a ``step()`` replaces blocks whenever the user calls it, once for each real step
of the optimizer at most. For new code take one of the methods.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .._sharded import refuse_sharded
from ..linear import BlockSparseLinear
from . import scores
from .choose import generator, lowest, random_sample, without_nan
from .hooks import innermost, on_step
from .layers import SparseLayer, refuse_tied, sparse_layers
from .log import log_entry, measure
from .schedule import check_number
from .update import absent_ids, block_state, holds, replace_blocks_

_DISTRIBUTIONS = ("uniform", "gaussian")
_CALLS_BEFORE_WARNING = 100

_Work = tuple[SparseLayer, dict[str, Any], torch.optim.Optimizer | None]  # layer, group, trainer


class SparseOptimizer(torch.optim.Optimizer):
    """Replaces, at each step, the share `lr` of the blocks: the smallest, by random new ones.

    As it is an Optimizer, a learning rate scheduler can drive `lr`.

    Give :meth:`attach_optimizer` the optimizer that trains the values, so that its state follows
    the blocks. Then a step replaces blocks only if that one has stepped since the last: under
    gradient accumulation real steps count, and after one that a GradScaler skipped nothing happens.

    A layer that is frozen (``requires_grad=False``) when it is given is left as it is, with a
    warning. Blocks that hold NaN or infinity are the first to go.

    Args:
        sparse_objects: layers, as :meth:`sparse_objects` lists them.
        lr: share of the blocks that a step replaces, in [0, 1]; rounded down.
        method: "magnitude".
        new_coefficients_scale: size of new values, relative to the standard deviation s of the
            layer's finite values.
        new_coefficients_distribution: "uniform", in +-scale * s, or "gaussian", of standard
            deviation scale * s.
        seed: of the random choices, which are the same on every rank.

    Attributes:
        steps: number of steps so far, without those where nothing was to be done.
        log: one dict for each of them, like that of :class:`Sparsifier`. Layers are named
            "sparse_objects[0]" and so on. It may be cleared where steps are many.

    Example:
        >>> import torch
        >>> from pytorch_block_sparse import BlockSparseLinear
        >>> from pytorch_block_sparse.optim import SparseOptimizer
        >>> model = torch.nn.Sequential(BlockSparseLinear(256, 256, density=0.5))
        >>> adam = torch.optim.Adam(model.parameters())
        >>> sparse = SparseOptimizer(SparseOptimizer.sparse_objects(model), lr=0.1)
        >>> sparse.attach_optimizer(adam)
        >>> before = model[0].pattern.mask()
        >>> model(torch.randn(8, 256)).square().mean().backward()
        >>> adam.step()
        >>> entry = sparse.step()
        >>> int((before & ~model[0].pattern.mask()).sum()), entry["churn"]  # of 32 blocks
        (3, 0.09375)
    """

    def __init__(
        self,
        sparse_objects: list[BlockSparseLinear],
        lr: float = 1e-1,
        method: str = "magnitude",
        new_coefficients_scale: float = 0.1,
        new_coefficients_distribution: str = "uniform",
        *,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "method": method,
            "new_coefficients_scale": new_coefficients_scale,
            "new_coefficients_distribution": new_coefficients_distribution,
        }
        self.seed = seed
        self.steps = 0
        self.log: list[dict[str, Any]] = []
        self._layers: list[list[SparseLayer]] = []  # of each group, without the frozen ones
        self._listed = 0  # number of layers that were given, frozen ones too
        self._trainers: list[_Trainer] = []
        self._calls_in_vain = 0
        self._warned = False
        super().__init__([{"sparse_objects": sparse_objects}], defaults)

    @staticmethod
    def sparse_objects(model: nn.Module) -> list[BlockSparseLinear]:
        """The block-sparse layers of `model`."""
        return list(sparse_layers(model).values())

    @property
    def attached_optimizers(self) -> list[torch.optim.Optimizer]:
        """Those that :meth:`attach_optimizer` was given."""
        return [trainer.optimizer for trainer in self._trainers]

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets the state of `optimizer`, which trains the values, follow the blocks.

        Its steps count from now on.
        """
        inner = innermost(optimizer)
        if inner is None:
            raise TypeError("optimizer: must be a torch.optim.Optimizer, got None")
        if not any(other is inner for other in self.attached_optimizers):
            self._trainers.append(_Trainer(inner))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds layers with options of their own: ``{"sparse_objects": [...], "lr": 0.5}``."""
        known = {"sparse_objects", "params", *self.defaults}
        unknown = set(param_group) - known
        if unknown:
            raise ValueError(f"param_group: unknown {sorted(unknown)}; known are {sorted(known)}")
        modules = param_group["sparse_objects"]
        modules = [modules] if isinstance(modules, nn.Module) else list(modules)
        for module in modules:
            if not isinstance(module, BlockSparseLinear):
                raise TypeError(
                    f"sparse_objects: must be BlockSparseLinear, got {type(module).__name__}; "
                    "SparseOptimizer.sparse_objects(model) lists those of a model"
                )
        if not modules:
            raise ValueError("sparse_objects: must be at least one BlockSparseLinear, got none")
        group = {**self.defaults, **param_group}
        _check_lr(group["lr"])
        check_number("new_coefficients_scale", group["new_coefficients_scale"])
        if not 0 <= group["new_coefficients_scale"] < math.inf:
            raise ValueError(
                "new_coefficients_scale: must be finite and not negative, got "
                f"{group['new_coefficients_scale']}"
            )
        if group["method"] != "magnitude":
            raise ValueError(f"method: must be 'magnitude', got {group['method']!r}")
        if group["new_coefficients_distribution"] not in _DISTRIBUTIONS:
            raise ValueError(
                f"new_coefficients_distribution: must be one of {_DISTRIBUTIONS}, got "
                f"{group['new_coefficients_distribution']!r}"
            )
        layers = self._choose(modules)
        group["sparse_objects"] = [layer.module for layer in layers]
        super().add_param_group({**group, "params": [layer.module.values for layer in layers]})
        self._layers.append(layers)
        self._listed += len(modules)

    def _choose(self, modules: list[BlockSparseLinear]) -> list[SparseLayer]:
        """Those of a new group that are trained."""
        layers: list[SparseLayer] = []
        for number, module in enumerate(modules, self._listed):
            name = f"sparse_objects[{number}]"
            refuse_sharded(name, module.values, "optimise its pattern")
            if not module.values.requires_grad:
                warnings.warn(f"{name}: is frozen, its pattern stays as it is", stacklevel=5)
                continue
            known = [*self._all_layers(), *layers]
            twice = next((layer for layer in known if layer.module is module), None)
            if twice is not None:
                raise ValueError(f"{name}: is the same layer as {twice.name}; list it once")
            refuse_tied(name, module, known)
            layers.append(SparseLayer.of(name, module))
        if not layers:
            raise ValueError("sparse_objects: none of the layers is trained, all are frozen")
        return layers

    def _all_layers(self) -> list[SparseLayer]:
        return [layer for layers in self._layers for layer in layers]

    @torch.no_grad()
    def step(self, closure: None = None) -> dict[str, Any] | None:  # type: ignore[override]
        """Replaces blocks. Call it after the step of the optimizer that trains the values.

        Returns:
            The new entry of :attr:`log`, or None if no attached optimizer has stepped since the
            last call.

        Raises:
            ValueError: optimizers are attached, but none of them trains a layer's values.
            RuntimeError: a layer has been frozen since it was given.
            TypeError: the optimizer keeps state that cannot follow the blocks.
        """
        work = self._work()
        if not work:
            self._calls_in_vain += 1
            if self._calls_in_vain == _CALLS_BEFORE_WARNING:
                warnings.warn(
                    f"SparseOptimizer: step() was called {_CALLS_BEFORE_WARNING} times, but no "
                    "attached optimizer has made a step in between",
                    stacklevel=4,
                )
            return None
        if not self._trainers and not self._warned:
            self._warned = True
            warnings.warn(
                "SparseOptimizer: no optimizer is attached; if the one that trains the values "
                "keeps state (Adam, momentum), that of a block now goes to another: call "
                "attach_optimizer(optimizer) first",
                stacklevel=4,
            )
        self._calls_in_vain = 0
        self.steps += 1
        layers = self._all_layers()
        before = [layer.module.block_count for layer in layers]
        replaced = {item[0].name: self._replace(*item) for item in work}
        for trainer in self._trainers:
            trainer.new_steps = 0
        if not any(replaced.values()) and any(group["lr"] > 0 for group in self.param_groups):
            warnings.warn(
                f"SparseOptimizer: step {self.steps} has replaced no block: in each layer lr is "
                "less than one block's share, or no block is absent",
                stacklevel=4,
            )
        numbers = torch.cat(measure(layers)).tolist()
        self.log.append(log_entry(self.steps, layers, before, replaced, numbers))
        return self.log[-1]

    def _work(self) -> list[_Work]:
        """What is due. Whatever is wrong shows here, before anything is changed."""
        work: list[_Work] = []
        for group, layers in zip(self.param_groups, self._layers, strict=True):
            _check_lr(group["lr"])  # a scheduler may have set it
            for layer in layers:
                values = layer.module.values
                _catch_up(layer)
                layer.check_trained("SparseOptimizer")
                if not self._trainers:
                    work.append((layer, group, None))
                    continue
                trainer = next((t for t in self._trainers if holds(t.optimizer, values)), None)
                if trainer is None:
                    raise ValueError(
                        f"attach_optimizer: no attached optimizer trains {layer.name}.values"
                    )
                block_state(trainer.optimizer, values)
                if trainer.new_steps:
                    work.append((layer, group, trainer.optimizer))
        return work

    def _replace(
        self, layer: SparseLayer, group: dict[str, Any], optimizer: torch.optim.Optimizer | None
    ) -> int:
        module = layer.module
        source = generator(self.seed, layer.name, self.steps)
        count = int(group["lr"] * module.block_count)
        ids = random_sample(absent_ids(module.pattern), count, source)
        norms = scores.l1(module.values)
        # An infinite one is as broken as NaN.
        norms = without_nan(norms.masked_fill(norms.isinf(), torch.nan), layer.name)
        new_values = _draw(module.values, len(ids), group, source)
        positions = lowest(norms, len(ids))
        change = replace_blocks_(module.weight, positions, ids, optimizer, new_values)
        layer.born = layer.born[change.order].masked_fill_(change.fresh, self.steps)
        return len(ids)

    def state_dict(self) -> dict[str, Any]:
        """The options of the groups, the number of steps and the log; not the layers themselves."""
        state: dict[str, Any] = super().state_dict()
        for group in state["param_groups"]:
            group.pop("sparse_objects")
        born = [layer.born.clone() for layer in self._all_layers()]
        return {
            **state,
            "steps": self.steps,
            "seed": self.seed,
            "log": list(self.log),
            "born": born,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the options, the number of steps and the log."""
        layers = [group["sparse_objects"] for group in self.param_groups]
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for group, own in zip(self.param_groups, layers, strict=True):
            group["sparse_objects"] = own
        self.steps, self.seed = state_dict["steps"], state_dict["seed"]
        self.log = list(state_dict["log"])
        for layer, born in zip(self._all_layers(), state_dict["born"], strict=True):
            layer.born = born.to(layer.born.device, copy=True)
        for trainer in self._trainers:
            trainer.new_steps = 0


class _Trainer:
    """An attached optimizer, and how many real steps it has made since blocks were replaced."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.new_steps = 0
        optimizer.register_step_post_hook(on_step(self._count))

    def _count(self) -> None:
        self.new_steps += 1


def _catch_up(layer: SparseLayer) -> None:
    """With a layer that was compacted, loaded or moved by hand."""
    now = SparseLayer.of(layer.name, layer.module)
    if len(now.born) == len(layer.born):
        now.born = layer.born.to(now.born.device)
    layer.born, layer.alive, layer.dead = now.born, now.alive, now.dead


def _check_lr(lr: float) -> None:
    check_number("lr", lr)
    if not 0 <= lr <= 1:
        raise ValueError(f"lr: must be in [0, 1], a share of the blocks, got {lr}")


def _draw(values: Tensor, count: int, group: dict[str, Any], source: torch.Generator) -> Tensor:
    """Values of `count` new blocks. (The ancestor drew integers in [0, 1): all zero.)"""
    shape = (count, *values.shape[1:])
    spread = group["new_coefficients_scale"] * _spread(values)
    if group["new_coefficients_distribution"] == "uniform":
        unit = torch.rand(shape, generator=source) * 2 - 1
    else:
        unit = torch.randn(shape, generator=source)
    return unit.to(values.device) * spread


def _spread(values: Tensor) -> Tensor:
    """Standard deviation of the finite values: one that is NaN must not make all new ones NaN."""
    spread = values.float().std()
    if not spread.isfinite():
        finite = values[values.isfinite()].double()
        spread = finite.std() if len(finite) > 1 else torch.zeros_like(spread)
    return spread
