"""Sums that cuda_sm90_strip splits along the depth, where tiles are few: exact for every count of
tokens, kind of pattern and block shape; the same bits every time, whatever memory held before; in a
CUDA graph; with a corrupt index."""

from __future__ import annotations

import re

import pytest
import torch

from cuda_helpers import captured, on_hopper
from test_cuda import Problem, check_corrupt_indices, make_problem
from test_cuda_few_tokens import KINDS, empty_rows, make_pattern, random

pytestmark = on_hopper

block_sparse = torch.ops.block_sparse
PRODUCTS = ["forward", "grad_input"]
BLOCKS = [(16, 16), (32, 32), (32, 16), (16, 32), (64, 32), (32, 64), (16, 128), (128, 16)]
TOKENS = [1, 8, 17, 63, 64, 65, 80, 96, 97, 128, 129, 176, 177, 192, 200, 300, 385]


@pytest.fixture(autouse=True)
def _strip_kernel(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("BLOCK_SPARSE_KERNEL", "cuda_sm90_strip")


def sizes_of(product):
    """(out, in) with few outputs and a long sum; multiples of 8, and of no block."""
    return (328, 4104) if product == "forward" else (4104, 328)


def workspace(problem: Problem, product: str) -> int:
    """Bytes: where sums are split, there are some."""
    text = block_sparse.explain(
        problem.values, product, len(problem.input), len(problem.bias), problem.input.shape[1], True
    )
    return int(re.search(r"chosen, workspace (\d+) bytes", text).group(1))


def run_over_nan(problem: Problem, product: str) -> torch.Tensor:
    """Runs where the memory of the workspace and of the result holds NaN, and shared memory too."""
    good = problem.input, problem.grad_output
    problem.input, problem.grad_output = (torch.full_like(x, float("nan")) for x in good)
    problem.run(product)
    problem.input, problem.grad_output = good
    output = problem.input if product == "grad_input" else problem.grad_output
    torch.full_like(output, float("nan"))
    torch.full((workspace(problem, product) // 4,), float("nan"), device="cuda")
    return problem.run(product)


def expected_of(problem: Problem, pattern, product: str) -> torch.Tensor:
    (rows, cols), (height, width) = pattern.grid, pattern.block_shape
    blocks = torch.zeros(rows, cols, height, width, device="cuda")
    blocks[pattern.row_indices.long(), pattern.col_indices.long()] = problem.values.float()
    weight = blocks.transpose(1, 2).reshape(rows * height, cols * width)
    weight = weight[: pattern.shape[0], : pattern.shape[1]]
    if product == "forward":
        result = problem.input.float() @ weight.T + problem.bias.float()
    else:
        result = problem.grad_output.float() @ weight
    return result.to(problem.values.dtype)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
def test_every_count_of_tokens(block_shape, kind, dtype, product):
    sizes = sizes_of(product)
    pattern = make_pattern(kind, sizes, block_shape)
    problem = make_problem((max(TOKENS), *sizes), block_shape, dtype, pattern).to("cuda")
    expected = expected_of(problem, pattern, product)
    x, dy = problem.input, problem.grad_output
    for tokens in TOKENS:
        problem.input, problem.grad_output = x[:tokens], dy[:tokens]
        assert workspace(problem, product) > 0, "sums are split"
        assert torch.equal(run_over_nan(problem, product), expected[:tokens]), tokens


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
def test_only_the_last_tiles(block_shape, product):
    """More tiles than the chip takes at once: whole ones, then parts of the others."""
    sizes = (6144, 4096)
    if product == "grad_input":
        sizes = sizes[::-1]
    pattern = make_pattern(random, sizes, block_shape)
    problem = make_problem((1280, *sizes), block_shape, torch.bfloat16, pattern).to("cuda")
    expected = expected_of(problem, pattern, product)
    x, dy = problem.input, problem.grad_output
    split = []
    for tokens in range(300, 1281, 140):
        problem.input, problem.grad_output = x[:tokens], dy[:tokens]
        split.append(workspace(problem, product) > 0)
        assert torch.equal(run_over_nan(problem, product), expected[:tokens]), tokens
    assert any(split)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("block_shape", [(32, 32), (16, 16)], ids=str)
@pytest.mark.parametrize("tokens", [65, 300])
def test_the_same_bits_every_run(tokens, block_shape, product):
    sizes = sizes_of(product)
    pattern = make_pattern(random, sizes, block_shape)
    problem = make_problem((tokens, *sizes), block_shape, torch.bfloat16, pattern).to("cuda")
    for name in ("input", "grad_output", "values", "bias"):
        setattr(problem, name, torch.randn_like(getattr(problem, name)))
    assert workspace(problem, product) > 0
    first = problem.run(product)
    assert first.isfinite().all()
    for _ in range(20):
        assert torch.equal(run_over_nan(problem, product), first)


@pytest.mark.parametrize("product", PRODUCTS)
def test_captured_by_a_cuda_graph(product):
    sizes = sizes_of(product)
    pattern = make_pattern(empty_rows, sizes, (32, 32))
    first, second = (
        make_problem((130, *sizes), (32, 32), torch.bfloat16, pattern).to("cuda") for _ in range(2)
    )
    expected = expected_of(second, pattern, product)
    assert workspace(first, product) > 0
    graph, result = captured(lambda: first.run(product))
    for name in ("input", "grad_output", "values", "bias"):
        getattr(first, name).copy_(getattr(second, name))
    for _ in range(3):
        result.fill_(float("nan"))
        graph.replay()
        assert torch.equal(result, expected)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("block_shape", [(32, 32), (16, 16)], ids=str)
def test_a_corrupt_index_gives_numbers_and_no_invalid_access(block_shape, product):
    problem = make_problem((200, *sizes_of(product)), block_shape, torch.bfloat16)
    assert workspace(problem.to("cuda"), product) > 0
    check_corrupt_indices(problem, product)


def test_a_wrong_element_shows():
    pattern = make_pattern(random, sizes_of("forward"), (32, 32))
    problem = make_problem((100, *pattern.shape), (32, 32), torch.bfloat16, pattern).to("cuda")
    expected = expected_of(problem, pattern, "forward")
    assert torch.equal(problem.run("forward"), expected)
    problem.values[-1, 0, 0] += 1
    assert not torch.equal(problem.run("forward"), expected)
