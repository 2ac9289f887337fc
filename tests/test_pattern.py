"""Pattern: every constructor and property, what is refused, and what is exact."""

import pytest
import torch

from pytorch_block_sparse import Pattern
from pytorch_block_sparse.pattern import index_size, split_index
from zoo import BLOCK_SHAPES, PATTERN_KINDS, block_id, pattern_of, seeded, zoo

MASK = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 0]], dtype=torch.bool)
SHAPE, BLOCK = (16, 6), (4, 2)  # 4 x 3 blocks


def blocks_of(pattern):
    return list(zip(pattern.row_indices.tolist(), pattern.col_indices.tolist(), strict=True))


# --- constructors ---------------------------------------------------------------------------------


def test_every_index_of_a_small_pattern(device):
    pattern = Pattern.from_mask(MASK.to(device), BLOCK)
    assert pattern.shape == SHAPE and pattern.block_shape == BLOCK and pattern.grid == (4, 3)
    assert pattern.nnz == 6 and pattern.density == 0.5
    assert pattern.device.type == device.type
    assert pattern.crow_indices.tolist() == [0, 2, 2, 4, 6]
    assert pattern.col_indices.tolist() == [0, 2, 1, 2, 0, 1]
    assert pattern.row_indices.tolist() == [0, 0, 2, 2, 3, 3]
    assert pattern.permutation.tolist() == [0, 4, 2, 5, 1, 3]  # by block column, then block row
    assert pattern.index.tolist() == [
        *(0, 2, 2, 4, 6),
        *(0, 2, 1, 2, 0, 1),
        *(0, 0, 2, 2, 3, 3),
        *(0, 2, 4, 6),
        *(0, 3, 2, 3, 0, 2),
        *(0, 4, 2, 5, 1, 3),
    ]
    parts = split_index(pattern.index, pattern.grid, pattern.nnz)
    assert torch.equal(torch.cat(parts), pattern.index)
    assert parts.ccol_indices.tolist() == [0, 2, 4, 6]
    assert parts.trow_indices.tolist() == [0, 3, 2, 3, 0, 2]
    assert len(pattern.index) == index_size(pattern.grid, pattern.nnz)
    for indices in (pattern.crow_indices, pattern.col_indices, pattern.index):
        assert indices.dtype == torch.int32 and indices.device == pattern.device
    assert torch.equal(pattern.mask().cpu(), MASK) and pattern.mask().device == pattern.device
    assert "nnz=6" in repr(pattern) and "(16, 6)" in repr(pattern)


def test_the_constructors_agree(device):
    pattern = Pattern.from_mask(MASK, BLOCK)
    blocks = MASK.nonzero()
    shuffled = blocks[torch.randperm(len(blocks))]
    bsr = (pattern.crow_indices.to(device), pattern.col_indices.to(device))
    for same in (
        Pattern.from_blocks(blocks.to(device), SHAPE, BLOCK),
        Pattern.from_blocks(shuffled, SHAPE, BLOCK),
        Pattern.from_blocks(shuffled.int(), SHAPE, BLOCK),
        Pattern.from_blocks([tuple(block) for block in blocks.tolist()], SHAPE, BLOCK),
        Pattern.from_bsr(*bsr, SHAPE, BLOCK),
        Pattern.from_bsr(*(indices.long() for indices in bsr), SHAPE, BLOCK),
        Pattern.from_mask(MASK.t().contiguous().t(), list(BLOCK), torch.Size(SHAPE)),
    ):
        assert same.equal(pattern) and torch.equal(same.index.cpu(), pattern.index)


def test_full_and_banded():
    full = Pattern.full((64, 96), (32, 32))
    assert full.density == 1 and full.mask().all()
    assert blocks_of(Pattern.banded((96, 96), 0, (32, 32))) == [(0, 0), (1, 1), (2, 2)]
    band = Pattern.banded((128, 128), 1, (32, 32)).mask()
    row, col = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    assert torch.equal(band, (row - col).abs() <= 1)
    assert Pattern.banded((64, 128), 0, (32, 32)).mask().sum() == 2  # scaled where not square
    assert Pattern.banded((64, 128), 10**30, (32, 32)).density == 1


