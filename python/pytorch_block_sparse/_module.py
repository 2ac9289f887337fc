"""PatternModule: keeps a pattern right through all that is done to a module.

Moves, casts, the meta device, checkpoints. It knows nothing of what the module computes.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._resized import refuse_old_state
from ._sharded import is_sharded
from .matrix import zero_outside
from .pattern import Pattern

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Derived from the pattern; never cast, never made up: see `_apply`.
_INDEX_BUFFERS = ("crow_indices", "col_indices", "_index")


class PatternModule(nn.Module):
    """A module with ``values`` ``[nnz, block_out, block_in]`` at the present blocks of a pattern.

    The pattern is held as buffers: ``crow_indices`` and ``col_indices``, which are saved, and
    ``_index``, which is made from them and which the products read.
    """

    in_features: int
    out_features: int
    block_shape: tuple[int, int]
    values: Tensor
    bias: Tensor | None
    crow_indices: Tensor
    col_indices: Tensor
    _index: Tensor

    # In a checkpoint these mean something only together.
    _SAVED_TOGETHER: ClassVar[tuple[str, ...]] = ("values", "crow_indices", "col_indices")

    @property
    def pattern(self) -> Pattern:
        """Which blocks are present; shares memory with the layer."""
        return Pattern(
            self.crow_indices,
            self.col_indices,
            self._index,
            (self.out_features, self.in_features),
            self.block_shape,
        )

    @property
    def block_count(self) -> int:
        """Number of present blocks."""
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """Share of the blocks that are present."""
        return self.pattern.density

    def extra_repr(self) -> str:
        """As ``nn.Linear``, plus the pattern."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, density={self.density:.3g}, "
            f"block_shape={self.block_shape}, block_count={self.block_count}"
        )

    def _pattern_from_bsr(self, crow_indices: Tensor, col_indices: Tensor) -> Pattern:
        shape = (self.out_features, self.in_features)
        return Pattern.from_bsr(crow_indices, col_indices, shape, self.block_shape)

    def _set_pattern(self, pattern: Pattern) -> None:
        """Makes `pattern` the layer's, on the device of `values`; its nnz is that of `values`."""
        device = self.values.device
        # A module on the meta device has no numbers: what it will need is kept on the host.
        self._host_pattern = pattern.to("cpu") if device.type == "meta" else None
        moved = pattern.to(device)
        self.register_buffer("crow_indices", moved.crow_indices)
        self.register_buffer("col_indices", moved.col_indices)
        self.register_buffer("_index", moved.index, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PatternModule":
        # Indices follow the device of `values` and nothing else: .type(dtype) must not touch them,
        # and to_empty() would make them garbage.
        pattern = self._pattern_to_keep()
        for name in _INDEX_BUFFERS:
            del self._buffers[name]
        try:
            super()._apply(fn, recurse)
        finally:
            self._set_pattern(pattern)
        if self.values.is_shared():
            for index in (self.crow_indices, self.col_indices, self._index):
                index.share_memory_()
        return self

    def _pattern_to_keep(self) -> Pattern:
        if self.crow_indices.is_meta or self.col_indices.is_meta:
            if self._host_pattern is None:
                raise RuntimeError(
                    "crow_indices, col_indices: are on the meta device, and the pattern is not "
                    "known here; a hook that offloads buffers (accelerate.cpu_offload with "
                    "offload_buffers=True) holds it: move or cast the model before, or remove the "
                    "hook first (accelerate.hooks.remove_hook_from_submodules)"
                )
            return self._host_pattern
        if self._index.is_meta:  # accelerate has placed the tensors of a checkpoint one by one
            return self._pattern_from_bsr(self.crow_indices, self.col_indices)
        return self.pattern

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_index" and not value.is_meta:
            # transformers' from_pretrained sets tensors one by one; last, and to an empty one, what
            # is in no checkpoint. It is made from the others here.
            self._set_pattern(self._pattern_from_bsr(self.crow_indices, self.col_indices))

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
        """Adopts the pattern of the checkpoint. A checkpoint that does not fit changes nothing."""
        assign = local_metadata.get("assign_to_params_buffers", False)
        keys = [prefix + name for name in self._SAVED_TOGETHER]
        present = [key for key in keys if key in state_dict]
        pattern = None
        if len(present) < len(keys):
            state_dict = {key: state_dict[key] for key in state_dict if key not in present}
        elif assign or not self.values.is_meta:  # else nn.Module warns that it does nothing
            try:
                pattern = self._check_checkpoint(state_dict, prefix)
            except (TypeError, ValueError, RuntimeError) as error:
                error_msgs.append(f"{prefix}: {error}" if prefix else str(error))
                return
            if pattern.nnz != self.block_count:
                self._resize(pattern)
            elif self._index.is_meta or not pattern.equal(self.pattern):
                self.values.grad = None  # it is that of other blocks
            values = state_dict[keys[0]].detach()
            inside = zero_outside(values, pattern.to(values.device))
            if inside is not values and not torch.equal(
                inside, values
            ):  # else `assign` takes the tensor as it is
                state_dict = {**state_dict, keys[0]: inside}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys[:] = [key for key in missing_keys if key not in present]
        if pattern is not None:
            if assign or self._index.is_meta:
                self._set_pattern(pattern if assign else own(pattern))
            else:
                self._index.copy_(pattern.to(self._index.device).index)

    def _check_checkpoint(self, state_dict: dict[str, Any], prefix: str) -> Pattern:
        pattern = self._pattern_from_bsr(
            state_dict[prefix + "crow_indices"], state_dict[prefix + "col_indices"]
        )
        for name, (size, dtypes) in self._saved(pattern.nnz).items():
            tensor = state_dict.get(prefix + name)
            if tensor is None or getattr(self, name) is None:
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: must be a tensor, got {type(tensor).__name__}")
            if tensor.dtype not in dtypes or tensor.is_meta:
                wanted = "floating point" if dtypes is DTYPES else " or ".join(map(str, dtypes))
                raise TypeError(
                    f"{name}: must be {wanted}, with numbers, got {tensor.dtype} on {tensor.device}"
                )
            if tuple(tensor.shape) != size:
                raise ValueError(f"{name}: must be {list(size)}, got {list(tensor.shape)}")
        if is_sharded(self.values) and pattern.nnz != self.block_count:
            raise ValueError(
                f"values: are sharded (fully_shard) and stay {self.block_count} blocks, but the "
                f"checkpoint has {pattern.nnz}; load it before they are sharded"
            )
        return pattern

    def _saved(self, nnz: int) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        """Shape and dtypes of what a checkpoint has beside the indices of `nnz` blocks."""
        return {
            "values": ((nnz, *self.block_shape), DTYPES),
            "bias": ((self.out_features,), DTYPES),
        }

    def _resize(self, pattern: Pattern) -> None:
        """Makes room for another number of blocks in the same Parameter object.

        So an optimizer that was made before goes on training it.
        """
        self.values.grad = None
        self.values.data = self.values.new_empty((pattern.nnz, *self.block_shape))
        self._set_pattern(own(pattern))
        refuse_old_state(self)


def own(pattern: Pattern) -> Pattern:
    """`pattern` in memory of its own: a layer changes its indices in place."""
    crow, col, index = pattern.crow_indices, pattern.col_indices, pattern.index_in_step()
    return Pattern(crow.clone(), col.clone(), index.clone(), pattern.shape, pattern.block_shape)
