"""SparseOptimizer: the face of the 2020 ancestor, on the parts of :class:`BlockSET`.

It has no schedule: each ``step()`` replaces blocks, when the user calls it. For new code take one
of the methods.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import BlockSparseLinear
from . import scores
from .choose import generator, lowest, random_sample, without_nan
from .layers import sparse_layers
from .update import absent_ids, holds, replace_blocks_

_DISTRIBUTIONS = ("uniform", "gaussian")


class SparseOptimizer(torch.optim.Optimizer):
    """Replaces, at each step, the share `lr` of the blocks: the smallest, by random new ones.

    As it is an Optimizer, a learning rate scheduler can drive `lr`.

    Args:
        sparse_objects: layers, as :meth:`sparse_objects` lists them.
        lr: share of the blocks that a step replaces, in [0, 1]; rounded down.
        method: "magnitude".
        new_coefficients_scale: size of new values, relative to the standard deviation s of the
            layer's values.
        new_coefficients_distribution: "uniform", in +-scale * s, or "gaussian", of standard
            deviation scale * s.
        seed: of the random choices, which are the same on every rank.

    Example:
        >>> import torch
        >>> from pytorch_block_sparse import BlockSparseLinear
        >>> from pytorch_block_sparse.optim import SparseOptimizer
        >>> model = torch.nn.Sequential(BlockSparseLinear(256, 256, density=0.5))
        >>> adam = torch.optim.Adam(model.parameters())
        >>> sparse = SparseOptimizer(SparseOptimizer.sparse_objects(model), lr=0.1)
        >>> sparse.attach_optimizer(adam)
        >>> before = model[0].pattern.mask()
        >>> sparse.step()
        >>> int((before & ~model[0].pattern.mask()).sum())  # of 32 blocks
        3
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
        self.attached_optimizers: list[torch.optim.Optimizer] = []
        super().__init__([{"sparse_objects": sparse_objects}], defaults)

    @staticmethod
    def sparse_objects(model: nn.Module) -> list[BlockSparseLinear]:
        """The block-sparse layers of `model`."""
        return list(sparse_layers(model).values())

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets the state of `optimizer`, which trains the values, follow the blocks."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer: must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if not any(other is optimizer for other in self.attached_optimizers):
            self.attached_optimizers.append(optimizer)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds layers with options of their own: ``{"sparse_objects": [...], "lr": 0.5}``."""
        known = {"sparse_objects", "params", *self.defaults}
        unknown = set(param_group) - known
        if unknown:
            raise ValueError(f"param_group: unknown {sorted(unknown)}; known are {sorted(known)}")
        layers = param_group["sparse_objects"]
        layers = [layers] if isinstance(layers, nn.Module) else list(layers)
        for layer in layers:
            if not isinstance(layer, BlockSparseLinear):
                raise TypeError(
                    f"sparse_objects: must be BlockSparseLinear, got {type(layer).__name__}; "
                    "SparseOptimizer.sparse_objects(model) lists those of a model"
                )
        if not layers:
            raise ValueError("sparse_objects: must be at least one BlockSparseLinear, got none")
        group = {**self.defaults, **param_group, "sparse_objects": layers}
        if not 0 <= group["lr"] <= 1:
            raise ValueError(f"lr: must be in [0, 1], a share of the blocks, got {group['lr']}")
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
        super().add_param_group({**group, "params": [layer.values for layer in layers]})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Replaces blocks. Call it after the step of the optimizer that trains the values.

        Raises:
            ValueError: optimizers are attached, but none of them trains a layer's values.
        """
        self.steps += 1
        number = replaced = 0
        for group in self.param_groups:
            for layer in group["sparse_objects"]:
                replaced += self._replace(layer, group, number)
                number += 1
        if not replaced and any(group["lr"] > 0 for group in self.param_groups):
            warnings.warn(
                f"SparseOptimizer: step {self.steps} has replaced no block: in each layer lr is "
                "less than one block's share, or no block is absent",
                stacklevel=2,
            )

    def _replace(self, layer: BlockSparseLinear, group: dict[str, Any], number: int) -> int:
        trainer = next((o for o in self.attached_optimizers if holds(o, layer.values)), None)
        if self.attached_optimizers and trainer is None:
            raise ValueError("attach_optimizer: no attached optimizer trains the values of a layer")
        source = generator(self.seed, f"sparse_objects[{number}]", self.steps)
        count = int(group["lr"] * layer.block_count)
        ids = random_sample(absent_ids(layer.pattern), count, source)
        norms = without_nan(scores.l1(layer.values), f"sparse_objects[{number}]")
        new_values = _draw(layer.values, len(ids), group, source)
        replace_blocks_(layer.weight, lowest(norms, len(ids)), ids, trainer, new_values)
        return len(ids)

    def state_dict(self) -> dict[str, Any]:
        """The options of the groups and the number of steps; not the layers themselves."""
        state: dict[str, Any] = super().state_dict()
        for group in state["param_groups"]:
            group.pop("sparse_objects")
        return {**state, "steps": self.steps, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the options and the number of steps."""
        layers = [group["sparse_objects"] for group in self.param_groups]
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for group, own in zip(self.param_groups, layers, strict=True):
            group["sparse_objects"] = own
        self.steps, self.seed = state_dict["steps"], state_dict["seed"]


def _draw(values: Tensor, count: int, group: dict[str, Any], source: torch.Generator) -> Tensor:
    """Values of `count` new blocks. (The ancestor drew integers in [0, 1): all zero.)"""
    shape = (count, *values.shape[1:])
    spread = group["new_coefficients_scale"] * values.float().std()
    if group["new_coefficients_distribution"] == "uniform":
        unit = torch.rand(shape, generator=source) * 2 - 1
    else:
        unit = torch.randn(shape, generator=source)
    return unit.to(values.device) * spread