@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=block_id)
def test_masks_survive(block_shape, device):
    for name, pattern in zoo(block_shape, device):
        again = Pattern.from_mask(pattern.mask(), block_shape, pattern.shape)
        assert again.equal(pattern), name
        assert torch.equal(again.index, pattern.index), name


def test_from_bsr_shares_memory_with_int32_indices_only():
    source = Pattern.from_mask(MASK, BLOCK)
    crow, col = source.crow_indices, source.col_indices
    shared = Pattern.from_bsr(crow, col, SHAPE, BLOCK)
    assert shared.crow_indices.data_ptr() == crow.data_ptr()
    assert shared.col_indices.data_ptr() == col.data_ptr()
    copied = Pattern.from_bsr(crow.long(), col.long(), SHAPE, BLOCK)
    assert copied.crow_indices.dtype == torch.int32


@pytest.mark.parametrize("shape", [(0, 6), (16, 0), (0, 0)], ids=str)
def test_a_grid_without_blocks(shape):
    for pattern in (
        Pattern.full(shape, BLOCK),
        Pattern.random(shape, 0.5, BLOCK),
        Pattern.from_blocks([], shape, BLOCK),
        Pattern.banded(shape, 1, BLOCK),
    ):
        assert pattern.nnz == 0 and pattern.density == 0 and pattern.mask().shape == pattern.grid
        assert pattern.t().shape == shape[::-1]


def test_constructors_are_not_moved_by_the_default_device():
    with torch.device("meta"):
        assert Pattern.from_blocks([(0, 1)], SHAPE, BLOCK).device.type == "cpu"
        assert Pattern.random(SHAPE, 0.5, BLOCK).device.type == "cpu"
        assert Pattern.full(SHAPE, BLOCK).device.type == "cpu"


def test_the_device_argument(device):
    for pattern in (
        Pattern.random(SHAPE, 0.5, BLOCK, device=device),
        Pattern.banded(SHAPE, 1, BLOCK, device=device),
        Pattern.full(SHAPE, BLOCK, device=device),
    ):
        assert pattern.device.type == device.type
        assert pattern.crow_indices.device == pattern.col_indices.device == pattern.device


# --- random ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("balanced", [False, True], ids=["uniform", "balanced"])
@pytest.mark.parametrize("density", [1e-9, 0.04, 0.1, 0.25, 0.3, 0.5, 0.77, 0.999, 1])
def test_random_has_exactly_the_blocks_of_its_density(density, balanced):
    for rows, cols in ((1, 1), (1, 7), (5, 5), (8, 3), (20, 30)):
        pattern = Pattern.random((rows * 4, cols * 2), density, BLOCK, balanced=balanced)
        assert pattern.nnz == max(1, round(density * rows * cols))
        assert pattern.mask().sum() == pattern.nnz  # all different


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_balanced_rows_and_columns_differ_by_at_most_one(density):
    for rows, cols in ((8, 8), (5, 12), (16, 3)):
        mask = Pattern.random((rows * 4, cols * 2), density, BLOCK, balanced=True).mask()
        for counts in (mask.sum(0), mask.sum(1)):
            assert counts.max() - counts.min() <= 1


def test_random_is_repeatable_and_uses_the_generator():
    def draw(generator=None):
        return Pattern.random((400, 200), 0.3, BLOCK, generator).mask()

    assert torch.equal(draw(seeded(7)), draw(seeded(7)))
    assert not torch.equal(draw(seeded(7)), draw(seeded(8)))
    generator = seeded(7)
    assert not torch.equal(draw(generator), draw(generator))  # it advances
    torch.manual_seed(3)
    first = draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first) and not torch.equal(draw(), first)
    state = torch.get_rng_state()
    draw(seeded(7))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_means_the_same_pattern_on_every_machine():
    """By the definition: splitmix64, and a cell is taken with probability wanted / cells left."""

    def draws(state):
        while True:
            state = (state + 0x9E3779B97F4A7C15) % 2**64
            z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            yield z ^ (z >> 31)

    draw, wanted, taken = draws(42), 5, []
    for cell in range(16):
        hit = next(draw) % (16 - cell) < wanted
        wanted -= hit
        taken.append(bool(hit))
    index = torch.ops.block_sparse.index_random(4, 4, 5, 42, False)
    mask = torch.tensor(taken).view(4, 4)
    assert torch.equal(index, torch.ops.block_sparse.index_from_mask(mask))


