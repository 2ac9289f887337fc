"""The packed index, made on a GPU: equal to the CPU's, and harmless where the input is corrupt."""

from __future__ import annotations

import itertools

import pytest
import torch

from cuda_helpers import captured
from pytorch_block_sparse import Pattern
from test_cuda import corrupted

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

block_sparse = torch.ops.block_sparse


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("grid", [(0, 0), (0, 3), (3, 0), (1, 1), (7, 5), (100, 70), (33, 1000)])
def test_index_from_bsr_equals_the_cpu(grid, density):
    mask = torch.rand(grid) < density
    index = block_sparse.index_from_mask(mask)
    nnz = int(mask.sum())
    crow, col = index[: grid[0] + 1], index[grid[0] + 1 : grid[0] + 1 + nnz]
    result = block_sparse.index_from_bsr(crow.cuda(), col.cuda(), grid[1])
    assert torch.equal(result.cpu(), index)


@pytest.mark.parametrize(
    ("crow", "col", "block_cols", "message"),
    [
        ([], [], 3, "crow_indices: is empty"),
        ([0, 0], [], -1, "both must be in"),
        ([0, 0], [], 2**31, "both must be in"),
        ([0, 4], [0, 1, 2, 0], 3, "do not fit a grid of 1 x 3"),
        ([0], [0], 3, "do not fit a grid of 0 x 3"),
    ],
)
def test_index_from_bsr_refuses_wrong_sizes(crow, col, block_cols, message):
    crow, col = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (crow, col))
    with pytest.raises(ValueError, match=message):
        block_sparse.index_from_bsr(crow, col, block_cols)


def test_indices_on_two_kinds_of_device_are_an_error():
    crow, col = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    for pair in ((crow.cuda(), col), (crow, col.cuda())):
        with pytest.raises(ValueError, match=r"is on cpu, but|not on a GPU"):
            block_sparse.index_from_bsr(*pair, 1)


def test_a_corrupt_bsr_gives_an_index_and_no_invalid_access():
    rows, cols = 40, 30
    pattern = Pattern.random((rows, cols), 0.3, (1, 1))
    bad_crows, bad_cols = corrupted(pattern.crow_indices), corrupted(pattern.col_indices)
    for crow, col in itertools.product(
        [pattern.crow_indices, *bad_crows], [pattern.col_indices, *bad_cols]
    ):
        index = block_sparse.index_from_bsr(crow.cuda(), col.cuda(), cols)
        x = torch.ones(3, cols, device="cuda")
        values = torch.ones(pattern.nnz, 1, 1, device="cuda")
        y = block_sparse.forward(x, values, index, None, rows)
        block_sparse.grad_input(y, values, index, cols)
        block_sparse.grad_weight(y, x, index, pattern.nnz, 1, 1)
    torch.cuda.synchronize()


def test_index_from_bsr_is_captured_by_a_cuda_graph():
    first, second = (Pattern.random((70, 50), 0.2, (1, 1)) for _ in range(2))
    crow, col = first.crow_indices.cuda(), first.col_indices.cuda()
    graph, index = captured(lambda: block_sparse.index_from_bsr(crow, col, 50))
    crow.copy_(second.crow_indices)
    col.copy_(second.col_indices)
    graph.replay()
    assert torch.equal(index.cpu(), second.index)
