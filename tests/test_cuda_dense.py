"""The way by a dense W on a GPU, the kernel cuda_dense: exact for every dtype, block shape and kind
of pattern, in one chunk and in several; how close to float64; what it takes of memory; in a CUDA
graph; which precision float32 has; when it is chosen."""

from __future__ import annotations

import pytest
import torch

from cuda_helpers import check_captured, check_no_synchronisation, check_rows_apart
from pytorch_block_sparse import Pattern, ops
from pytorch_block_sparse.testing import (
    assert_close_to_float64,
    chosen_kernel,
    dense_forward,
    dense_grad_input,
    dense_grad_weight,
)
from test_cuda import DTYPES, PRODUCTS, Problem, check_corrupt_indices, make_problem
from test_cuda_few_tokens import KINDS, make_pattern, poison_outside, random, run_over_nan

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

block_sparse = torch.ops.block_sparse
KERNEL = "cuda_dense"
CHUNK = 64 << 20  # bytes of W at a time
TOKENS = 130
BLOCKS = [(1, 1), (1, 16), (4, 4), (8, 8), (16, 8), (3, 5), (48, 80), (128, 200)]
SIZES = [(328, 456), (329, 457)]  # (out, in): with and without units of 16 bytes


@pytest.fixture(autouse=True)
def _dense_kernel(monkeypatch):
    """Forced, so it takes small products too. Small integers are exact in TF32."""
    torch.manual_seed(0)
    monkeypatch.setenv("BLOCK_SPARSE_KERNEL", KERNEL)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_block_shape_equals_the_cpu(kind, dtype, product):
    for sizes in SIZES:
        for block_shape in BLOCKS:
            pattern = make_pattern(kind, sizes, block_shape)
            problem = make_problem((TOKENS, *sizes), block_shape, dtype, pattern)
            on_gpu = problem.to("cuda")
            poison_outside(on_gpu, pattern)
            result = run_over_nan(on_gpu, product)
            where = (sizes, block_shape)
            assert torch.equal(result.cpu(), problem.run(product)), where
            assert torch.equal(run_over_nan(on_gpu, product), result), (where, "the same bits")


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("block_shape", [(8, 8), (5, 3)], ids=str)
def test_in_several_chunks(block_shape, product):
    sizes = (9000, 4000)  # 69 MiB
    pattern = make_pattern(random, sizes, block_shape)
    problem = make_problem((128, *sizes), block_shape, torch.bfloat16, pattern)
    if product != "grad_weight":
        # Every feature in one token only: cuBLAS may round partial sums to bfloat16.
        for tensor in (problem.input, problem.grad_output):
            elsewhere = torch.arange(tensor.shape[1]) % 128 != torch.arange(128)[:, None]
            tensor.masked_fill_(elsewhere, 0)
    problem, pattern = problem.to("cuda"), pattern.to("cuda")
    result = run_over_nan(problem, product)
    problem.values, problem.bias = problem.values.float(), problem.bias.float()
    problem.input, problem.grad_output = problem.input.float(), problem.grad_output.float()
    assert torch.equal(result, by_a_dense_weight(problem, pattern, product).bfloat16())


def by_a_dense_weight(problem: Problem, pattern: Pattern, product: str) -> torch.Tensor:
    if product == "forward":
        return dense_forward(problem.input, problem.values, pattern, problem.bias)
    if product == "grad_input":
        return dense_grad_input(problem.grad_output, problem.values, pattern)
    return dense_grad_weight(problem.grad_output, problem.input, pattern)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_close_to_float64_as_torch(dtype, product):
    sizes = (520, 1032)
    pattern = make_pattern(random, sizes, (8, 8))
    problem = make_problem((TOKENS, *sizes), (8, 8), dtype, pattern)
    for name in ("input", "grad_output", "values", "bias"):
        setattr(problem, name, torch.randn_like(getattr(problem, name)))
    on_gpu = problem.to("cuda")
    whole = problem.to("cuda")
    pattern = pattern.to("cuda")
    for name in ("input", "grad_output", "values", "bias"):
        setattr(whole, name, getattr(whole, name).double())
    assert_close_to_float64(
        on_gpu.run(product),
        by_a_dense_weight(whole, pattern, product),
        by_a_dense_weight(on_gpu, pattern, product),
    )