def test_random_is_uniform():
    """Each of 24 cells is present in a quarter of the patterns, within 5 standard deviations."""
    draws = 2000
    generator = seeded(0)
    total = sum(
        Pattern.random((4 * 4, 6 * 2), 0.25, BLOCK, generator).mask().int() for _ in range(draws)
    )
    deviation = (draws * 0.25 * 0.75) ** 0.5
    assert (total - draws * 0.25).abs().max() < 5 * deviation


# --- methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PATTERN_KINDS)
def test_t(kind, device):
    pattern = pattern_of(kind, (30, 45), (4, 6), device)
    transposed = pattern.t()
    assert transposed.shape == (45, 30) and transposed.block_shape == (6, 4)
    assert torch.equal(transposed.mask(), pattern.mask().t())
    assert transposed.t().equal(pattern)
    # Its blocks are those of the pattern, in the order of `permutation`.
    order = pattern.permutation.long()
    assert torch.equal(transposed.row_indices, pattern.col_indices[order])
    assert torch.equal(transposed.col_indices, pattern.row_indices[order])


def test_to_returns_itself_where_nothing_moves():
    pattern = Pattern.from_mask(MASK, BLOCK)
    assert pattern.to("cpu") is pattern and pattern.to(torch.device("cpu")) is pattern
    assert pattern.to("meta").device.type == "meta"


@pytest.mark.cuda
def test_to_and_back():
    pattern = Pattern.from_mask(MASK, BLOCK)
    moved = pattern.to("cuda")
    assert moved.device.type == "cuda" and moved.to("cuda") is moved
    assert moved.equal(pattern) and torch.equal(moved.to("cpu").index, pattern.index)


def test_equal():
    pattern = Pattern.from_mask(MASK, BLOCK)
    assert pattern.equal(Pattern.from_mask(MASK, BLOCK))
    assert not pattern.equal(Pattern.from_mask(~MASK, BLOCK))
    assert not pattern.equal(Pattern.from_mask(MASK, (2, 2)))
    assert not pattern.equal(Pattern.from_mask(MASK, BLOCK, (15, 6)))


# --- what is refused ------------------------------------------------------------------------------


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


