"""Pattern: which blocks of a weight are present. Knows positions, never values."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_index_from_bsr = torch.ops.block_sparse.index_from_bsr
_index_from_mask = torch.ops.block_sparse.index_from_mask
_index_from_blocks = torch.ops.block_sparse.index_from_blocks
_index_random = torch.ops.block_sparse.index_random
_index_banded = torch.ops.block_sparse.index_banded
_with_walks = torch.ops.block_sparse.with_walks

_MAX_INT32 = 2**31 - 1


def check_block_shape(block_shape: tuple[int, int]) -> tuple[int, int]:
    """Returns `block_shape` as two ints, or raises ValueError."""
    shape = tuple(block_shape) if isinstance(block_shape, (tuple, list, torch.Size)) else ()
    if len(shape) != 2 or not all(
        isinstance(size, int) and not isinstance(size, bool) and 0 < size <= _MAX_INT32
        for size in shape
    ):
        raise ValueError(f"block_shape: must be two positive ints (out, in), got {block_shape!r}")
    return shape


def check_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Returns `shape` as (out_features, in_features), or raises ValueError."""
    sizes = tuple(shape) if isinstance(shape, (tuple, list, torch.Size)) else ()
    if len(sizes) != 2 or not all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= _MAX_INT32
        for size in sizes
    ):
        raise ValueError(
            f"shape: must be two ints in [0, 2^31), (out_features, in_features), got {shape!r}"
        )
    return sizes


def check_density(density: float) -> float:
    """Returns `density` as a float in (0, 1], or raises ValueError."""
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ValueError(f"density: must be in (0, 1], got {density!r}")
    return float(density)


