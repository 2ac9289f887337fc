"""Layers of which each rank holds a part, with the collectives around their product.

Parameters are plain tensors, those of the rank's part, because parts that are balanced by nnz have
sizes that no DTensor has. So the ``state_dict`` is made whole here: it is that of the whole layer,
on every rank, and is cut while it is loaded.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.placement_types import Placement, Shard

from .._sharded import refuse_sharded
from ..linear import BlockSparseLinear
from ..pattern import Pattern
from .collectives import broadcast, broadcast_pattern, cuts_last, spread
from .cuts import check_equal, cut_pattern, join_patterns, widths_of


class Layouts(NamedTuple):
    """How input and output lie over the mesh: what the styles are told."""

    input: tuple[Placement, ...]
    output: tuple[Placement, ...]
    local_output: bool


class ParallelLinear(BlockSparseLinear):
    """A ``BlockSparseLinear`` that is a range of features of a larger one. Made by a style.

    ``state_dict()`` is that of the whole layer, so every rank of the mesh has to call it.
    """

    cut_dim: ClassVar[int]  # 0: outputs, block rows; 1: inputs, block columns
    is_part = True

    mesh: DeviceMesh
    cuts: list[int]
    layouts: Layouts

    @property
    def _range(self) -> tuple[int, int]:
        rank = self.mesh.get_local_rank()
        return self.cuts[rank], self.cuts[rank + 1]

    @property
    def _widths(self) -> list[int]:
        return widths_of(self.cuts)

    @property
    def _even(self) -> bool:
        return len(set(self._widths)) == 1

    def _shape_of(self, features: int) -> tuple[int, int]:
        """Of a layer with so many features where this one is cut."""
        if self.cut_dim == 0:
            return features, self.in_features
        return self.out_features, features

    def _replicated(self, input: Tensor) -> Tensor:
        """All of the input, on each rank. Each uses it for its part: the gradients are summed."""
        given = spread(input, self.mesh, self.layouts.input)
        whole = given.redistribute(placements=(Replicate(),))
        return whole.to_local(grad_placements=(Partial(),))

    def extra_repr(self) -> str:
        """As of the part, plus where it lies in the whole."""
        start, stop = self._range
        return f"{super().extra_repr()}, part={start}:{stop} of {self.cuts[-1]}"

    # --- checkpoints ------------------------------------------------------------------------------

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        refuse_sharded("layer", self.values, "take its state_dict")
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.values.is_meta:
            for name, tensor in self._whole().items():
                destination[prefix + name] = tensor

    @torch.no_grad()
    def _whole(self) -> dict[str, Tensor]:
        """The entries of the whole layer's state_dict that are not this one's."""
        group = self.mesh.get_group()
        parts, values, biases = [], [], []
        for source, width in enumerate(self._widths):
            pattern = broadcast_pattern(self, self._shape_of(width), group, source)
            parts.append(pattern)
            values.append(broadcast(self.values, (pattern.nnz, *self.block_shape), group, source))
            if self.bias is not None and self.cut_dim == 0:
                biases.append(broadcast(self.bias, (width,), group, source))
        whole, order = join_patterns(parts, self.cut_dim, self.cuts)
        state = {
            "values": torch.cat(values)[order],
            "crow_indices": whole.crow_indices,
            "col_indices": whole.col_indices,
        }
        return {**state, "bias": torch.cat(biases)} if biases else state

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            state_dict = {**state_dict, **self._part_of(state_dict, prefix)}
        except (TypeError, ValueError, RuntimeError) as error:
            error_msgs.append(f"{prefix}: {error}" if prefix else str(error))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _part_of(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
        """What this rank holds of the entries of the whole layer."""
        values, crow, col, bias = (
            state_dict.get(prefix + name)
            for name in ("values", "crow_indices", "col_indices", "bias")
        )
        start, stop = self._range
        part: dict[str, Tensor] = {}
        if values is not None and crow is not None and col is not None:
            whole = Pattern.from_bsr(crow, col, self._shape_of(self.cuts[-1]), self.block_shape)
            size = (whole.nnz, *self.block_shape)
            if not isinstance(values, Tensor) or tuple(values.shape) != size:
                raise ValueError(f"values: must be {list(size)}, got {_shape(values)}")
            pattern, inside = cut_pattern(whole, self.cut_dim, start, stop)
            part["values"] = values[inside.to(values.device)]
            part["crow_indices"], part["col_indices"] = pattern.crow_indices, pattern.col_indices
        if bias is not None and self.cut_dim == 0:
            if not isinstance(bias, Tensor) or tuple(bias.shape) != (self.cuts[-1],):
                raise ValueError(f"bias: must be [{self.cuts[-1]}], got {_shape(bias)}")
            part["bias"] = bias[start:stop]
        return {prefix + name: tensor for name, tensor in part.items()}


class ColwiseLinear(ParallelLinear):
    """Each rank has a range of block rows: all of the input, a part of the output."""

    cut_dim = 0

    def forward(self, input: Tensor) -> Tensor:
        """The layouts are those of the style."""
        y = super().forward(self._replicated(input))
        to, last = self.layouts.output, y.dim() - 1
        if cuts_last(to, y.dim()):
            if self.layouts.local_output:
                return y
            check_equal(self.cuts)
            return spread(y, self.mesh, (Shard(last),))
        # DTensor knows equal parts only.
        widest = max(self._widths)
        padded = nn.functional.pad(y, (0, widest - y.shape[-1]))
        spread_out = spread(padded, self.mesh, (Shard(last),)).redistribute(placements=to)
        whole: Tensor = spread_out.to_local() if self.layouts.local_output else spread_out
        if self._even:
            return whole
        parts = [whole.narrow(-1, i * widest, width) for i, width in enumerate(self._widths)]
        return torch.cat(parts, -1)


class RowwiseLinear(ParallelLinear):
    """Each rank has a range of block columns: a part of the input, a summand of the output."""

    cut_dim = 1

    def forward(self, input: Tensor) -> Tensor:
        """The layouts are those of the style."""
        partial = self._product(self._own_inputs(input), None)
        y: Any = spread(partial, self.mesh, (Partial(),))
        y = y.redistribute(placements=self.layouts.output)
        if self.bias is not None:  # once, after the sum
            y = y + spread(self.bias.to(y.dtype), self.mesh, (Replicate(),))
        return y.to_local() if self.layouts.local_output else y

    def reset_parameters(self) -> None:
        """As of the whole layer; the bias is the same on every rank."""
        super().reset_parameters()
        if self.bias is not None and not self.values.is_meta:
            with torch.no_grad():
                bound = self.cuts[-1] ** -0.5
                self.bias.uniform_(-bound, bound)
                dist.broadcast(self.bias, group=self.mesh.get_group(), group_src=0)

    def _present_inputs(self) -> Tensor:
        counts = super()._present_inputs()
        dist.all_reduce(counts, group=self.mesh.get_group())
        return counts

    def _own_inputs(self, input: Tensor) -> Tensor:
        if isinstance(input, DTensor):
            if self._even and cuts_last(input.placements, input.dim()):
                return input.to_local()
        elif cuts_last(self.layouts.input, input.dim()):
            return input
        start, stop = self._range
        return self._replicated(input).narrow(-1, start, stop - start)


def _shape(item: Any) -> Any:
    return list(item.shape) if isinstance(item, Tensor) else type(item).__name__
