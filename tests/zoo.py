"""The cases that the tests share: patterns of every shape, block shapes, and small-integer data."""

import torch

from pytorch_block_sparse import Pattern
from pytorch_block_sparse.pattern import grid_shape

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BLOCK_SHAPES = [(32, 32), (16, 16), (64, 32), (4, 4), (1, 16), (48, 80), (7, 5)]


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def block_id(block_shape):
    return f"{block_shape[0]}x{block_shape[1]}"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def _masks(rows, cols):
    """Name and mask of one pattern of each kind, on any grid."""
    random = torch.rand(rows, cols, generator=seeded(1))
    row, col = torch.arange(rows)[:, None], torch.arange(cols)[None, :]
    empty_row = random < 0.6
    empty_row[rows // 2] = False
    empty_row[-1] = False
    empty_column = random < 0.6
    empty_column[:, cols // 2] = False
    empty_column[:, -1] = False
    one_block = torch.zeros(rows, cols, dtype=torch.bool)
    one_block[-1, -1] = True
    skewed = random < 0.1
    skewed[rows // 3] = True  # nearly all blocks in one block row and one block column
    skewed[:, cols // 3] = True
    return {
        "empty_row": empty_row,
        "empty_column": empty_column,
        "one_block": one_block,
        "no_block": torch.zeros(rows, cols, dtype=torch.bool),
        "full": torch.ones(rows, cols, dtype=torch.bool),
        "banded": (row - col).abs() <= 1,
        "skewed": skewed,
        "random": random < 0.3,
    }


PATTERN_KINDS = list(_masks(3, 3))


def shapes(block_shape):
    """An aligned size, and a ragged one where each last block reaches outside by some elements."""
    block_out, block_in = block_shape
    rows = max(3, min(6, 96 // block_out))
    cols = max(3, min(5, 96 // block_in))
    aligned = (rows * block_out, cols * block_in)
    ragged = (aligned[0] - block_out // 3, aligned[1] - max(block_in // 2, 1))
    return {"aligned": aligned, "ragged": ragged}


def pattern_of(kind, shape, block_shape, device="cpu"):
    mask = _masks(*grid_shape(shape, block_shape))[kind]
    return Pattern.from_mask(mask, block_shape, shape).to(device)


def zoo(block_shape, device="cpu"):
    """(name, pattern): every kind of pattern, aligned and ragged."""
    for size, shape in shapes(block_shape).items():
        for kind in PATTERN_KINDS:
            yield f"{kind}-{size}", pattern_of(kind, shape, block_shape, device)


def small_integers(*size, dtype=torch.float32, device="cpu", seed=0):
    """Integers so small that every product of the zoo is exact in `dtype`, in any order."""
    bound = 1 if dtype in (torch.bfloat16, torch.float16) else 8
    data = torch.randint(-bound, bound + 1, size, generator=seeded(seed))
    return data.to(device, dtype)


def normal(*size, dtype=torch.float32, device="cpu", seed=0):
    """Normal numbers that `dtype` holds exactly."""
    return torch.randn(*size, generator=seeded(seed), dtype=torch.float64).to(dtype).to(device)
