"""BlockSparseLinear: a drop-in for ``torch.nn.Linear`` whose weight is block sparse."""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .matrix import BlockSparseMatrix, largest_blocks
from .pattern import Pattern, check_block_shape, check_density, grid_shape

# Derived from the pattern; never cast, never made up: see `_apply`.
_INDEX_BUFFERS = ("crow_indices", "col_indices", "_index")


class BlockSparseLinear(nn.Module):
    """``y = x Wt + bias`` where only the blocks of the pattern of W are stored and multiplied.

    Args:
        in_features, out_features: sizes, as in ``nn.Linear``; any size and any block shape go
            together (edge blocks may reach outside; what lies outside is zero and stays zero).
        bias: whether to add a learnt bias.
        density: share of the blocks that are present, in (0, 1]; ``round(density * blocks)``.
        torch_nn_linear: take sizes, weights and bias from this layer, keeping the blocks of largest
            magnitude (see :meth:`from_dense`); then `in_features` and `out_features` may be 0.
        verbose: print the layer once it is made.
        block_shape: (out, in) of a block.
        pattern: the pattern to use instead of a random one of `density` (or, with
            `torch_nn_linear`, instead of the largest blocks). Its block shape counts.
        device, dtype: as in ``nn.Linear``.

    Shapes:
        input ``[..., in_features]``, any number of leading dimensions; output
        ``[..., out_features]``. float64, float32, bfloat16, float16.

    Attributes:
        values: Parameter ``[nnz, block_out, block_in]``, the blocks in BSR order.
        bias: Parameter ``[out_features]`` or None.

    The values are drawn uniformly from +-1/sqrt(n) where n is the number of inputs that are present
    in the block row, so that each output has the variance that it has in a dense ``nn.Linear``.

    Example:
        >>> import torch
        >>> from pytorch_block_sparse import BlockSparseLinear
        >>> layer = BlockSparseLinear(1024, 256, density=0.1)
        >>> layer(torch.randn(8, 1024)).shape
        torch.Size([8, 256])
        >>> layer.block_count
        26
    """

    crow_indices: Tensor
    col_indices: Tensor
    _index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        density: float = 0.5,
        torch_nn_linear: nn.Linear | None = None,
        verbose: bool = False,
        block_shape: tuple[int, int] = (32, 32),
        *,
        pattern: Pattern | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_density(density)
        dense = None
        if torch_nn_linear is not None:
            dense = _dense_of(torch_nn_linear)
            in_features = _same_size("in_features", in_features, torch_nn_linear)
            out_features = _same_size("out_features", out_features, torch_nn_linear)
            bias = dense.bias is not None
        shape = (
            _check_features("out_features", out_features),
            _check_features("in_features", in_features),
        )
        if pattern is not None and pattern.shape != shape:
            raise ValueError(
                f"pattern: is of shape {pattern.shape}, but the layer (out_features, in_features) "
                f"is {shape}"
            )
        if dense is not None:
            device = dense.weight.device if device is None else device
            dtype = dense.weight.dtype if dtype is None else dtype
        if pattern is None:
            block_shape = check_block_shape(block_shape)
            if dense is not None and not dense.weight.is_meta:
                pattern = largest_blocks(dense.weight, block_shape, density)
            else:
                pattern = Pattern.random(shape, density, block_shape)

        device = torch.get_default_device() if device is None else torch.device(device)
        self.in_features = in_features
        self.out_features = out_features
        self.block_shape = pattern.block_shape
        self.values = nn.Parameter(
            torch.empty((pattern.nnz, *pattern.block_shape), device=device, dtype=dtype)
        )
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._set_pattern(pattern)
        if dense is None:
            self.reset_parameters()
        elif not self.values.is_meta:
            with torch.no_grad():
                matrix = BlockSparseMatrix.from_dense(dense.weight, pattern=pattern)
                self.values.copy_(matrix.values)
                if self.bias is not None and dense.bias is not None:
                    self.bias.copy_(dense.bias)
        if verbose:
            print(self)

    # --- from and to a dense layer ----------------------------------------------------------------

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        density: float = 0.5,
        block_shape: tuple[int, int] = (32, 32),
        *,
        pattern: Pattern | None = None,
    ) -> "BlockSparseLinear":
        """The blocks of a dense layer that have the largest L1 norm, or those that `pattern` names.

        Device, dtype, ``requires_grad`` and train/eval mode are those of `linear`. At density 1 the
        result computes the same.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            density,
            linear,
            block_shape=block_shape,
            pattern=pattern,
        )
        layer.values.requires_grad_(linear.weight.requires_grad)
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """A dense ``nn.Linear`` that computes the same, with zeros outside the pattern."""
        linear = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.values.device,
            dtype=self.values.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(self.weight.to_dense())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        linear.weight.requires_grad_(self.values.requires_grad)
        if self.bias is not None:
            linear.bias.requires_grad_(self.bias.requires_grad)
        return linear.train(self.training)

    # --- what it computes -------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return ops.linear(input, self.values, self._index, self.bias, self.out_features)

    def explain(self, tokens: int, product: str = "forward") -> str:
        """Which kernel runs `product` (forward, grad_input or grad_weight), and why not others."""
        return torch.ops.block_sparse.explain(
            self.values,
            product,
            tokens,
            self.out_features,
            self.in_features,
            self.bias is not None,
        )

    def reset_parameters(self) -> None:
        """Draws values and bias anew; the pattern stays."""
        if self.values.is_meta:
            return
        with torch.no_grad():
            bound = self._present_inputs().clamp(min=1).rsqrt().to(self.values.dtype)
            rows = self.pattern.row_indices.long()
            self.values.uniform_(-1, 1).mul_(bound[rows, None, None])
            self._zero_outside()
            if self.bias is not None:
                bound_of_bias = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
                self.bias.uniform_(-bound_of_bias, bound_of_bias)

    def _present_inputs(self) -> Tensor:
        """float64 ``[block_rows]``: how many inputs each block row sees."""
        block_in = self.block_shape[1]
        cols = grid_shape((self.out_features, self.in_features), self.block_shape)[1]
        widths = torch.full(
            (cols,), float(block_in), dtype=torch.float64, device=self._index.device
        )
        if cols:
            widths[-1] -= cols * block_in - self.in_features
        counts = torch.zeros_like(self.crow_indices[1:], dtype=torch.float64)
        return counts.index_add_(0, self.pattern.row_indices, widths[self.col_indices.long()])

    def _zero_outside(self) -> None:
        """Zeroes the part of edge blocks that lies outside the matrix."""
        rows, cols = grid_shape((self.out_features, self.in_features), self.block_shape)
        inside_out = self.out_features - (rows - 1) * self.block_shape[0]
        inside_in = self.in_features - (cols - 1) * self.block_shape[1]
        self.values[self.pattern.row_indices == rows - 1, inside_out:] = 0
        self.values[self.col_indices == cols - 1, :, inside_in:] = 0

    # --- what it is -------------------------------------------------------------------------------

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
    def weight(self) -> BlockSparseMatrix:
        """The weight as a matrix, ``[out_features, in_features]``; shares memory with the layer."""
        return BlockSparseMatrix(self.values, self.pattern)

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

    # --- the pattern's buffers --------------------------------------------------------------------

    def _set_pattern(self, pattern: Pattern) -> None:
        """Makes `pattern` the layer's, on the device of `values`; its nnz is that of `values`."""
        device = self.values.device
        # A module on the meta device has no numbers: what it will need is kept on the host.
        self._host_pattern = pattern.to("cpu") if device.type == "meta" else None
        moved = pattern.to(device)
        self.register_buffer("crow_indices", moved.crow_indices)
        self.register_buffer("col_indices", moved.col_indices)
        self.register_buffer("_index", moved.index, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BlockSparseLinear":
        # Indices follow the device of `values` and nothing else: .half() must not touch them, and
        # to_empty() would make them garbage.
        pattern = self._host_pattern or self.pattern
        for name in _INDEX_BUFFERS:
            del self._buffers[name]
        try:
            super()._apply(fn, recurse)
        finally:
            self._set_pattern(pattern)
        return self

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
        names = ["values", "crow_indices", "col_indices"]
        if self.bias is not None:
            names.append("bias")
        missing = [prefix + name for name in names if prefix + name not in state_dict]
        missing_keys.extend(missing)
        if strict:
            known = {prefix + name for name in names}
            unexpected_keys.extend(
                key for key in state_dict if key.startswith(prefix) and key not in known
            )
        if {prefix + name for name in names[:3]} & set(missing):
            return  # values and indices mean something only together
        values, bias = state_dict[prefix + "values"], state_dict.get(prefix + "bias")
        try:
            pattern = Pattern.from_bsr(
                state_dict[prefix + "crow_indices"],
                state_dict[prefix + "col_indices"],
                (self.out_features, self.in_features),
                self.block_shape,
            )
            self._check_checkpoint(values, bias if self.bias is not None else None, pattern)
        except (TypeError, ValueError, RuntimeError) as error:
            error_msgs.append(f"While loading {prefix or 'a BlockSparseLinear'}: {error}")
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        with torch.no_grad():
            self._load_values(values, assign)
            self._adopt_pattern(pattern)
            if self.bias is not None and bias is not None:
                if assign:
                    self.bias = _as_parameter(bias, self.bias)
                else:
                    self.bias.copy_(bias)

    def _check_checkpoint(self, values: Tensor, bias: Tensor | None, pattern: Pattern) -> None:
        wanted = (pattern.nnz, *self.block_shape)
        if tuple(values.shape) != wanted:
            raise ValueError(f"values: must be {list(wanted)}, got {list(values.shape)}")
        if not values.is_floating_point():
            raise ValueError(f"values: must be floating point, got {values.dtype}")
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"bias: must be [{self.out_features}], got {list(bias.shape)}")

    def _load_values(self, values: Tensor, assign: bool) -> None:
        if assign:
            self.values = _as_parameter(values, self.values)
        elif self.values.is_meta:
            warnings.warn(
                "values: loading into a BlockSparseLinear on the meta device does nothing; use "
                "load_state_dict(..., assign=True) or to_empty() first",
                stacklevel=2,
            )
        elif values.shape == self.values.shape:
            self.values.copy_(values)
        else:
            # The same Parameter object, so that an optimizer made before goes on training it.
            self.values.grad = None
            self.values.data = values.to(self.values, copy=True)

    def _adopt_pattern(self, pattern: Pattern) -> None:
        """In place where the number of blocks allows it, so that captured graphs see it."""
        if self.values.is_meta:
            if self.block_count == pattern.nnz:
                self._host_pattern = pattern.to("cpu")
        elif self.col_indices.is_meta or self.col_indices.numel() != pattern.nnz:
            self._set_pattern(pattern)
        else:
            self.crow_indices.copy_(pattern.crow_indices)
            self.col_indices.copy_(pattern.col_indices)
            self._index.copy_(pattern.index)


class _Dense(NamedTuple):
    """Weight and bias of a dense layer, detached."""

    weight: Tensor
    bias: Tensor | None


def _dense_of(linear: nn.Linear) -> _Dense:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"torch_nn_linear: must be a torch.nn.Linear, got {type(linear).__name__}")
    return _Dense(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def _same_size(name: str, value: int, linear: nn.Linear) -> int:
    size: int = getattr(linear, name)
    if value not in (0, size):
        raise ValueError(f"{name}: is {value}, but torch_nn_linear has {size}; 0 takes it over")
    return size


def _check_features(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"{name}: must be an int in [0, 2^31), got {value!r}")
    return value


def _as_parameter(tensor: Tensor, like: nn.Parameter) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=like.requires_grad)
