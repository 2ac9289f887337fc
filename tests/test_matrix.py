"""BlockSparseMatrix: constructors, conversions that share memory, arithmetic, gradients."""

import copy
import pickle

import pytest
import torch
from torch.autograd import gradcheck

from pytorch_block_sparse import (
    BlockSparseLinear,
    BlockSparseMatrix,
    Pattern,
    PseudoBlockSparseLinear,
)
from pytorch_block_sparse.optim import update_pattern_
from zoo import DTYPES, PATTERN_KINDS, dtype_id, normal, pattern_of, small_integers

SHAPE, RAGGED, BLOCK = (12, 20), (11, 18), (4, 5)  # 3 x 4 blocks


def matrix_of(kind="random", shape=RAGGED, dtype=torch.float64, data=normal, device="cpu"):
    pattern = pattern_of(kind, shape, BLOCK, device)
    return BlockSparseMatrix(data(pattern.nnz, *BLOCK, dtype=dtype, device=device), pattern)


def dense_by_loops(matrix):
    """The definition, one block at a time."""
    (out_features, in_features), (block_out, block_in) = matrix.shape, matrix.block_shape
    rows, cols = matrix.pattern.grid
    dense = torch.zeros(rows * block_out, cols * block_in, dtype=matrix.dtype)
    pattern = matrix.pattern
    for i in range(pattern.nnz):
        r, c = int(pattern.row_indices[i]) * block_out, int(pattern.col_indices[i]) * block_in
        dense[r : r + block_out, c : c + block_in] = matrix.values[i]
    return dense[:out_features, :in_features]


# --- constructors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["zeros", "ones", "randn"])
def test_filled(fill, device):
    make = getattr(BlockSparseMatrix, fill)
    full = make(SHAPE, block_shape=BLOCK, device=device)
    assert full.pattern.density == 1 and full.shape == SHAPE and full.device.type == device.type
    assert full.dtype == torch.float32 and full.block_shape == BLOCK
    five = make(SHAPE, 5, block_shape=BLOCK, device=device)
    assert five.values.shape == (5, 4, 5)
    chosen = make(SHAPE, blocks=[(2, 3), (0, 1)], block_shape=BLOCK, device=device)
    assert chosen.pattern.mask().nonzero().tolist() == [[0, 1], [2, 3]]
    values = full.values
    wanted = {"zeros": values == 0, "ones": values == 1, "randn": values != 0}
    assert wanted[fill].all()
    assert make((64, 64)).block_shape == (32, 32)


def test_filled_follows_the_default_device():
    with torch.device("meta"):
        assert BlockSparseMatrix.zeros(SHAPE, 3, block_shape=BLOCK).device.type == "meta"


@pytest.mark.parametrize("n_blocks", range(1, 13))
def test_n_blocks_is_exact(n_blocks):
    assert BlockSparseMatrix.zeros(SHAPE, n_blocks, block_shape=BLOCK).pattern.nnz == n_blocks


@pytest.mark.parametrize("kind", PATTERN_KINDS)
@pytest.mark.parametrize("shape", [SHAPE, RAGGED], ids=["aligned", "ragged"])
def test_to_dense_and_back(kind, shape, device):
    matrix = matrix_of(kind, shape, device=device)
    dense = matrix.to_dense()
    assert dense.shape == shape and dense.is_contiguous()
    assert torch.equal(dense.cpu(), dense_by_loops(matrix))
    again = BlockSparseMatrix.from_dense(dense, pattern=matrix.pattern)
    assert torch.equal(again.to_dense(), dense)
    full = BlockSparseMatrix.from_dense(dense, BLOCK)
    assert full.pattern.density == 1 and torch.equal(full.to_dense(), dense)


def test_from_dense_keeps_the_largest_blocks():
    dense = torch.ones(12, 20)
    dense[4:8, 5:10] = -3  # magnitude counts, not sign
    dense[0:4, 15:20] = 2
    matrix = BlockSparseMatrix.from_dense(dense, BLOCK, 2)
    assert matrix.block_mask().nonzero().tolist() == [[0, 3], [1, 1]]
    assert torch.equal(matrix.to_dense(), torch.where(dense == 1, 0, dense))


def test_from_dense_keeps_the_first_of_equal_blocks():
    matrix = BlockSparseMatrix.from_dense(torch.ones(12, 20), BLOCK, 5)
    assert matrix.block_mask().nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]]