CROW, COL = ints(0, 2, 2, 4, 6), ints(0, 2, 1, 2, 0, 1)
REFUSED = {
    "density_0": (lambda: Pattern.random(SHAPE, 0, BLOCK), r"density: must be in \(0, 1\], got 0"),
    "density_over_1": (lambda: Pattern.random(SHAPE, 1.01, BLOCK), "density: .*got 1.01"),
    "density_nan": (lambda: Pattern.random(SHAPE, float("nan"), BLOCK), "density: .*got nan"),
    "density_text": (lambda: Pattern.random(SHAPE, "half", BLOCK), "density: .*got 'half'"),
    "block_shape_0": (lambda: Pattern.full(SHAPE, (0, 2)), r"block_shape: .*got \(0, 2\)"),
    "block_shape_1d": (lambda: Pattern.full(SHAPE, (2,)), r"block_shape: .*got \(2,\)"),
    "block_shape_int": (lambda: Pattern.full(SHAPE, 32), "block_shape: .*got 32"),
    "block_shape_float": (lambda: Pattern.full(SHAPE, (2.0, 2)), "block_shape: must be two pos"),
    "shape_negative": (lambda: Pattern.full((-1, 2), BLOCK), r"shape: .*got \(-1, 2\)"),
    "shape_huge": (lambda: Pattern.full((2**31, 2), BLOCK), r"shape: .*\[0, 2\^31\)"),
    "shape_bool": (lambda: Pattern.full((True, 2), BLOCK), "shape: must be two ints"),
    "overflow": (lambda: Pattern.full((2**17, 2**17), (1, 1)), "blocks overflow int32"),
    "mask_dtype": (lambda: Pattern.from_mask(MASK.int(), BLOCK), "mask: .*bool.*got torch.int32"),
    "mask_list": (lambda: Pattern.from_mask([[True]], BLOCK), "mask: must be a bool tensor"),
    "mask_size": (lambda: Pattern.from_mask(MASK, BLOCK, (17, 6)), r"mask: is \[4, 3\].*5 x 3"),
    "blocks_twice": (lambda: Pattern.from_blocks([(0, 0)] * 2, SHAPE, BLOCK), "named twice"),
    "blocks_outside": (lambda: Pattern.from_blocks([(4, 0)], SHAPE, BLOCK), r"\(4, 0\) is outside"),
    "blocks_triple": (lambda: Pattern.from_blocks([(0, 0, 0)], SHAPE, BLOCK), r"got \[1, 3\]"),
    "blocks_uneven": (lambda: Pattern.from_blocks([(0, 0), (1,)], SHAPE, BLOCK), "blocks: must be"),
    "blocks_none": (lambda: Pattern.from_blocks(None, SHAPE, BLOCK), "blocks: must be.*None"),
    "blocks_float": (lambda: Pattern.from_blocks([(0.0, 1.0)], SHAPE, BLOCK), "blocks: .*float32"),
    "bandwidth": (lambda: Pattern.banded(SHAPE, -1, BLOCK), "bandwidth: .*got -1"),
    "bandwidth_float": (lambda: Pattern.banded(SHAPE, 0.5, BLOCK), "bandwidth: .*got 0.5"),
    "generator": (lambda: Pattern.random(SHAPE, 0.5, BLOCK, 7), "generator: .*got 7"),
    "crow_list": (lambda: Pattern.from_bsr([0], COL, SHAPE, BLOCK), "crow_indices: .*got list"),
    "crow_float": (lambda: Pattern.from_bsr(CROW.float(), COL, SHAPE, BLOCK), "crow.*float32"),
    "col_2d": (lambda: Pattern.from_bsr(CROW, COL[None], SHAPE, BLOCK), "col_indices: .*one dim"),
    "crow_short": (lambda: Pattern.from_bsr(CROW[1:], COL, SHAPE, BLOCK), "4 entries;.*need 5"),
    "crow_order": (
        lambda: Pattern.from_bsr(ints(0, 2, 1, 4, 6), COL, SHAPE, BLOCK),
        "crow_indices: must ascend",
    ),
    "crow_end": (lambda: Pattern.from_bsr(CROW, COL[:-1], SHAPE, BLOCK), "must end at.*5, got 6"),
    "col_outside": (lambda: Pattern.from_bsr(CROW, COL + 1, SHAPE, BLOCK), r"is 3; .*\[0, 3\)"),
    "col_twice": (
        lambda: Pattern.from_bsr(CROW, ints(0, 0, 1, 2, 0, 1), SHAPE, BLOCK),
        "without duplicates",
    ),
    "col_descends": (
        lambda: Pattern.from_bsr(CROW, ints(2, 0, 1, 2, 0, 1), SHAPE, BLOCK),
        "col_indices: must ascend",
    ),
    "col_int64": (
        lambda: Pattern.from_bsr(CROW, COL.long() + 2**40, SHAPE, BLOCK),
        r"col_indices: has an entry outside \[0, 2\^31\)",
    ),
    "col_device": (
        lambda: Pattern.from_bsr(CROW, COL.to("meta"), SHAPE, BLOCK),
        "col_indices: is on meta, but crow_indices on cpu",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused(name):
    call, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()
