"""Values that are sharded over processes (FSDP2): DTensors, cut between blocks.

The pattern is whole on every rank; here is which part of what is kept per block goes with the
blocks of this one. It does not import ``torch.distributed``.
"""

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor."""
    return hasattr(tensor, "placements")


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor, sharing its memory; any other tensor itself."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor


def own_part_like(tensor: Tensor, values: Tensor) -> Tensor:
    """The part of `tensor`, an entry for each block, for the blocks of ``own_part(values)``."""
    if not is_sharded(values):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = values
    # No source: every rank has all of it, and takes its part without asking another.
    whole = (sharded.device_mesh, sharded.placements)
    return distribute_tensor(tensor, *whole, src_data_rank=None).to_local()


def refuse_sharded(name: str, values: Tensor, what: str) -> None:
    """ValueError if `values`, of the layer or argument `name`, are sharded."""
    if is_sharded(values):
        raise ValueError(
            f"{name}: its values are sharded (fully_shard); {what} before they are, or with DDP"
        )