def test_from_dense_is_a_copy():
    dense = torch.ones(12, 20)
    matrix = BlockSparseMatrix.from_dense(dense, BLOCK)
    dense.zero_()
    assert matrix.values.eq(1).all()


# --- BSR ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", PATTERN_KINDS)
def test_to_bsr_and_back(kind, dtype):
    matrix = matrix_of(kind, SHAPE, dtype)
    bsr = matrix.to_bsr()
    assert bsr.layout == torch.sparse_bsr and bsr.shape == SHAPE
    assert torch.equal(bsr.to_dense(), matrix.to_dense())
    again = BlockSparseMatrix.from_bsr(bsr)
    assert again.pattern.equal(matrix.pattern) and torch.equal(again.values, matrix.values)


def test_from_bsr_of_torch():
    dense = small_integers(12, 20) * (torch.rand(12, 20) < 0.1)
    bsr = dense.to_sparse_bsr(BLOCK)
    assert bsr.col_indices().dtype == torch.int64
    matrix = BlockSparseMatrix.from_bsr(bsr)
    assert matrix.pattern.col_indices.dtype == torch.int32
    assert torch.equal(matrix.to_dense(), dense)
    matrix.values[0] += 1  # values are shared whatever the indices are
    assert torch.equal(bsr.values(), matrix.values)


def test_bsr_shares_memory_both_ways():
    matrix = matrix_of(shape=SHAPE)
    bsr = matrix.to_bsr()
    again = BlockSparseMatrix.from_bsr(bsr)
    matrix.values[0, 0, 0] = 100
    assert bsr.values()[0, 0, 0] == again.values[0, 0, 0] == 100
    bsr.values()[1, 2, 3] = 200
    assert matrix.values[1, 2, 3] == again.values[1, 2, 3] == 200
    again.values[1, 1, 1] = 300
    assert matrix.values[1, 1, 1] == bsr.values()[1, 1, 1] == 300
    for mine, theirs, back in (
        (matrix.pattern.crow_indices, bsr.crow_indices(), again.pattern.crow_indices),
        (matrix.pattern.col_indices, bsr.col_indices(), again.pattern.col_indices),
    ):
        mine[0] += 50
        assert theirs[0] == back[0] == mine[0]
        theirs[0] -= 50
        assert back[0] == mine[0] == theirs[0]


@pytest.mark.parametrize("name", ["crow_indices", "col_indices"])
def test_products_refuse_indices_that_were_written(name):
    matrix = matrix_of(shape=SHAPE)
    bsr = BlockSparseMatrix.from_bsr(matrix.to_bsr()).to_bsr()
    matrix = BlockSparseMatrix.from_bsr(bsr)
    x, left = normal(20, 2, dtype=torch.float64), normal(2, 12, dtype=torch.float64)
    before = matrix @ x
    getattr(bsr, name)().add_(0)
    for product in (
        lambda: matrix @ x,
        lambda: left @ matrix,
        lambda: matrix.t() @ left.t(),
        lambda: copy.copy(matrix) @ x,
    ):
        with pytest.raises(RuntimeError, match=r"^pattern: .*written in place.*Pattern\.from_bsr"):
            product()
    assert torch.equal(BlockSparseMatrix.from_bsr(bsr) @ x, before)


def test_products_after_a_pattern_was_changed_with_its_index():
    layer = BlockSparseLinear(20, 12, density=0.5, block_shape=BLOCK)
    weight, other = layer.weight, BlockSparseLinear(20, 12, density=0.5, block_shape=BLOCK)
    layer.load_state_dict(other.state_dict())  # in place: `weight` sees it
    x = normal(20, 2)
    with torch.no_grad():
        assert torch.equal(weight @ x, other.weight @ x)
        absent = (~weight.block_mask()).nonzero()[:1]
        update_pattern_(weight, weight.block_mask().nonzero()[:1], absent)
        torch.testing.assert_close(weight @ x, weight.to_dense() @ x)


def test_products_in_inference_mode():
    with torch.inference_mode():
        matrix, x = matrix_of(), normal(18, 2, dtype=torch.float64)
        matrix.pattern.col_indices.add_(0)  # torch does not count the writes here
        torch.testing.assert_close(matrix @ x, matrix.to_dense() @ x)
    torch.testing.assert_close(matrix @ x, matrix.to_dense() @ x)


def test_a_product_compiles():
    matrix, left = matrix_of(), normal(2, 11, dtype=torch.float64)
    compiled = torch.compile(lambda x: x @ matrix, fullgraph=True, backend="eager")
    assert torch.equal(compiled(left), left @ matrix)


