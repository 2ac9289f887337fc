"""QuantizedBlockSparseLinear: a block-sparse layer for serving with int8 values; and whole models.

Only weights are quantized: inputs, sums and outputs stay floating point. It is never trained.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from ._inference import InferenceModule, check_layer_to_serve
from ._module import DTYPES, PatternModule, own
from ._patchable import carries, replace
from ._progress import progress
from ._sharded import refuse_sharded
from .integrations import record_layers
from .linear import BlockSparseLinear
from .matrix import BlockSparseMatrix
from .pattern import Pattern

_LARGEST = 127  # of an int8 value; -128 is left out, so that the two signs are alike
_AT_A_TIME = 1 << 20  # values: what is computed with is eight times as large as the result


class QuantizedBlockSparseLinear(InferenceModule, PatternModule):
    """What :meth:`BlockSparseLinear.quantize` returns: ``y = x Wt + bias``, without gradients.

    Row ``n`` of the weight is ``scales[n] * values``, where the values are integers from -127 to
    127: the row's largest magnitude is 127 of them. A scale for a whole row, and not for each
    block, because then it is applied to sums, once for each output, and never to a value. A value
    is off by half its scale at most.

    The values are a copy in memory of its own, a quarter of that of float32. Casts (``half()``)
    change the dtype of the bias; values and scales stay int8 and float32. ``load_state_dict`` takes
    the ``state_dict`` of a quantized layer, with its pattern.

    Args:
        layer: the layer to serve, without pending gradients.

    Shapes:
        input ``[..., in_features]``, output ``[..., out_features]``, in float64, float32, bfloat16
        or float16: the dtype of the bias, and any of them where there is none.

    Attributes:
        values: int8 ``[nnz, block_out, block_in]``, the blocks in BSR order.
        scales: float32 ``[out_features]``.
        bias: ``[out_features]`` or None.

    Raises:
        RuntimeError: a gradient is pending.
        ValueError: a value is not finite, or the layer is one of several ranks.

    Example:
        >>> import torch
        >>> from pytorch_block_sparse import BlockSparseLinear
        >>> layer = BlockSparseLinear(64, 96, density=0.5)
        >>> served = layer.quantize()
        >>> with torch.inference_mode():
        ...     x = torch.randn(4, 64)
        ...     torch.allclose(served(x), layer(x), atol=0.02)
        True
        >>> error = (served.weight.to_dense() - layer.weight.to_dense()).abs()
        >>> bool((error <= served.scales[:, None] * 0.5001).all())
        True
    """

    _BACK = "dequantize"
    _SAVED_TOGETHER = (*PatternModule._SAVED_TOGETHER, "scales")

    scales: Tensor

    def __init__(self, layer: BlockSparseLinear) -> None:
        super().__init__()
        _check(layer)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.block_shape = layer.block_shape
        with torch.no_grad():
            values, scales = _quantize(layer.values, layer.pattern)
            bias = None if layer.bias is None else layer.bias.detach().clone()
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self._set_pattern(own(layer._pattern_to_keep()))
        self.eval()

    # --- what it computes -------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        self._check_input(input)
        return ops.forward_int8(
            input, self.values, self.scales, self._index, self.bias, self.out_features
        )

    def explain(self, tokens: int, dtype: torch.dtype | None = None) -> str:
        """Which kernel runs for an input of `dtype` (that of the bias), and why not others."""
        return torch.ops.block_sparse.explain(
            self.values,
            "forward",
            tokens,
            self.out_features,
            self.in_features,
            self.bias is not None,
            input=self.scales.new_empty(0, dtype=self._float_dtype(dtype)),
        )

    # --- back to the layer ------------------------------------------------------------------------

    def dequantize(self, dtype: torch.dtype | None = None) -> BlockSparseLinear:
        """The layer with the values that are computed with here, in memory of its own.

        Args:
            dtype: of the layer; by default that of the bias, or torch's default where there is
                none.
        """
        dtype = self._float_dtype(dtype)
        layer = BlockSparseLinear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            pattern=self._pattern_to_keep(),
            device="meta",
            dtype=dtype,
        )
        wide = self.scales.to(torch.promote_types(dtype, torch.float32))
        scales = _of_blocks(wide, self.pattern)
        layer.values = nn.Parameter((self.values * scales[:, :, None]).to(dtype))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.to(dtype, copy=True))
        layer._set_pattern(own(self._pattern_to_keep()))
        return layer.train(self.training)

    def _float_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        if dtype is None:
            return torch.get_default_dtype() if self.bias is None else self.bias.dtype
        if dtype not in DTYPES:
            raise TypeError(f"dtype: must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        return dtype

    @property
    def weight(self) -> BlockSparseMatrix:
        """The weight as a matrix of floats: a copy, made at each access."""
        return self.dequantize().weight

    # --- moves and checkpoints --------------------------------------------------------------------

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "QuantizedBlockSparseLinear":
        kept = {"values": self.values, "scales": self.scales}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():  # moved, and never cast
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self

    def _saved(self, nnz: int) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        return {
            **super()._saved(nnz),
            "values": ((nnz, *self.block_shape), (torch.int8,)),
            "scales": ((self.out_features,), (torch.float32,)),
        }

    def _check_checkpoint(self, state_dict: dict[str, Any], prefix: str) -> Pattern:
        pattern = super()._check_checkpoint(state_dict, prefix)
        check_scales(state_dict[prefix + "scales"])
        return pattern


def _check(layer: BlockSparseLinear) -> None:
    """Raises unless `layer` can be quantized."""
    check_layer_to_serve(layer, "quantized")
    refuse_sharded("layer", layer.values, "quantize")
    if layer.values.is_meta:
        return
    limit = torch.finfo(torch.float32).max
    wrong = ~(_largest(layer.values) <= limit)  # not ">": NaN is wrong too
    if wrong.any():
        block = int(wrong.any(dim=1).int().argmax())
        raise ValueError(
            f"values: must be finite, and at most {limit:.3g} in magnitude; those of block {block} "
            "are not"
        )


def _largest(values: Tensor) -> Tensor:
    """``[nnz, block_out]``: the largest magnitude in each row of each block."""
    return values.detach().abs().amax(dim=2)


def _quantize(values: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """int8 values, and the float32 scale of each row of the weight."""
    rows, (block_out, _) = pattern.grid[0], pattern.block_shape
    largest = torch.zeros((rows, block_out), dtype=torch.float64, device=values.device)
    row_of_block = pattern.row_indices.long()[:, None].expand(-1, block_out)
    largest.scatter_reduce_(0, row_of_block, _largest(values).double(), "amax")
    scales = (largest.flatten()[: pattern.shape[0]] / _LARGEST).float()
    scales.clamp_(min=torch.finfo(torch.float32).tiny)  # a row of zeros has one too
    quantized = torch.empty_like(values, dtype=torch.int8)
    count = max(1, _AT_A_TIME // (values.shape[1] * values.shape[2]))
    parts = (t.split(count) for t in (values, _of_blocks(scales, pattern), quantized))
    for some, scale, to in zip(*parts, strict=True):
        to.copy_((some.double() / scale[:, :, None]).round_())
    return quantized, scales


def _of_blocks(scales: Tensor, pattern: Pattern) -> Tensor:
    """``[nnz, block_out]``: the scale of each row of each block."""
    rows, (block_out, _) = pattern.grid[0], pattern.block_shape
    outside = rows * block_out - len(scales)
    padded = nn.functional.pad(scales, (0, outside), value=1.0)
    return padded.view(rows, block_out)[pattern.row_indices.long()]


def check_scales(scales: Tensor) -> None:
    """ValueError unless the scales of a checkpoint are what a quantized layer has."""
    bad = ~(scales.isfinite() & (scales >= 0))
    if bad.any():
        row = int(bad.int().argmax())
        raise ValueError(
            f"scales: must be finite and not negative, got {scales[row].item()} for output {row}"
        )


def quantize_(model: nn.Module) -> list[str]:
    """Replaces each :class:`BlockSparseLinear` of `model` by its quantized form, in place.

    For serving: what is replaced has no gradients any more. All else is left as it is, dense layers
    too (torchao's ``quantize_`` takes those, and leaves these). So are layers that carry hooks,
    with a warning. One layer after the other is replaced, so that at no time there is a second copy
    of the model.

    Returns:
        The names of the layers that were replaced.

    Raises:
        ValueError: `model` is a layer itself, and has no parent to be replaced in; a value is not
            finite; or a layer is one of several ranks.
        RuntimeError: a gradient is pending. Layers are checked before the first is replaced.

    Example:
        >>> from torch import nn
        >>> from pytorch_block_sparse import BlockSparseLinear, quantize_
        >>> model = nn.Sequential(BlockSparseLinear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        >>> quantize_(model)
        ['0']
    """
    if isinstance(model, BlockSparseLinear):
        raise ValueError(
            f"model: is a {type(model).__name__} itself and has no parent to be replaced in; use "
            "its quantize()"
        )
    layers: dict[BlockSparseLinear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BlockSparseLinear):
            layers.setdefault(module, []).append(name)
    for layer, names in list(layers.items()):
        if (reason := carries(layer)) is not None:
            warnings.warn(f"{names[0]}: left as it is, since {reason}", stacklevel=2)
            del layers[layer]
            continue
        try:
            _check(layer)
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"{names[0]}: {error}") from error
    done = []
    for layer, names in progress(list(layers.items()), "Quantizing"):
        replace(model, names, layer.quantize())
        done.append(names[0])
    record_layers(model)
    return done
