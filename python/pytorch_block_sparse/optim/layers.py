"""The block-sparse layers of a model, and what is kept of each: who is cared for, not how.

Names lose what DDP, torch.compile and checkpointing put into them, so that they are the same on
every rank and in every run.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..linear import BlockSparseLinear
from ..ops import zero_blocks_

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(eq=False)
class SparseLayer:
    """One layer in the care of a sparsifier.

    Attributes:
        name: full name in the model, without the wrappers of DDP and torch.compile.
        module: the layer.
        born: int64 ``[nnz]``, the step at which each block was grown; 0: there from the start.
        alive: bool ``[nnz]``; False where a block is held at zero until the next compaction.
        dead: int64, ascending: positions of the blocks that are not alive.
        start: number of blocks when the sparsifier was made.
    """

    name: str
    module: BlockSparseLinear
    born: Tensor
    alive: Tensor
    dead: Tensor
    start: int

    @classmethod
    def of(cls, name: str, module: BlockSparseLinear) -> "SparseLayer":
        """A layer whose blocks were all there from the start, and are alive."""
        nnz, device = module.block_count, module.values.device
        born = torch.zeros(nnz, dtype=torch.int64, device=device)
        return cls(name, module, born, torch.ones_like(born, dtype=torch.bool), born[:0], nnz)

    def set_alive(self, alive: Tensor) -> None:
        """Says which blocks are alive."""
        self.alive, self.dead = alive, (~alive).nonzero().squeeze(1)

    def check_trained(self, method: str) -> None:
        """RuntimeError if the layer has been frozen since `method` was made."""
        if not self.module.values.requires_grad:
            raise RuntimeError(
                f"{self.name}: has been frozen since {method} was made, which would go on changing "
                "its pattern; make the method anew, it leaves frozen layers as they are"
            )

    def check_device(self) -> None:
        """RuntimeError if the layer has moved to another device since this was made."""
        if self.module.values.device != self.dead.device:
            raise RuntimeError(
                f"{self.name}: is on {self.module.values.device} now, but was on "
                f"{self.dead.device} when the method was made; make it after the model was moved"
            )

    @property
    def alive_count(self) -> int:
        """Number of blocks that are alive."""
        return len(self.alive) - len(self.dead)

    @property
    def cells(self) -> int:
        """Number of blocks of the full grid."""
        rows, cols = self.module.pattern.grid
        return rows * cols


def refuse_tied(name: str, module: BlockSparseLinear, layers: list[SparseLayer]) -> None:
    """ValueError if one of `layers` has the same values."""
    for layer in layers:
        if layer.module.values is module.values:
            raise ValueError(
                f"{name}: has its values in common with {layer.name}, so neither can change its "
                "pattern; leave both out"
            )


def hold_at_zero(layers: list[SparseLayer]) -> None:
    """Zeroes the blocks that are not alive."""
    values = [layer.module.values for layer in layers]
    dead = [layer.dead for layer in layers]
    device = values[0].device
    if not any(positions.numel() for positions in dead):
        return
    there = zip(values, dead, strict=True)
    if all(own.is_contiguous() and own.device == at.device == device for own, at in there):
        zero_blocks_(values, dead)  # on a GPU, a launch for each takes longer than what it does
        return
    for layer, own in zip(layers, values, strict=True):
        layer.check_device()
        own.index_fill_(0, layer.dead, 0)


def sums_of_parts(joined: Tensor, sizes: list[int]) -> Tensor:
    """int64: the sum of each part of `joined`, integers, in as few launches as for one."""
    ends = torch.tensor([0, *itertools.accumulate(sizes)])
    sums = nn.functional.pad(joined.cumsum(0), (1, 0))
    return sums[ends.to(joined.device, non_blocking=True)].diff()


def sparse_layers(model: nn.Module) -> dict[str, BlockSparseLinear]:
    """The block-sparse layers of `model`, by name, or ValueError if there is none.

    Names lose what DDP, torch.compile and checkpointing put into them, so that they are the same
    on every rank and in every run.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be a torch.nn.Module, got {type(model).__name__}")
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or hasattr(
        model, "_orig_mod"
    ):
        inner = model._orig_mod if hasattr(model, "_orig_mod") else model.module
        assert isinstance(inner, nn.Module)
        model = inner
    layers: dict[str, BlockSparseLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, BlockSparseLinear):
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            layers[name] = module
    if not layers:
        raise ValueError(
            "model: has no BlockSparseLinear; replace its layers with BlockSparseModelPatcher first"
        )
    return layers