def test_to_bsr_of_a_ragged_matrix():
    matrix = matrix_of("full")
    with pytest.raises(ValueError, match=r"padded: \(11, 18\).*size rounded up, \(12, 20\)"):
        matrix.to_bsr()
    padded = matrix.to_bsr(padded=True)
    assert padded.shape == (12, 20)
    assert torch.equal(padded.to_dense()[:11, :18], matrix.to_dense())
    assert padded.values().data_ptr() == matrix.values.data_ptr()


def test_to_bsr_checks_the_invariants():
    matrix = matrix_of(shape=SHAPE)
    matrix.pattern.col_indices[0] = 77
    with pytest.raises(RuntimeError, match="0 <= col_indices"):
        matrix.to_bsr()


# --- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", PATTERN_KINDS)
def test_matmul_on_both_sides(kind, dtype, device):
    matrix = matrix_of(kind, dtype=dtype, data=small_integers, device=device)
    dense = matrix.to_dense().double()
    make = {"dtype": dtype, "device": device}
    for size in ((18,), (18, 1), (18, 7), (18, 0)):
        right = small_integers(*size, seed=1, **make)
        wanted = (dense @ right.double()).to(dtype)
        assert torch.equal(matrix @ right, wanted) and (matrix @ right).shape == wanted.shape
        assert torch.equal(torch.matmul(matrix, right), wanted)
    for size in ((11,), (1, 11), (7, 11), (2, 3, 11), (0, 11)):
        left = small_integers(*size, seed=2, **make)
        wanted = (left.double() @ dense).to(dtype)
        assert torch.equal(left @ matrix, wanted) and (left @ matrix).shape == wanted.shape
        assert torch.equal(torch.matmul(left, matrix), wanted)
        assert torch.equal(left.matmul(matrix), wanted)


@pytest.mark.parametrize("kind", PATTERN_KINDS)
def test_t(kind):
    matrix = matrix_of(kind)
    transposed = matrix.t()
    assert transposed.shape == (18, 11) and transposed.block_shape == (5, 4)
    assert torch.equal(transposed.to_dense(), matrix.to_dense().t())
    assert torch.equal(transposed.t().values, matrix.values)
    assert transposed.pattern.equal(matrix.pattern.t())


@pytest.mark.parametrize("p", [1, 2, float("inf")], ids=str)
def test_block_norm(p):
    matrix = matrix_of("full", SHAPE)
    blocks = matrix.to_dense().reshape(3, 4, 4, 5).transpose(1, 2).reshape(12, 20)
    wanted = torch.stack([torch.linalg.vector_norm(block, p) for block in blocks])
    torch.testing.assert_close(matrix.block_norm(p), wanted)
    assert matrix_of("no_block").block_norm(p).shape == (0,)


def test_block_norm_counts_the_inside_only():
    matrix = BlockSparseMatrix(torch.ones(12, *BLOCK), Pattern.full(RAGGED, BLOCK))
    wanted = torch.tensor([[20, 20, 20, 12]] * 2 + [[15, 15, 15, 9]])
    assert torch.equal(matrix.block_norm(1), wanted.flatten().float())
    assert matrix.values.eq(1).all()


def test_block_mask_and_the_rest():
    matrix = matrix_of()
    assert torch.equal(matrix.block_mask(), matrix.pattern.mask())
    assert matrix.dtype == torch.float64 and matrix.device.type == "cpu"
    assert isinstance(matrix.shape, torch.Size)
    assert "(11, 18)" in repr(matrix) and "float64" in repr(matrix)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(again):
    matrix = matrix_of()
    other = again(matrix)
    assert torch.equal(other.to_dense(), matrix.to_dense())
    other.values.zero_()
    assert matrix.values.abs().sum() > 0


# --- gradients ------------------------------------------------------------------------------------


