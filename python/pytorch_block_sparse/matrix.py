"""BlockSparseMatrix: a pattern and the values of its blocks. Not a module and not a Parameter."""

import torch
from torch import Tensor

from . import ops
from ._sharded import own_part, own_part_like
from .pattern import Pattern, check_block_shape, check_shape, count_for_density, grid_shape

_AT_A_TIME = 2**18  # elements: 1 MB of float32


class BlockSparseMatrix:
    """A block-sparse matrix ``[rows, cols]``: a :class:`Pattern` and its values.

    The memory is that of ``torch.sparse_bsr_tensor``: :meth:`from_bsr` and :meth:`to_bsr` copy
    nothing when the indices are int32.

    Args:
        values: ``[nnz, block_out, block_in]``, in BSR order.
        pattern: the positions of the blocks, on the device of `values`.

    Raises:
        ValueError: `values` does not fit the pattern.

    Example:
        >>> import torch
        >>> from pytorch_block_sparse import BlockSparseMatrix
        >>> m = BlockSparseMatrix.randn((64, 96), n_blocks=3)
        >>> x = torch.randn(96, 5)
        >>> torch.allclose(m @ x, m.to_dense() @ x, atol=1e-4)
        True
    """

    # transformers initialises what has no such mark; T5 and GPT-2 reach `weight` from a parent.
    _is_hf_initialized = True

    def __init__(self, values: Tensor, pattern: Pattern) -> None:
        if not isinstance(values, Tensor):
            raise TypeError(f"values: must be a tensor, got {type(values).__name__}")
        wanted = (pattern.nnz, *pattern.block_shape)
        if tuple(values.shape) != wanted:
            raise ValueError(f"values: must be {list(wanted)}, got {list(values.shape)}")
        if values.device != pattern.device:
            raise ValueError(f"values: is on {values.device}, but the pattern on {pattern.device}")
        self.values = values
        self.pattern = pattern

    # --- constructors -----------------------------------------------------------------------------

    @classmethod
    def _filled(
        cls,
        fill: str,
        shape: tuple[int, int],
        n_blocks: int | None,
        blocks: Tensor | list[tuple[int, int]] | None,
        block_shape: tuple[int, int],
        device: torch.device | str | None,
    ) -> "BlockSparseMatrix":
        shape = check_shape(shape)
        device = torch.get_default_device() if device is None else torch.device(device)
        if blocks is not None:
            if n_blocks is not None:
                raise ValueError("n_blocks: give either n_blocks or blocks, not both")
            pattern = Pattern.from_blocks(blocks, shape, block_shape)
        elif n_blocks is not None:
            cells = Pattern.full(shape, block_shape).nnz
            _check_count("n_blocks", n_blocks, cells)
            pattern = Pattern.random(shape, n_blocks / cells, block_shape)
        else:
            pattern = Pattern.full(shape, block_shape)
        pattern = pattern.to(device)
        values = getattr(torch, fill)((pattern.nnz, *pattern.block_shape), device=device)
        return cls(values, pattern)

    @classmethod
    def zeros(
        cls,
        shape: tuple[int, int],
        n_blocks: int | None = None,
        blocks: Tensor | list[tuple[int, int]] | None = None,
        block_shape: tuple[int, int] = (32, 32),
        device: torch.device | str | None = None,
    ) -> "BlockSparseMatrix":
        """Zeros in `n_blocks` random blocks, or in `blocks`; in all blocks if neither is given."""
        return cls._filled("zeros", shape, n_blocks, blocks, block_shape, device)

    @classmethod
    def ones(
        cls,
        shape: tuple[int, int],
        n_blocks: int | None = None,
        blocks: Tensor | list[tuple[int, int]] | None = None,
        block_shape: tuple[int, int] = (32, 32),
        device: torch.device | str | None = None,
    ) -> "BlockSparseMatrix":
        """Ones in `n_blocks` random blocks, or in `blocks`; in all blocks if neither is given."""
        return cls._filled("ones", shape, n_blocks, blocks, block_shape, device)

    @classmethod
    def randn(
        cls,
        shape: tuple[int, int],
        n_blocks: int | None = None,
        blocks: Tensor | list[tuple[int, int]] | None = None,
        block_shape: tuple[int, int] = (32, 32),
        device: torch.device | str | None = None,
    ) -> "BlockSparseMatrix":
        """Normal numbers in `n_blocks` random blocks, or in `blocks`; by default in all blocks."""
        return cls._filled("randn", shape, n_blocks, blocks, block_shape, device)

    @classmethod
    def from_dense(
        cls,
        dense: Tensor,
        block_shape: tuple[int, int] = (32, 32),
        block_count: int | None = None,
        *,
        pattern: Pattern | None = None,
    ) -> "BlockSparseMatrix":
        """The blocks of `dense` that `pattern` names, or the `block_count` of largest magnitude.

        The magnitude of a block is its L1 norm; of equal ones the first is kept. By default
        (neither is given) every block is kept. The values are a copy, and differentiable.
        """
        if not isinstance(dense, Tensor):
            raise TypeError(f"dense: must be a tensor, got {type(dense).__name__}")
        if dense.dim() != 2:
            raise ValueError(f"dense: must have two dimensions, got {dense.dim()}")
        shape = (dense.shape[0], dense.shape[1])
        if pattern is not None and block_count is not None:
            raise ValueError("block_count: give either block_count or pattern, not both")
        if pattern is None:
            block_shape = check_block_shape(block_shape)
            grid = grid_shape(shape, block_shape)
            if block_count is None:
                pattern = Pattern.full(shape, block_shape)
            else:
                pattern = _largest_blocks(dense, block_shape, block_count, grid)
        elif pattern.shape != shape:
            raise ValueError(f"pattern: is of shape {pattern.shape}, but dense of {shape}")
        pattern = pattern.to(dense.device)
        blocks = _blocks_of(dense, pattern.block_shape)
        values = blocks[pattern.row_indices.long(), pattern.col_indices.long()]
        return cls(values, pattern)

    @classmethod
    def from_bsr(cls, bsr: Tensor) -> "BlockSparseMatrix":
        """The matrix of a ``torch.sparse_bsr`` tensor, sharing its memory.

        (int64 indices are converted to int32, which copies them.) Values may be written through
        either; indices are read-only: after a write into those of `bsr` products raise RuntimeError
        until the matrix is made again.
        """
        if not isinstance(bsr, Tensor):
            raise TypeError(f"bsr: must be a sparse_bsr tensor, got {type(bsr).__name__}")
        if bsr.layout != torch.sparse_bsr or bsr.dim() != 2:
            raise ValueError(
                f"bsr: must be a sparse_bsr tensor of two dimensions, got {bsr.layout} of "
                f"{bsr.dim()}"
            )
        values = bsr.values()
        block_shape = (values.shape[1], values.shape[2])
        shape = (bsr.shape[0], bsr.shape[1])
        pattern = Pattern.from_bsr(bsr.crow_indices(), bsr.col_indices(), shape, block_shape)
        return cls(values, pattern)

    # --- conversions ------------------------------------------------------------------------------

    def to_bsr(self, *, padded: bool = False) -> Tensor:
        """This matrix as a ``torch.sparse_bsr`` tensor, sharing its memory.

        Values may be written through either. Indices are read-only: the products read another
        tensor, made from them, and torch does not tell this matrix of a write into those of the
        result. To change the pattern make a matrix of the result, with :meth:`from_bsr`.

        Args:
            padded: where the size is no multiple of the block, BSR cannot express it: with
                ``padded=True`` the tensor has the size rounded up, otherwise ValueError is raised.
        """
        rows, cols = self.pattern.grid
        block_out, block_in = self.pattern.block_shape
        size = (rows * block_out, cols * block_in)
        if size != self.shape and not padded:
            raise ValueError(
                f"padded: {tuple(self.shape)} is no multiple of the block {self.block_shape}; "
                f"to_bsr(padded=True) gives the size rounded up, {size}"
            )
        with torch.sparse.check_sparse_tensor_invariants():
            return torch.sparse_bsr_tensor(
                self.pattern.crow_indices, self.pattern.col_indices, self.values, size=size
            )

    def to_dense(self) -> Tensor:
        """The dense matrix, zero outside the pattern. Differentiable."""
        rows, cols = self.pattern.grid
        block_out, block_in = self.pattern.block_shape
        blocks = self.values.new_zeros((rows, cols, block_out, block_in))
        where = (self.pattern.row_indices.long(), self.pattern.col_indices.long())
        blocks = blocks.index_put(where, self.values)
        dense = blocks.permute(0, 2, 1, 3).reshape(rows * block_out, cols * block_in)
        return dense[: self.shape[0], : self.shape[1]].contiguous()

    # --- arithmetic -------------------------------------------------------------------------------

    def __matmul__(self, other: Tensor) -> Tensor:
        """``W @ X``: `other` is ``[cols, n]`` or ``[cols]``."""
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.dim() not in (1, 2):
            raise ValueError(f"other: must have one or two dimensions, got {other.dim()}")
        if other.shape[0] != self.shape[1]:
            raise ValueError(
                f"other: must have {self.shape[1]} rows, as the matrix has columns; "
                f"got {list(other.shape)}"
            )
        tokens = other if other.dim() == 1 else other.t()
        result = ops.linear(tokens, self.values, self.pattern.index_in_step(), None, self.shape[0])
        return result if other.dim() == 1 else result.t()

    def __rmatmul__(self, other: Tensor) -> Tensor:
        """``X @ W``: `other` is ``[..., rows]``."""
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.shape[-1:] != self.shape[:1]:
            raise ValueError(
                f"other: must have {self.shape[0]} columns, as the matrix has rows; "
                f"got {list(other.shape)}"
            )
        return ops.left_linear(other, self.values, self.pattern.index_in_step(), self.shape[1])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Lets ``tensor @ matrix`` reach :meth:`__rmatmul__`; nothing else takes a matrix."""
        functions = (torch.Tensor.__matmul__, torch.matmul, torch.Tensor.matmul)
        if func in functions and len(args) == 2 and not kwargs:
            left, right = args
            return left.__matmul__(right) if isinstance(left, cls) else right.__rmatmul__(left)
        return NotImplemented

    def t(self) -> "BlockSparseMatrix":
        """The transposed matrix; copies the values. Differentiable."""
        values = self.values[self.pattern.permutation.long()].transpose(1, 2).contiguous()
        return BlockSparseMatrix(values, self.pattern.t())

    def block_norm(self, p: float = 2) -> Tensor:
        """``[nnz]``: the p-norm of each block as a vector; what lies outside does not count."""
        inside = zero_outside(self.values, self.pattern)
        return torch.linalg.vector_norm(inside, ord=p, dim=(1, 2))

    def block_mask(self) -> Tensor:
        """bool ``[block_rows, block_cols]``: True where the block is present."""
        return self.pattern.mask()

    # --- what it is -------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """[rows, cols]."""
        return torch.Size(self.pattern.shape)

    @property
    def block_shape(self) -> tuple[int, int]:
        """(block_out, block_in)."""
        return self.pattern.block_shape

    @property
    def dtype(self) -> torch.dtype:
        """That of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """That of the values."""
        return self.values.device

    def __repr__(self) -> str:
        return (
            f"BlockSparseMatrix(shape={tuple(self.shape)}, block_shape={self.block_shape}, "
            f"nnz={self.pattern.nnz}, density={self.pattern.density:.3g}, dtype={self.dtype}, "
            f"device={str(self.device)!r})"
        )


