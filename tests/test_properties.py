"""Properties that hold for every shape, block shape, density, dtype and stride (hypothesis)."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytorch_block_sparse import BlockSparseMatrix, Pattern, ops
from pytorch_block_sparse.testing import dense_forward, dense_grad_input, dense_grad_weight
from zoo import DTYPES, seeded

sizes = st.integers(1, 70)
block_shapes = st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.sampled_from(
    [(4, 4), (8, 8), (16, 16), (32, 32), (1, 16), (16, 1), (32, 8)]
)
seeds = st.integers(0, 2**31)


@st.composite
def patterns(draw):
    shape = (draw(sizes), draw(sizes))
    block_shape = draw(block_shapes)
    if draw(st.booleans()):
        density = draw(st.floats(0.001, 1))
        generator = seeded(draw(seeds))
        return Pattern.random(shape, density, block_shape, generator, balanced=draw(st.booleans()))
    grid = Pattern.full(shape, block_shape).grid
    mask = torch.rand(grid, generator=seeded(draw(seeds))) < draw(st.sampled_from([0, 0.2, 0.7]))
    return Pattern.from_mask(mask, block_shape, shape)


@st.composite
def strided(draw, shape, dtype):
    """Small integers; contiguous, a slice, a permutation, or expanded along some dimensions."""
    data = torch.randint(-1, 2, shape, generator=seeded(draw(seeds))).to(dtype)
    steps = [draw(st.integers(1, 3)) for _ in shape]
    offset = draw(st.integers(0, 3))
    order = draw(st.permutations(range(len(shape))))
    wide = torch.full([n * s + offset for n, s in zip(shape, steps, strict=True)], torch.nan)
    wide = (
        wide.to(dtype)
        .permute(order)
        .contiguous()
        .permute([order.index(d) for d in range(len(shape))])
    )
    view = wide[tuple(slice(offset, None, s) for s in steps)]
    view = view[tuple(slice(0, n) for n in shape)].copy_(data)
    for d, n in enumerate(shape):
        if n > 0 and draw(st.integers(0, 9)) == 0:
            view = view.narrow(d, 0, 1).expand(shape) if view.shape == tuple(shape) else view
    return view


@given(data=st.data(), pattern=patterns(), dtype=st.sampled_from(DTYPES))
@settings(max_examples=100)
def test_products_equal_dense_ones(data, pattern, dtype):
    leading = data.draw(st.lists(st.integers(0, 7), max_size=3))
    out_features, in_features = pattern.shape
    x = data.draw(strided([*leading, in_features], dtype))
    dy = data.draw(strided([*leading, out_features], dtype))
    values = data.draw(strided([pattern.nnz, *pattern.block_shape], dtype))
    bias = data.draw(st.none() | strided([out_features], dtype))
    assert not any(t.isnan().any() for t in (x, dy, values))

    operands = [values, x, *([] if bias is None else [bias])]
    leaves = [operand.detach().requires_grad_() for operand in operands]
    y = ops.linear(
        leaves[1], leaves[0], pattern.index, leaves[2] if bias is not None else None, out_features
    )
    wide = [None if t is None else t.double() for t in (x, values, bias, dy)]
    assert torch.equal(y, dense_forward(wide[0], wide[1], pattern, wide[2]).to(dtype))
    gradients = torch.autograd.grad(y, leaves, dy)
    assert torch.equal(gradients[0], dense_grad_weight(wide[3], wide[0], pattern).to(dtype))
    assert torch.equal(gradients[1], dense_grad_input(wide[3], wide[1], pattern).to(dtype))
    if bias is not None:
        assert torch.equal(gradients[2], wide[3].reshape(-1, out_features).sum(0).to(dtype))


@given(pattern=patterns())
def test_mask_to_pattern_to_mask(pattern):
    again = Pattern.from_mask(pattern.mask(), pattern.block_shape, pattern.shape)
    assert again.equal(pattern) and torch.equal(again.index, pattern.index)


@given(pattern=patterns(), seed=seeds)
def test_blocks_in_any_order_are_the_same_pattern(pattern, seed):
    blocks = pattern.mask().nonzero()
    order = torch.randperm(len(blocks), generator=seeded(seed))
    assert Pattern.from_blocks(blocks[order], pattern.shape, pattern.block_shape).equal(pattern)


@given(pattern=patterns())
def test_the_index_is_what_it_says(pattern):
    """The six arrays, each by its definition."""
    rows, cols = pattern.grid
    nnz = pattern.nnz
    crow, col, row, ccol, trow, perm = pattern.index.split([rows + 1, nnz, nnz, cols + 1, nnz, nnz])
    where = pattern.mask().nonzero()
    assert torch.equal(row, where[:, 0].int()) and torch.equal(col, where[:, 1].int())
    assert torch.equal(crow[1:] - crow[:-1], pattern.mask().sum(1).int()) and crow[0] == 0
    assert torch.equal(ccol[1:] - ccol[:-1], pattern.mask().sum(0).int()) and ccol[0] == 0
    assert torch.equal(perm.sort().values, torch.arange(nnz, dtype=torch.int32))
    assert torch.equal(trow, row[perm.long()])
    assert torch.equal(trow, pattern.mask().t().nonzero()[:, 1].int())
    assert pattern.t().t().equal(pattern)


@given(pattern=patterns(), dtype=st.sampled_from(DTYPES), seed=seeds)
def test_matrix_to_bsr_to_matrix(pattern, dtype, seed):
    values = torch.randn(pattern.nnz, *pattern.block_shape, generator=seeded(seed)).to(dtype)
    matrix = BlockSparseMatrix(values, pattern)
    bsr = matrix.to_bsr(padded=True)
    assert torch.equal(bsr.to_dense()[: pattern.shape[0], : pattern.shape[1]], matrix.to_dense())
    again = BlockSparseMatrix.from_bsr(bsr)
    assert torch.equal(again.values, values)
    assert torch.equal(again.block_mask(), matrix.block_mask())


@given(pattern=patterns(), seed=seeds, data=st.data())
def test_dense_to_matrix_to_dense(pattern, seed, data):
    dense = torch.randn(pattern.shape, generator=seeded(seed))
    assert torch.equal(BlockSparseMatrix.from_dense(dense, pattern.block_shape).to_dense(), dense)
    sampled = BlockSparseMatrix.from_dense(dense, pattern=pattern).to_dense()
    block_out, block_in = pattern.block_shape
    mask = pattern.mask().repeat_interleave(block_out, 0).repeat_interleave(block_in, 1)
    mask = mask[: pattern.shape[0], : pattern.shape[1]]
    assert torch.equal(sampled, torch.where(mask, dense, 0))
    cells = pattern.grid[0] * pattern.grid[1]
    count = data.draw(st.integers(1, cells))
    kept = BlockSparseMatrix.from_dense(dense, pattern.block_shape, count)
    assert kept.pattern.nnz == count
    norms = BlockSparseMatrix.from_dense(dense, pattern.block_shape).block_norm(1)
    left_out = norms[~kept.block_mask().flatten()]
    assert left_out.numel() == 0 or left_out.max() <= kept.block_norm(1).min() * (1 + 1e-5)