def test_gradients():
    pattern = pattern_of("random", (5, 8), (2, 3))
    make = {"dtype": torch.float64}
    values = normal(pattern.nnz, *pattern.block_shape, **make).requires_grad_()
    right, left = normal(8, 2, **make).requires_grad_(), normal(2, 5, **make).requires_grad_()
    dense = normal(5, 8, **make).requires_grad_()

    def of(v):
        return BlockSparseMatrix(v, pattern)

    assert gradcheck(lambda v: of(v).to_dense(), (values,))
    assert gradcheck(lambda v: of(v).t().to_dense(), (values,))
    assert gradcheck(lambda v, x: of(v) @ x, (values, right))
    assert gradcheck(lambda v, x: x @ of(v), (values, left))
    assert gradcheck(lambda v, x: of(v).t() @ x, (values, left.detach().t()))
    assert gradcheck(lambda d: BlockSparseMatrix.from_dense(d, pattern=pattern).values, (dense,))
    assert gradcheck(lambda d: BlockSparseMatrix.from_dense(d, (2, 3), 3).values, (dense,))
    assert gradcheck(lambda v: of(v).block_norm(2), (values,))  # (5, 8) in (2, 3) is ragged


# --- what is refused ------------------------------------------------------------------------------

DENSE = torch.ones(12, 20)
REFUSED = {
    "values_size": (
        lambda: BlockSparseMatrix(torch.ones(5, 4, 5), Pattern.full(SHAPE, BLOCK)),
        r"values: must be \[12, 4, 5\], got \[5, 4, 5\]",
    ),
    "values_device": (
        lambda: BlockSparseMatrix(torch.ones(12, 4, 5, device="meta"), Pattern.full(SHAPE, BLOCK)),
        "values: is on meta, but the pattern on cpu",
    ),
    "values_list": (lambda: BlockSparseMatrix([], Pattern.full(SHAPE, BLOCK)), "values: .*list"),
    "n_blocks_0": (
        lambda: BlockSparseMatrix.zeros(SHAPE, 0, block_shape=BLOCK),
        r"n_blocks: .*got 0",
    ),
    "n_blocks_13": (
        lambda: BlockSparseMatrix.zeros(SHAPE, 13, block_shape=BLOCK),
        r"\[1, 12\], got 13",
    ),
    "n_blocks_float": (lambda: BlockSparseMatrix.zeros(SHAPE, 2.5, block_shape=BLOCK), "got 2.5"),
    "n_blocks_and_blocks": (
        lambda: BlockSparseMatrix.zeros(SHAPE, 1, [(0, 0)], BLOCK),
        "either n_blocks or blocks",
    ),
    "dense_list": (lambda: BlockSparseMatrix.from_dense([[1.0]]), "dense: must be a tensor"),
    "dense_1d": (lambda: BlockSparseMatrix.from_dense(DENSE[0]), "dense: must have two dim.*got 1"),
    "dense_block": (lambda: BlockSparseMatrix.from_dense(DENSE, (0, 1)), "block_shape: must be"),
    "block_count": (
        lambda: BlockSparseMatrix.from_dense(DENSE, BLOCK, 13),
        r"block_count: .*got 13",
    ),
    "block_count_0": (
        lambda: BlockSparseMatrix.from_dense(DENSE, BLOCK, 0),
        r"block_count: .*got 0",
    ),
    "count_and_pattern": (
        lambda: BlockSparseMatrix.from_dense(DENSE, BLOCK, 2, pattern=Pattern.full(SHAPE, BLOCK)),
        "either block_count or pattern",
    ),
    "dense_pattern": (
        lambda: BlockSparseMatrix.from_dense(DENSE, pattern=Pattern.full(RAGGED, BLOCK)),
        r"pattern: is of shape \(11, 18\), but dense of \(12, 20\)",
    ),
    "bsr_dense": (lambda: BlockSparseMatrix.from_bsr(DENSE), "bsr: must be.*strided"),
    "bsr_csr": (lambda: BlockSparseMatrix.from_bsr(DENSE.to_sparse_csr()), "bsr: .*sparse_csr"),
    "bsr_none": (lambda: BlockSparseMatrix.from_bsr(None), "bsr: .*NoneType"),
    "matmul_rows": (lambda: matrix_of() @ torch.ones(17), r"other: must have 18 rows.*got \[17\]"),
    "matmul_3d": (lambda: matrix_of() @ torch.ones(2, 18, 3), "other: .*one or two dim.*got 3"),
    "rmatmul_columns": (lambda: torch.ones(2, 12) @ matrix_of(), r"other: must have 11 columns"),
    "matmul_matrix": (lambda: matrix_of() @ matrix_of(), "unsupported operand"),
    "matmul_number": (lambda: matrix_of() @ 2, "unsupported operand"),
    "add": (lambda: DENSE + matrix_of(), "unsupported operand"),
    "pseudo": (lambda: PseudoBlockSparseLinear(torch.nn.Linear(2, 2)), "layer: .*got Linear"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused(name):
    call, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()