def grid_shape(shape: tuple[int, int], block_shape: tuple[int, int]) -> tuple[int, int]:
    """(block rows, block columns) that cover `shape`: rounded up where it is no multiple."""
    return -(-shape[0] // block_shape[0]), -(-shape[1] // block_shape[1])


def count_for_density(density: float, blocks: int) -> int:
    """round(density * blocks), and at least one where there is a block at all."""
    return min(blocks, max(1, round(check_density(density) * blocks)))


class IndexParts(NamedTuple):
    """Views of a packed index, in the order in which they lie in it."""

    crow_indices: Tensor
    col_indices: Tensor
    row_indices: Tensor
    ccol_indices: Tensor
    trow_indices: Tensor
    permutation: Tensor


def index_size(grid: tuple[int, int], nnz: int) -> int:
    """Length of the packed index of `nnz` blocks in a `grid` of (block rows, block columns)."""
    rows, cols = grid
    return rows + 1 + cols + 1 + 4 * nnz


def split_index(index: Tensor, grid: tuple[int, int], nnz: int) -> IndexParts:
    """The parts of a packed index, as ``include/block_sparse/pattern.h`` lays it out."""
    rows, cols = grid
    parts = index[: index_size(grid, nnz)].split([rows + 1, nnz, nnz, cols + 1, nnz, nnz])
    return IndexParts(*parts)


def with_walks(
    index: Tensor, grid: tuple[int, int], nnz: int, block_shape: tuple[int, int]
) -> Tensor:
    """A packed index as kernels of its device want it.

    Those of a GPU plan once per pattern in which order they take its blocks; the plan follows the
    index in the same tensor. On the CPU there is none.
    """
    if index.is_cuda:
        walked: Tensor = _with_walks(index, *grid, nnz, *block_shape)
        return walked
    return index


class Pattern:
    """The set of present blocks of a weight ``[out_features, in_features]``, with its indices.

    Build one with :meth:`from_mask`, :meth:`from_blocks`, :meth:`from_bsr`, :meth:`random`,
    :meth:`banded` or :meth:`full`. All of them validate. Where a size is no multiple of the block,
    the grid is rounded up.

    Attributes:
        shape: (out_features, in_features).
        block_shape: (block_out, block_in), in elements.
        crow_indices: int32 ``[block_rows + 1]``, as in ``torch.sparse_bsr_tensor``.
        col_indices: int32 ``[nnz]``, as in ``torch.sparse_bsr_tensor``.
        index: packed int32 tensor of everything that the products read, made from the two above.

    Example:
        >>> from pytorch_block_sparse import Pattern
        >>> pattern = Pattern.random((256, 128), density=0.25, block_shape=(32, 32))
        >>> pattern.nnz, pattern.density, pattern.grid
        (8, 0.25, (8, 4))
    """

    def __init__(
        self,
        crow_indices: Tensor,
        col_indices: Tensor,
        index: Tensor,
        shape: tuple[int, int],
        block_shape: tuple[int, int],
    ) -> None:
        """Takes tensors that belong together, unchecked: use the class methods instead."""
        self.crow_indices = crow_indices
        self.col_indices = col_indices
        self.index = index
        self.shape = shape
        self.block_shape = block_shape
        self._versions = self._count_writes()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's tensors count their writes anew."""
        self.__dict__.update(state)
        self._versions = self._count_writes()

    def _count_writes(self) -> tuple[int, int, int] | None:
        """How often each tensor was written in place; None where torch does not count."""
        tensors = (self.crow_indices, self.col_indices, self.index)
        if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
            return None
        crow, col, index = (t._version for t in tensors)
        return crow, col, index

    def index_in_step(self) -> Tensor:
        """:attr:`index`, or RuntimeError if the BSR indices were written without it."""
        was, now = self._versions, self._count_writes()
        if was and now and was[:2] != now[:2] and was[2] == now[2]:
            raise RuntimeError(
                "pattern: crow_indices or col_indices were written in place, but index is made "
                "from what they were; make the pattern again: Pattern.from_bsr(crow_indices, "
                "col_indices, shape, block_shape)"
            )
        return self.index

    @classmethod
    def _from_index(
        cls, index: Tensor, shape: tuple[int, int], block_shape: tuple[int, int]
    ) -> "Pattern":
        grid = grid_shape(shape, block_shape)
        nnz = (index.numel() - index_size(grid, 0)) // 4
        parts = split_index(index, grid, nnz)
        crow, col = parts.crow_indices.clone(), parts.col_indices.clone()
        return cls(crow, col, index, shape, block_shape)

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        block_shape: tuple[int, int] = (32, 32),
        shape: tuple[int, int] | None = None,
    ) -> "Pattern":
        """The pattern of a bool mask of blocks, ``[block_rows, block_cols]``.

        Args:
            mask: True where the block is present.
            block_shape: (block_out, block_in).
            shape: (out_features, in_features) where it is no multiple of the block;
                by default the grid is filled.
        """
        block_shape = check_block_shape(block_shape)
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.dtype != torch.bool:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask)
            raise ValueError(f"mask: must be a bool tensor [block_rows, block_cols], got {got}")
        if shape is None:
            shape = (mask.shape[0] * block_shape[0], mask.shape[1] * block_shape[1])
        shape = check_shape(shape)
        grid = grid_shape(shape, block_shape)
        if tuple(mask.shape) != grid:
            raise ValueError(
                f"mask: is {list(mask.shape)}, but {shape} in blocks of {block_shape} has "
                f"{grid[0]} x {grid[1]} blocks"
            )
        pattern = cls._from_index(_index_from_mask(mask.cpu()), shape, block_shape)
        return pattern.to(mask.device)

    @classmethod
    def from_blocks(
        cls,
        blocks: Tensor | list[tuple[int, int]],
        shape: tuple[int, int],
        block_shape: tuple[int, int] = (32, 32),
    ) -> "Pattern":
        """The pattern of a list of (block row, block column), in any order, each at most once."""
        shape, block_shape = check_shape(shape), check_block_shape(block_shape)
        coordinates = blocks if isinstance(blocks, Tensor) else _tensor_of("blocks", blocks)
        device = coordinates.device
        if coordinates.numel() == 0:
            coordinates = coordinates.new_zeros((0, 2), dtype=torch.int64)
        if coordinates.is_floating_point() or coordinates.dtype == torch.bool:
            raise TypeError(f"blocks: must be integers, got {coordinates.dtype}")
        if coordinates.dim() != 2 or coordinates.shape[1] != 2:
            raise ValueError(
                "blocks: must be pairs (block row, block column), [n, 2], "
                f"got {list(coordinates.shape)}"
            )
        index = _index_from_blocks(
            coordinates.to("cpu", torch.int64), *grid_shape(shape, block_shape)
        )
        return cls._from_index(index, shape, block_shape).to(device)

    @classmethod
    def from_bsr(
        cls,
        crow_indices: Tensor,
        col_indices: Tensor,
        shape: tuple[int, int],
        block_shape: tuple[int, int] = (32, 32),
    ) -> "Pattern":
        """The pattern of BSR indices, as ``torch.sparse_bsr_tensor`` has them.

        int32 indices are kept, sharing memory; int64 ones are converted. Both are validated in
        full, on the host. Do not write into them afterwards: the products read :attr:`index`,
        which is made from them here, once.
        """
        shape, block_shape = check_shape(shape), check_block_shape(block_shape)
        rows, cols = grid_shape(shape, block_shape)
        crow = _as_int32("crow_indices", crow_indices)
        col = _as_int32("col_indices", col_indices)
        if crow.device != col.device:
            raise ValueError(f"col_indices: is on {col.device}, but crow_indices on {crow.device}")
        if crow.numel() != rows + 1:
            raise ValueError(
                f"crow_indices: has {crow.numel()} entries; {rows} block rows need {rows + 1}"
            )
        index = _index_from_bsr(crow.cpu(), col.cpu(), cols)
        index = with_walks(index.to(crow.device), (rows, cols), col.numel(), block_shape)
        return cls(crow, col, index, shape, block_shape)

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        density: float,
        block_shape: tuple[int, int] = (32, 32),
        generator: torch.Generator | None = None,
        *,
        balanced: bool = False,
        device: torch.device | str | None = None,
    ) -> "Pattern":
        """Exactly ``round(density * blocks)`` blocks, at least one, uniform without replacement.

        Args:
            shape: (out_features, in_features).
            density: share of the blocks that are present, in (0, 1].
            block_shape: (block_out, block_in).
            generator: source of the randomness; by default torch's global one
                (``torch.manual_seed``).
            balanced: the same number of blocks in each block row, and in each block column, up to
                one.
            device: where the indices go; by default the CPU.
        """
        shape, block_shape = check_shape(shape), check_block_shape(block_shape)
        rows, cols = grid_shape(shape, block_shape)
        nnz = count_for_density(density, rows * cols)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: must be a torch.Generator, got {generator!r}")
        source = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=source))
        index = _index_random(rows, cols, nnz, seed, balanced)
        return cls._from_index(index, shape, block_shape).to(device or "cpu")

    @classmethod
    def banded(
        cls,
        shape: tuple[int, int],
        bandwidth: int,
        block_shape: tuple[int, int] = (32, 32),
        *,
        device: torch.device | str | None = None,
    ) -> "Pattern":
        """The blocks at most `bandwidth` blocks beside the diagonal; 0 is block-diagonal."""
        shape, block_shape = check_shape(shape), check_block_shape(block_shape)
        if isinstance(bandwidth, bool) or not isinstance(bandwidth, int) or bandwidth < 0:
            raise ValueError(f"bandwidth: must be an int of at least 0, got {bandwidth!r}")
        bandwidth = min(bandwidth, _MAX_INT32)
        index = _index_banded(*grid_shape(shape, block_shape), bandwidth)
        return cls._from_index(index, shape, block_shape).to(device or "cpu")

    @classmethod
    def full(
        cls,
        shape: tuple[int, int],
        block_shape: tuple[int, int] = (32, 32),
        *,
        device: torch.device | str | None = None,
    ) -> "Pattern":
        """Every block."""
        shape, block_shape = check_shape(shape), check_block_shape(block_shape)
        cols = grid_shape(shape, block_shape)[1]
        return cls.banded(shape, cols, block_shape, device=device)

    @property
    def grid(self) -> tuple[int, int]:
        """(block rows, block columns)."""
        return grid_shape(self.shape, self.block_shape)

    @property
    def nnz(self) -> int:
        """Number of present blocks."""
        return self.col_indices.numel()

    @property
    def density(self) -> float:
        """Share of the blocks that are present."""
        rows, cols = self.grid
        return self.nnz / (rows * cols) if rows * cols else 0.0

    @property
    def device(self) -> torch.device:
        """Where the indices are."""
        return self.index.device

    @property
    def row_indices(self) -> Tensor:
        """int32 ``[nnz]``: the block row of each block (a view of `index`)."""
        return split_index(self.index, self.grid, self.nnz).row_indices

    @property
    def permutation(self) -> Tensor:
        """int32 ``[nnz]``: the blocks ordered by block column, then block row (a view)."""
        return split_index(self.index, self.grid, self.nnz).permutation

    def mask(self) -> Tensor:
        """bool ``[block_rows, block_cols]``: True where the block is present."""
        mask = torch.zeros(self.grid, dtype=torch.bool, device=self.device)
        mask[self.row_indices.long(), self.col_indices.long()] = True
        return mask

    def to(self, device: torch.device | str) -> "Pattern":
        """This pattern with its indices on `device`; itself if they are there."""
        index = self.index.to(device)
        if index is self.index:
            return self
        if index.device.type != self.index.device.type:
            bare = index[: index_size(self.grid, self.nnz)].clone()
            index = with_walks(bare, self.grid, self.nnz, self.block_shape)
        crow, col = self.crow_indices.to(device), self.col_indices.to(device)
        return Pattern(crow, col, index, self.shape, self.block_shape)

    def t(self) -> "Pattern":
        """The pattern of the transposed weight. Its blocks are ordered as :attr:`permutation`."""
        parts = split_index(self.index_in_step(), self.grid, self.nnz)
        ccol, trow = parts.ccol_indices.clone(), parts.trow_indices.clone()
        return Pattern.from_bsr(ccol, trow, self.shape[::-1], self.block_shape[::-1])

    def equal(self, other: "Pattern") -> bool:
        """True if both have the same blocks, shape and block shape."""
        return (
            self.shape == other.shape
            and self.block_shape == other.block_shape
            and torch.equal(self.crow_indices.cpu(), other.crow_indices.cpu())
            and torch.equal(self.col_indices.cpu(), other.col_indices.cpu())
        )

    def __repr__(self) -> str:
        return (
            f"Pattern(shape={self.shape}, block_shape={self.block_shape}, nnz={self.nnz}, "
            f"density={self.density:.3g}, device={str(self.device)!r})"
        )


def _tensor_of(name: str, pairs: list[tuple[int, int]]) -> Tensor:
    try:
        return torch.tensor(pairs, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: must be pairs of ints, got {pairs!r} ({error})") from error


def _as_int32(name: str, indices: Tensor) -> Tensor:
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name}: must be a tensor, got {type(indices).__name__}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: dtype must be int32 or int64, got {indices.dtype}")
    if indices.dim() != 1:
        raise ValueError(f"{name}: must have one dimension, got {indices.dim()}")
    if indices.dtype == torch.int64:
        if indices.numel() and (int(indices.max()) > _MAX_INT32 or int(indices.min()) < 0):
            raise ValueError(f"{name}: has an entry outside [0, 2^31)")
        return indices.to(torch.int32)
    return indices.contiguous()