def zero_outside(values: Tensor, pattern: Pattern) -> Tensor:
    """`values` with zeros where edge blocks reach outside the matrix; itself if none does."""
    sizes = zip(pattern.shape, pattern.block_shape, strict=True)
    aligned = all(size % block == 0 for size, block in sizes)
    return values if aligned else zero_outside_(values.clone(), pattern)


def zero_outside_(values: Tensor, pattern: Pattern) -> Tensor:
    """Zeroes `values` in place where edge blocks reach outside the matrix."""
    (rows, cols), (block_out, block_in) = pattern.grid, pattern.block_shape
    inside_out = pattern.shape[0] - (rows - 1) * block_out
    inside_in = pattern.shape[1] - (cols - 1) * block_in
    own = own_part(values)
    if inside_out < block_out:
        own[own_part_like(pattern.row_indices == rows - 1, values), inside_out:] = 0
    if inside_in < block_in:
        own[own_part_like(pattern.col_indices == cols - 1, values), :, inside_in:] = 0
    return values


def _check_count(name: str, count: int, cells: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= cells:
        raise ValueError(f"{name}: must be an int in [1, {cells}], got {count!r}")


def _blocks_of(dense: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """`dense` as ``[block_rows, block_cols, block_out, block_in]``, padded with zeros."""
    rows, cols = grid_shape((dense.shape[0], dense.shape[1]), block_shape)
    pad_out = rows * block_shape[0] - dense.shape[0]
    pad_in = cols * block_shape[1] - dense.shape[1]
    if pad_out or pad_in:
        dense = torch.nn.functional.pad(dense, (0, pad_in, 0, pad_out))
    return dense.reshape(rows, block_shape[0], cols, block_shape[1]).permute(0, 2, 1, 3)


def _l1_norms(dense: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """float64: the L1 norm of each block of the grid, in BSR order.

    Some block rows at a time: copies of the size of `dense`, made for one layer after the other
    with something kept in between, would leave holes in the heap that add up to the dense model.
    """
    height = block_shape[0] * max(1, _AT_A_TIME // max(1, block_shape[0] * dense.shape[1]))
    parts = [
        _blocks_of(some, block_shape).abs().sum(dim=(2, 3), dtype=torch.float64).flatten()
        for some in dense.split(height)
    ]
    return torch.cat(parts)


def _largest_blocks(
    dense: Tensor, block_shape: tuple[int, int], count: int, grid: tuple[int, int]
) -> Pattern:
    cells = grid[0] * grid[1]
    _check_count("block_count", count, cells)
    order = torch.sort(_l1_norms(dense.detach(), block_shape), descending=True, stable=True).indices
    mask = torch.zeros(cells, dtype=torch.bool, device=dense.device)
    mask[order[:count]] = True
    return Pattern.from_mask(mask.reshape(grid), block_shape, (dense.shape[0], dense.shape[1]))


def largest_blocks(dense: Tensor, block_shape: tuple[int, int], density: float) -> Pattern:
    """The pattern of the blocks of `dense` with the largest L1 norm, at `density`."""
    grid = grid_shape((dense.shape[0], dense.shape[1]), block_shape)
    return _largest_blocks(dense, block_shape, count_for_density(density, grid[0] * grid[1]), grid)
