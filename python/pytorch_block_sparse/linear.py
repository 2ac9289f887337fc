"""BlockSparseLinear: a drop-in for ``torch.nn.Linear`` whose weight is block sparse."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import ops
from ._module import DTYPES, PatternModule, own
from ._sharded import own_part, own_part_like
from .matrix import BlockSparseMatrix, largest_blocks, zero_outside_
from .pattern import Pattern, check_block_shape, check_density, grid_shape

if TYPE_CHECKING:
    from .prepacked import PrepackedLinear
    from .quantized import QuantizedBlockSparseLinear


class BlockSparseLinear(PatternModule):
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

    ``load_state_dict`` adopts the pattern of the checkpoint, also one with another number of blocks
    (same ``values`` object). If the pattern is another one, the gradient of ``values`` is cleared,
    and the moments that an optimizer already holds are those of other blocks: load its state too,
    or ``optimizer.state.pop(layer.values)``. With moments of an old shape it refuses to step.

    Example:
        >>> import torch
        >>> from pytorch_block_sparse import BlockSparseLinear
        >>> layer = BlockSparseLinear(1024, 256, density=0.1)
        >>> layer(torch.randn(8, 1024)).shape
        torch.Size([8, 256])
        >>> layer.block_count
        26
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    is_part = False  # True where other ranks hold the rest of the layer (tensor parallelism)

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
        dense = torch_nn_linear
        if dense is not None:
            _check_dense(dense, device)
            in_features = _same_size("in_features", in_features, dense)
            out_features = _same_size("out_features", out_features, dense)
            bias = dense.bias is not None
            device = dense.weight.device if device is None else device
            dtype = dense.weight.dtype if dtype is None else dtype
        _check_features("in_features", in_features)
        _check_features("out_features", out_features)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise TypeError(f"dtype: must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        shape = (out_features, in_features)
        if pattern is not None:
            pattern = own(_check_pattern(pattern, shape))
        elif dense is None or dense.weight.is_meta:
            pattern = Pattern.random(shape, density, check_block_shape(block_shape))
        else:
            pattern = largest_blocks(dense.weight, check_block_shape(block_shape), density)

        self.in_features = in_features
        self.out_features = out_features
        self.block_shape = pattern.block_shape
        size = (pattern.nnz, *pattern.block_shape)
        self.values = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._set_pattern(pattern)
        if dense is None:
            self.reset_parameters()
        elif not self.values.is_meta:
            with torch.no_grad():
                self.values.copy_(
                    BlockSparseMatrix.from_dense(dense.weight, pattern=pattern).values
                )
                if self.bias is not None:
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
        return self._product(input, self.bias)

    def _product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"input: must be [..., in_features={self.in_features}], got {list(input.shape)}"
            )
        return ops.linear(input, self.values, self._index, bias, self.out_features)

    def prepack(self) -> "PrepackedLinear":
        """This layer for serving on the CPU: a module that holds the values in the kernels' order.

        It is faster than this layer, most of all for few tokens, and cannot be trained; its
        :meth:`~PrepackedLinear.unpack` gives a layer again. Replace this layer by it, or both hold
        a copy of the values.
        """
        from .prepacked import PrepackedLinear  # it is made of this class

        return PrepackedLinear(self)

    def quantize(self) -> "QuantizedBlockSparseLinear":
        """This layer for serving with int8 values: a quarter of the memory of float32.

        Each row of the weight has a scale of its own, and each value is off by half of it at most.
        The module that is returned cannot be trained; its
        :meth:`~QuantizedBlockSparseLinear.dequantize` gives a layer again. For all layers of a
        model: :func:`quantize_`.
        """
        from .quantized import QuantizedBlockSparseLinear  # it is made of this class

        return QuantizedBlockSparseLinear(self)

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
            self.values.uniform_(-1, 1)
            own_part(self.values).mul_(own_part_like(bound[rows, None, None], self.values))
            zero_outside_(self.values, self.pattern)
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

    # --- what it is -------------------------------------------------------------------------------

    @property
    def weight(self) -> BlockSparseMatrix:
        """The weight as a matrix, ``[out_features, in_features]``; shares memory with the layer."""
        return BlockSparseMatrix(self.values, self.pattern)


def _check_pattern(pattern: Pattern, shape: tuple[int, int]) -> Pattern:
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern: must be a Pattern, got {type(pattern).__name__}")
    if pattern.shape != shape:
        raise ValueError(
            f"pattern: must have the shape of the layer, (out_features, in_features) = {shape}, "
            f"got {pattern.shape}"
        )
    return pattern


def _check_dense(linear: nn.Linear, device: torch.device | str | None) -> None:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"torch_nn_linear: must be a torch.nn.Linear, got {type(linear).__name__}")
    if linear.weight.is_meta and device is not None and torch.device(device).type != "meta":
        raise ValueError(f"torch_nn_linear: is on the meta device, has no numbers for {device!r}")


def _same_size(name: str, value: int, linear: nn.Linear) -> int:
    size: int = getattr(linear, name)
    if value not in (0, size):
        raise ValueError(f"{name}: is {value}, but torch_nn_linear has {size}; 0 takes it over")
    return size


def _check_features(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"{name}: must be an int in [0, 2^31), got {value!r}")
