"""PrepackedLinear: a block-sparse layer for serving on the CPU. It is never trained.

It holds the values in the order that the kernels read best, and in no other. The ordinary layer
brings them into that order again in each call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from ._inference import InferenceModule, check_layer_to_serve
from ._module import own
from .linear import BlockSparseLinear
from .matrix import BlockSparseMatrix
from .pattern import Pattern


class PrepackedLinear(InferenceModule):
    """What :meth:`BlockSparseLinear.prepack` returns: ``y = x Wt + bias``, without gradients.

    ``state_dict`` is that of the layer, in canonical form: either loads that of the other. Moving
    and casting repack, and so does ``load_state_dict``; each makes a second copy of the values
    while it lasts. The values are a copy: training the layer on does not change this module. The
    pattern is shared with the layer: after it was changed in place every call is an error.

    Under autocast the input is cast to the dtype of the values, which stay as they are.

    Args:
        layer: the layer to serve, on the CPU, without pending gradients.

    Raises:
        RuntimeError: a gradient is pending.
        ValueError: the layer is not on the CPU.

    Example:
        >>> import torch
        >>> from pytorch_block_sparse import BlockSparseLinear
        >>> layer = BlockSparseLinear(64, 96, density=0.5)
        >>> served = layer.prepack()
        >>> with torch.inference_mode():
        ...     x = torch.randn(4, 64)
        ...     torch.allclose(served(x), layer(x), atol=1e-5)
        True
        >>> torch.equal(served.unpack().values, layer.values)
        True
    """

    _BACK = "unpack"

    out_features: int
    block_shape: tuple[int, int]
    bias: Tensor | None
    crow_indices: Tensor
    col_indices: Tensor
    _index: Tensor
    _packed: Tensor  # [nnz, block_out * block_in], include/block_sparse/packed.h

    def __init__(self, layer: BlockSparseLinear) -> None:
        super().__init__()
        check_layer_to_serve(layer, "prepacked")
        self._adopt(layer)
        self.eval()

    def _adopt(self, layer: BlockSparseLinear) -> None:
        """Becomes what `layer` is."""
        if layer.values.device.type != "cpu":
            raise ValueError(
                f"layer: is on {layer.values.device}, but only the kernels of the CPU have an "
                "order of their own; move it to the CPU first, or serve it as it is"
            )
        pattern = layer.pattern
        if pattern.index.is_inference():  # torch does not count the writes to it
            pattern = own(pattern)
        with torch.no_grad():
            packed = ops.pack(layer.values)
            bias = None if layer.bias is None else layer.bias.detach().clone()
        if layer.values.is_shared():
            packed.share_memory_()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.block_shape = layer.block_shape
        self.register_buffer("_packed", packed, persistent=False)
        self.register_buffer("bias", bias)
        self.register_buffer("crow_indices", pattern.crow_indices)
        self.register_buffer("col_indices", pattern.col_indices)
        self.register_buffer("_index", pattern.index, persistent=False)
        self._writes = self._count_writes()

    def _count_writes(self) -> int:
        return 0 if self._index.is_inference() else self._index._version

    def _check_pattern(self) -> None:
        if self._count_writes() != self._writes:
            raise RuntimeError(
                "pattern: was changed in place after prepack(), so the values here belong to other "
                "blocks; call prepack() of the layer again"
            )

    # --- what it computes -------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        self._check_input(input)
        if not torch.compiler.is_compiling():
            self._check_pattern()
        return ops.forward_packed(
            input, self._packed, self._index, self.bias, self.out_features, *self.block_shape
        )

    def explain(self, tokens: int) -> str:
        """Which kernel runs, and why not others."""
        values = self._packed.view(-1, *self.block_shape)
        sizes = (tokens, self.out_features, self.in_features)
        return torch.ops.block_sparse.explain(
            values, "forward", *sizes, self.bias is not None, packed=True
        )

    # --- back to the layer ------------------------------------------------------------------------

    def unpack(self) -> BlockSparseLinear:
        """The layer with the same values, in canonical order and in memory of its own."""
        self._check_pattern()
        layer = BlockSparseLinear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            pattern=self.pattern,
            device="meta",
            dtype=self._packed.dtype,
        )
        layer.values = nn.Parameter(ops.unpack(self._packed, *self.block_shape))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.clone())
        layer._set_pattern(own(self.pattern))
        return layer.train(self.training)

    @property
    def pattern(self) -> Pattern:
        """Which blocks are present."""
        shape = (self.out_features, self.in_features)
        return Pattern(self.crow_indices, self.col_indices, self._index, shape, self.block_shape)

    @property
    def weight(self) -> BlockSparseMatrix:
        """The weight as a matrix: a copy, made at each access."""
        return self.unpack().weight

    @property
    def block_count(self) -> int:
        """Number of present blocks."""
        return self._packed.shape[0]

    @property
    def density(self) -> float:
        """Share of the blocks that are present."""
        return self.pattern.density

    def extra_repr(self) -> str:
        """As that of the layer."""
        return self.unpack().extra_repr()

    # --- moves, copies and checkpoints: those of the layer ----------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PrepackedLinear":
        layer = self.unpack()
        layer._apply(fn, recurse)
        self._adopt(layer)
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._check_pattern()
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's tensors count their writes anew."""
        super().__setstate__(state)
        self._writes = self._count_writes()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        self._check_pattern()
        destination[prefix + "values"] = ops.unpack(self._packed, *self.block_shape)
        super()._save_to_state_dict(destination, prefix, keep_vars)

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
        layer, errors = self.unpack(), len(error_msgs)
        layer._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if len(error_msgs) == errors:
            self._adopt(layer)
