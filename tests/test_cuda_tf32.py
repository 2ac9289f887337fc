"""float32 that may be rounded to TF32 on Hopper, the kernel cuda_sm90_tf32: exact on small integers
for every kernel that it uses; how close to float64; operands of any magnitude, and what is not
finite; in a CUDA graph; what it refuses and when it is chosen."""

from __future__ import annotations

import pytest
import torch

from cuda_helpers import check_captured, check_no_synchronisation, check_rows_apart, on_hopper
from pytorch_block_sparse.testing import assert_close_to_float64, chosen_kernel
from test_cuda import PRODUCTS, check_corrupt_indices, make_problem
from test_cuda_dense import by_a_dense_weight
from test_cuda_few_tokens import KINDS, make_pattern, random, run_over_nan

pytestmark = on_hopper

block_sparse = torch.ops.block_sparse
SIZES = (768, 1152)  # of these blocks multiples, and of no larger tile
BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (64, 16), (16, 32), (32, 128), (128, 64)]
OPERANDS = {
    "forward": ("input", "values"),
    "grad_input": ("grad_output", "values"),
    "grad_weight": ("grad_output", "input"),
}


@pytest.fixture(autouse=True)
def _tf32_kernel(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("BLOCK_SPARSE_KERNEL", "cuda_sm90_tf32")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def problem_of(block_shape=(32, 32), tokens=130, kind=random, sizes=SIZES, pattern=None):
    pattern = pattern or make_pattern(kind, sizes, block_shape)
    return make_problem((tokens, *sizes), block_shape, torch.float32, pattern)


def normal_problem_of(*args, **kwargs):
    problem = problem_of(*args, **kwargs)
    for name in ("input", "grad_output", "values", "bias"):
        setattr(problem, name, torch.randn_like(getattr(problem, name)))
    return problem


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
def test_equals_the_cpu(block_shape, kind, product):
    for tokens in (65, 200, 1000):
        problem = problem_of(block_shape, tokens, kind)
        expected, on_gpu = problem.run(product), problem.to("cuda")
        result = run_over_nan(on_gpu, product)
        assert torch.equal(result.cpu(), expected), tokens
        assert torch.equal(run_over_nan(on_gpu, product), result), (tokens, "the same bits")


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("block_shape", [(16, 16), (32, 32), (64, 64)], ids=str)
def test_as_close_to_float64_as_tf32(block_shape, product):
    sizes = (2048, 4096)
    pattern = make_pattern(random, sizes, block_shape)
    problem = normal_problem_of(block_shape, 1000, sizes=sizes, pattern=pattern)
    on_gpu, whole = problem.to("cuda"), problem.to("cuda")
    for name in ("input", "grad_output", "values", "bias"):
        setattr(whole, name, getattr(whole, name).double())
    pattern = pattern.to("cuda")
    assert_close_to_float64(
        on_gpu.run(product),
        by_a_dense_weight(whole, pattern, product),
        by_a_dense_weight(on_gpu, pattern, product),
    )


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("exponents", [(90, -80), (-90, 60), (110, 0), (-90, -10), (0, 110)])
def test_operands_of_any_magnitude(exponents, product):
    """Powers of two change no other bit."""
    problem = normal_problem_of().to("cuda")
    problem.bias.zero_()
    expected = problem.run(product) * 2.0 ** sum(exponents)
    for name, exponent in zip(OPERANDS[product], exponents, strict=True):
        setattr(problem, name, getattr(problem, name) * 2.0**exponent)
    assert torch.equal(problem.run(product), expected)


@pytest.mark.parametrize("product", PRODUCTS)
def test_small_elements_beside_large_ones(product):
    """29 binary orders of magnitude in one operand: the small ones keep all of their bits."""
    problem = problem_of().to("cuda")
    problem.bias.zero_()
    first = OPERANDS[product][0]
    expected = problem.run(product) * 2.0**-20
    operand = getattr(problem, first)
    large = torch.zeros_like(operand)
    setattr(problem, first, torch.cat([operand * 2.0**-20, large]))
    getattr(problem, first)[-1] = 2.0**6
    if product == "grad_weight":
        problem.input = torch.cat([problem.input, torch.zeros_like(problem.input)])
        result = problem.run(product)
    else:
        result = problem.run(product)[: len(expected)]
    assert torch.equal(result, expected)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_where_it_is(value):
    problem = problem_of().to("cuda")
    expected = problem.run("forward")
    problem.input[7] = value
    result = problem.run("forward")
    others = torch.arange(len(expected), device="cuda") != 7
    assert torch.equal(result[others], expected[others])
    assert not result[7].isfinite().all()


def test_zeros():
    problem = problem_of().to("cuda")
    problem.input.zero_()
    assert torch.equal(problem.run("forward"), problem.bias.expand(130, -1))
    problem.values.zero_()
    assert problem.run("grad_input").abs().max() == 0


def test_rows_that_are_not_contiguous():
    check_rows_apart(problem_of((64, 64)), 4, 4)


@pytest.mark.parametrize("product", PRODUCTS)
def test_captured_by_a_cuda_graph(product):
    pattern = make_pattern(random, SIZES, (32, 32))
    first, second = (
        make_problem((130, *SIZES), (32, 32), torch.float32, pattern) for _ in range(2)
    )
    check_captured(first, second, product)


def test_nothing_synchronises():
    check_no_synchronisation(problem_of().to("cuda"))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("block_shape", [(16, 16), (32, 32), (64, 64)], ids=str)
def test_a_corrupt_index_gives_numbers_and_no_invalid_access(block_shape, product):
    check_corrupt_indices(problem_of(block_shape), product)


def test_what_it_refuses():
    def reason(problem, precision="high"):
        torch.set_float32_matmul_precision(precision)
        text = block_sparse.explain(
            problem.values, "forward", len(problem.input), len(problem.bias), 1152, True
        )
        return text.split("cuda_sm90_tf32: ")[1].split("\n")[0]

    problem = problem_of().to("cuda")
    assert reason(problem).startswith("chosen")
    assert "may not be rounded" in reason(problem, "highest")
    assert "no more than 64 tokens" in reason(problem_of(tokens=64).to("cuda"))
    assert "reaches outside" in reason(problem_of(sizes=(760, 1152)).to("cuda"))
    assert "rounded to f16: " in reason(problem_of((8, 8)).to("cuda"))
    problem.values = problem.values.half()
    assert "takes f32" in reason(problem)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(
    ("side", "density", "precision", "kernel"),
    [
        (32, 0.25, "high", "cuda_sm90_tf32"),
        (64, 0.25, "medium", "cuda_sm90_tf32"),
        (128, 0.5, "high", "cuda_sm90_tf32"),
        (16, 0.1, "high", "cuda_sm90_tf32"),
        (32, 0.25, "highest", "cuda_tiled"),
    ],
)
def test_when_it_is_chosen(side, density, precision, kernel, product, monkeypatch):
    monkeypatch.delenv("BLOCK_SPARSE_KERNEL")
    torch.set_float32_matmul_precision(precision)
    blocks = int(density * (14336 // side) * (4096 // side))
    values = torch.empty(1, device="cuda").expand(blocks, side, side)
    text = block_sparse.explain(values, product, 8192, 14336, 4096, False)
    assert chosen_kernel(text)[0] == kernel, text
