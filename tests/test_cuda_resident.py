"""cuda_sm90_resident, whose CTAs keep x in shared memory: exact for every count of tokens, kind of
pattern, block shape and depth; the same bits every time, whatever memory held before; in a CUDA
graph; with a corrupt index; and when it is chosen."""

from __future__ import annotations

import pytest
import torch

from cuda_helpers import captured, on_hopper
from test_cuda import check_corrupt_indices, make_problem
from test_cuda_few_tokens import KINDS, empty_rows, make_pattern, random
from test_cuda_split import expected_of, run_over_nan

pytestmark = on_hopper

block_sparse = torch.ops.block_sparse
PRODUCTS = ["forward", "grad_input"]
SIDES = [16, 32, 64, 128]
BLOCKS = [(height, width) for height in SIDES for width in SIDES] + [(192, 64), (32, 320)]
TOKENS = [1, 7, 63, 64, 65, 95, 96, 97, 128, 129, 300]
DEPTHS = [8, 200, 520, 768, 1024]  # that sums are over: no multiples of the blocks among them


@pytest.fixture(autouse=True)
def _resident_kernel(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("BLOCK_SPARSE_KERNEL", "cuda_sm90_resident")


def sizes_of(product, depth, outputs=456):
    """(out, in); the outputs are a multiple of 8 and of no block."""
    return (outputs, depth) if product == "forward" else (depth, outputs)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
def test_every_count_of_tokens(block_shape, kind, dtype, product):
    sizes = sizes_of(product, 520)
    pattern = make_pattern(kind, sizes, block_shape)
    problem = make_problem((max(TOKENS), *sizes), block_shape, dtype, pattern).to("cuda")
    expected = expected_of(problem, pattern, product)
    x, dy = problem.input, problem.grad_output
    for tokens in TOKENS:
        problem.input, problem.grad_output = x[:tokens], dy[:tokens]
        assert torch.equal(run_over_nan(problem, product), expected[:tokens]), tokens


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("block_shape", [(64, 64), (32, 32), (16, 16), (128, 128)], ids=str)
def test_every_depth(block_shape, depth, product):
    """Few outputs and many, so that CTAs share the tokens' rows of blocks and do not."""
    for outputs, tokens in [(72, 1000), (3080, 200)]:
        sizes = sizes_of(product, depth, outputs)
        pattern = make_pattern(random, sizes, block_shape)
        problem = make_problem((tokens, *sizes), block_shape, torch.bfloat16, pattern).to("cuda")
        assert torch.equal(run_over_nan(problem, product), expected_of(problem, pattern, product))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("block_shape", [(64, 64), (32, 32), (16, 16)], ids=str)
def test_the_same_bits_every_run(block_shape, product):
    sizes = sizes_of(product, 768)
    pattern = make_pattern(random, sizes, block_shape)
    problem = make_problem((300, *sizes), block_shape, torch.bfloat16, pattern).to("cuda")
    for name in ("input", "grad_output", "values", "bias"):
        setattr(problem, name, torch.randn_like(getattr(problem, name)))
    first = problem.run(product)
    assert first.isfinite().all()
    for _ in range(20):
        assert torch.equal(run_over_nan(problem, product), first)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("block_shape", [(64, 64), (32, 32), (16, 16)], ids=str)
def test_no_number_goes_nowhere_else(block_shape, product):
    """What is no number in x is in the outputs of its blocks, and in no others."""
    sizes = sizes_of(product, 768)
    pattern = make_pattern(empty_rows, sizes, block_shape)
    problem = make_problem((70, *sizes), block_shape, torch.bfloat16, pattern).to("cuda")
    expected = expected_of(problem, pattern, product)
    x = problem.input if product == "forward" else problem.grad_output
    x[:, :1] = float("inf")
    ones = make_problem((70, *sizes), block_shape, torch.bfloat16, pattern).to("cuda")
    ones.values.fill_(1)
    ones.bias.fill_(0)
    ones_x = ones.input if product == "forward" else ones.grad_output
    ones_x.fill_(0)
    ones_x[:, :1] = 1
    touched = expected_of(ones, pattern, product) != 0
    result = problem.run(product)
    assert torch.equal(result[~touched], expected[~touched])
    assert not result[touched].isfinite().any()


@pytest.mark.parametrize("product", PRODUCTS)
def test_captured_by_a_cuda_graph(product):
    sizes = sizes_of(product, 768)
    pattern = make_pattern(empty_rows, sizes, (32, 32))
    first, second = (
        make_problem((130, *sizes), (32, 32), torch.bfloat16, pattern).to("cuda") for _ in range(2)
    )
    expected = expected_of(second, pattern, product)
    graph, result = captured(lambda: first.run(product))
    for name in ("input", "grad_output", "values", "bias"):
        getattr(first, name).copy_(getattr(second, name))
    for _ in range(3):
        result.fill_(float("nan"))
        graph.replay()
        assert torch.equal(result, expected)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("block_shape", [(64, 64), (32, 32), (16, 16), (128, 64)], ids=str)
def test_a_corrupt_index_gives_numbers_and_no_invalid_access(block_shape, product):
    problem = make_problem((200, *sizes_of(product, 520)), block_shape, torch.bfloat16)
    check_corrupt_indices(problem, product)


def test_a_wrong_element_shows():
    pattern = make_pattern(random, sizes_of("forward", 520), (32, 32))
    problem = make_problem((100, *pattern.shape), (32, 32), torch.bfloat16, pattern).to("cuda")
    expected = expected_of(problem, pattern, "forward")
    assert torch.equal(problem.run("forward"), expected)
    problem.values[-1, 0, 0] += 1
    assert not torch.equal(problem.run("forward"), expected)


@pytest.mark.parametrize(
    ("block", "density", "depth", "is_chosen"),
    [
        (64, 0.25, 768, True),
        (32, 0.5, 768, True),
        (16, 0.1, 768, True),
        (32, 0.1, 1024, False),
        (64, 1.0, 768, False),
        (16, 0.5, 768, False),
        (32, 0.25, 1088, False),
    ],
)
@pytest.mark.parametrize("product", PRODUCTS)
def test_when_it_is_chosen(product, block, density, depth, is_chosen, monkeypatch):
    monkeypatch.delenv("BLOCK_SPARSE_KERNEL")
    out_features, in_features = sizes_of(product, depth, 3072)
    blocks = int(density * (out_features // block) * (in_features // block))
    values = torch.empty(1, dtype=torch.bfloat16, device="cuda").expand(blocks, block, block)
    text = block_sparse.explain(values, product, 8192, out_features, in_features, False)
    assert ("cuda_sm90_resident: chosen" in text) == is_chosen, text


@pytest.mark.parametrize("product", PRODUCTS)
def test_deeper_sums_with_few_outputs(product, monkeypatch):
    monkeypatch.delenv("BLOCK_SPARSE_KERNEL")
    values = torch.empty(1, dtype=torch.bfloat16, device="cuda").expand(256, 32, 32)
    text = block_sparse.explain(values, product, 2048, 1024, 1024, False)
    assert "cuda_sm90_resident: chosen" in text, text