def test_float32_takes_the_precision_that_torch_is_told():
    pattern = Pattern.full((256, 512), (8, 8), device="cuda")
    problem = make_problem((TOKENS, 256, 512), (8, 8), torch.float32, pattern.to("cpu")).to("cuda")
    problem.input.normal_()
    problem.values.normal_()
    with_tf32 = problem.run("forward")
    torch.set_float32_matmul_precision("highest")
    without = problem.run("forward")
    whole = problem.input.double() @ pattern_dense(problem, pattern).double().T + problem.bias
    errors = [(y - whole).abs().max().item() for y in (with_tf32, without)]
    assert errors[1] < 1e-3 < errors[0] < 1


def pattern_dense(problem, pattern):
    eye = torch.eye(pattern.shape[1], dtype=problem.values.dtype, device="cuda")
    return dense_forward(eye, problem.values, pattern, None).T


@pytest.mark.parametrize("product", PRODUCTS)
def test_its_workspace_is_bounded(product):
    for sizes, block_shape in (
        ((2**16, 2**16), (4096, 4096)),
        ((128, 2**18), (8, 4096)),
        ((2**18, 128), (4096, 8)),
    ):
        values = torch.empty(1, device="cuda", dtype=torch.bfloat16)
        nnz = (sizes[0] // block_shape[0]) * (sizes[1] // block_shape[1])
        values = values.expand(nnz, *block_shape)
        text = block_sparse.explain(values, product, 8192, *sizes, False)
        name, workspace = chosen_kernel(text)
        assert name == KERNEL
        assert CHUNK // 3 < workspace <= CHUNK, sizes


def test_rows_that_are_not_contiguous():
    pattern = make_pattern(random, SIZES[0], (8, 8))
    problem = make_problem((TOKENS, *SIZES[0]), (8, 8), torch.bfloat16, pattern)
    check_rows_apart(problem, 1, 2)


@pytest.mark.parametrize("product", PRODUCTS)
def test_captured_by_a_cuda_graph(product):
    pattern = make_pattern(random, SIZES[0], (8, 8))
    first, second = (
        make_problem((TOKENS, *SIZES[0]), (8, 8), torch.bfloat16, pattern) for _ in range(2)
    )
    check_captured(first, second, product)


def test_nothing_synchronises():
    pattern = make_pattern(random, SIZES[0], (8, 8))
    problem = make_problem((TOKENS, *SIZES[0]), (8, 8), torch.bfloat16, pattern).to("cuda")
    check_no_synchronisation(problem)


def test_the_current_stream_is_used():
    pattern = make_pattern(random, SIZES[0], (8, 8))
    problem = make_problem((TOKENS, *SIZES[0]), (8, 8), torch.bfloat16, pattern)
    expected = {product: problem.run(product) for product in PRODUCTS}
    on_gpu = problem.to("cuda")
    for product, result in expected.items():
        operands = {"input": on_gpu.input, "grad_output": on_gpu.grad_output}
        on_gpu.input, on_gpu.grad_output = (torch.zeros_like(t) for t in operands.values())
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(200_000_000)  # on another stream they would still be zero
            for name, tensor in operands.items():
                getattr(on_gpu, name).copy_(tensor)
            got = on_gpu.run(product)
            torch.cuda.current_stream().synchronize()
        assert torch.equal(got.cpu(), result), product


def test_inside_torch_func_and_autocast():
    pattern = Pattern.full((64, 128), (8, 8), device="cuda")
    values = torch.randn(pattern.nnz, 8, 8, device="cuda", dtype=torch.float16)
    x = torch.randn(TOKENS, 128, device="cuda", dtype=torch.float16)

    def loss(values):
        return ops.linear(x, values, pattern.index, None, 64).float().square().sum()

    leaf = values.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(torch.func.grad(loss)(values), by_autograd)
    expected = ops.linear(x, values, pattern.index, None, 64)
    with torch.autocast("cuda", dtype=torch.float16):
        y = ops.linear(x.float(), values.float(), pattern.index, None, 64)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("block_shape", [(8, 8), (3, 5), (48, 80)], ids=str)
def test_a_corrupt_index_gives_numbers_and_no_invalid_access(block_shape, product):
    check_corrupt_indices(make_problem((TOKENS, 320, 448), block_shape, torch.bfloat16), product)


@pytest.mark.parametrize(
    ("dtype", "block_shape", "density", "tokens", "precision", "kernel"),
    [
        (torch.bfloat16, (8, 8), 0.25, 8192, "highest", "cuda_dense"),
        (torch.bfloat16, (8, 8), 0.25, 256, "highest", "cuda_dense"),
        (torch.bfloat16, (8, 8), 0.01, 8, "highest", "cuda_tiled"),
        (torch.float32, (32, 32), 0.25, 8192, "highest", "cuda_tiled"),
        (torch.float32, (8, 8), 0.25, 8192, "high", "cuda_dense"),
        (torch.float32, (32, 32), 0.9, 8192, "highest", "cuda_dense"),
        (torch.float64, (32, 32), 0.9, 8192, "highest", "cuda_dense"),
        (torch.bfloat16, (64, 64), 0.25, 8192, "highest", "cuda_sm90_panel"),
    ],
)
def test_when_it_is_chosen(dtype, block_shape, density, tokens, precision, kernel, monkeypatch):
    if kernel == "cuda_sm90_panel" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")
    monkeypatch.delenv("BLOCK_SPARSE_KERNEL")
    torch.set_float32_matmul_precision(precision)
    blocks = int(density * (14336 // block_shape[0]) * (4096 // block_shape[1]))
    values = torch.empty(1, dtype=dtype, device="cuda").expand(blocks, *block_shape)
    # grad_weight has a kernel of its own on Hopper.
    for product in PRODUCTS if kernel != "cuda_sm90_panel" else ("forward", "grad_input"):
        text = block_sparse.explain(values, product, tokens, 14336, 4096, False)
        assert chosen_kernel(text)[0] == kernel, text


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="needs Hopper"
)
@pytest.mark.parametrize(
    ("block_shape", "density", "tokens", "kernel"),
    [
        ((64, 64), 1.0, 8192, "cuda_sm90_panel"),
        ((32, 32), 0.5, 8192, "cuda_sm90_strip"),
        ((16, 16), 0.25, 8192, "cuda_sm90_strip"),
        ((16, 16), 1.0, 512, "cuda_sm90_strip"),
        ((16, 16), 1.0, 8192, "cuda_dense"),
        ((96, 96), 0.1, 8192, "cuda_sm90_panel"),
        ((48, 80), 0.1, 8192, "cuda_sm80_strip"),
        ((48, 80), 0.5, 8192, "cuda_dense"),
    ],
)
def test_when_it_is_chosen_before_kernels_with_tensor_cores(
    block_shape, density, tokens, kernel, monkeypatch
):
    monkeypatch.delenv("BLOCK_SPARSE_KERNEL")
    values = torch.empty(1, dtype=torch.bfloat16, device="cuda")
    blocks = int(density * -(-14336 // block_shape[0]) * -(-4096 // block_shape[1]))
    values = values.expand(blocks, *block_shape)
    for product in ("forward", "grad_input"):
        text = block_sparse.explain(values, product, tokens, 14336, 4096, False)
        assert chosen_kernel(text)[0] == kernel, text


def test_small_products_are_another_kernels(monkeypatch):
    monkeypatch.delenv("BLOCK_SPARSE_KERNEL")
    pattern = make_pattern(random, SIZES[0], (8, 8))
    problem = make_problem((TOKENS, *SIZES[0]), (8, 8), torch.bfloat16, pattern).to("cuda")
    for product in PRODUCTS:
        assert "cuda_dense" not in problem.kernels(product)


def test_where_nothing_is_multiplied_it_refuses():
    empty = torch.zeros(41, 57, dtype=torch.bool)
    pattern = Pattern.from_mask(empty, shape=SIZES[0], block_shape=(8, 8))
    problem = make_problem((TOKENS, *SIZES[0]), (8, 8), torch.bfloat16, pattern).to("cuda")
    with pytest.raises(ValueError, match="nothing to multiply"):
        problem.run("forward")
